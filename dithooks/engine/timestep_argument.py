"""The timestep among the arguments of a call: the names it goes by, where it is looked for, and its value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import attrgetter, methodcaller
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import InvalidSetting, WrongType
from ..validation import shown

# Names that samplers give to what moves from step to step and only then, by how sure they are.
TIMESTEP_NAMES = (
    "timestep",
    "timesteps",
    "t",
    "time",
    "times",
    "sigma",
    "sigmas",
    "noise_level",
    "noise_levels",
    "noise_labels",
    "timesteps_B_T",
    "t_B",
)
_DEPTH = 2  # containers within containers: transformer_options["sigmas"], video.timesteps
_MANY = 64  # different values in one call: more are an embedding of the timestep, not timesteps

_NUMPY = (torch.float32, torch.float64, torch.float16, torch.int64, torch.int32)  # dtypes that NumPy has, too
FORM = attrgetter("shape", "dtype", "device")
Arguments = Mapping[str, Any]


class Reading(NamedTuple):
    """The value of a timestep argument: one number, or one for each sample, frame or token.

    Args:
        values: the different values in ascending order, without 0, which is that of clean frames.
        highest: the highest of them.
        mean: their mean over all samples, frames and tokens.
    """

    values: tuple[float, ...]
    highest: float
    mean: float


class Found(NamedTuple):
    """A timestep argument: its path, such as ``video.sigma``, and what was given."""

    path: str
    given: Any


class Noted(NamedTuple):
    """A timestep argument of an earlier call.

    Args:
        path: of the argument.
        given: its value, copied, as the loop may write into it.
        original: what was given then.
        version: how many times that had been written into; ``None`` where torch does not count.
    """

    path: str
    given: Any
    original: Any
    version: int | None

    def is_still(self, now: Any) -> bool:
        """Whether the present value is the same object, which shows without waiting for a device."""
        if not isinstance(now, Tensor) or self.version is None:
            return now is self.original
        return is_same(now, self.original) and not now.is_inference() and now._version == self.version

    def differs(self, now: Any) -> bool:
        """Return whether the present value is another one, which waits for the device, once."""
        if isinstance(now, Tensor) and isinstance(self.given, Tensor) and FORM(now) == FORM(self.given):
            return not torch.equal(now, self.given)
        before, after = read(self.given), read(now)
        return before is not None and after is not None and before.values != after.values


def note(found: Found) -> Noted:
    """Keep a timestep argument, to compare it with later ones."""
    value = found.given
    if not isinstance(value, Tensor):
        return Noted(found.path, value, value, None)
    return Noted(found.path, value.detach().clone(), value, None if value.is_inference() else value._version)


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are the same object, or the same view of one."""
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.device.type == "meta":
        return False
    try:
        return 0 != a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0
    except RuntimeError:  # sparse, or without storage, which can show as an address of 0, too
        return False


def read(given: Any) -> Reading | None:
    """Return the value of what a timestep argument was given, or ``None`` if that is no timestep.

    The value of a tensor waits for the device that it is on: the price of having neither scope nor scheduler.
    """
    if isinstance(given, (int, float)) and not isinstance(given, bool):
        return Reading((float(given),), float(given), float(given))
    if not isinstance(given, Tensor) or not given.numel() or given.is_meta or given.is_complex():
        return None
    if given.numel() == 1:
        value = float(given.item())
        return Reading((value,), value, value)
    flat = given.detach().flatten().to("cpu").double()
    different = flat.unique()
    if len(different) > _MANY and 2 * len(different) > len(flat):
        return None
    values = tuple(value for value in different.tolist() if value) or (0.0,)
    return Reading(values, float(different[-1]), float(flat.mean()))


def host_reader(given: Any) -> Callable[[Any], Any] | None:
    """Return what reads a timestep that the host has, as a number or NumPy array; ``None`` for one on a device."""
    if isinstance(given, (int, float)):
        return float
    on_host = isinstance(given, Tensor) and given.device.type == "cpu" and not given.requires_grad
    return methodcaller("numpy") if on_host and given.numel() and given.dtype in _NUMPY else None


def timesteps_in(arguments: Sequence[Arguments], names: Sequence[str] = TIMESTEP_NAMES) -> Iterator[Found]:
    """Iterate over the timestep arguments of a call, the likeliest first.

    Args:
        arguments: of the transformer, and then of the modules around it, from the inside out.
        names: what they may be called; a dotted name is a path into containers.
    """
    for given in arguments:
        for name in names:
            if (value := given.get(name)) is not None:
                yield Found(name, value)
    for given in arguments:
        deeper = [found for found in _within(given) if any(_is_called(found.path, name) for name in names)]
        yield from sorted(deeper, key=lambda found: names.index(_name(found.path, names)))


def check_name(name: object) -> tuple[str, ...]:
    """Return the names to look for; all known ones if none is given.

    Raises:
        WrongType: the name is no text.
        InvalidSetting: the name is no dotted path.
    """
    if name is None:
        return TIMESTEP_NAMES
    if not isinstance(name, str):
        raise WrongType(f"timestep={shown(name)} must be the name of an argument, such as 'sigma'")
    if not all(part.isidentifier() for part in name.split(".")):
        raise InvalidSetting(f"timestep={shown(name)} is not the name of an argument, such as 'sigma' or 'video.sigma'")
    return (name,)


def _within(arguments: Arguments) -> Iterator[Found]:
    """Iterate over what the containers among some arguments hold, by path."""
    for name, value in arguments.items():
        if not isinstance(value, (Tensor, str, int, float)):
            yield from _inside(name, value, _DEPTH)


def _inside(path: str, value: Any, depth: int) -> Iterator[Found]:
    fields: Mapping[Any, Any] = {}
    if isinstance(value, Mapping):
        fields = value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    for key, item in fields.items():
        if isinstance(key, str) and item is not None:
            yield Found(f"{path}.{key}", item)
            if depth > 1:
                yield from _inside(f"{path}.{key}", item, depth - 1)


def _is_called(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _name(path: str, names: Sequence[str]) -> str:
    return next(name for name in names if _is_called(path, name))
