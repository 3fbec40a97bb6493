"""A survey in words: the ranges in the blocks of the real model, the places of gaps, and the reasons of refusals."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

from .range_trials import BlockPair
from .survey import Survey, spelled

Kind = Literal["any", "lists", "single", "some", "none"]


class Ranges(NamedTuple):
    """The ranges of a survey, counted as in the real model where that follows from the tiny one.

    Args:
        kind: the ranges that can be cached, in a word.
        number: the number of the real model's blocks.
        inside: ranges of which every part can be cached, too.
        wholes: ranges that can be cached, but not any part of them.
        real: whether ``inside`` and ``wholes`` are counted in blocks of the real model, or of the tiny one.
        largest: the largest range, in blocks of the real model; None if there is none, or none that is known.
    """

    kind: Kind
    number: int
    inside: tuple[BlockPair, ...]
    wholes: tuple[BlockPair, ...]
    real: bool
    largest: BlockPair | None


def ranges_of(survey: Survey, counts: Mapping[str, int]) -> Ranges:
    """The ranges of a survey in the numbers of the real model.

    Args:
        survey: a survey of a tiny model, or of the real one.
        counts: the real number of blocks by path of list; a list that is left out has as many as were surveyed.
    """
    kind, tiny = kind_of(survey), len(survey.blocks)
    real = {each.path: counts.get(each.path, each.number) for each in survey.lists if not each.apart}
    number = sum(real.values())
    same = all(real[each.path] == each.number for each in survey.lists if not each.apart)
    ends = [sum(list(real.values())[: place + 1]) for place in range(len(real))]
    inside: tuple[BlockPair, ...] | None = {
        "any": ((0, number - 1),),
        "lists": tuple((end - own, end - 1) for end, own in zip(ends, real.values(), strict=True)),
        "single": tuple((block, block) for block in range(number)),
        "none": (),
    }.get(kind)
    if same or inside is None:
        whole = (0, tiny - 1) in survey.wholes
        largest = survey.largest if same else (0, number - 1) if whole else None
        return Ranges(kind, number, survey.ranges, survey.wholes, same, largest)
    return Ranges(kind, number, inside, (), True, max(inside, key=lambda pair: pair[1] - pair[0], default=None))


def kind_of(survey: Survey) -> Kind:
    """The kind of ranges that can be cached: any, any within one list, single blocks only, some, or none."""
    last = len(survey.blocks) - 1
    if survey.ranges == ((0, last),):
        return "any"
    if not survey.ranges and not survey.wholes:
        return "none"
    if not survey.wholes:
        if survey.ranges == tuple((block, block) for block in range(last + 1)):
            return "single"
        if survey.ranges == _runs(survey.blocks):
            return "lists"
    return "some"


def allowed_of(survey: Survey) -> set[BlockPair]:
    """All ranges that can be cached, by first and last block of the surveyed model."""
    parts = {(a, b) for first, last in survey.ranges for a in range(first, last + 1) for b in range(a, last + 1)}
    return parts | set(survey.wholes)


def describe(ranges: Ranges) -> str:
    """The ranges that can be cached, in a line.

    Example:
        >>> describe(Ranges("some", 40, ((0, 0), (2, 5)), ((0, 5), (1, 4)), False, (0, 39)))
        'any range in 0 or 2–5; as a whole only: 0–5, 1–4'
    """
    if ranges.kind == "none":
        return "none"
    if ranges.kind == "single":
        return f"single blocks only ({_pair((0, ranges.number - 1))})"
    if ranges.kind == "lists":
        return "any range in one list"
    spans = [_pair(pair) for pair in ranges.inside]
    inside = f"any range in {', '.join(spans[:-1])} or {spans[-1]}" if len(spans) > 1 else f"any range in {spans[0]}"
    return inside + (f"; as a whole only: {', '.join(_pair(pair) for pair in ranges.wholes)}" if ranges.wholes else "")


def reasons(survey: Survey) -> list[tuple[str, str]]:
    """The reasons of refusals, each with the blocks of a shortest range that it holds for.

    Reasons that differ in their numbers only count as one. A range that was not tried has the reason of a range inside
    it that failed.
    """
    by_kind: dict[str, tuple[str, str]] = {}
    for first, last, why in survey.refused:
        line = brief(why)
        alike = re.sub(r"\d+(\.\d+)*", "#", re.sub(r"[\w.]*\.\d+\b", "#", line))
        ends = survey.blocks[first], survey.blocks[last]
        by_kind.setdefault(alike, (ends[0] if first == last else " … ".join(ends), line))
    return list(by_kind.values())


def brief(why: str) -> str:
    """A reason without the range that it names at its beginning, and without the advice at its end.

    Example:
        >>> brief("blocks.1 runs 2 times in one call of the transformer. Choose others")
        'blocks.1 runs 2 times in one call of the transformer'
    """
    sentence = re.split(r"\. (?=[A-Z])", why, maxsplit=1)[0]
    sentence = re.sub(r"^.*?: between ", "between ", sentence)  # without the model's name
    return re.sub(r" \(nor could it be.*\)$", "", sentence.rpartition("(relative L2): ")[2])


def places(survey: Survey, numbers: Sequence[int]) -> str:
    """The places of gaps in words, which hold for any number of blocks if possible.

    Args:
        survey: the survey.
        numbers: the blocks before each gap.
    """
    runs = _runs(survey.blocks)
    if len(numbers) == len(survey.blocks) - 1:
        return "between all blocks"
    lists = [survey.blocks[first].rpartition(".")[0] for first, _ in runs]
    if len(set(lists)) < len(lists):
        return f"after {spelled(numbers)}"
    words, left = [], set(numbers)
    for name, (first, last) in zip(lists, runs, strict=True):
        within = set(range(first, last))
        if within and within <= left:
            words.append(f"between the blocks of {name}")
        elif within & left:
            words.append(f"after {name}.{spelled(sorted(number - first for number in within & left))}")
        left -= within
    for (_, last), (before, after) in zip(runs, pairwise(lists), strict=False):
        if last in left:
            words.append(f"between {before} and {after}")
    return ", ".join(words)


def _runs(blocks: Sequence[str]) -> tuple[BlockPair, ...]:
    """First and last block of each run of blocks of one list."""
    runs: list[BlockPair] = []
    for number, path in enumerate(blocks):
        name = path.rpartition(".")[0]
        if runs and blocks[runs[-1][1]].rpartition(".")[0] == name:
            runs[-1] = (runs[-1][0], number)
        else:
            runs.append((number, number))
    return tuple(runs)


def _pair(pair: BlockPair) -> str:
    return f"{pair[0]}–{pair[1]}" if pair[1] > pair[0] else str(pair[0])
