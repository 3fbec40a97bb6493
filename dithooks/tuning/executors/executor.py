"""Plans run by several workers at once, for a search that asks for one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Protocol

from torch import nn

from ...config.cache_plan import CachePlan
from ..evaluation import Evaluation, Evaluator
from .lookahead import TrialScore

ExecutorResult = Evaluation | Exception  # what came of a plan: where its run failed, how
KnownScore = Callable[[CachePlan], "tuple[TrialScore] | None"]
LikelyPlans = Callable[[KnownScore], Iterable[CachePlan]]


class WorkerGroup(Protocol):
    """Workers that are ready."""

    @property
    def size(self) -> int:
        """How many there are."""

    @property
    def seconds(self) -> float | None:
        """Of an uncached run, as this process saw it; ``None``: speed is of block executions."""

    @property
    def run_equivalents(self) -> float:
        """Uncached runs that the workers made, to compare with."""

    def run(self, plans: Sequence[CachePlan]) -> dict[str, ExecutorResult]:
        """Run as many plans as there are workers at most, each once; what came of each, by :func:`plan_key`."""

    def close(self) -> None:
        """Let them go."""


class Executor(Protocol):
    """What ``search(executor=)`` takes: where plans are run."""

    def check(self, models: Sequence[nn.Module]) -> None:
        """See whether it can be used, before anything is run.

        Raises:
            ValueError, TypeError, ModuleNotFoundError: it cannot.
        """

    def start(self, evaluator: Evaluator, results: Any, most: int) -> WorkerGroup:
        """Workers that can run plans.

        Args:
            evaluator: would run them here.
            results: of this process's run without a cache; ``None``: it made none.
            most: plans that will be run.

        Raises:
            ValueError: a worker does not draw what was recorded.
        """


class ParallelRunner:
    """Runs the plan that is asked for, and on workers that were idle else those that may be next.

    Args:
        group: runs them.
    """

    def __init__(self, group: WorkerGroup) -> None:
        self.group = group
        self._found: dict[str, ExecutorResult] = {}
        self._used: set[str] = set()

    @property
    def seconds(self) -> float | None:
        """Of an uncached run."""
        return self.group.seconds

    @property
    def unused_run_equivalents(self) -> float:
        """Block executions that no decision was made on, over those of an uncached run."""
        unused = [found for key, found in self._found.items() if key not in self._used]
        return self.group.run_equivalents + sum(each.blocks for each in unused if isinstance(each, Evaluation))

    def __call__(self, plan: CachePlan, likely: LikelyPlans) -> Evaluation:
        """What came of a plan, run now or ahead of its time.

        Args:
            plan: that is asked for.
            likely: those that may be next, itself among them.
        """
        key = plan_key(plan)
        if key not in self._found:
            plans = {key: plan}
            for each in likely(self._answer):
                if len(plans) >= self.group.size:
                    break
                plans.setdefault(plan_key(each), each)
            self._found |= self.group.run(list(islice(plans.values(), self.group.size)))
        self._used.add(key)
        found = self._found[key]
        if isinstance(found, Exception):
            raise found
        return replace(found, plan=plan)

    def _answer(self, plan: CachePlan) -> tuple[TrialScore] | None:
        """How a plan did that was run ahead, if it could be."""
        found = self._found.get(plan_key(plan))
        return (found.psnr,) if isinstance(found, Evaluation) else None


def plan_key(plan: CachePlan) -> str:
    """What a plan does, whoever made it."""
    return json.dumps([asdict(piece) for piece in plan.pieces])
