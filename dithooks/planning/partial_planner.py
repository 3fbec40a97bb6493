"""The planner of steps that compute a part: the last blocks alone, or one branch of guidance alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np

from ..config.transformer_plan import TransformerPlan
from ..policies.conditional import Conditional
from ..recording.recording import Floats, Trace
from .candidate import Candidate, Choice, Option, Variant
from .conditional_schedules import ConditionalSchedules, most_anchors
from .pareto_front import joint_front, pareto_front
from .planner import FEW_RANGES, Planner

HALVES = 2  # of the cost of a step with guidance, of which one branch alone is computed


@dataclass(eq=False)
class PartialPlanner(Planner):
    """A planner of steps that compute a part, for variants of such a mode; of others it plans as :class:`Planner`."""

    _with_halves: dict[tuple[Any, ...], ConditionalSchedules] = field(default_factory=dict, repr=False)

    def neighbours(self, candidate: Candidate) -> Iterator[Candidate]:
        """Yield those of a plan without such steps; of others none are tried."""
        if candidate.variant.mode == "whole":
            yield from super().neighbours(candidate)

    def _options(self, number: int, variant: Variant, needed: float, avoid: Sequence[Choice]) -> list[Option]:
        if variant.mode == "whole":
            return super()._options(number, variant, needed, avoid)
        found = self._with_tails if variant.mode == "tail" else self._with_one_branch
        return pareto_front([*self._uncached, *found(number, variant, avoid)])

    def _choice(self, number: int, option: Option, variant: Variant) -> Choice:
        if option.tail:
            behind = tuple(super(PartialPlanner, self)._choice(number, each, variant) for each in option.tail)
            return super()._choice(number, option._replace(tail=()), variant)._replace(tail=behind)
        if variant.mode == "conditional":
            found = self._one_branch(number, variant).best(option.refreshes / HALVES)
            choice = super()._choice(number, option._replace(computed=found.computed), variant)
            return choice._replace(conditional=found.conditional)
        return super()._choice(number, option, variant)

    def _piece(self, choice: Choice, variant: Variant) -> TransformerPlan:
        """Return the plan of one range, with those of the ranges behind it."""
        piece = super()._piece(choice, variant)
        more = tuple(self._piece(each, variant) for each in choice.tail)
        return replace(piece, more_ranges=more, conditional=self._alone(choice, self.recording.traces[choice.trace]))

    def _alone(self, choice: Choice, trace: Trace) -> Conditional | None:
        """Return the steps at which one branch alone is computed, over all steps of the run."""
        solver = self.recording.solver
        if solver is None or solver.conditional is None or not any(choice.conditional):
            return None
        steps = np.zeros(self.recording.steps, dtype=int)
        steps[trace.steps] = choice.conditional
        return Conditional(solver.conditional, tuple(steps.tolist()), solver.in_batch)

    def _with_tails(self, number: int, variant: Variant, avoid: Sequence[Choice]) -> list[Option]:
        """Return the options with all blocks in two ranges, for each place to part them and each number of refreshes.

        The errors of both are taken to add up as if unrelated, so each range's schedules are solved by themselves.
        """
        trace = self.recording.traces[number]
        last, numbers = len(trace.blocks) - 1, {tuple(pair): r for r, pair in enumerate(trace.ranges.tolist())}
        parted = [(numbers.get((0, at - 1), -1), numbers.get((at, last), -1)) for at in range(1, last + 1)]
        usable = set(self._possible(number, avoid, variant._replace(mode="whole")))
        parted = [pair for pair in parted if usable.issuperset(pair)]
        if not parted or self.shared or variant.payload == "output" or not are_in_order(trace.blocks):
            return []
        if variant.anchors > 2 and len(parted) > FEW_RANGES:
            fewer = self._of_parts(number, parted, variant._replace(anchors=2))
            front = dict.fromkeys((each.range, each.tail[0].range) for each in reversed(pareto_front(fewer)))
            parted = [*front][:FEW_RANGES]
        return self._of_parts(number, parted, variant)

    def _of_parts(self, number: int, parted: Sequence[tuple[int, int]], variant: Variant) -> list[Option]:
        """Return the options of some pairs of ranges, those that no other of the same pair beats."""
        steps, saving = len(self.recording.traces[number].steps), self.savings.step[number]
        ranges = sorted({each for pair in parted for each in pair})
        whole = variant._replace(mode="whole")  # what is solved for it serves both
        costs = dict(zip(ranges, self._costs(number, ranges, whole, steps), strict=True))

        def options(r: int) -> list[Option]:
            every = [Option((steps - k) * float(saving[r]), float(costs[r][k]), r, k) for k in range(1, steps)]
            return pareto_front(every)

        return [
            front._replace(saved=saved, cost=cost, tail=(behind,))
            for head, tail in parted
            for saved, cost, (front, behind) in joint_front([options(head), options(tail)])
        ]

    def _with_one_branch(self, number: int, variant: Variant, avoid: Sequence[Choice]) -> list[Option]:
        """Return the options with steps of one branch alone, one for each cost in halves of a step."""
        whole = self._possible(number, avoid, variant._replace(payload="output"))
        trace = self.recording.traces[number]
        if not whole or self.shared or self._directions(number) is None or not most_anchors(len(trace.steps), 2):
            return []
        steps, saving = len(trace.steps), float(self.savings.step[number][whole[0]])
        errors = self._one_branch(number, variant).errors()
        return [
            Option((steps - cost) * saving, error, whole[0], round(cost * HALVES))
            for cost, error in errors.items()
            if cost < steps
        ]

    def _one_branch(self, number: int, variant: Variant) -> ConditionalSchedules:
        """Return all schedules of a transformer with steps of one branch alone."""
        key = number, variant.anchors, variant.late_error_weight, variant.carries
        if key not in self._with_halves:
            trace, solver, apart = self.recording.traces[number], self.recording.solver, self._directions(number)
            assert solver is not None
            assert apart is not None
            gram = solver.gram[np.ix_(trace.steps, trace.steps)]
            moved = self._late_weights(trace, variant) * np.abs(solver.gains[trace.steps])
            anchors = most_anchors(len(trace.steps), variant.anchors)
            self._with_halves[key] = ConditionalSchedules(
                gram, trace.times, moved, apart, anchors, carries=variant.carries
            )
        return self._with_halves[key]

    def _directions(self, number: int) -> Floats | None:
        """Return by how much guidance differs between a transformer's steps; ``None``: it is not known."""
        solver, steps = self.recording.solver, self.recording.traces[number].steps
        apart = None if solver is None else solver.apart_squares
        return None if apart is None else apart[np.ix_(steps, steps)]


def are_in_order(blocks: Sequence[str]) -> bool:
    """Return whether blocks are called list by list, each in its order: several ranges of the others are refused.

    Example:
        >>> are_in_order(["blocks.0", "blocks.1", "singles.0"]), are_in_order(["blocks.0", "singles.0", "blocks.1"])
        (True, False)
    """
    places = [(path, number) for path, _, number in (block.rpartition(".") for block in blocks)]
    if not all(number.isdecimal() for _, number in places):  # blocks that stand in no list
        return False
    runs = [(path, [int(number) for _, number in group]) for path, group in groupby(places, key=lambda place: place[0])]
    return len(runs) == len(dict(runs)) and all(numbers == sorted(numbers) for _, numbers in runs)
