"""How to read the streams of one block from a call, and how to build an output of its form from streams."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import WrongType
from .containers import Step, Way, follow, leaves_of, part_of, replaced, steps_of

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

    What containers among the arguments hold has names as Python writes them: ``hidden_states[0]``, ``video.x``,
    ``state['image']``.
    """

    def __init__(self, module: nn.Module) -> None:
        self.names = parameter_names(module)
        self._ways: dict[str, tuple[str, Way]] = {}  # of values in containers: the argument, and the way in it

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the call's arguments by name, and what containers among them hold.

        What the first argument holds takes its place; what others hold comes last, as it is seldom a stream.
        """
        bound = bind(self.names, args, kwargs)
        first = self.names[0] if self.names else "*0"
        front: dict[str, Any] = {}
        held: dict[str, Any] = {}
        for argument, value in bound.items():
            if steps_of(value) is None:
                continue
            leaves = leaves_of(value)
            if not any(isinstance(leaf, Tensor) for _, leaf in leaves):
                continue
            for way, leaf in leaves:
                name = argument + "".join(step.text for step in way)
                self._ways[name] = argument, way
                (front if argument == first else held)[name] = leaf
        if front:
            del bound[first]
        return {**front, **bound, **held}

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument called ``name``, passed by position or keyword; ``None`` if it was not passed."""
        if name in kwargs:
            return kwargs[name]
        names = self.names
        if name in names:
            place = names.index(name)
            return args[place] if place < len(args) else None
        if name in self._ways:
            argument, way = self._ways[name]
            return follow(self.read(argument, args, kwargs), way)
        place = int(name[1:]) if name.startswith("*") else len(args)
        return args[place] if place < len(args) else None

    def way(self, name: str) -> tuple[str, Way]:
        """Return the argument that holds the value ``name``, and the way in it; empty for the argument itself."""
        return self._ways.get(name, (name, ()))

    def container(self, argument: str, way: Way) -> Callable[[tuple[Any, ...], dict[str, Any]], Any]:
        """Return a function that reads a container from a call: an argument, or a part of one."""
        return partial(self._follow, argument, way)

    def _follow(self, argument: str, way: Way, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return follow(self.read(argument, args, kwargs), way)

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
        self._ways = {}
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
        parts: builders of those parts that are containers themselves, ``None`` for a value; empty if all are values.
        given: reads from a call what the output is made of, if it is a container that the block was given, with some
            parts replaced.
        kept: numbers of the values that stay as they are in what was given.
        twins: by number of a value that is the very same object as an earlier one, the number of that one.
    """

    kind: type
    keys: tuple[Any, ...] = ()
    functor: PatchFunctor | None = None
    parts: tuple[OutputBuilder | None, ...] = ()
    given: Callable[[tuple[Any, ...], dict[str, Any]], Any] | None = None
    kept: frozenset[int] = frozenset()
    twins: tuple[tuple[int, int], ...] = ()
    is_tuple: bool = field(init=False, compare=False)  # of this kind, and nothing else: made at once on reused steps

    def __post_init__(self) -> None:
        flat = self.functor is None and not self.keys and not self.parts and not self.twins
        object.__setattr__(self, "is_tuple", self.kind is tuple and flat)

    def __call__(self, values: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.twins:
            numbers = dict(self.twins)
            values = [values[numbers.get(number, number)] for number in range(len(values))]
        if self.functor is not None:
            return self.functor.build(values, args, kwargs)
        if self.kind is Tensor:
            return values[0]
        if self.parts:
            return self._nested(iter(enumerate(values)), self.kept, args, kwargs)
        return self._made(values)

    def _made(self, values: Sequence[Any]) -> Any:
        """Build the output from its parts alone."""
        if not self.keys:
            return self.kind(values) if values else self.kind()
        named = dict(zip(self.keys, values, strict=True))
        return self.kind(named) if self.kind in (dict, OrderedDict) else self.kind(**named)

    def _nested(
        self,
        values: Iterator[tuple[int, Any]],
        kept: frozenset[int],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Build a container of containers; ``values`` are those of all that it holds, with their numbers."""
        given = None if self.given is None else self.given(args, kwargs)
        parts, changes = [], {}
        for step, part in zip(self.steps, self.parts, strict=True):
            if part is not None:
                changes[step] = value = part._nested(values, kept, args, kwargs)
            else:
                number, value = next(values)
                if number in kept:
                    value = part_of(given, step)
                else:
                    changes[step] = value
            parts.append(value)
        if self.given is not None and (type(given) is self.kind or not changes):
            return replaced(given, changes)
        return self._made(parts)

    @property
    def steps(self) -> tuple[Step, ...]:
        """The steps to its parts, of an output with :attr:`parts`."""
        if not self.keys:
            return tuple(Step(index) for index in range(len(self.parts)))
        return tuple(Step(key, self.kind not in (dict, OrderedDict)) for key in self.keys)

    @property
    def ways(self) -> tuple[Way, ...]:
        """The way to each value, of an output with :attr:`parts`."""
        below = [((),) if part is None else part.ways for part in self.parts]
        return tuple((step, *way) for step, ways in zip(self.steps, below, strict=True) for way in ways)

    def derived(
        self,
        given: Mapping[Way, Callable[[tuple[Any, ...], dict[str, Any]], Any]],
        kept: frozenset[int],
        here: Way = (),
    ) -> OutputBuilder:
        """Return a builder that makes the containers at some ways of what reads them from the block's call."""
        parts = tuple(
            None if part is None else part.derived(given, kept, (*here, step))
            for step, part in zip(self.steps, self.parts, strict=True)
        )
        return replace(self, parts=parts, given=given.get(here), kept=kept)

    def take(self, output: Any) -> tuple[Any, ...]:
        """Return an output's values by position, ``None`` for one that is kept; none at all if its form is another."""
        if self.kind is Tensor:
            return (output,) if isinstance(output, Tensor) else ()
        if not self.parts:
            return tuple(output) if isinstance(output, (tuple, list)) and type(output) is self.kind else ()
        builder, values = take_apart(output)
        if builder.ways != self.ways:
            return ()
        return tuple(None if number in self.kept else value for number, value in enumerate(values))

    def without_twins(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Return an output's values, ``None`` for those that are earlier ones; none at all if they are others."""
        if not self.twins:
            return tuple(values)
        numbers = dict(self.twins)
        if any(max(pair) >= len(values) or values[pair[0]] is not values[pair[1]] for pair in self.twins):
            return ()
        return tuple(None if number in numbers else value for number, value in enumerate(values))

    @property
    def simple(self) -> bool:
        """Whether the output is a tensor, or a tuple or list of tensors."""
        flat = not self.keys and not self.parts and not self.twins
        return self.functor is None and flat and self.kind in (Tensor, tuple, list)

    @property
    def text(self) -> str:
        """The form in a few words, for tables."""
        if self.functor is not None:
            return "functor"
        inner = dict.fromkeys(part.text for part in self.parts if part is not None)
        return f"{self.kind.__name__} of {', '.join(inner)}" if inner else self.kind.__name__


def take_apart(output: Any) -> tuple[OutputBuilder, tuple[Any, ...]]:
    """Split a block's output into its values by position, and a builder of such outputs from values."""
    if isinstance(output, Tensor):
        return OutputBuilder(Tensor), (output,)
    return _builder_of(output), tuple(leaf for _, leaf in leaves_of(output)) if steps_of(output) is not None else ()


def _builder_of(output: Any, above: tuple[Any, ...] = ()) -> OutputBuilder:
    """Return a builder of outputs like this one, whose parts are values or containers."""
    steps = steps_of(output) or []
    around = (*above, output)
    parts = []
    for step in steps:
        part = part_of(output, step)
        inner = steps_of(part) is not None and not any(part is each for each in around)
        parts.append(_builder_of(part, around) if inner else None)
    kind = type(output)
    keys = () if kind in (tuple, list) else tuple(step.key for step in steps)
    flat = kind in (tuple, list) and not above and not any(parts)
    return OutputBuilder(kind, keys, parts=() if flat else tuple(parts))


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
        kept: by output position, the argument that the output is, unchanged; ``None`` for other outputs, and empty if
            there are none. A reused step takes them from its own call.

    ``slots`` is derived: name and position of the argument behind each output, if all outputs carry one on and the
    output has a simple form; else empty.
    """

    reader: CallReader
    output_builder: OutputBuilder
    carries: tuple[str | None, ...]
    new_forms: tuple[Form | None, ...]
    remark: str = ""
    kept: tuple[str | None, ...] = ()
    slots: tuple[tuple[str, int], ...] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        slots = [self.reader.slot(name) for name in self.carries] if self.output_builder.simple else []
        object.__setattr__(self, "slots", tuple(slots) if None not in slots else ())

    def read(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the argument called ``name``."""
        return self.reader.read(name, args, kwargs)

    def take(self, output: Any) -> tuple[Any, ...]:
        """Return the values of an output by position, ``None`` for those that are kept or are earlier ones."""
        builder = self.output_builder
        values = builder.take(output) if builder.functor is None else self.reader.take(output)[1]
        return builder.without_twins(values) if builder.twins else values

    def carried(self, position: int) -> str | None:
        """Return the argument that an output carries on, changed or not; ``None`` if it carries on none."""
        return self.carries[position] or (self.kept[position] if self.kept else None)

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
    return positional_names(module.forward)


def positional_names(function: Callable[..., Any]) -> tuple[str, ...]:
    """Return the names of the positional parameters of a function; empty if it has no signature."""
    try:
        parameters = inspect.signature(function).parameters.values()
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


def may_become(before: Form | None, after: Form | None) -> bool:
    """Whether a tensor of one form may leave a block in the other: autocast, and some blocks, change its dtype."""
    if before is None or after is None or before[0] != after[0]:
        return False
    return before[1] == after[1] or (before[1].is_floating_point and after[1].is_floating_point)


def show(form: Form | None) -> str:
    """Write a form as text."""
    return "None" if form is None else f"{list(form[0])} {str(form[1]).removeprefix('torch.')}"
