"""Plans run by several workers at once, for a search that asks for one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, Protocol

from torch import nn

from ...config.cache_plan import CachePlan
from ..evaluation import Evaluation, Verifier
from .lookahead import Answer

ExecutorResult = Evaluation | Exception  # what came of a plan: where its run failed, how
Known = Callable[[CachePlan], "tuple[Answer] | None"]
Likely = Callable[[Known], Iterable[CachePlan]]


class Team(Protocol):
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
        """Run as many plans as there are workers at most, each once; what came of each, by :func:`key_of`."""

    def close(self) -> None:
        """Let them go."""


class Executor(Protocol):
    """What ``search(executor=)`` takes: where plans are run."""

    def check(self, models: Sequence[nn.Module]) -> None:
        """See whether it can be used, before anything is run.

        Raises:
            ValueError, TypeError, ModuleNotFoundError: it cannot.
        """

    def start(self, verifier: Verifier, results: Any, most: int) -> Team:
        """Workers that can run plans.

        Args:
            verifier: would run them here.
            results: of this process's run without a cache; ``None``: it made none.
            most: plans that will be run.

        Raises:
            ValueError: a worker does not draw what was recorded.
        """


class SpreadRunner:
    """Runs the plan that is asked for, and on workers that were idle else those that may be next.

    Args:
        team: runs them.
    """

    def __init__(self, team: Team) -> None:
        self.team = team
        self._found: dict[str, ExecutorResult] = {}
        self._used: set[str] = set()

    @property
    def seconds(self) -> float | None:
        """Of an uncached run."""
        return self.team.seconds

    @property
    def in_vain(self) -> float:
        """Block executions that no decision was made on, over those of an uncached run."""
        unused = [found for key, found in self._found.items() if key not in self._used]
        return self.team.run_equivalents + sum(each.blocks for each in unused if isinstance(each, Evaluation))

    def __call__(self, plan: CachePlan, likely: Likely) -> Evaluation:
        """What came of a plan, run now or ahead of its time.

        Args:
            plan: that is asked for.
            likely: those that may be next, itself among them.
        """
        key = key_of(plan)
        if key not in self._found:
            plans = {key: plan}
            for each in likely(self._answer):
                if len(plans) >= self.team.size:
                    break
                plans.setdefault(key_of(each), each)
            self._found |= self.team.run(list(islice(plans.values(), self.team.size)))
        self._used.add(key)
        found = self._found[key]
        if isinstance(found, Exception):
            raise found
        return replace(found, plan=plan)

    def _answer(self, plan: CachePlan) -> tuple[Answer] | None:
        """How a plan did that was run ahead, if it could be."""
        found = self._found.get(key_of(plan))
        return (found.worth,) if isinstance(found, Evaluation) else None


def key_of(plan: CachePlan) -> str:
    """What a plan does, whoever made it."""
    return json.dumps([asdict(piece) for piece in plan.pieces])
