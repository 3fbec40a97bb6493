"""Executors: several workers run plans at once, for a search that decides on one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Protocol

from torch import nn

from ...config.cache_plan import CachePlan
from ..evaluation import Evaluation, Evaluator, Objective
from .lookahead import TrialScore

ExecutorResult = Evaluation | Exception  # a plan's evaluation, or the error that its run raised
KnownScore = Callable[[CachePlan], "tuple[TrialScore] | None"]  # a plan's score, if there is one already
LikelyPlans = Callable[[KnownScore], Iterable[CachePlan]]  # plans that may be run next, the likeliest first


class WorkerGroup(Protocol):
    """Workers that are ready to run plans."""

    @property
    def size(self) -> int:
        """Number of workers."""

    @property
    def seconds(self) -> float | None:
        """Time of an uncached run in this process; ``None``: speed is counted in block executions."""

    @property
    def run_equivalents(self) -> float:
        """Uncached runs that the workers made to compare with."""

    def run(self, plans: Sequence[CachePlan]) -> dict[str, ExecutorResult]:
        """Run plans, one on each worker at most; return their results by :func:`plan_key`."""

    def run_here(self, evaluator: Evaluator, plan: CachePlan) -> ExecutorResult:
        """Run a plan in this process, with another evaluator; of several ranks, on the first."""

    def close(self) -> None:
        """End the workers."""


class Executor(Protocol):
    """A place to run plans, as ``search(executor=)`` takes it."""

    def check(self, models: Sequence[nn.Module]) -> None:
        """Check that the executor can be used, before anything is run.

        Raises:
            ValueError, TypeError, ModuleNotFoundError: it cannot.
        """

    def start(self, evaluator: Evaluator, results: Any, most: int) -> WorkerGroup:
        """Start workers that can run plans.

        Args:
            evaluator: the evaluator that would run plans in this process.
            results: results of this process's uncached run; ``None``: it made none.
            most: largest number of plans that will be run.

        Raises:
            ValueError: a worker does not draw what was recorded.
        """


class ParallelRunner:
    """A plan runner with several workers: those that would be idle run the plans that are likely to come next.

    Args:
        group: the workers.
        objective: what plans are chosen by.
    """

    def __init__(self, group: WorkerGroup, objective: Objective = "both") -> None:
        self.group, self.objective = group, objective
        self._results: dict[str, ExecutorResult] = {}
        self._used: set[str] = set()

    @property
    def seconds(self) -> float | None:
        """Time of an uncached run."""
        return self.group.seconds

    @property
    def unused_run_equivalents(self) -> float:
        """Block executions that no decision was based on, over those of an uncached run."""
        unused = [result for key, result in self._results.items() if key not in self._used]
        return self.group.run_equivalents + sum(each.blocks for each in unused if isinstance(each, Evaluation))

    def __call__(self, plan: CachePlan, likely: LikelyPlans) -> Evaluation:
        """Evaluate a plan, unless it was run ahead: then return its evaluation.

        Args:
            plan: the plan to run now.
            likely: yields this plan, and then those that may be next.
        """
        key = plan_key(plan)
        if key not in self._results:
            plans = {key: plan}
            for other in likely(self._known_score):
                if len(plans) >= self.group.size:
                    break
                plans.setdefault(plan_key(other), other)
            self._results |= self.group.run(list(islice(plans.values(), self.group.size)))
        self._used.add(key)
        result = self._results[key]
        if isinstance(result, Exception):
            raise result
        return replace(result, plan=replace(plan, pieces=result.plan.pieces))

    def last(self, evaluator: Evaluator, plan: CachePlan) -> Evaluation:
        """Evaluate a plan in this process; what stops it on one of several ranks stops all."""
        result = self.group.run_here(evaluator, plan)
        if isinstance(result, Exception):
            raise result
        return result

    def _known_score(self, plan: CachePlan) -> tuple[TrialScore] | None:
        """Return the score of a plan that was run ahead, if its run raised nothing."""
        result = self._results.get(plan_key(plan))
        return (result.merit(self.objective),) if isinstance(result, Evaluation) else None


def plan_key(plan: CachePlan) -> str:
    """Return a text that is the same for all plans that cache the same, whatever their provenance."""
    return json.dumps([asdict(piece) for piece in plan.pieces])
