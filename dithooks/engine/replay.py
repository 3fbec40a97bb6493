"""Call the transformer once more with the same arguments, to learn from it or to test a residual."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

# Set while a call is replayed, so that other caches on the same model stand aside.
replaying: ContextVar[bool] = ContextVar("dithooks.replaying", default=False)

# The compiler's stance is the whole process's: two threads that change it at once would leave it changed.
_STANCE = threading.Lock()


class Replay:
    """One call of a module, to be made again.

    Arguments are copied, so that a cache kept in one is not fed twice, and nobody's tensor is written into.
    """

    def __init__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs

    def keep(self) -> None:
        """Copy them before the call itself, too, which may write into them or take things out."""
        self._args, self._kwargs = _copied(self._args), _copied(self._kwargs)

    @property
    def safe(self) -> bool:
        """Whether the arguments are tensors, numbers and containers of these: nothing that could remember a call."""
        return not self.unsafe_argument

    @property
    def unsafe_argument(self) -> str | None:
        """The first argument that is none of these, and its type."""
        named = {**{f"argument {i}": value for i, value in enumerate(self._args)}, **self._kwargs}
        return next((f"{k} ({type(v).__name__})" for k, v in named.items() if not _plain(v)), None)

    def __call__(self, eager: bool) -> Any:
        """The output, without gradients and hooks of the module itself; ``eager``: without compiled code, too."""
        token = replaying.set(True)
        try:
            with torch.no_grad(), eagerly() if eager else nullcontext():
                return self._module.forward(*_copied(self._args, True), **_copied(self._kwargs, True))
        finally:
            replaying.reset(token)


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code stands aside, in the whole process."""
    with _STANCE, torch.compiler.set_stance("force_eager"):
        yield


def difference(output: Any, reference: Any) -> float:
    """Relative L2 distance of all floating tensors of two outputs: ‖a − b‖ / ‖b‖, computed in float32."""
    pairs = [(a, b) for a, b in zip(_tensors(output), _tensors(reference), strict=True) if b.is_floating_point()]
    if any(b.is_meta for _, b in pairs):  # no values: nothing to compare
        return 0.0
    distance = sum(float((a.float() - b.float()).square().sum()) for a, b in pairs)
    size = sum(float(b.float().square().sum()) for _, b in pairs)
    return float((distance / size) ** 0.5) if size else float(distance > 0)


def finite(output: Any) -> bool:
    """Whether all numbers of an output are."""
    return all(t.is_meta or bool(t.isfinite().all()) for t in _tensors(output) if t.is_floating_point())


def tolerance(output: Any, kept: torch.dtype | None = None) -> float:
    """What rounding alone may make of :func:`difference`, by the coarsest dtype of an output, or of what was kept."""
    dtypes = [tensor.dtype for tensor in _tensors(output) if tensor.is_floating_point()]
    coarsest = max((torch.finfo(dtype).eps for dtype in [*dtypes, *([kept] if kept else [])]), default=0.0)
    return max(1e-3, 16 * coarsest)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif hasattr(value, "__dict__") and not isinstance(value, (type, nn.Module)):  # an output object of any kind
        for item in vars(value).values():
            yield from _tensors(item)


def _plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_plain, value))
    if isinstance(value, dict):
        return all(map(_plain, value.values()))
    return value is None or isinstance(value, (Tensor, bool, int, float, complex, str, torch.dtype, torch.device))


def _copied(value: Any, objects: bool = False) -> Any:
    """Copy containers and tensors; with ``objects``, also other objects that can be copied."""
    if type(value) in (list, tuple):
        return type(value)(_copied(item, objects) for item in value)
    if type(value) is dict:
        return {key: _copied(item, objects) for key, item in value.items()}
    if isinstance(value, Tensor):  # without memory for it this raises: the call must not write into the original
        return value.clone()
    try:
        return copy.copy(value) if objects else value
    except Exception:  # a generator, say: taken as it is
        return value
