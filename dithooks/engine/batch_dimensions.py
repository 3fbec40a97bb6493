"""Which of a call's arguments hold the rows of a batch, and in which dimension: seen in calls of two sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from ..blocks.containers import Step, part_of, replaced, steps_of
from ..blocks.observation import ObservedBlock
from ..errors import WiringError
from ..validation import shown
from .output_comparison import tensors_in

_PLAIN = (bool, int, float, complex, str, bytes, Enum, type(None), torch.dtype, torch.device, torch.Size)


class UnknownForm(Exception):
    """An argument has a form that no survey has shown: where its rows are is not known."""


@dataclass(frozen=True)
class Described:
    """The form of an argument: a tensor's shape, a container's parts, or the value itself.

    Args:
        kind: class of the value.
        shape: of a tensor.
        parts: of a container.
        value: of all else that is plain; of an object, whether it holds tensors.
    """

    kind: type
    shape: torch.Size | None = None
    parts: Mapping[Step, Described] | None = None
    value: Any = None


@dataclass(frozen=True)
class RowPlace:
    """Where the rows of an argument are.

    Args:
        dim: of a tensor that holds them.
        is_whole: a tensor has been shown to hold none, whatever its size.
        parts: of a container.
        is_listed: the argument is a list with an item for each row.
    """

    dim: int | None = None
    is_whole: bool = False
    parts: Mapping[Step, RowPlace] | None = None
    is_listed: bool = False


class RowSelection:
    """Some rows of a batch, taken from any tensor that holds them.

    Example:
        >>> RowSelection([2, 0], 3).of(torch.arange(6).reshape(3, 2), 0)
        tensor([[4, 5],
                [0, 1]])
    """

    def __init__(self, rows: Sequence[int], batch: int) -> None:
        self.rows, self.batch = list(rows), batch
        self._indices: dict[torch.device, Tensor] = {}
        self._former: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}  # what the block before was given
        self._taken: dict[tuple[int, int], tuple[Tensor, int, Tensor]] = {}

    def __len__(self) -> int:
        return len(self.rows)

    def index(self, device: torch.device) -> Tensor:
        """Return the numbers of the rows, as a tensor."""
        if device not in self._indices:
            self._indices[device] = torch.tensor(self.rows, device=device)
        return self._indices[device]

    def of(self, tensor: Tensor, dim: int) -> Tensor:
        """Return these rows of a tensor, a copy."""
        return tensor.index_select(dim, self.index(tensor.device))

    def shared(self, tensor: Tensor, dim: int) -> Tensor:
        """Do the same for what the next blocks are given, too, such as an embedding of the time: it is taken once."""
        if tensor.is_inference():
            return self.of(tensor, dim)
        key, version = (id(tensor), dim), tensor._version
        former = self._taken.get(key) or self._former.get(key)
        if former is None or former[0] is not tensor or former[1] != version:
            former = tensor, version, self.of(tensor, dim)
        self._taken[key] = former
        return former[2]

    def go_on(self) -> None:
        """Forget what the block before the last was given: streams that have gone through it."""
        self._former, self._taken = self._taken, {}


def described(value: Any) -> Described:
    """Return the form of an argument."""
    if isinstance(value, Tensor):
        return Described(Tensor, value.shape)
    steps = steps_of(value)
    if steps is not None:
        return Described(type(value), parts={step: described(part_of(value, step)) for step in steps})
    if isinstance(value, _PLAIN):
        return Described(type(value), value=value)
    return Described(type(value), value=bool(tensors_in(value)))


def placed(full: Described, few: Described, sizes: tuple[int, int], where: str) -> RowPlace:
    """Return where the rows of an argument are, from its forms in two calls of different numbers of rows.

    Args:
        full: the form with the first number of rows.
        few: the form with the second.
        sizes: both numbers.
        where: name of the argument, for messages.

    Raises:
        WiringError: the argument changes with the number of rows in another way than by holding them.
    """
    if full.kind is not few.kind:
        raise _refusal(where, f"is {full.kind.__name__} in one call and {few.kind.__name__} in the other", sizes)
    if full.shape is not None and few.shape is not None:
        return _tensor_place(full.shape, few.shape, sizes, where)
    if full.parts is not None and few.parts is not None:
        lengths = len(full.parts), len(few.parts)
        if lengths == sizes and full.kind in (list, tuple):
            return RowPlace(is_listed=True)
        if full.parts.keys() != few.parts.keys():
            raise _refusal(where, f"holds {lengths[0]} and {lengths[1]} things", sizes)
        parts = {step: placed(part, few.parts[step], sizes, f"{where}{step.text}") for step, part in full.parts.items()}
        return RowPlace(parts=parts)
    if full.value is True and not issubclass(full.kind, bool):
        raise _refusal(where, f"is {full.kind.__name__}, which holds tensors", sizes)
    if full.value != few.value:
        raise _refusal(where, f"is {shown(full.value)} and {shown(few.value)}", sizes)
    return RowPlace()


def _tensor_place(full: torch.Size, few: torch.Size, sizes: tuple[int, int], where: str) -> RowPlace:
    dims = [dim for dim, pair in enumerate(zip(full, few, strict=False)) if pair == sizes]
    rest = [dim for dim, (one, other) in enumerate(zip(full, few, strict=False)) if one != other and dim not in dims]
    if len(full) != len(few) or rest or len(dims) > 1:
        raise _refusal(where, f"is {list(full)} and {list(few)}", sizes)
    return RowPlace(dim=dims[0]) if dims else RowPlace(is_whole=True)


def merged(former: RowPlace | None, now: RowPlace) -> RowPlace:
    """Return what two surveys have shown together; where they differ, the later one counts."""
    if former is not None and now == RowPlace():  # left out this time
        return former
    if former is None or former.parts is None or now.parts is None:
        return now
    parts = {step: merged(former.parts.get(step), place) for step, place in now.parts.items()}
    return RowPlace(parts={**former.parts, **parts})


def taken(value: Any, place: RowPlace, rows: RowSelection) -> Any:
    """Return an argument with only some of the rows.

    Raises:
        UnknownForm: it holds a tensor where none was, or one of another form.
    """
    if isinstance(value, Tensor):
        if place.dim is not None and place.dim < value.dim() and value.shape[place.dim] == rows.batch:
            return rows.shared(value, place.dim)
        if place.is_whole:
            return value
        raise UnknownForm
    steps = steps_of(value)
    if steps is None:
        if isinstance(value, _PLAIN) or not tensors_in(value):
            return value
        raise UnknownForm
    if place.is_listed:
        if len(steps) != rows.batch:
            raise UnknownForm
        return type(value)([value[row] for row in rows.rows])
    places = place.parts or {}
    changes = {}
    for step in steps:
        part = part_of(value, step)
        if (few := taken(part, places.get(step, RowPlace()), rows)) is not part:
            changes[step] = few
    return replaced(value, changes)


def by_layout(value: Any, batch: int, but: frozenset[str], where: str = "") -> RowPlace:
    """Return where the rows should be in what a transformer is given: in the first dimension, if that has their number.

    Of lists without tensors, such as the lengths of prompts, each item is a row's, where there are as many.

    Args:
        value: an argument, or a container of all of them.
        batch: number of the rows.
        but: names of what holds none, though it is of that size.
        where: name of the argument.
    """
    if isinstance(value, Tensor):
        holds = value.dim() > 0 and value.shape[0] == batch and where not in but
        return RowPlace(dim=0) if holds else RowPlace(is_whole=True)
    steps = steps_of(value)
    if steps is None:
        return RowPlace()
    if type(value) in (list, tuple) and len(steps) == batch and where not in but and not tensors_in(value):
        return RowPlace(is_listed=True)
    return RowPlace(parts={step: by_layout(part_of(value, step), batch, but, f"{where}{step.text}") for step in steps})


def held_rows(value: Any, place: RowPlace, where: str = "") -> list[str]:
    """Return the names of the tensors and lists that hold rows."""
    if place.parts is None:
        return [where] if place.dim is not None or place.is_listed else []
    found = [held_rows(part_of(value, step), part, f"{where}{step.text}") for step, part in place.parts.items()]
    return [name for names in found for name in names]


def without_rows(value: Any, batch: int, where: str = "") -> list[str]:
    """Return the names of tensors and containers that hold no rows: of another size, and not one for all rows."""
    steps = steps_of(value)
    if steps is None:
        is_other = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] not in (1, batch)
        return [where] if is_other else []
    inner = [name for step in steps for name in without_rows(part_of(value, step), batch, f"{where}{step.text}")]
    return [where, *inner] if len(steps) not in (1, batch) else inner


class BatchDimensions:
    """Where the rows of a batch are in the arguments of each block of a range, in calls of one form."""

    def __init__(self) -> None:
        self._places: dict[int, RowPlace] = {}  # by block of the range, of its positional and named arguments
        self.is_needed = True  # something is not known, so that another survey is due

    def learn(self, full: BatchSurvey, few: BatchSurvey, blocks: Sequence[ObservedBlock]) -> None:
        """Learn from two calls of different numbers of rows; ``blocks``: those of the range.

        Raises:
            WiringError: a block's argument changes with the number of rows in another way than by holding them.
        """
        sizes = full.batch, few.batch
        for offset, form in full.forms.items():
            if offset in few.forms:
                found = _placed_call(form, few.forms[offset], sizes, blocks[offset])
                self._places[offset] = merged(self._places.get(offset), found)
        self.is_needed = False

    def taken(
        self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any], rows: RowSelection
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Return a block's arguments with only some rows; ``None`` if it is not known where these are."""
        place = self._places.get(offset)
        rows.go_on()
        if place is not None:
            try:
                some_args, some_kwargs = taken((args, kwargs), place, rows)
                return some_args, some_kwargs
            except UnknownForm:
                pass
        self.is_needed = True
        return None


class BatchSurvey:
    """One call in which the form of every block's arguments is noted; its blocks run on all rows.

    Args:
        batch: number of rows.
    """

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.forms: dict[int, Described] = {}

    def run(self, offset: int, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Note what a block is given, and run it."""
        self.forms[offset] = described((args, kwargs))
        return block(*args, **kwargs)


def _placed_call(full: Described, few: Described, sizes: tuple[int, int], block: ObservedBlock) -> RowPlace:
    """Return where the rows of a block's arguments are, by position and by name."""
    halves = {}
    for half, step in enumerate(full.parts or {}):
        own, other = (full.parts or {})[step].parts or {}, (few.parts or {})[step].parts or {}
        if own.keys() != other.keys():
            raise _refusal(block.path, f"is given {len(own)} and {len(other)} arguments", sizes)
        names = block.reader.names
        named = {s: names[s.key] if not half and s.key < len(names) else f"argument {s.key}" for s in own}
        halves[step] = RowPlace(
            parts={
                s: placed(part, other[s], sizes, f"{block.path}: {s.key if half else named[s]}")
                for s, part in own.items()
            }
        )
    return RowPlace(parts=halves)


def _refusal(where: str, what: str, sizes: tuple[int, int]) -> WiringError:
    return WiringError(
        f"rows of a batch: {where} {what:.120} with {sizes[0]} and {sizes[1]} rows: which part of it is whose row "
        "is unknown. Choose blocks without it, or do not treat rows apart: call the model once for each request, or "
        "give reduce='mean' or 'max'"
    )
