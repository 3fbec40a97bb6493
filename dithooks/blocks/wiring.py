"""How the streams run through a range of blocks: observed on one computed call, not declared.

Which output of a block *is* (the same object) which input of the next one tells what each block takes and returns, by
position or keyword, in whatever order. Where the model makes a new tensor between two blocks, its values tell how
(:mod:`.bridge`); where they don't (a ControlNet's addition), the name does, then the shape. What stays ambiguous is
refused, with what was seen.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .bridge import Bridge, Fresh, Stream, streams_of, substitute
from .observe import Observation, Seen, Spot
from .ports import Ports, show


class WiringError(ValueError):
    """The streams of a range could not be followed; the message says what was seen."""


class BlockError(WiringError):
    """How one block takes and returns its streams is not clear, whatever the range."""


@dataclass(frozen=True)
class Wiring:
    """The streams of a range: their names at its first block, and how each output of its last is made of them."""

    ports: tuple[Ports, ...]  # of each block of the range
    entry: tuple[str, ...]
    leave: tuple[Bridge | None, ...]
    certain: bool  # every stream is handed on as the very object that a block returned

    def shapes(self, deltas: Sequence[Tensor]) -> dict[int, torch.Size]:
        """Of the outputs of its last block, by position, from their residuals."""
        positions = [position for position, bridge in enumerate(self.leave) if bridge is not None]
        return {position: delta.shape for position, delta in zip(positions, deltas, strict=False)}

    @property
    def plain(self) -> bool:
        """Whether every output is just one stream that entered, and no other output is the same one."""
        streams = [bridge for bridge in self.leave if bridge is not None]
        return all(isinstance(bridge, Stream) for bridge in streams) and len(set(streams)) == len(streams)


@dataclass(frozen=True)
class Gap:
    """What happens to the streams between two blocks.

    Args:
        made: how each stream of the second is made of the outputs of the first, by number of output.
        how: in words, for tables; only where it is not the very output.
        lost: why a stream of the second is not made of these.
    """

    made: dict[str, Bridge]
    how: dict[str, str]
    lost: dict[str, str]


def resolve(observation: Observation, order: Sequence[int], start: int, end: int) -> Wiring | None:
    """The wiring of blocks start … end of those in ``order``; ``None`` if this call did not run them all.

    Raises:
        WiringError: they ran, but not as one chain of streams.
    """
    spots, wanted = observation.spots, list(order[start : end + 1])
    calls = [(number, call) for number, call in enumerate(observation.calls) if call.index in set(order)]
    indices = [call.index for _, call in calls]
    if not set(wanted) <= set(indices):
        return None
    first = indices.index(wanted[0])
    if indices[first : first + len(wanted)] != wanted:
        seen = ", ".join(spots[i].path for i in indices[first : first + len(wanted) + 1])
        raise WiringError(
            f"blocks {spots[wanted[0]].path} … {spots[wanted[-1]].path} do not run one after another: seen {seen}, …"
        )
    if indices.count(wanted[0]) > 1:
        times = indices.count(wanted[0])
        raise WiringError(f"{spots[wanted[0]].path} runs {times} times in one call of the transformer")
    numbers, seen_calls = zip(*calls[first : first + len(wanted)], strict=True)
    for producer, consumer, name in observation.late:
        if producer in numbers[:-1] and consumer > numbers[-1]:
            taker = spots[observation.calls[consumer].index].path
            raise WiringError(
                f"an output of {spots[observation.calls[producer].index].path} goes to {taker} ({name}=), past the "
                f"end of the range at {spots[wanted[-1]].path}: what is skipped would be missing there"
            )
    ports = [ports_of(observation, call) for call in seen_calls]
    return _follow(observation, list(seen_calls), ports)


def ports_of(observation: Observation, call: Seen) -> Ports:
    """Which arguments a block carries on, and in what form it returns them.

    Raises:
        WiringError: that is not clear.
    """
    spot = observation.spots[call.index]
    if call.odd:
        raise BlockError(
            f"{spot.path} returns {', '.join(call.odd)}; tensors, alone or in a tuple, dict or dataclass, are "
            "understood. Say where its streams are with BlockAdapter(patch_functor=...)"
        )
    if spot.pattern is not None:
        carries = _declared(observation, spot, call)
    else:
        found = [None if form is None else _carried(observation, call, p) for p, form in enumerate(call.outputs)]
        carries = tuple(found)
    twice = [name for name in carries if name is not None and carries.count(name) > 1]
    if twice:
        raise BlockError(f"{spot.path}: two outputs seem to carry on the same argument, {twice[0]}: {_advice(call)}")
    forms = zip(call.outputs, carries, strict=True)
    born = tuple(form if name is None else None for form, name in forms)
    if all(name is None for name in carries):
        seen = ", ".join(f"{name} {show(form)}" for name, form in call.inputs.items())
        raise BlockError(
            f"{spot.path}: which argument does output 0, {', '.join(map(show, call.outputs[:1]))}, carry on? Its "
            f"arguments are {seen}; none is alike"
        )
    return Ports(spot.face, call.maker, carries, born)


def gap(observation: Observation, before: Seen, sender: Ports, after: Seen, taker: Ports) -> Gap:
    """How the streams that one block takes are made of what the one before returned."""
    spots = observation.spots
    made: dict[str, Bridge] = {}
    how, lost = {}, {}
    fed = {name: position for position, name in before.fed.items()} if before.next is after else {}
    streams = [name for name in taker.carries if name is not None]
    for name in streams:
        form = after.inputs.get(name)
        if name in fed:
            made[name] = Stream(fed[name])
        elif name in after.made and before.next is after:
            made[name] = after.made[name]
        elif name in after.same:
            continue  # as an argument of the block before, which left it alone
        elif before.next is after and (like := _elsewhere(observation, before, after, name)) is not None:
            made[name] = like  # the values are hidden by an addition (of positions, at the first one)
        elif name in sender.carries and before.outputs[sender.carries.index(name)] == form:
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
                    f"between {spots[before.index].path} and {spots[after.index].path} the "
                    f"stream {name} {show(form)} is lost: the former returns {returned}, and it is not made of that "
                    "in a way that can be followed (nor could it be if inputs were constant, as in a warm-up on zeros)"
                )
    return Gap(made, how, lost)


def _elsewhere(observation: Observation, before: Seen, after: Seen, name: str) -> Bridge | None:
    """How the same stream was seen to be made between other blocks of the same two lists, in the same forms."""
    groups = [observation.spots[call.index].group for call in (before, after)]
    for call in observation.calls:
        if call.next is None or name not in call.next.made or isinstance(call.next.made[name], Stream):
            continue
        pair = (call, call.next)
        same_lists = groups == [observation.spots[other.index].group for other in pair]
        if same_lists and call.outputs == before.outputs and call.next.inputs.get(name) == after.inputs.get(name):
            return call.next.made[name]
    return None


def _declared(observation: Observation, spot: Spot, call: Seen) -> tuple[str | None, ...]:
    """What a declared pattern says, if it fits the forms that were seen, and where the outputs went."""
    assert spot.pattern is not None
    alike = call.next is not None and observation.spots[call.next.index].group == spot.group
    if len(spot.pattern.returns) != len(call.outputs):
        raise BlockError(
            f"{spot.path} returns {len(call.outputs)} value(s), but forward pattern {spot.pattern.value}, "
            f"{spot.pattern.text}, says {len(spot.pattern.returns)}"
        )
    try:
        carries = spot.pattern.carries(list(call.inputs))
    except ValueError as error:
        raise BlockError(f"{spot.path}: {error}") from None
    for position, name in enumerate(carries):
        if name is None and alike and position in call.fed:
            raise BlockError(
                f"{spot.path}: by forward pattern {spot.pattern.value}, {spot.pattern.text}, output {position} is no "
                f"stream, but the model hands it to the next block as {call.fed[position]}"
            )
        if name is not None and call.outputs[position] not in (None, call.inputs[name]):
            raise BlockError(
                f"{spot.path}: by forward pattern {spot.pattern.value}, {spot.pattern.text}, output {position} carries "
                f"on {name}, but they are {show(call.outputs[position])} and {show(call.inputs[name])}"
            )
        if alike and name is not None and call.fed.get(position, name) != name:
            raise BlockError(
                f"{spot.path}: by forward pattern {spot.pattern.value}, {spot.pattern.text}, output {position} carries "
                f"on {name}, but the model hands it to the next block as {call.fed[position]}"
            )
    return tuple(name if call.outputs[p] is not None else None for p, name in enumerate(carries))


def _carried(observation: Observation, call: Seen, position: int) -> str | None:
    """The argument of this block that output ``position`` carries on; ``None`` for what comes on top of a stream."""
    spots, spot, form = observation.spots, observation.spots[call.index], call.outputs[position]
    alike = [name for name, other in call.inputs.items() if other == form]
    kin = [
        other
        for other in observation.calls
        if spots[other.index].cls is spot.cls and len(other.outputs) == len(call.outputs)
    ]
    # Where outputs were seen to go: those of the nearest of its class within a list, first its own; to another list,
    # which may be handed them otherwise, only where nothing else is known.
    going_on = [
        other for other in kin if other.next is not None and spots[other.next.index].group == spots[other.index].group
    ]
    own = [other for other in going_on if spots[other.index].group == spot.group]
    fed: dict[int, str] = {}
    for other in [*sorted(own or going_on, key=lambda other: abs(other.index - call.index)), call]:
        fed = {**other.fed, **fed}
    # What another list does, with blocks of this class that may be set up otherwise, has to agree with the values.
    if not own and any(call.near.get(p, name) != name for p, name in fed.items()):
        fed = {}
    if fed.get(position) in alike:  # it goes on under a name that this block has, too
        return fed[position]
    alike = [name for name in alike if name not in {to for p, to in fed.items() if p != position}]
    if call.next is None and (before := _before(observation, call)) is not None:
        alike = [name for name in alike if name in before.fed.values()] or alike
    if "hidden_states" in alike and len(call.outputs) == 1:
        return "hidden_states"
    if len(alike) == 1:
        return alike[0]
    others = [form for p, form in enumerate(call.outputs) if p != position and form in call.inputs.values()]
    if form not in call.inputs.values() and position not in call.fed and others:
        return None
    seen = ", ".join(f"{name} {show(other)}" for name, other in call.inputs.items())
    taken = [name for name, other in call.inputs.items() if other == form]
    why = f"alike: {', '.join(alike or taken)}: {_advice(call)}" if taken else "none is alike"
    raise BlockError(
        f"{spot.path}: which argument does output {position}, {show(form)}, carry on? Its arguments are {seen}; {why}"
    )


def _advice(call: Seen) -> str:
    if len(call.outputs) > 2:
        return "say where its streams are with BlockAdapter(patch_functor=...)"
    patterns = "0, (h, e) -> (h, e), or 1, (h, e) -> (e, h)" if len(call.outputs) == 2 else "2 or 3"
    return f"say which with BlockAdapter(forward_pattern=...), {patterns}"


def _before(observation: Observation, call: Seen) -> Seen | None:
    return next((other for other in observation.calls if other.next is call), None)


def _follow(observation: Observation, calls: list[Seen], ports: list[Ports]) -> Wiring:
    """Follow each stream from the first block's arguments to the last one's outputs."""
    spots = observation.spots
    entry = list(calls[0].inputs)
    known: dict[str, Bridge | None] = {name: Stream(number) for number, name in enumerate(entry)}
    certain = True
    lost: dict[str, str] = {}
    for before, sender, after, taker in zip(calls, ports, calls[1:], ports[1:], strict=False):
        between = gap(observation, before, sender, after, taker)
        certain = certain and before.next is after and set(between.made) <= set(before.fed.values())
        left: dict[int, Bridge | None] = {
            p: Fresh() if name is None else known.get(name) for p, name in enumerate(sender.carries)
        }
        why = {p: lost[name] for p, name in enumerate(sender.carries) if name in lost}
        onward: dict[str, Bridge | None] = {}
        reasons = dict(between.lost)
        for name in after.inputs:
            if name in between.made:
                onward[name] = substitute(between.made[name], left)
                reason = next((why[p] for p in streams_of(between.made[name]) if p in why), None)
                if reason is not None:
                    reasons[name] = reason
            elif name in after.same and before.next is after:
                onward[name] = known.get(after.same[name])
                if after.same[name] in lost:
                    reasons[name] = lost[after.same[name]]
        known, lost = onward, reasons
    leave = [_source(name, known, lost, spots, calls) for name in ports[-1].carries]
    leave = [Fresh() if form is not None else bridge for bridge, form in zip(leave, ports[-1].born, strict=True)]
    used = sorted({number for bridge in leave for number in streams_of(bridge)})
    renumbered: dict[int, Bridge | None] = {number: Stream(new) for new, number in enumerate(used)}
    return Wiring(
        tuple(ports),
        tuple(entry[number] for number in used),
        tuple(None if bridge is None else substitute(bridge, renumbered) for bridge in leave),
        certain,
    )


def _source(
    name: str | None,
    known: Mapping[str, Bridge | None],
    lost: Mapping[str, str],
    spots: Sequence[Spot],
    calls: Sequence[Seen],
) -> Bridge | None:
    """What an output of the range's last block, which carries on ``name``, is made of at its first."""
    if name is None:
        return None
    bridge = known.get(name)
    if bridge is None or not any(True for _ in streams_of(bridge)):
        first, last = spots[calls[0].index].path, spots[calls[-1].index].path
        otherwise = f"{name}, which {last} returns, does not come from an argument of {first}: the streams change"
        raise WiringError(lost.get(name, otherwise))
    return bridge
