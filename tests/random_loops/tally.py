"""Many loops, one after another, and what came of them by kind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby

from .drawing import draw
from .judging import Verdict, described, judge
from .playing import play

KEPT = 100  # loops of each fault that are listed
LEAST = 0.9  # of the calls that are due to be reused


@dataclass
class Share:
    """The calls of one kind of loop that could be reused, and those that were.

    Args:
        loops: number of loops.
        reusable: number of calls that could be reused.
        due: of these, those that were reused, or for whose computing there is no excuse.
        met: of these, those that were reused.
        wrong: number of loops with a wrong residual.
        silent: number of loops that say nothing about reusing nothing.
        refused: number of loops that an error of the library ended.
    """

    loops: int = 0
    reusable: int = 0
    due: int = 0
    met: int = 0
    wrong: int = 0
    silent: int = 0
    refused: int = 0

    @property
    def ratio(self) -> float:
        """Return the share of the due calls that were reused."""
        return self.met / self.due if self.due else 1.0

    def __add__(self, other: Share) -> Share:
        return Share(*map(sum, zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


@dataclass
class Tally:
    """What came of many loops.

    Args:
        wrong: size and number of a loop, and its first wrong residual in words.
        silent: size and number of a loop that reused nothing and says nothing about it, and its kind.
        refused: size and number of a loop, and the error that ended it.
        calls: number of all calls.
        unplanned: number of calls that were reused although they were to be computed.
        shares: by dimension and value of :meth:`Loop.features`.
    """

    wrong: list[tuple[int, int, str]] = field(default_factory=list)
    silent: list[tuple[int, int, str]] = field(default_factory=list)
    refused: list[tuple[int, int, str]] = field(default_factory=list)
    calls: int = 0
    unplanned: int = 0
    shares: dict[tuple[str, str], Share] = field(default_factory=dict)

    @property
    def total(self) -> Share:
        """Return the share over all loops."""
        return self.shares.get(("all", "loops"), Share())

    def add(self, number: int, verdict: Verdict) -> None:
        """Add one loop."""
        met = verdict.reusable & verdict.reused
        due = met | (verdict.reusable - verdict.excused)
        loop = verdict.loop
        unusual = [loop.pattern] * (loop.pattern != "constant") + ["ended at once"] * loop.ends_at_once
        kind = ", ".join([loop.clock, loop.kind, loop.solver, *unusual])
        wrong, refused = bool(verdict.wrong), verdict.error is not None
        share = Share(1, len(verdict.reusable), len(due), len(met), wrong, verdict.silent, refused)
        for key in [("all", "loops"), *verdict.loop.features().items()]:
            self.shares[key] = self.shares.get(key, Share()) + share
        self.calls += verdict.calls
        self.unplanned += len(verdict.reused - verdict.reusable)
        if wrong:
            self.wrong.append((verdict.calls, number, f"{kind}: {verdict.wrong[0]}"))
        if verdict.silent:
            self.silent.append((verdict.calls, number, kind))
        if verdict.error is not None:
            self.refused.append((verdict.calls, number, f"{kind}: {verdict.error}"))

    def merge(self, other: Tally) -> None:
        """Add the loops of another tally."""
        self.wrong, self.silent = self.wrong + other.wrong, self.silent + other.silent
        self.refused = self.refused + other.refused
        self.calls, self.unplanned = self.calls + other.calls, self.unplanned + other.unplanned
        for key, share in other.shares.items():
            self.shares[key] = self.shares.get(key, Share()) + share


def run_loops(first: int, count: int, only: Mapping[str, str] | None = None) -> Tally:
    """Play the loops of so many numbers, of these those of some kind, and return the tally."""
    tally = Tally()
    for number in range(first, first + count):
        loop = draw(number)
        if not only or only.items() <= loop.features().items():
            tally.add(number, judge(play(loop)))
    return tally


def page(tally: Tally, least: float = LEAST) -> str:
    """Return a tally in Markdown."""
    total = tally.total
    lines = [
        f"{total.loops} loops of {tally.calls} calls: {len(tally.wrong)} with a wrong residual, {len(tally.silent)} "
        f"silent, {len(tally.refused)} refused. Of {total.reusable} calls that could be reused, {total.due} were due "
        f"and {total.met} reused ({total.ratio:.1%}); {tally.unplanned} others were reused, too.",
    ]
    for dimension, rows in groupby(sorted(tally.shares.items()), lambda item: item[0][0]):
        shown = [(value, share) for (_, value), share in rows]
        if dimension == "all":
            continue
        if dimension == "clock x branches":
            shown = [(value, share) for value, share in shown if share.ratio < least or share.wrong or share.silent]
        lines += [
            "",
            f"| {dimension} | loops | due | reused | share | wrong | silent | refused |",
            "|---|" + "---|" * 7,
        ]
        lines += [
            f"| {value} | {share.loops} | {share.due} | {share.met} | {share.ratio:.1%} | {share.wrong} | "
            f"{share.silent} | {share.refused} |"
            for value, share in shown
        ]
    for title, loops in (("Wrong", tally.wrong), ("Refused", tally.refused), ("Silent", tally.silent)):
        if loops:
            lines += ["", f"{title}, the smallest loops first:", ""]
            lines += [f"- {number} ({calls} calls): {text}" for calls, number, text in sorted(loops)[:KEPT]]
    return "\n".join(lines)


def story(number: int) -> str:
    """Return one loop in words: each call, and whose residual it was given."""
    loop = draw(number)
    outcome = play(loop)
    verdict = judge(outcome)
    lines = [f"{name} = {value!r}" for name, value in vars(loop).items()]
    for call in outcome.calls.values():
        fate = "computed" if call.source is None else f"residual of call {call.source}"
        flags = " reusable" * (call.number in verdict.reusable) + " excused" * (call.number in verdict.excused)
        lines.append(f"{call.number}: {described(call)}: {fate}{flags}")
    lines += [f"WRONG {text}" for text in verdict.wrong] + [f"WARNING {text}" for text in outcome.warnings]
    lines += ["SILENT"] * verdict.silent + [f"ERROR {verdict.error}"] * (verdict.error is not None)
    return "\n".join(lines)
