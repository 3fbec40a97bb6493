"""One computed call of the blocks, observed: each block's arguments and outputs, and where the outputs went."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .block_io import CallReader, Form, FunctorReader, OutputBuilder, form_of, take_apart
from .block_lists import Chain
from .pattern import ForwardPattern
from .stream_transforms import Stream, StreamTransform, build, has_other_tokens, recognise, recognise_swap_by_shape


@dataclass(frozen=True)
class ObservedBlock:
    """A block to observe.

    Args:
        path: of the block.
        cls: class of the block.
        group: path of its list.
        reader: reads its calls.
        pattern: declared for its list.
        strict: whether the pattern overrules observation.
    """

    path: str
    cls: type
    group: str
    reader: CallReader
    pattern: ForwardPattern | None = None
    strict: bool = True


def observed_blocks(chain: Chain, of: Callable[[nn.Module], nn.Module] = lambda block: block) -> list[ObservedBlock]:
    """Describe the blocks of a chain for observation; ``of`` maps an entry of a list to the block behind a stand-in."""
    observed = []
    for ref in chain.block_refs:
        block, listed = of(ref.block), ref.block_list
        reader = CallReader(block) if listed.functor is None else FunctorReader(listed.functor)
        observed.append(ObservedBlock(ref.path, type(block), listed.path, reader, listed.pattern, listed.strict))
    return observed


@dataclass
class BlockCall:
    """One call of one block: forms of its arguments and outputs, and how they relate to the calls around it."""

    index: int  # of the block among those observed
    inputs: dict[str, Form]  # forms of the tensor arguments
    given: tuple[str, ...] = ()  # names of all arguments that are not None
    output_builder: OutputBuilder = field(default_factory=lambda: OutputBuilder(object))
    outputs: tuple[Form | None, ...] = ()  # None also for one that is the very same tensor as an earlier one
    odd: dict[int, str] = field(
        default_factory=dict
    )  # output position → description of an output that is neither tensor nor None
    next: BlockCall | None = None
    fed: dict[int, str] = field(default_factory=dict)  # output position → argument of the next block: the same object
    same: dict[str, str] = field(default_factory=dict)  # argument → argument of the block before: the same object
    made: dict[str, StreamTransform] = field(
        default_factory=dict
    )  # argument → how it was made of the outputs of the block before
    near: dict[int, str] = field(
        default_factory=dict
    )  # output position → of several arguments of its form, the nearest by value
    touched: set[str] = field(default_factory=set)  # arguments that are not what the block before returned, as it was
    kept: dict[int, tuple[str, ...]] = field(
        default_factory=dict
    )  # output position → arguments that are the same object and have not been written into; of containers only


class LateUse(NamedTuple):
    """An output that a later call than the next one takes: of which call, at which position, by whom, and as what."""

    producer: int
    position: int
    consumer: int
    name: str


class Observation:
    """The calls of some blocks within one call of the model, in order.

    It holds the arguments and outputs of one block at a time.

    Args:
        observed: the blocks to observe.
        whole: whether the model itself was observed too; else the observation begins with the range's first block, and
            the end of the model's call is not known.

    Example:
        >>> from dithooks.blocks.discovery import find_chains
        >>> from dithooks.blocks.tap import tap
        >>> class Block(torch.nn.Module):
        ...     def forward(self, hidden_states):
        ...         return hidden_states + 1
        >>> model = torch.nn.Module()
        >>> model.blocks = torch.nn.ModuleList([Block(), Block()])
        >>> observation = Observation(observed_blocks(find_chains(model, "blocks")[0]))
        >>> with tap(model.blocks, observation.enter, observation.leave):
        ...     _ = model.blocks[1](model.blocks[0](torch.zeros(1, 2)))
        >>> observation.calls[0].fed  # output 0 of the first block is the argument hidden_states of the second
        {0: 'hidden_states'}
    """

    def __init__(self, observed: Sequence[ObservedBlock], whole: bool = True) -> None:
        self.observed, self.whole = observed, whole
        self.calls: list[BlockCall] = []
        self.returned: tuple[Form, ...] = ()  # forms of the model's outputs, (batch, tokens, …), if they were seen
        self.late: list[LateUse] = []
        self._outputs: tuple[Any, ...] = ()
        self._marks: list[Any] = []  # by which writes into the outputs are seen
        self._arguments: dict[str, Any] = {}
        self._argument_marks: dict[str, Any] = {}  # by which writes into tensors in containers are seen
        self._produced: dict[
            int, tuple[int, int, weakref.ref[Tensor]]
        ] = {}  # call and position by id of a tensor it returned; ids are reused, hence the reference

    @property
    def empty(self) -> bool:
        """Whether no call of a block was observed."""
        return not self.calls

    @property
    def first(self) -> int | None:
        """The block that was called first; ``None`` if none was."""
        return self.calls[0].index if self.calls else None

    @torch.no_grad()
    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note the arguments of a block that is about to run."""
        arguments = dict(self.observed[index].reader.arguments(args, kwargs))
        forms = {name: form for name, value in arguments.items() if (form := form_of(value))}
        here = BlockCall(index, forms, tuple(name for name, value in arguments.items() if value is not None))
        if self.calls:
            self._link(self.calls[-1], here, arguments)
        self._outputs, self._marks, self._arguments = (), [], arguments
        self._argument_marks = {
            name: value.clone() if value.is_inference() else value._version
            for name, value in arguments.items()
            if isinstance(value, Tensor) and self.observed[index].reader.way(name)[1]
        }
        self.calls.append(here)

    @torch.no_grad()
    def leave(self, index: int, output: Any) -> None:
        """Note the output of a block that has run."""
        if not self.calls or self.calls[-1].index != index:  # blocks within blocks: the outer call is not followed
            return
        here = self.calls[-1]
        here.output_builder, values = self.observed[index].reader.take(output)
        if here.output_builder.parts:
            for position, value in enumerate(values):
                here.kept[position] = tuple(name for name in self._arguments if self._is_unchanged(name, value))
        if twins := _twins([None if here.kept.get(position) else value for position, value in enumerate(values)]):
            here.output_builder = replace(here.output_builder, twins=twins)
        self._outputs = here.output_builder.without_twins(values)
        here.outputs = tuple(form_of(value) for value in self._outputs)
        self._marks = [_mark(value) for value in self._outputs]
        here.odd = {
            position: f"{where}: {type(value).__name__}"
            for position, (where, value) in enumerate(zip(_places(here), self._outputs, strict=False))
            if not (value is None or isinstance(value, Tensor))
        }
        if not self._outputs:
            here.odd = {0: type(output).__name__}
        for position, value in enumerate(self._outputs):
            if isinstance(value, Tensor):
                self._produced[id(value)] = len(self.calls) - 1, position, weakref.ref(value)
            if (name := _nearest(value, self._arguments)) is not None:
                here.near[position] = name

    def end(self, output: Any) -> None:
        """Note what the model returned. A list is one output, of a tensor for each sample or block."""
        values = () if isinstance(output, list) else take_apart(output)[1]
        tensors = [value for value in values if isinstance(value, Tensor) and value.dim() > 2]
        self.returned = tuple((each.shape, each.dtype) for each in tensors if each.is_floating_point())

    def close(self) -> None:
        """Drop all tensors, at the end of the model's call."""
        self._outputs, self._marks, self._arguments, self._argument_marks, self._produced = (), [], {}, {}, {}

    def _is_unchanged(self, name: str, value: Any) -> bool:
        """Whether an output is what a container among the arguments holds, and the block has not written into it."""
        if value is not self._arguments[name] or not self.observed[self.calls[-1].index].reader.way(name)[1]:
            return False
        mark = self._argument_marks.get(name)
        return mark is None or (torch.equal(mark, value) if isinstance(mark, Tensor) else mark == value._version)

    def _link(self, before: BlockCall, here: BlockCall, arguments: Mapping[str, Any]) -> None:
        """Relate the arguments of a call to the arguments and outputs of the call before it."""
        before.next = here
        outputs = [out if isinstance(out, Tensor) else None for out in self._outputs]
        written = [out is not None and _is_written(out, mark) for out, mark in zip(outputs, self._marks, strict=True)]
        for name, value in arguments.items():
            if not isinstance(value, Tensor):
                continue
            position = next((p for p, out in enumerate(outputs) if out is value), None)
            if position is not None:
                before.fed.setdefault(position, name)
                if written[position]:
                    here.touched.add(name)
                continue
            number = len(self.calls)
            producer, place, ref = self._produced.get(id(value), (number, 0, None))
            if ref is not None and ref() is value and producer < number - 1:
                self.late.append(LateUse(producer, place, number, name))
            former = next((other for other, given in self._arguments.items() if given is value), None)
            if former is not None:
                here.same[name] = former
            elif value.is_floating_point():
                made = recognise(value, outputs)
                if made is None and before.inputs.get(name) != here.inputs[name]:
                    made = recognise_swap_by_shape(value, outputs)
                if made is not None:
                    here.made[name] = made
                if any(written) or not _is_only_rearranged(value, made, outputs):  # it may be a view of an output
                    here.touched.add(name)


def _twins(values: Sequence[Any]) -> tuple[tuple[int, int], ...]:
    """Return the numbers of values that are the very same tensor as an earlier one, with the number of that one."""
    first: dict[int, int] = {}
    numbers = [first.setdefault(id(value), number) for number, value in enumerate(values)]
    pairs = ((number, found) for number, found in enumerate(numbers) if found < number)
    return tuple(pair for pair in pairs if isinstance(values[pair[0]], Tensor))


def _nearest(value: Any, arguments: Mapping[str, Any]) -> str | None:
    """Return the argument of a value's form that differs least from it; ``None`` unless several have that form."""
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.is_meta:
        return None
    distances = {
        name: float((value - other).float().norm())
        for name, other in arguments.items()
        if form_of(other) == form_of(value)
    }
    return min(distances, key=distances.__getitem__) if len(distances) > 1 else None


def _mark(value: Any) -> Any:
    """Return what shows later whether a tensor was written into: its version, or a copy where it has none."""
    if not isinstance(value, Tensor):
        return None
    return value.clone() if value.is_inference() else value._version


def _is_written(value: Tensor, mark: Any) -> bool:
    if isinstance(mark, Tensor):
        return not value.is_meta and not torch.equal(value, mark)
    return bool(value._version != mark)


def _is_only_rearranged(value: Tensor, made: StreamTransform | None, outputs: Sequence[Tensor | None]) -> bool:
    """Return whether a new tensor holds outputs joined, cut or turned, and nothing was added to them.

    A new tensor in an output's place counts as added to, though it has the same values: a ControlNet may begin with 0.
    """
    if made is None or isinstance(made, Stream) or has_other_tokens(made):
        return False
    if value.is_meta:
        return True
    like = next(out for out in outputs if out is not None)
    joined = build(made, [like if out is None else out for out in outputs], value.shape)
    return joined is not None and torch.equal(joined.to(value.dtype), value)


def _places(call: BlockCall) -> list[str]:
    """Say where in its output each value of a call is."""
    if call.output_builder.parts:
        return ["".join(step.text for step in way) for way in call.output_builder.ways]
    return [f"position {position}" for position in range(len(call.outputs))]
