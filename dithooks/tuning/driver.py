"""Runs what is proposed, until there is nothing more, or a limit is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from ..config.cache_plan import CachePlan
from ..errors import RunMismatch
from ..planning.plan import assembled
from ..planning.planner import Candidate, Planner
from ..progress_bars import ProgressReport
from ..recording.image_metrics import Score
from ..recording.rank_agreement import agree, leads
from ..validation import check_count, check_number
from .evaluation import Evaluation, Verifier
from .executors.executor import Known, Likely, key_of
from .executors.lookahead import Answer, ahead
from .journal import Journal
from .proposals import Proposals, proposals
from .result import SearchResult, best_of

MEASURED = ("seconds", "speedup", "blocks", "failure")
METHODS = {"time": "by search", "blocks": "by search, in block executions,"}
NEAR = 0.95  # of the target: runs differ by as much from one time to another


@dataclass(frozen=True)
class Limits:
    """How long a search goes on.

    Args:
        evals: plans that are run, and
        local_moves: further ones that only move a refresh of the best.
        runs: block executions of all, the recorded run included, over those of an uncached run.
        seconds: of all.
    """

    evals: int
    local_moves: int
    runs: float | None
    seconds: float | None

    def __post_init__(self) -> None:
        check_count("max_evals", self.evals, 1)
        check_count("local_moves", self.local_moves, 0)
        for name, value in (("max_runs", self.runs), ("max_seconds", self.seconds)):
            if value is not None:
                check_number(name, value, 0, strictly=True)

    def allow(self, runs: float, seconds: float) -> bool:
        """Whether that much may be spent."""
        spent = ((runs, self.runs), (seconds, self.seconds))
        return all(limit is None or value <= limit for value, limit in spent)


class Runner(Protocol):
    """Runs plans: here, or with others."""

    @property
    def seconds(self) -> float | None:
        """Of an uncached run; ``None``: speed is of block executions."""

    @property
    def in_vain(self) -> float:
        """Block executions that no decision was made on, over those of an uncached run."""

    def __call__(self, plan: CachePlan, likely: Likely) -> Evaluation:
        """What came of a plan; those that are likely to be asked for next may be run beside it."""


@dataclass(frozen=True, eq=False)
class Here:
    """A runner that runs one plan after another."""

    verifier: Verifier
    in_vain: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Of an uncached run."""
        return self.verifier.seconds

    def __call__(self, plan: CachePlan, likely: Likely) -> Evaluation:
        """What came of a plan."""
        return self.verifier(plan)


@dataclass(eq=False)
class Driver:
    """Runs what is proposed until a limit is reached; on several ranks, the first one decides."""

    runner: Runner
    planner: Planner
    target: float
    limits: Limits
    journal: Journal
    report: ProgressReport
    begun: float
    run_equivalents: float

    def __post_init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.interrupted = False

    def drive(self) -> SearchResult:
        """All of it."""
        most = self.limits.evals, self.limits.local_moves
        proposed = proposals(self.planner, self.target, *most) if leads() else None
        score: float | None = None
        try:
            while (plan := self._next(proposed, score)) is not None:
                evaluation = self._evaluated(plan)
                self.evaluations.append(evaluation)
                score = evaluation.worth
        except KeyboardInterrupt:
            self.interrupted = True
        return self._result()

    def _next(self, proposed: Proposals | None, score: float | None) -> CachePlan | None:
        """The plan that is to be run, on every rank."""
        text = None
        if proposed is not None:
            try:
                plan = self._assembled(proposed.send(score) if self.evaluations else next(proposed))
                text = plan.to_json() if self._affordable(plan) else None
            except StopIteration:
                pass
        text = agree(text)
        return None if text is None else CachePlan.from_json(text)

    def _ahead(self, known: Known) -> Iterator[CachePlan]:
        """The plan that is asked for, and those that may be next."""
        return ahead(self._after, [each.worth for each in self.evaluations], known) if leads() else iter(())

    def _after(self, answers: Sequence[Answer]) -> CachePlan | None:
        """What is run when plans have done so well, one after another."""
        proposed = proposals(self.planner, self.target, self.limits.evals, self.limits.local_moves)
        try:
            candidate = next(proposed)
            for answer in answers:
                candidate = proposed.send(answer)
        except StopIteration:
            return None
        plan = self._assembled(candidate)
        return plan if self._affordable(plan) else None

    def _assembled(self, candidate: Candidate) -> CachePlan:
        return assembled(self.planner, candidate, self.target, METHODS[self.planner.cost])

    def _affordable(self, plan: CachePlan) -> bool:
        if self._known(plan) is not None:
            return True
        whole = self.planner.recording.run_ms / 1e3 if self.runner.seconds is None else self.runner.seconds
        seconds = time.perf_counter() - self.begun + whole / plan.provenance.predicted_speedup
        return self.limits.allow(self.run_equivalents + 1.0 / plan.speedup, seconds)

    def _evaluated(self, plan: CachePlan) -> Evaluation:
        """Run a plan, or look up how it did."""
        most = self.limits.evals + self.limits.local_moves
        best = best_of(self.evaluations)
        note = "" if best is None else f"best so far {best.worth:.1f} dB at {best.speedup:.2f}×"
        self.report("run plans", len(self.evaluations), most, note)
        known: Evaluation | None = agree(self._known(plan))
        if known is not None:
            return known
        found = self.runner(plan, self._ahead)
        self.run_equivalents += found.blocks
        seen: dict[str, Any] = {name: getattr(found, name) for name in MEASURED}
        seen |= {} if found.score is None else asdict(found.score)
        seen = agree(seen)
        self.journal.keep_evaluation(key_of(plan), seen)
        return _made(plan, seen)

    def _known(self, plan: CachePlan) -> Evaluation | None:
        """How a plan did before, if the journal tells."""
        known = self.journal.evaluation(key_of(plan))
        try:
            return None if known is None else _made(plan, known)
        except (KeyError, TypeError):  # a line that was written by hand, or by another version: it is run again
            return None

    def _result(self) -> SearchResult:
        best = best_of(self.evaluations)
        failures = [each.failure or "its pictures are not finite" for each in self.evaluations]
        if best is None and failures and not self.interrupted:
            raise RunMismatch(f"none of {len(failures)} plans could be run: {'; '.join(dict.fromkeys(failures))}")
        if best is not None:
            plan, score = best.plan, best.score
            assert score is not None
            near = NEAR if self.planner.cost == "time" else 1 - 1e-6
            fast = best.speedup >= self.target * near
            found = replace(
                plan.provenance,
                measured_speedup=best.speedup,
                psnr=score.psnr,
                relative_l1=score.relative_l1 if math.isfinite(score.relative_l1) else None,
                ssim=score.ssim,
                reached=plan.provenance.reached and fast,
            )
            plan = replace(plan, provenance=found)
        else:  # interrupted, or no run was allowed: what the recording says
            candidate = self.planner.candidate(self.target)
            plan = assembled(self.planner, candidate, self.target, "by planning from a recording")
            plan = CachePlan.from_json(agree(plan.to_json()))
        return SearchResult(
            plan,
            plan.provenance.reached,
            tuple(self.evaluations),
            self.planner.recording,
            self.run_equivalents + self.runner.in_vain,
            time.perf_counter() - self.begun,
            self.interrupted,
        )


def _made(plan: CachePlan, values: dict[str, Any]) -> Evaluation:
    """An evaluation, from what was measured."""
    score = None if values["failure"] else Score(**{each.name: values[each.name] for each in fields(Score)})
    return Evaluation(plan, score=score, **{name: values[name] for name in MEASURED})
