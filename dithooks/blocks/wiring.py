"""How the streams run through a range of blocks: observed on one computed call, not declared.

If an output of a block *is* an input of the next one (the same object), that shows what each block takes and returns,
by position or keyword, in any order. Where the model makes a new tensor between two blocks, its values show how
(:mod:`.stream_transforms`); where they do not (a ControlNet's addition), the name decides, then the shape. What stays
ambiguous is refused with a description of what was observed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import WiringError
from .block_io import BlockIO, may_become, show
from .observation import BlockCall, Observation, ObservedBlock
from .stream_matching import block_io_of
from .stream_transforms import Stream, StreamTransform, Unrelated, streams_of, substitute


@dataclass(frozen=True)
class Joint:
    """How the streams of one block of a range come from the block before it.

    Args:
        made: by stream, how it is made of the former block's outputs.
        same: by argument, the argument of the former block that it is, passed on untouched.
    """

    made: Mapping[str, StreamTransform]
    same: Mapping[str, str]


@dataclass(frozen=True)
class Wiring:
    """The streams of a range of blocks.

    Args:
        block_ios: how to read and build the streams of each block.
        entry: names of the streams at the first block.
        leave: by output of the last block, how it is made of these streams; ``None`` where the block returns ``None``.
        certain: whether every stream passes from block to block as the very object that a block returned.
        looked_at: names of the streams that a change metric measures; empty: ``hidden_states``, and where there is
            none, all.
        joints: how the streams come from block to block, one fewer than blocks.
        touched: the first two blocks between which a stream was written into or replaced; ``None`` if there are none.
    """

    block_ios: tuple[BlockIO, ...]
    entry: tuple[str, ...]
    leave: tuple[StreamTransform | None, ...]
    certain: bool
    joints: tuple[Joint, ...] = field(default=(), compare=False)
    touched: tuple[str, str] | None = field(default=None, compare=False)
    looked_at: tuple[str, ...] = ()
    # Made out once, as they are asked for at every call:
    measured: tuple[int, ...] = field(init=False)  # streams that a change metric measures
    measured_outputs: tuple[int, ...] = field(init=False)  # positions of the outputs that hold these
    outputs: tuple[StreamTransform, ...] = field(init=False)  # of the outputs that are tensors
    hands_on: tuple[str, ...] = field(init=False)  # streams of the outputs, where the first block hands on no others
    # By output that is a tensor: the last block's argument that it carries on, and whether the first block hands it on.
    arrives_as: tuple[str | None, ...] = field(init=False)
    is_handed_on: tuple[bool, ...] = field(init=False)
    is_plainly_read: bool = field(init=False)  # every stream is an argument of the first block by itself
    plain: bool = field(init=False)  # every output is one stream that entered, and no other output is the same one

    def __post_init__(self) -> None:
        entry = self.entry
        looked_at = self.looked_at or (("hidden_states",) if "hidden_states" in entry else entry)
        measured = tuple(entry.index(name) for name in looked_at)
        measured_outputs = tuple(_position_of(number, self.leave) for number in measured)
        outputs = tuple(bridge for bridge in self.leave if bridge is not None)
        plain = all(isinstance(bridge, Stream) for bridge in outputs) and len(set(outputs)) == len(outputs)
        names = tuple(entry[bridge.number] for bridge in outputs if isinstance(bridge, Stream)) if plain else ()
        hands_on = names if all(name in names for name in self.block_ios[0].carries if name is not None) else ()
        object.__setattr__(self, "hands_on", hands_on)
        last = zip(self.block_ios[-1].carries, self.leave, strict=False)
        object.__setattr__(self, "arrives_as", tuple(name for name, bridge in last if bridge is not None))
        object.__setattr__(self, "is_handed_on", tuple(name in self.block_ios[0].carries for name in hands_on))
        names = self.block_ios[0].reader.names
        object.__setattr__(self, "is_plainly_read", all(name in names for name in entry))
        for name, value in (
            ("measured", measured),
            ("measured_outputs", measured_outputs),
            ("outputs", outputs),
            ("plain", plain),
        ):
            object.__setattr__(self, name, value)

    def shapes(self, deltas: Sequence[Tensor]) -> dict[int, torch.Size]:
        """Return the shapes of the last block's outputs by position, from their residuals."""
        positions = [position for position, transform in enumerate(self.leave) if transform is not None]
        return {position: delta.shape for position, delta in zip(positions, deltas, strict=False)}


def _position_of(number: int, leave: Sequence[StreamTransform | None]) -> int:
    """Return the position of the first output that a stream is in."""
    return next(p for p, bridge in enumerate(leave) if bridge is not None and number in streams_of(bridge))


@dataclass(frozen=True)
class Gap:
    """What happens to the streams between two blocks.

    Args:
        made: by stream of the second block, how it is made of the first block's outputs.
        how: by stream, how it was recognised, as text for tables; only if not by identity or value.
        lost: by stream that is not made of the first block's outputs, why not.
    """

    made: dict[str, StreamTransform]
    how: dict[str, str]
    lost: dict[str, str]


def resolve(observation: Observation, order: Sequence[int], start: int, end: int) -> Wiring | None:
    """Determine the wiring of blocks start … end of ``order``; ``None`` if the observed call did not run them all.

    Raises:
        WiringError: the blocks ran, but not as one chain of streams.
    """
    observed, wanted = observation.observed, list(order[start : end + 1])
    calls = [(number, call) for number, call in enumerate(observation.calls) if call.index in set(order)]
    indices = [call.index for _, call in calls]
    if not set(wanted) <= set(indices):
        return None
    first = indices.index(wanted[0])
    if indices[first : first + len(wanted)] != wanted:
        seen = ", ".join(observed[i].path for i in indices[first : first + len(wanted) + 1])
        ends = f"{observed[wanted[0]].path} … {observed[wanted[-1]].path}"
        raise WiringError(f"blocks {ends} do not run one after another: seen {seen}, …")
    if indices.count(wanted[0]) > 1:
        times = indices.count(wanted[0])
        raise WiringError(f"{observed[wanted[0]].path} runs {times} times in one call of the transformer")
    numbers, seen_calls = zip(*calls[first : first + len(wanted)], strict=True)
    block_ios = [block_io_of(observation, call) for call in seen_calls]
    for producer, position, consumer, name in observation.late:
        if producer not in numbers[:-1] or consumer <= numbers[-1]:
            continue
        kept = block_ios[numbers.index(producer)].kept
        if not kept or kept[position] is None:
            taker = observed[observation.calls[consumer].index].path
            raise WiringError(
                f"an output of {observed[observation.calls[producer].index].path} goes to {taker} ({name}=), past the "
                f"end of the range at {observed[wanted[-1]].path}: what is skipped would be missing there"
            )
    return _follow(observation, list(seen_calls), block_ios)


def gap(observation: Observation, before: BlockCall, sender: BlockIO, after: BlockCall, taker: BlockIO) -> Gap:
    """Determine how the streams that a block takes are made of what the block before returned."""
    observed = observation.observed
    made: dict[str, StreamTransform] = {}
    how, lost = {}, {}
    fed = {name: position for position, name in before.fed.items()} if before.next is after else {}
    made.update({name: Stream(fed[name]) for name in taker.kept if name is not None and name in fed})
    streams = [name for name in taker.carries if name is not None]
    for name in streams:
        form = after.inputs.get(name)
        if name in fed:
            made[name] = Stream(fed[name])
        elif name in after.made and before.next is after:
            made[name] = after.made[name]
        elif name in after.same:
            continue  # an argument of the block before, passed on untouched
        elif before.next is after and (like := _elsewhere(observation, before, after, name)) is not None:
            made[name] = like  # an addition (of positions, before the first block) hides the values
        elif name in sender.carries and may_become(before.outputs[sender.carries.index(name)], form):
            made[name] = Stream(sender.carries.index(name))
            how[name] = "a new tensor in its place"
        else:
            free = [p for p, other in enumerate(before.outputs) if other == form and p not in fed.values()]
            if form is not None and len(free) == 1:
                made[name] = Stream(free[0])
                how[name] = "a new tensor of its form"
            else:
                returned = ", ".join(show(other) for other in before.outputs)
                lost[name] = (
                    f"between {observed[before.index].path} and {observed[after.index].path} the "
                    f"stream {name} {show(form)} is lost: the former returns {returned}, and it is not made of that "
                    "in a way that can be followed (nor could it be if inputs were constant, as in a warm-up on zeros)"
                )
    return Gap(made, how, lost)


def _elsewhere(observation: Observation, before: BlockCall, after: BlockCall, name: str) -> StreamTransform | None:
    """Return how a stream of this name was made between other blocks of the same two lists, in the same forms."""
    groups = [observation.observed[call.index].group for call in (before, after)]
    for call in observation.calls:
        if call.next is None or name not in call.next.made or isinstance(call.next.made[name], Stream):
            continue
        pair = (call, call.next)
        same_lists = groups == [observation.observed[other.index].group for other in pair]
        if same_lists and call.outputs == before.outputs and call.next.inputs.get(name) == after.inputs.get(name):
            return call.next.made[name]
    return None


def _follow(observation: Observation, calls: list[BlockCall], block_ios: list[BlockIO]) -> Wiring:
    """Follow each stream from the first block's arguments to the last one's outputs."""
    observed = observation.observed
    entry = list(calls[0].inputs)
    known: dict[str, StreamTransform | None] = {name: Stream(number) for number, name in enumerate(entry)}
    changed: set[str] = set()  # arguments that a block of the range has changed, or the model in between
    certain = True
    joints: list[Joint] = []
    touched: tuple[str, str] | None = None
    lost: dict[str, str] = {}
    for before, sender, after, taker in zip(calls, block_ios, calls[1:], block_ios[1:], strict=False):
        between = gap(observation, before, sender, after, taker)
        certain = certain and before.next is after and set(between.made) <= set(before.fed.values())
        joints.append(Joint(between.made, after.same if before.next is after else {}))
        if touched is None and (before.next is not after or after.touched & set(between.made)):
            touched = observed[before.index].path, observed[after.index].path
        sent = [sender.carried(position) for position in range(len(before.outputs))]
        left: dict[int, StreamTransform | None] = {
            p: Unrelated() if name is None else known.get(name) for p, name in enumerate(sent)
        }
        why = {p: lost[name] for p, name in enumerate(sent) if name in lost}
        onward: dict[str, StreamTransform | None] = {}
        reasons = dict(between.lost)
        changing: set[str] = set()
        for name in after.inputs:
            if name in between.made:
                onward[name] = substitute(between.made[name], left)
                reason = next((why[p] for p in streams_of(between.made[name]) if p in why), None)
                if reason is not None:
                    reasons[name] = reason
                if not _is_unchanged(between.made[name], sender, changed):
                    changing.add(name)
            elif name in after.same and before.next is after:
                onward[name] = known.get(after.same[name])
                if after.same[name] in lost:
                    reasons[name] = lost[after.same[name]]
                if after.same[name] in changed:
                    changing.add(name)
        known, lost, changed = onward, reasons, changing
    # What the last block leaves as it is, but another one has changed, is a stream of the range all the same.
    if changed & set(block_ios[-1].kept):
        block_ios = [*block_ios[:-1], block_io_of(observation, calls[-1], changed)]
    leave = [_source(name, known, lost, observed, calls) for name in block_ios[-1].carries]
    leave = [
        Unrelated() if form is not None else transform
        for transform, form in zip(leave, block_ios[-1].new_forms, strict=True)
    ]
    used = sorted({number for transform in leave for number in streams_of(transform)})
    renumbered: dict[int, StreamTransform | None] = {number: Stream(new) for new, number in enumerate(used)}
    names = tuple(entry[number] for number in used)
    made = tuple(None if transform is None else substitute(transform, renumbered) for transform in leave)
    shapes = [None if form is None else form[0] for form in calls[-1].outputs]
    looked_at = _becoming_outputs(
        {name: shapes[_position_of(number, made)] for number, name in enumerate(names)},
        [form[0] for form in observation.returned],
    )
    return Wiring(tuple(block_ios), names, made, certain, tuple(joints), touched, looked_at)


def _becoming_outputs(shapes: Mapping[str, torch.Size | None], returned: Sequence[torch.Size]) -> tuple[str, ...]:
    """Return the streams that become outputs of a model which returns several; none if it returns a single one.

    They are known by their tokens: an output (batch, tokens, …) is made of a stream (batch, tokens, …). If one of the
    outputs has the tokens of no stream, it may be made of any of them, and all are returned.
    """
    if len(returned) < 2:
        return ()
    found = {name for shape in returned for name, own in shapes.items() if own is not None and own[:-1] == shape[:-1]}
    tokens = {own[:-1] for own in shapes.values() if own is not None}
    return tuple(name for name in shapes if name in found or not tokens.issuperset(shape[:-1] for shape in returned))


def _is_unchanged(transform: StreamTransform, sender: BlockIO, changed: Collection[str]) -> bool:
    """Whether an argument is what a block was given, unchanged since the range's first block."""
    kept = sender.kept[transform.number] if isinstance(transform, Stream) and sender.kept else None
    return kept is not None and kept not in changed


def _source(
    name: str | None,
    known: Mapping[str, StreamTransform | None],
    lost: Mapping[str, str],
    observed: Sequence[ObservedBlock],
    calls: Sequence[BlockCall],
) -> StreamTransform | None:
    """Return how the last block's output that carries on ``name`` is made of the streams at the first block."""
    if name is None:
        return None
    transform = known.get(name)
    if transform is None or not any(True for _ in streams_of(transform)):
        first, last = observed[calls[0].index].path, observed[calls[-1].index].path
        otherwise = f"{name}, which {last} returns, does not come from an argument of {first}: the streams change"
        raise WiringError(lost.get(name, otherwise))
    numbers = list(streams_of(transform))
    if len(set(numbers)) < len(numbers):  # more likely, other tokens of the same number were mistaken for the stream
        raise WiringError(f"{name} at {observed[calls[-1].index].path} seems to hold one stream twice: {numbers}")
    return transform
