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
    """Says how a block's call holds its streams, where arguments and outputs alone do not: no forward is copied.

    Streams are what a block takes, changes and hands on. They have an order, and it is the same in all three methods;
    on a reused step the blocks of the range are not run, and what ``build`` makes of the streams is handed to the
    model in their place. Give one to :class:`~dithooks.BlockAdapter` as ``patch_functor``.

    Example: a block that is given one dict, and returns a new one.
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
        """The streams that enter the block, from its call."""

    @abstractmethod
    def take(self, output: Any) -> Sequence[Tensor | None]:
        """The streams that leave the block, from its output; ``None`` for one that it does not return."""

    @abstractmethod
    def build(self, streams: Sequence[Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An output as the block would return it, from streams and the call that is passed over."""


class CallReader:
    """What a block's call shows, by name: its arguments.

    A first argument that is a tuple or list of tensors is a stream each: ``hidden_states[0]``, ``hidden_states[1]``, ….
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = parameter_names(module)

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The call's arguments by name."""
        bound = bind(self.names, args, kwargs)
        first = self.names[0] if self.names else "*0"
        several = bound.get(first)
        if type(several) in (tuple, list) and several and all(isinstance(each, Tensor) for each in several):
            del bound[first]
            bound = {**{f"{first}[{number}]": each for number, each in enumerate(several)}, **bound}
        return bound

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument called ``name``, however it was passed; ``None`` if it was not."""
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
        """Name and position of an argument that a call shows as it is; ``None`` for one that has to be looked for."""
        return (name, self.names.index(name)) if name in self.names else None

    def take(self, output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
        """The values of an output by position, and what makes an output of values."""
        return take_apart(output)


class FunctorReader(CallReader):
    """The same by a functor: streams are called "0", "1", … in its order."""

    def __init__(self, functor: PatchFunctor) -> None:
        self.names = ()  # so that no argument has a slot
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
    """Builds outputs of one form: a tensor, or a tuple, list, named tuple, dict or dataclass of them."""

    kind: type
    keys: tuple[Any, ...] = ()
    functor: PatchFunctor | None = None

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
        """Whether it is a tensor, or a tuple or list of them."""
        return self.functor is None and not self.keys and self.kind in (Tensor, tuple, list)

    @property
    def text(self) -> str:
        """The form in words, for tables."""
        return "functor" if self.functor is not None else self.kind.__name__


def take_apart(output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
    """A block's output as values by position, and what puts such values together again."""
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
    """The streams of one block of a range.

    ``carries[p]`` is the argument that output position p carries on. ``born[p]`` is the form of an output that carries
    on none; where ``carries[p]`` and ``born[p]`` are both ``None``, the block returns ``None`` there. ``remark`` is
    what is to be said of what was declared of it. ``slots`` has a name and a position for each that is carried on, if
    all are, in an output of a simple form; else it is empty.
    """

    face: CallReader
    maker: OutputBuilder
    carries: tuple[str | None, ...]
    born: tuple[Form | None, ...]
    remark: str = ""
    slots: tuple[tuple[str, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        slots = [self.face.slot(name) for name in self.carries] if self.maker.simple else []
        object.__setattr__(self, "slots", tuple(slots) if None not in slots else ())

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The argument called ``name``."""
        return self.face.read(name, args, kwargs)

    def build(self, values: Sequence[Tensor | None], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An output like the block's own, from one value per position."""
        return self.maker(values, args, kwargs)

    def pass_on(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the block would return if it changed nothing, where :attr:`slots` tell all there is to know.

        Most blocks are like that, and on a reused step there is little else to do than this, many times.
        """
        slots, kind = self.slots, self.maker.kind
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
    """An argument, however it was passed."""
    return kwargs[name] if name in kwargs else args[place] if place < len(args) else None


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a module's forward; empty where it does not say."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; positions without a name are called ``*0``, ``*1``, …"""
    bound = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    bound.update(kwargs)
    return bound


def form_of(value: Any) -> Form | None:
    """Shape and dtype of a tensor."""
    return (value.shape, value.dtype) if isinstance(value, Tensor) else None


def show(form: Form | None) -> str:
    """A form in words."""
    return "None" if form is None else f"{list(form[0])} {str(form[1]).removeprefix('torch.')}"
