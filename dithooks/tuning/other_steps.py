"""A plan's schedule and weights for other numbers of steps, and the loss where they are carried over."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..config.cache_plan import CachePlan
from ..config.provenance import Elsewhere
from ..config.transformer_plan import Payload, TransformerPlan
from ..errors import InvalidSetting, WrongType
from ..planning.candidate import Candidate, Choice, Variant
from ..planning.costs import Cost, Savings
from ..planning.plan import build_plan, make_planner
from ..planning.planner import Planner
from ..policies.history import Schedule
from ..policies.mask import Mask
from ..progress_bars import ProgressReport
from ..recording.image_metrics import samples_of
from ..recording.rank_broadcast import broadcast_from_rank_0, is_rank_0, on_all_ranks
from ..recording.record import record
from ..recording.recording import Recording
from ..validation import check_count, shown
from .evaluation import Evaluation, Evaluator, Fit, Objective
from .proposals import FITTED_GAIN
from .result import SearchResult
from .timed_run import TimedRun

FEWEST = 3  # numbers of steps, from which on each is left out once, to see the loss in between


@dataclass(frozen=True)
class RunOf:
    """A run with a number of steps: ``run(pipe, steps)``.

    Args:
        run: as for :func:`search`, with ``steps``.
        steps: of the run.
    """

    run: Callable[[Any, int], Any]
    steps: int

    def __call__(self, pipe: Any) -> Any:
        """Make the run."""
        return self.run(pipe, self.steps)


def check_steps(steps: object, run: object) -> tuple[int, ...]:
    """Return numbers of steps, checked, and whether a run takes one.

    Raises:
        TypeError: they are no numbers, or ``run`` takes no second argument.
        ValueError: there are fewer than two, or one twice.

    Example:
        >>> check_steps([20, 28], lambda pipe, steps: [])
        (20, 28)
    """
    if not isinstance(steps, Iterable) or isinstance(steps, (str, bytes)):
        raise WrongType(f"steps must be several numbers of steps, (20, 28, 50), not {shown(steps)}")
    counts = tuple(check_count("a number in steps", each, 2) for each in steps)
    if len(counts) < 2 or len(set(counts)) < len(counts):
        raise InvalidSetting(f"steps={counts}: give two or more numbers of steps, each once; leave it out for one")
    try:
        inspect.signature(run).bind(None, counts[0])  # type: ignore[arg-type]
    except TypeError:
        raise WrongType(
            f"run takes no number of steps: with steps={counts} it is called as run(pipe, num_inference_steps)"
        ) from None
    except ValueError:  # a callable without a signature
        pass
    return counts


@dataclass(eq=False)
class OtherSteps:
    """Fits the plan that was found for one number of steps to other ones, too.

    Args:
        target: the pipeline or model, as for :func:`search`.
        run: makes a run of so many steps.
        blocks: as for :func:`search`.
        scheduler: as for :func:`search`.
        cost: as for :func:`search`.
        objective: as for :func:`search`.
        payloads: what may be forecast.
        report: shows progress.
        evaluator: of the first number of steps.
        recording: of that.
        settings: how further runs are recorded.
    """

    target: CacheTarget
    run: Callable[[Any, int], Any]
    blocks: Blocks
    scheduler: object
    cost: Cost
    objective: Objective
    payloads: tuple[Payload, ...]
    report: ProgressReport
    evaluator: Evaluator
    recording: Recording
    settings: dict[str, Any]
    runs: float = 0.0  # block executions so far, over those of an uncached run of the first number of steps
    _evaluators: dict[int, Evaluator] = field(default_factory=dict)

    def __call__(self, found: SearchResult, variant: Variant | None, steps: Sequence[int]) -> SearchResult:
        """Return a result whose plan has schedules and weights for further numbers of steps, and says what they draw.

        Ctrl-C ends this with the plan as it was found.

        Args:
            found: the result of the search at the first number of steps.
            variant: how its schedule was priced; ``None``: not known, so that it is only placed among other steps.
            steps: the further numbers of steps.
        """
        try:
            plan, interrupted = self._extended(found, variant, steps), False
        except KeyboardInterrupt:
            plan, interrupted = found.plan, True
        return replace(found, plan=plan, run_equivalents=found.run_equivalents + self.runs, interrupted=interrupted)

    def _extended(self, result: SearchResult, variant: Variant | None, steps: Sequence[int]) -> CachePlan:
        plan = result.plan
        self._evaluators = {plan.made.steps: replace(self.evaluator, seconds=None, fit=Fit.NONE)}
        plans = {plan.made.steps: plan}
        psnr = {plan.made.steps: _psnr_of(result)}
        for number, count in enumerate(steps):
            self.report("other numbers of steps", number, len(steps))
            found = self._fitted(plan, variant, count)
            if found.psnr is not None:
                plans[count], psnr[count] = found.plan, found.psnr
        if len(plans) < 2:
            return plan
        lost = {count: self._left_out(plans, count) for count in plans} if len(plans) >= FEWEST else {}
        elsewhere = tuple(Elsewhere(count, psnr[count], lost.get(count)) for count in sorted(plans))
        provenance = replace(plan.provenance, elsewhere=elsewhere)
        return replace(_joined(plan, [plans[count] for count in sorted(plans)]), provenance=provenance)

    def _fitted(self, plan: CachePlan, variant: Variant | None, steps: int) -> Evaluation:
        """Return the better of the plan's schedule among so many steps, and one that is made for them, both fitted."""
        recording = record(
            self.target,
            RunOf(self.run, steps),
            num_inference_steps=steps,
            blocks=self.blocks,
            scheduler=self.scheduler,
            report=self.report,
            **self.settings,
        )
        self.runs += steps / self.recording.steps
        fits = self.evaluator.fit is not Fit.NONE and on_all_ranks(recording.solver is not None)
        trace = recording.traces[0]
        evaluator = replace(
            self.evaluator,
            timed_run=TimedRun(RunOf(self.run, steps), self.blocks, trace.path, None, trace.second, trace.calls),
            reference=samples_of(recording.results) if is_rank_0() else None,
            seconds=None,
            executions=Savings.of(recording, "blocks").total,
            solver=recording.solver if fits else None,
            fit=Fit.ALL if fits else Fit.NONE,
        )
        self._evaluators[steps] = replace(evaluator, fit=Fit.NONE)
        planner = make_planner(recording, self.cost, None, self.report, self.payloads, fits)
        texts = broadcast_from_rank_0([each.to_json() for each in _schedules(plan, planner, variant)])
        made = [self._evaluated(evaluator, CachePlan.from_json(text), steps) for text in texts]
        scores = broadcast_from_rank_0([each.merit(self.objective) for each in made])
        ranks = [-math.inf if score is None else score for score in scores]
        best = 0
        for number, rank in enumerate(ranks):  # a difference of less may be chance
            best = number if rank > ranks[best] + FITTED_GAIN else best
        score = broadcast_from_rank_0(made[best].score)
        return replace(made[best], score=score)

    def _left_out(self, plans: dict[int, CachePlan], steps: int) -> float | None:
        """Return the PSNR at a number of steps with what was fitted at the others."""
        first, *others = [plan for count, plan in plans.items() if count != steps]
        made = self._evaluated(self._evaluators[steps], _joined(first, [first, *others]), steps)
        psnr: float | None = broadcast_from_rank_0(made.psnr)
        return psnr

    def _evaluated(self, evaluator: Evaluator, plan: CachePlan, steps: int) -> Evaluation:
        made = evaluator(plan)
        self.runs += made.blocks * steps / self.recording.steps
        return made


def _schedules(plan: CachePlan, planner: Planner, variant: Variant | None) -> list[CachePlan]:
    """Return the plans to try for a recording: the given one's schedule among its steps, and the best one for them."""
    recording, found = planner.recording, plan.provenance
    numbers = {trace.path: number for number, trace in enumerate(recording.traces)}
    schedule = Schedule(recording.steps, sigmas=recording.sigmas)
    choices = []
    for piece in plan.pieces:
        mask = piece.policy.for_run(schedule)
        assert isinstance(mask, Mask)
        number = numbers[piece.path]
        bits = tuple(int(mask.steps[step]) for step in recording.traces[number].steps)
        last = piece.first + piece.blocks - 1
        choices.append(Choice(number, piece.first, last, (1, *bits[1:]), piece.payload))
    anchors = max(piece.predictor.anchors for piece in plan.pieces)
    known = variant or Variant(anchors, payload=plan.pieces[0].payload)
    candidates = [Candidate(tuple(choices), known, plan.speedup, found.predicted_error, True, found.target)]
    if variant is not None:
        candidates.append(planner.candidate(found.target, variant))
    made = [build_plan(planner, each, found.target, found.method) for each in candidates if each.choices]
    made = [each for each in made if _ranges(each) == _ranges(plan)]
    return list({each.pieces: each for each in reversed(made)}.values())[::-1]


def _psnr_of(result: SearchResult) -> float | None:
    """Return the PSNR of the plan that was found, on all pictures, as that of other numbers of steps is."""
    of_all = [each.every or each.score for each in result.evaluations if _steps(each.plan) == _steps(result.plan)]
    return next((score.psnr for score in of_all if score is not None), result.plan.provenance.psnr)


def _steps(plan: CachePlan) -> list[tuple[object, ...]]:
    pairs = zip(_ranges(plan), plan.pieces, strict=True)
    return [(*of_piece, piece.steps, piece.conditional) for of_piece, piece in pairs]


def _ranges(plan: CachePlan) -> list[tuple[object, ...]]:
    return [(each.path, each.first, each.blocks, each.total, each.payload, each.axis) for each in plan.pieces]


def _joined(plan: CachePlan, plans: Sequence[CachePlan]) -> CachePlan:
    """Return a plan that knows what was fitted at other numbers of steps."""

    def others(place: int, piece: TransformerPlan) -> tuple[TransformerPlan, ...]:
        pieces = [each.pieces[place] for each in plans]
        return tuple(replace(each, others=()) for each in pieces if len(each.steps) != len(piece.steps))

    pieces = tuple(replace(piece, others=others(place, piece)) for place, piece in enumerate(plan.pieces))
    return replace(plan, pieces=pieces)
