"""Runs proposed plans one after another, until no more are proposed or a limit is reached."""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

from ..config.cache_plan import CachePlan
from ..errors import InvalidSetting, RunMismatch, TargetMissed, WrongType
from ..planning.candidate import Candidate, Variant
from ..planning.plan import build_plan
from ..planning.planner import Planner
from ..progress_bars import ProgressReport
from ..recording.image_metrics import Metric, Score
from ..recording.rank_broadcast import broadcast_from_rank_0, is_rank_0
from ..validation import check_choice, check_count, check_number, check_text, shown
from .evaluation import HALVED, Evaluation, Evaluator, Fit, Objective
from .executors.executor import KnownScore, LikelyPlans, plan_key
from .executors.lookahead import TrialScore, likely_next
from .journal import Journal
from .proposals import Proposals, fastest, proposals
from .result import SearchResult, best_evaluation, fastest_evaluation
from .search_progress import CHECKS, expected_trials

LATER = ("lpips", "psnr_error")  # what a journal need not hold of a score
MEASURED = ("seconds", "speedup", "blocks", "failure")
METHODS = {"time": "by search", "blocks": "by search, in block executions,"}
DRAWN_OTHERWISE = 1.0  # dB below the fit, from where on what a plan draws by itself is what counts: guidance may change
TIMING_TOLERANCE = 0.95  # of the target: two runs of one plan differ by as much


@dataclass(frozen=True)
class Limits:
    """The limits of a search.

    Args:
        evals: plans that are run, without local moves.
        local_moves: further plans that only move a refresh of the best.
        runs: block executions of all runs, the recorded one included, over those of one uncached run.
        seconds: time of the whole search.
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

    @property
    def plans(self) -> int:
        """Plans that are run at most, local moves included."""
        return self.evals + self.local_moves

    def runs_ahead(self, spent: float, speedup: float, done: int = 0) -> float:
        """Return what the trials and checks of plans will probably take yet, in uncached runs.

        Args:
            spent: uncached runs' worth of blocks so far.
            speedup: of the plans.
            done: plans that were run.
        """
        left = None if self.runs is None else self.runs - spent
        return (expected_trials(self.plans - done, left, speedup) + CHECKS) / speedup

    def allow(self, runs: float, seconds: float) -> bool:
        """Whether so much may be spent in all."""
        spent = ((runs, self.runs), (seconds, self.seconds))
        return all(limit is None or value <= limit for value, limit in spent)


class PlanRunner(Protocol):
    """Runs plans, in this process or with workers."""

    @property
    def seconds(self) -> float | None:
        """Time of an uncached run; ``None``: speed is counted in block executions."""

    @property
    def unused_run_equivalents(self) -> float:
        """Block executions that no decision was based on, over those of an uncached run."""

    def __call__(self, plan: CachePlan, likely: LikelyPlans) -> Evaluation:
        """Evaluate a plan; idle workers may run plans that are likely to be proposed next."""

    def last(self, evaluator: Evaluator, plan: CachePlan) -> Evaluation:
        """Evaluate a plan in this process; what stops it on one of several ranks stops all."""


@dataclass(frozen=True, eq=False)
class LocalRunner:
    """A plan runner that runs one plan after another in this process."""

    evaluator: Evaluator
    unused_run_equivalents: float = 0.0

    @property
    def seconds(self) -> float | None:
        """Time of an uncached run."""
        return self.evaluator.seconds

    def __call__(self, plan: CachePlan, likely: LikelyPlans) -> Evaluation:
        """Evaluate a plan."""
        return self.evaluator(plan)

    def last(self, evaluator: Evaluator, plan: CachePlan) -> Evaluation:
        """Evaluate a plan."""
        return evaluator(plan)


@dataclass(eq=False)
class TrialDriver:
    """Runs proposed plans until a limit is reached; of several ranks, rank 0 decides."""

    runner: PlanRunner
    planner: Planner
    target: float
    limits: Limits
    journal: Journal
    report: ProgressReport
    started_at: float
    run_equivalents: float

    evaluator: Evaluator
    objective: Objective = "both"
    target_psnr: float | None = None
    min_psnr: float | None = None
    reused_runs: float = 0.0

    def __post_init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.interrupted = False
        self._tried, self._tried_since = 0, 0.0  # plans that were run here, and since when
        self.final: Evaluation | None = None  # the best plan, and what was found out of it at last
        self._variants: dict[Any, Variant] = {}  # by schedule: how it was priced

    def drive(self) -> SearchResult:
        """Run the whole search; Ctrl-C ends it with the best plan so far."""
        proposed = self._proposals() if is_rank_0() else None
        score: TrialScore = None
        try:
            while (plan := self._next_plan(proposed, score)) is not None:
                evaluation = self._evaluate(plan)
                self.evaluations.append(evaluation)
                score = evaluation.merit(self.objective)
            self._finish()
        except KeyboardInterrupt:
            self.interrupted = True
        return self._result()

    def _best(self) -> Evaluation | None:
        """Return the best plan so far: at the speed-up that is asked for, or the fastest that draws well enough."""
        if self.target_psnr is None:
            return best_evaluation(self.evaluations, self.objective)
        return fastest_evaluation(self.evaluations, self.objective, self.target_psnr)

    def _finish(self) -> None:
        """Find out how good the best plan is on pictures that it was not fitted on; and if it is of time, how fast."""
        best = self._best()
        if best is None or best.fit is Fit.NONE:
            return
        fits = self._last_fits
        if not any(each.is_exact for each in self.evaluations):  # what the plan draws by itself counts first
            fits = [Fit.NONE, *(fit for fit in fits if fit is not Fit.NONE)]
        for fit in fits:
            if not broadcast_from_rank_0(self._is_affordable(best.plan, runs=1)):
                return
            self.report("check", 0, None)
            made = self._run_at_last(best.plan, fit)
            if made.score is None or made.psnr is None:
                return
            if fit is Fit.HALF:
                best = replace(best, score=made.score)
            else:
                best = replace(best, speedup=made.speedup, seconds=made.seconds)
                if best.every is not None and made.psnr < best.every.psnr - DRAWN_OTHERWISE:
                    self.final = replace(best, score=made.score, every=made.score)
                    return
            self.final = best

    @property
    def _last_fits(self) -> list[Fit]:
        """The runs of the best plan that a search makes at last."""
        solver, is_timed = self.evaluator.solver, self.evaluator.seconds is not None
        if self.evaluator.fit is Fit.NONE or solver is None:
            return []
        return [Fit.HALF] * (solver.outputs.shape[1] >= HALVED) + [Fit.NONE] * is_timed

    def _run_at_last(self, plan: CachePlan, fit: Fit) -> Evaluation:
        """Run the best plan in this process, or take its evaluation from the journal."""
        key = f"{fit.name} {plan_key(plan)}"
        known: Evaluation | None = broadcast_from_rank_0(self._known(key, plan))
        if known is not None:
            return self._reused(known)
        evaluator = replace(self.evaluator, fit=fit, seconds=self.runner.seconds)
        made = self.runner.last(evaluator, plan)
        self.run_equivalents += made.blocks
        kept = broadcast_from_rank_0(_values_of(made, self.evaluator.metrics))
        self.journal.keep_evaluation(key, kept)
        return _evaluation_of(plan, kept)

    def _proposals(self) -> Proposals:
        if self.target_psnr is not None:
            return fastest(self.planner, self.target_psnr, self.limits.evals + self.limits.local_moves)
        return proposals(self.planner, self.target, self.limits.evals, self.limits.local_moves)

    def _next_plan(self, proposed: Proposals | None, score: TrialScore) -> CachePlan | None:
        """Return the plan to run next, on every rank."""
        text = None
        if proposed is not None:
            try:
                plan = self._built(proposed.send(score) if self.evaluations else next(proposed))
                text = plan.to_json() if self._is_affordable(plan) else None
            except StopIteration:
                pass
        text = broadcast_from_rank_0(text)
        return None if text is None else CachePlan.from_json(text)

    def _likely_plans(self, known: KnownScore) -> Iterator[CachePlan]:
        """Yield the plan that is to be run now, then those that may be next."""
        scores = [evaluation.merit(self.objective) for evaluation in self.evaluations]
        return likely_next(self._plan_after, scores, known) if is_rank_0() else iter(())

    def _plan_after(self, scores: Sequence[TrialScore]) -> CachePlan | None:
        """Return the plan that is run after plans with these scores."""
        proposed = self._proposals()
        try:
            candidate = next(proposed)
            for score in scores:
                candidate = proposed.send(score)
        except StopIteration:
            return None
        plan = self._built(candidate)
        return plan if self._is_affordable(plan) else None

    def _built(self, candidate: Candidate) -> CachePlan:
        target = self.target if self.target_psnr is None else candidate.target
        plan = build_plan(self.planner, candidate, target, METHODS[self.planner.cost])
        self._variants[_schedule(plan)] = candidate.variant
        return plan

    def variant_of(self, plan: CachePlan) -> Variant | None:
        """Return how a plan's schedule was priced, as rank 0 knows; ``None``: it was not proposed here."""
        variant: Variant | None = broadcast_from_rank_0(self._variants.get(_schedule(plan)))
        return variant

    def _is_affordable(self, plan: CachePlan, runs: int | None = None) -> bool:
        """Return whether a plan can be run: so often, or once and then as often as its last fit takes."""
        if self._from_journal(plan) is not None:
            return True
        if runs is None:
            runs = 1 + len(self._last_fits)
        uncached = self.planner.recording.run_ms / 1e3 if self.runner.seconds is None else self.runner.seconds
        seconds = time.perf_counter() - self.started_at + uncached / plan.provenance.predicted_speedup
        return self.limits.allow(self.run_equivalents + runs / plan.speedup, seconds)

    def _seconds_left(self) -> float:
        """Return the time until the best plan has been checked, at the pace of the plans so far."""
        ahead = self.limits.runs_ahead(self.run_equivalents, self.target, len(self.evaluations))
        uncached = self.planner.recording.run_ms / 1e3 if self.runner.seconds is None else self.runner.seconds
        pace = uncached / self.target
        if self._tried:
            pace = (time.perf_counter() - self._tried_since) / self._tried
        seconds = ahead * self.target * pace
        if self.limits.seconds is None:
            return seconds
        return max(0.0, min(seconds, self.limits.seconds - (time.perf_counter() - self.started_at)))

    def _evaluate(self, plan: CachePlan) -> Evaluation:
        """Run a plan, or take its evaluation from the journal."""
        best = self._best()
        note = "" if best is None else f"best {best.psnr:.1f} dB, {best.speedup:.2f}×"
        self.report("run plans", len(self.evaluations), self.limits.plans, note, self._seconds_left())
        known: Evaluation | None = broadcast_from_rank_0(self._from_journal(plan))
        if known is not None:
            return self._reused(known)
        if not self._tried:
            self._tried_since = time.perf_counter()
        evaluation = self.runner(plan, self._likely_plans)
        self._tried += 1
        self.run_equivalents += evaluation.blocks
        values = broadcast_from_rank_0(_values_of(evaluation, self.evaluator.metrics))
        self.journal.keep_evaluation(plan_key(plan), values)
        return _evaluation_of(plan, values)

    def _reused(self, known: Evaluation) -> Evaluation:
        """Return an evaluation of the journal, counted as a run that was not made."""
        self.reused_runs += known.blocks
        return replace(known, is_reused=True)

    def _from_journal(self, plan: CachePlan) -> Evaluation | None:
        return self._known(plan_key(plan), plan)

    def _known(self, key: str, plan: CachePlan) -> Evaluation | None:
        values = self.journal.evaluation(key)
        if values is not None and not values.get("failure") and not set(self.evaluator.metrics) <= set(values):
            return None  # made by a search that did not measure as much
        try:
            return None if values is None else _evaluation_of(plan, values)
        except (KeyError, TypeError):  # a line written by hand, or by another version: the plan is run again
            return None

    def _result(self) -> SearchResult:
        best = self.final or self._best()
        failures = [evaluation.failure or "its pictures are not finite" for evaluation in self.evaluations]
        if best is None and failures and not self.interrupted:
            raise RunMismatch(f"none of {len(failures)} plans could be run: {'; '.join(dict.fromkeys(failures))}")
        merit = None if best is None else best.merit(self.objective)
        if best is not None and merit is not None and self.min_psnr is not None and merit < self.min_psnr:
            raise TargetMissed(
                f"no plan draws at {self.min_psnr:g} dB or better: the best of {len(failures)}, "
                f"{best.speedup:.2f}× as fast, has {merit:.1f} dB ({self.objective}). Ask for a lower speed-up or "
                "min_psnr, or take more steps"
            )
        if best is None and self.min_psnr is not None and not self.interrupted:
            raise TargetMissed(
                f"no plan was run, so none is known to draw at {self.min_psnr:g} dB or better: raise max_runs or "
                "max_seconds, or leave min_psnr out"
            )
        if best is not None:
            plan, score = best.plan, best.score
            assert score is not None
            tolerance = TIMING_TOLERANCE if self.planner.cost == "time" else 1 - 1e-6
            measured = replace(
                plan.provenance,
                measured_speedup=best.speedup,
                psnr=score.psnr,
                psnr_error=score.psnr_error,
                relative_l1=score.relative_l1 if math.isfinite(score.relative_l1) else None,
                ssim=score.ssim,
                lpips=score.lpips,
                worst=score.worst,
                reached=plan.provenance.reached and best.speedup >= self.target * tolerance
                if self.target_psnr is None
                else merit is not None and merit >= self.target_psnr,
            )
            plan = replace(plan, provenance=measured)
        else:  # interrupted, or no run was allowed: the plan that the recording predicts to be best
            candidate = self.planner.candidate(self.target, Variant(payload=self.planner.payloads[0]))
            plan = build_plan(self.planner, candidate, self.target, "by planning from a recording")
            if self.target_psnr is not None:  # of which nothing is known
                plan = replace(plan, provenance=replace(plan.provenance, reached=False))
            plan = CachePlan.from_json(broadcast_from_rank_0(plan.to_json()))
        return SearchResult(
            plan,
            plan.provenance.reached,
            tuple(self.evaluations),
            self.planner.recording,
            self.run_equivalents + self.runner.unused_run_equivalents,
            time.perf_counter() - self.started_at,
            self.interrupted,
            self.target_psnr,
            reused_runs=self.reused_runs,
        )


def _schedule(plan: CachePlan) -> tuple[object, ...]:
    return tuple(each.schedule for each in plan.pieces)


def _values_of(evaluation: Evaluation, metrics: Collection[Metric]) -> dict[str, Any]:
    """Return an evaluation's values for the journal."""
    values: dict[str, Any] = {name: getattr(evaluation, name) for name in MEASURED}
    values |= _measured(evaluation.score, metrics)
    if evaluation.fit is not Fit.NONE:
        every = _measured(evaluation.every, metrics)
        values |= {"fit": evaluation.fit.name, "plan": evaluation.plan.to_json(), "every": every}
        values |= {"is_exact": evaluation.is_exact}
    return values


def _measured(score: Score | None, metrics: Collection[Metric]) -> dict[str, Any]:
    """Return what was measured, by name; of metrics that are not always measured, those that were to be."""
    values = {} if score is None else asdict(score)
    return {name: value for name, value in values.items() if name != "lpips" or name in metrics}


def _evaluation_of(plan: CachePlan, values: dict[str, Any]) -> Evaluation:
    """Make an evaluation from a journal's values."""
    score = None if values["failure"] else _score_of(values)
    fit = Fit[values.get("fit", Fit.NONE.name)]
    if fit is not Fit.NONE:
        plan = replace(plan, pieces=CachePlan.from_json(values["plan"]).pieces)
    every = _score_of(values["every"]) if values.get("every") else score
    measured = {name: values[name] for name in MEASURED}
    is_exact = values.get("is_exact") is True
    return Evaluation(plan, score=score, fit=fit, every=every, is_exact=is_exact, **measured)


def _score_of(values: Mapping[str, Any]) -> Score:
    measured = {field.name: values[field.name] for field in fields(Score) if field.name not in LATER}
    return Score(**measured, lpips=values.get("lpips"), psnr_error=values.get("psnr_error"))


def check_measures(values: Mapping[str, Any]) -> None:
    """Check what a journal's line has of a run: numbers where these belong. One that is missing is passed over.

    Raises:
        TypeError, ValueError: a value is of another kind, or none that is measured.

    Example:
        >>> check_measures({"seconds": 1.5, "speedup": 2.0, "psnr": math.inf, "failure": ""})
    """
    for name in ("seconds", "speedup", "blocks"):
        if name in values:
            check_number(name, values[name], 0)
    _check_score(values)
    if "failure" in values:
        check_text("failure", values["failure"], empty=True)
    if "fit" in values:
        check_choice("fit", values["fit"], tuple(Fit.__members__))
        CachePlan.from_json(check_text("plan", values.get("plan")))
        if not isinstance(every := values.get("every", {}), Mapping):
            raise WrongType(f"every must be an object, not {shown(every)}")
        _check_score(every)


def _check_score(values: Mapping[str, Any]) -> None:
    for name, least in (("psnr", -math.inf), ("worst", -math.inf), ("soft", -math.inf), ("relative_l1", 0)):
        if values.get(name) is not None and values[name] not in (math.inf, -math.inf):  # as of equal or broken pictures
            check_number(name, values[name], least)
    for name in LATER:
        if values.get(name) is not None:
            check_number(name, values[name], 0)
    if values.get("ssim") is not None and check_number("ssim", values["ssim"], -1) > 1:
        raise InvalidSetting(f"ssim={values['ssim']} is out of range: it must be at most 1")
