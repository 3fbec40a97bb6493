"""The comparison of the tensors that a call leaves behind with those that its repeat does."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from ..environment.torch_api import autocast_dtype

_WITHOUT_TENSORS = (type, nn.Module, ModuleType, FunctionType, BuiltinFunctionType, MethodType, torch.Generator)


def difference(output: Any, reference: Any) -> float:
    """Relative L2 distance of all floating tensors of two outputs: ‖a − b‖ / ‖b‖, computed in float32.

    Both have the same tensors: :func:`first_unlike` finds none.
    """
    pairs = zip(tensors_in(output).values(), tensors_in(reference).values(), strict=True)
    floating = [(a, b) for a, b in pairs if b.is_floating_point()]
    if any(b.is_meta for _, b in floating):  # no values: nothing to compare
        return 0.0
    distance = sum(float((a.float() - b.float()).square().sum()) for a, b in floating)
    size = sum(float(b.float().square().sum()) for _, b in floating)
    return float((distance / size) ** 0.5) if size else float(distance > 0)


def first_unlike(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str | None:
    """Return the path of the first tensor that is only in one of two, or has another shape there.

    Example: what was made in a call, and not in its repeat.
        >>> first_unlike({"output": torch.ones(2)}, {"output": torch.ones(2), "kv.k": torch.ones(3)})
        'kv.k'
    """
    shapes = [{path: tensor.shape for path, tensor in each.items()} for each in (ours, theirs)]
    return next((path for path in {**theirs, **ours} if shapes[0].get(path) != shapes[1].get(path)), None)


def first_not_finite(output: Any) -> str | None:
    """Return the path of the first tensor of an output with a number that is NaN or infinite."""
    floating = {n: tensor for n, tensor in tensors_in(output).items() if tensor.is_floating_point()}
    return next((n for n, tensor in floating.items() if not tensor.is_meta and not bool(tensor.isfinite().all())), None)


def is_zero(output: Any) -> bool:
    """Return whether all numbers of an output are 0, so that nothing that is left out could show in it."""
    floating = [tensor for tensor in tensors_in(output).values() if tensor.is_floating_point()]
    return bool(floating) and not any(tensor.is_meta or bool(tensor.any()) for tensor in floating)


def tolerance(output: Any, *kept: torch.dtype | None) -> float:
    """What rounding alone may make of :func:`difference`, by the coarsest dtype of an output, or of what was kept."""
    dtypes = [tensor.dtype for tensor in tensors_in(output).values() if tensor.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in [*dtypes, *kept] if dtype is not None), default=0.0)
    return max(1e-3, 16 * coarsest)


def autocast_of(tensors: Iterable[Tensor]) -> tuple[torch.dtype, ...]:
    """Return the dtypes that autocast computes in on the devices of some tensors; none where it is off."""
    devices = sorted({tensor.device.type for tensor in tensors} - {"meta"})
    return tuple(dtype for device in devices if (dtype := autocast_dtype(device)) is not None)


def tensors_in(value: Any) -> dict[str, Tensor]:
    """Return the tensors in a value, its containers and its objects, each by the path to it.

    Example:
        >>> tensors_in([torch.ones(2), {"k": torch.ones(3)}]).keys()
        dict_keys(['[0]', "[1]['k']"])
    """
    return dict(_walk(value, "", set()))


def _walk(value: Any, path: str, seen: set[int]) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        yield path, value
        return
    if isinstance(value, _WITHOUT_TENSORS) or id(value) in seen:  # an object may hold itself
        return
    if isinstance(value, (list, tuple)):
        seen.add(id(value))
        for index, item in enumerate(value):
            yield from _walk(item, f"{path}[{index}]", seen)
    elif isinstance(value, Mapping):
        seen.add(id(value))
        for index, (key, item) in enumerate(value.items()):
            name = repr(key) if isinstance(key, (str, int)) else f"key {index}"  # others may show their address
            yield from _walk(item, f"{path}[{name}]", seen)
    else:  # an output object of any kind
        slots = [name for kind in type(value).__mro__ for name in _slots(kind)]
        attributes = {name: getattr(value, name, None) for name in slots} | getattr(value, "__dict__", {})
        if attributes:
            seen.add(id(value))
        for name, item in attributes.items():
            yield from _walk(item, f"{path}.{name}", seen)


def _slots(kind: type) -> tuple[str, ...]:
    names = kind.__dict__.get("__slots__", ())
    return (
        (names,) if isinstance(names, str) else tuple(name for name in names if name not in ("__dict__", "__weakref__"))
    )
