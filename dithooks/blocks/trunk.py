"""The trunk of a model: in which order its lists of blocks run, as observed on one computed call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ..errors import BlockError, WiringError
from .observation import Observation
from .stream_matching import block_io_of
from .wiring import Wiring, gap, resolve


@dataclass(frozen=True)
class Trunk:
    """Blocks in the order in which a model calls them.

    Args:
        order: the blocks' numbers among the observed blocks.
        apart: by list that is not part of the trunk, why not.
    """

    order: tuple[int, ...]
    apart: Mapping[str, str]


def wire(
    observation: Observation,
    order: tuple[int, ...],
    start: int,
    end: int,
    weights: Mapping[str, int] | None,
    name: str,
) -> tuple[tuple[int, ...], Wiring] | None:
    """Determine the order of the blocks and the wiring of a range; ``None`` if the observed call does not show it.

    Args:
        observation: of one call; if the model itself was not observed, ``order`` is kept.
        order: the order assumed so far.
        start: first block of the range.
        end: last block of the range; negative values count from the last of all blocks.
        weights: as for :func:`find_trunk`.
        name: of the transformer, for messages.

    Raises:
        WiringError: the range reaches past the end, or its streams cannot be followed; the message has advice.
    """
    observed = observation.observed
    trunk = find_trunk(observation, weights) if observation.whole else Trunk(order, {})
    if trunk is None:
        return None
    asked, end = end, end if end >= 0 else len(trunk.order) + end
    if end < start:
        raise WiringError(
            f"cache_block_start={start} and compute_last={-1 - asked} leave no block: {name} calls {len(trunk.order)}"
        )
    if end >= len(trunk.order):
        first, last = (observed[trunk.order[i]].path for i in (0, -1))
        apart = "; ".join(f"{group}: {why}" for group, why in trunk.apart.items())
        raise WiringError(
            f"blocks {start} to {end} reach past the end: {name} calls {len(trunk.order)} blocks, {first} … {last}"
            + (f" ({apart})" if apart else "")
        )
    try:
        wiring = resolve(observation, trunk.order, start, end)
    except BlockError:
        raise
    except WiringError as error:
        lists = list(dict.fromkeys(observed[index].group for index in trunk.order))
        advice = "Choose a range on one side of it with cache_block_start and cache_num_blocks"
        if len(lists) > 1:
            advice = f"Cache one of the lists by itself: blocks={' or '.join(map(repr, lists))}"
        raise WiringError(f"{error}. {advice}") from None
    return None if wiring is None else (trunk.order, wiring)


def resolve_lead(observation: Observation, order: tuple[int, ...], number: int) -> Wiring | None:
    """Determine the wiring of the first ``number`` blocks; ``None`` if the observed call did not run them all.

    Raises:
        WiringError: the blocks' streams cannot be followed; the message has advice.
    """
    try:
        return resolve(observation, order, 0, number - 1)
    except WiringError as error:
        raise WiringError(
            f"{error}. The policy decides by what the {number} blocks before the range do, and that is not known: "
            "choose cache_block_start=0, to decide by what enters the range, or a policy that does not look"
        ) from None


def followable_ranges(
    observation: Observation, trunk: Trunk
) -> tuple[set[tuple[int, int]], dict[tuple[int, int], str]]:
    """Split all ranges (first and last block) into those whose streams can be followed, and the others with reasons."""
    allowed, refused = set(), {}
    for start in range(len(trunk.order)):
        for end in range(start, len(trunk.order)):
            try:
                if resolve(observation, trunk.order, start, end) is None:
                    refused[start, end] = "the run did not call all of these blocks"
                else:
                    allowed.add((start, end))
            except WiringError as error:
                refused[start, end] = str(error)
    return allowed, refused


def find_trunk(observation: Observation, weights: Mapping[str, int] | None) -> Trunk | None:
    """Order the lists by their calls; ``None`` if the observed call ran none.

    Blocks of lists that alternate are counted in the order of their calls. With ``weights`` (parameters per list), a
    list is left out if its streams neither lead to nor come from the heaviest list's, unless it has half the weight of
    that one: counting blocks differently from call to call would be worse than refusing a range over both. Without
    ``weights``, all lists that ran are kept.
    """
    groups: dict[str, list[int]] = {}
    for index, block in enumerate(observation.observed):
        groups.setdefault(block.group, []).append(index)
    first: dict[int, int] = {}
    for number, call in enumerate(observation.calls):
        first.setdefault(call.index, number)
    apart = {group: "not run in this call" for group, indices in groups.items() if not first.keys() & set(indices)}
    ran = {group: indices for group, indices in groups.items() if group not in apart}
    if not ran:
        return None
    segments = _segments(ran, first)
    if weights is not None and len(segments) > 1:
        segments = _joined(observation, segments, first, weights, apart)
    return Trunk(tuple(index for segment in segments for index in _in_turn(segment, ran, first)), apart)


def _segments(ran: Mapping[str, Sequence[int]], first: Mapping[int, int]) -> list[list[str]]:
    """Group the lists by their first calls; lists that alternate form one group."""
    spans = {}
    for group, indices in ran.items():
        called = [first[index] for index in indices if index in first]
        spans[group] = (min(called), max(called))
    segments: list[list[str]] = []
    end = -1
    for group, (begins, ends) in sorted(spans.items(), key=lambda item: item[1]):
        if segments and begins < end:
            segments[-1].append(group)
        else:
            segments.append([group])
        end = max(end, ends)
    return segments


def _in_turn(segment: Sequence[str], ran: Mapping[str, Sequence[int]], first: Mapping[int, int]) -> list[int]:
    """Order the blocks of some lists by first call; a block that did not run stays behind the block before it."""
    keyed = []
    for group in segment:
        last = -1.0
        for index in ran[group]:
            last = first.get(index, last)
            keyed.append((last, index not in first, index))
    return [index for _, _, index in sorted(keyed)]


def _joined(
    observation: Observation,
    segments: list[list[str]],
    first: Mapping[int, int],
    weights: Mapping[str, int],
    apart: dict[str, str],
) -> list[list[str]]:
    """Return the segments that share the heaviest one's streams, outwards from it; note the others in ``apart``."""
    loads = [sum(weights[group] for group in segment) for segment in segments]
    heaviest = loads.index(max(loads))
    kept = [segments[heaviest]]
    ends = [heaviest, heaviest]
    for step, side in ((-1, 0), (1, 1)):
        here = heaviest + step
        while 0 <= here < len(segments):
            pair = (segments[here], segments[ends[0]]) if step < 0 else (segments[ends[1]], segments[here])
            why = _parted(observation, *pair, first) if loads[here] * 2 < loads[heaviest] else None
            if why is None:
                kept.insert(0 if step < 0 else len(kept), segments[here])
                ends[side] = here
            else:
                apart.update(dict.fromkeys(segments[here], why))
            here += step
    return kept


def _parted(
    observation: Observation, former: Sequence[str], latter: Sequence[str], first: Mapping[int, int]
) -> str | None:
    """Explain why the streams of some lists do not continue in others; ``None`` if they do."""
    observed = observation.observed
    numbers = {
        side: [first[i] for i in first if observed[i].group in groups] for side, groups in ((0, former), (1, latter))
    }
    before, after = observation.calls[max(numbers[0])], observation.calls[min(numbers[1])]
    try:
        sender, taker = block_io_of(observation, before), block_io_of(observation, after)
    except WiringError as error:
        return str(error)
    between = gap(observation, before, sender, after, taker)
    if between.lost:
        return next(iter(between.lost.values()))
    foreign = [name for name in taker.carries if name is not None and name not in between.made]
    if foreign:
        return f"{observed[after.index].path} takes {foreign[0]}, which {observed[before.index].path} does not return"
    return None
