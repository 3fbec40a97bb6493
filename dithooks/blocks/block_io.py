"""How to read the streams of one block from a call, and how to build an output of its form from streams."""

from __future__ import annotations

import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WrongType

Form = tuple[torch.Size, torch.dtype]


class PatchFunctor(ABC):
    """A declaration of where a block's call holds its streams, for blocks whose arguments and outputs do not show it.

    Streams are the tensors that a block takes, changes and passes on. Their order is the same in all three methods. On
    a reused step the blocks of the range do not run; the model receives what ``build`` makes of the streams instead.
    Give a functor to :class:`~dithooks.BlockAdapter` as ``patch_functor``; it does not copy or change any ``forward``.

    Example: a block that takes one dict and returns a new one.
        >>> class State(PatchFunctor):
        ...     def read(self, args, kwargs):
        ...         return [args[0]["image"], args[0]["text"]]
        ...     def take(self, output):
        ...         return [output["image"], output["text"]]
        ...     def build(self, streams, args, kwargs):
        ...         return {**args[0], "image": streams[0], "text": streams[1]}
    """

    @abstractmethod
    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Tensor]:
        """Read the streams that enter the block from its call."""

    @abstractmethod
    def take(self, output: Any) -> Sequence[Tensor | None]:
        """Read the streams that leave the block from its output; ``None`` for a stream that it does not return."""

    @abstractmethod
    def build(self, streams: Sequence[Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build an output like the block's own, from streams and from the call that is skipped."""


class CallReader:
    """A reader of a block's calls: arguments by name, outputs by position.

    If the first argument is a tuple or list of tensors, each of them is a stream: ``hidden_states[0]``,
    ``hidden_states[1]``, ….
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = parameter_names(module)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the call's arguments by name."""
        bound = bind(self.names, args, kwargs)
        first = self.names[0] if self.names else "*0"
        several = bound.get(first)
        if type(several) in (tuple, list) and several and all(isinstance(each, Tensor) for each in several):
            del bound[first]
            bound = {**{f"{first}[{number}]": each for number, each in enumerate(several)}, **bound}
        return bound

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument called ``name``, passed by position or keyword; ``None`` if it was not passed."""
        if name.endswith("]"):
            name, _, number = name[:-1].rpartition("[")
            several = self.read(name, args, kwargs)
            within = isinstance(several, (tuple, list)) and int(number) < len(several)
            return several[int(number)] if within else None
        if name in kwargs:
            return kwargs[name]
        position = (
            int(name[1:]) if name.startswith("*") else self.names.index(name) if name in self.names else len(args)
        )
        return args[position] if position < len(args) else None

    def slot(self, name: str | None) -> tuple[str, int] | None:
        """Return name and position of an argument that is one of the call's own; ``None`` if reading it takes more."""
        return (name, self.names.index(name)) if name in self.names else None

    def take(self, output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
        """Split an output into its values by position, and a builder of such outputs from values."""
        return take_apart(output)


class FunctorReader(CallReader):
    """A reader of a block's calls by a :class:`PatchFunctor`: streams are called "0", "1", … in the functor's order."""

    def __init__(self, functor: PatchFunctor) -> None:
        self.names = ()  # no slots: the functor has to be called
        self.functor = functor

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        return {str(number): stream for number, stream in enumerate(self._read(args, dict(kwargs)))}

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        streams = self._read(args, kwargs)
        return streams[int(name)] if int(name) < len(streams) else None

    def take(self, output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
        return OutputBuilder(PatchFunctor, (), self.functor), tuple(self._streams("take", self.functor.take(output)))

    def _read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[Any]:
        return self._streams("read", self.functor.read(args, kwargs))

    def _streams(self, method: str, found: Any) -> Sequence[Any]:
        if isinstance(found, (list, tuple)):
            return found
        name = f"{type(self.functor).__name__}.{method}"
        raise WrongType(f"{name} returned {type(found).__name__}: give a list or tuple of tensors, one per stream")


@dataclass(frozen=True)
class OutputBuilder:
    """A builder of outputs of one form: a tensor, or a tuple, list, named tuple, dict or dataclass of tensors.

    Args:
        kind: class of the output.
        keys: names of its values, if it holds them by name.
        functor: builds the output instead, if there is one.
    """

    kind: type
    keys: tuple[Any, ...] = ()
    functor: PatchFunctor | None = None
    is_tuple: bool = field(init=False, compare=False)  # of this kind, and nothing else: made at once on reused steps

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_tuple", self.kind is tuple and self.functor is None and not self.keys)

    def __call__(self, values: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.functor is not None:
            return self.functor.build(values, args, kwargs)
        if self.kind is Tensor:
            return values[0]
        if not self.keys:
            return self.kind(values)
        named = dict(zip(self.keys, values, strict=True))
        return self.kind(named) if self.kind in (dict, OrderedDict) else self.kind(**named)

    @property
    def simple(self) -> bool:
        """Whether the output is a tensor, or a tuple or list of tensors."""
        return self.functor is None and not self.keys and self.kind in (Tensor, tuple, list)

    @property
    def text(self) -> str:
        """The form in a word, for tables."""
        return "functor" if self.functor is not None else self.kind.__name__


def take_apart(output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
    """Split a block's output into its values by position, and a builder of such outputs from values."""
    if isinstance(output, Tensor):
        return OutputBuilder(Tensor), (output,)
    kind = type(output)
    if kind in (tuple, list):
        return OutputBuilder(kind), tuple(output)
    if isinstance(output, tuple) and hasattr(kind, "_fields"):
        return OutputBuilder(kind, tuple(kind._fields)), tuple(output)
    if dataclasses.is_dataclass(output):  # diffusers' outputs are both: dataclass and dict
        keys = tuple(field.name for field in dataclasses.fields(output) if field.init)
        return OutputBuilder(kind, keys), tuple(getattr(output, key) for key in keys)
    if kind in (dict, OrderedDict):
        return OutputBuilder(kind, tuple(output)), tuple(output.values())
    return OutputBuilder(kind), ()


@dataclass(frozen=True)
class BlockIO:
    """The streams of one block of a range: how to read them from a call, and how to build an output from them.

    For a block ``forward(hidden_states, encoder_hidden_states)`` that returns ``(encoder, hidden)``, ``carries`` is
    ``("encoder_hidden_states", "hidden_states")``.

    Args:
        reader: reads the block's calls.
        output_builder: builds outputs of the block's form.
        carries: by output position, the argument that the output carries on; ``None`` if it carries on none.
        new_forms: by output position, the form of an output that carries on no argument. Where both ``carries`` and
            ``new_forms`` are ``None``, the block returns ``None``.
        remark: a warning about what was declared of the block; empty if there is none.

    ``slots`` is derived: name and position of the argument behind each output, if all outputs carry one on and the
    output has a simple form; else empty.
    """

    reader: CallReader
    output_builder: OutputBuilder
    carries: tuple[str | None, ...]
    new_forms: tuple[Form | None, ...]
    remark: str = ""
    slots: tuple[tuple[str, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        slots = [self.reader.slot(name) for name in self.carries] if self.output_builder.simple else []
        object.__setattr__(self, "slots", tuple(slots) if None not in slots else ())

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument called ``name``."""
        return self.reader.read(name, args, kwargs)

    def build(self, values: Sequence[Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build an output like the block's own, from one value per position."""
        return self.output_builder(values, args, kwargs)

    def pass_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Build what the block would return if it changed nothing; only for blocks that have :attr:`slots`.

        Most blocks have them, and a reused step is little more than this call for every skipped block: hence the
        unrolled cases.
        """
        slots, kind = self.slots, self.output_builder.kind
        if len(slots) > 2:
            return kind([_given(name, place, args, kwargs) for name, place in slots])
        name, place = slots[0]
        first = kwargs[name] if name in kwargs else _given(name, place, args, kwargs)
        if len(slots) == 1:
            return first if kind is Tensor else kind((first,))
        name, place = slots[1]
        second = kwargs[name] if name in kwargs else _given(name, place, args, kwargs)
        return kind((first, second))


def _given(name: str, place: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return an argument, passed by position or keyword."""
    return kwargs[name] if name in kwargs else args[place] if place < len(args) else None


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Return the names of the positional parameters of a module's ``forward``; empty if it has no signature."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments by name; positional ones without a name are called ``*0``, ``*1``, …"""
    bound = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    bound.update(kwargs)
    return bound


def form_of(value: Any) -> Form | None:
    """Return shape and dtype of a tensor; ``None`` of anything else."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def show(form: Form | None) -> str:
    """Write a form as text."""
    return "None" if form is None else f"{list(form[0])} {str(form[1]).removeprefix('torch.')}"
