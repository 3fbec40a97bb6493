"""One plan, run once: with its weights as they are, or fitted meanwhile."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from enum import Enum
from functools import partial
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ..blocks.adapter import BlockAdapter
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..config.cache_plan import CachePlan
from ..engine.batch_parts import repeated_argument
from ..engine.clock import scheduler_of
from ..engine.output_cache import output_caches_of
from ..environment.torch_api import OutOfMemoryError
from ..errors import InvalidSetting, WiringError
from ..handle import CacheHandle, dit_cache
from ..recording.guidance_shares import watched_outputs
from ..recording.image_metrics import Metric, Score, compare, samples_of
from ..recording.record import recordable
from ..recording.recording import Floats
from ..recording.solver_trace import SolverTrace
from ..recording.solver_watch import can_be_watched, watched_solver
from .closed_loop import ClosedLoop
from .fit_timer import FitTimer
from .timed_run import TimedRun

Objective = Literal["mean", "worst", "both"]
OBJECTIVES: tuple[Objective, ...] = ("mean", "worst", "both")
ANCHORS = 3  # outputs that an output is made of
EXACT = 1e-4  # misfit of guided sums, which rounding in single precision does not reach
HALVED = 4  # pictures, from which on some are left out of the fit


class Fit(Enum):
    """Whether a run of a plan also fits its weights."""

    NONE = "they are as they are"
    HALF = "they are fitted on every second picture, and the others show how good they are"
    ALL = "they are fitted on all pictures"


@dataclass(frozen=True, repr=False)
class Evaluation:
    """What one run of a plan measured.

    Args:
        plan: the plan that was run.
        seconds: the time that the run took, without that of the fit.
        speedup: times as fast as the uncached run: in time, or in block executions where the target is of these.
        score: distance of the pictures from those of the uncached run; without those that weights were fitted on, where
            some were left out of the fit. ``None``: the plan could not be run.
        blocks: block executions of the run, over those of the uncached run.
        failure: why the plan could not be run; empty if it could.
        fit: whether the plan's weights were fitted in this run, and on which pictures.
        every: distance of all pictures, by which plans are compared; ``None``: it is ``score``.
        is_exact: whether the run has shown that the plan by itself draws what its fit has drawn: guidance is linear.
        is_reused: whether it was taken from the journal of an earlier search.
    """

    plan: CachePlan
    seconds: float
    speedup: float
    score: Score | None
    blocks: float
    failure: str = ""
    fit: Fit = Fit.NONE
    every: Score | None = None
    is_exact: bool = False
    is_reused: bool = False

    def __repr__(self) -> str:
        drawn = self.failure or ("" if self.score is None else f"PSNR {self.score.psnr:.2f} dB")
        return f"<Evaluation {self.speedup:.2f}×, {drawn}>"

    def merit(self, objective: Objective) -> float | None:
        """Return the PSNR that plans are chosen by: the mean, the worst, or a mean in which bad pictures count more."""
        score = self.every or self.score
        if score is None or self.psnr is None:
            return None
        soft = score.psnr if score.soft is None else score.soft
        return {"mean": score.psnr, "worst": score.worst, "both": soft}[objective]

    @property
    def psnr(self) -> float | None:
        """PSNR in dB, the mean over the pictures; ``None``: the plan failed, or its pictures are not finite."""
        return None if self.score is None or self.score.psnr == -math.inf else self.score.psnr


def as_here(weights: Floats) -> Floats:
    """Return weights as this process has found them."""
    return weights


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Runs plans, and compares what they draw with the uncached run.

    Args:
        target: the pipeline or model, as for :func:`dit_cache`.
        timed_run: makes the recorded run again, and times it.
        reference: samples of the uncached run; ``None``: another rank compares.
        seconds: time of the uncached run; ``None``: speed is counted in block executions.
        executions: block executions of the uncached run.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.
        solver: the solver's steps of the uncached run; ``None``: weights cannot be fitted in a run.
        fit: whether the weights of plans are fitted while they are run.
        agreed: makes weights the same on all ranks that run a plan together.
        metrics: the measures, as for :func:`.compare`.
    """

    target: CacheTarget
    timed_run: TimedRun
    reference: Sequence[NDArray[np.float32]] | None
    seconds: float | None
    executions: float
    blocks: Blocks = None
    scheduler: object = None
    solver: SolverTrace | None = None
    fit: Fit = Fit.NONE
    agreed: Callable[[Floats], Floats] = as_here
    metrics: tuple[Metric, ...] = ()

    def __call__(self, plan: CachePlan) -> Evaluation:
        """Run a plan once. The cache is off again when this returns or raises.

        Raises:
            ValueError: the run makes no step of the target.
            Exception: what ``run`` raises, but for a wiring error or lack of memory: then the evaluation has failed.
        """
        loop = self._loop(plan)
        with warnings.catch_warnings(), ExitStack() as stack:
            warnings.simplefilter("ignore", UserWarning)  # whoever uses the plan gets its warnings
            chains = [] if loop is None else recordable(self.target, self.blocks)
            if loop is not None:
                for chain in chains:
                    stack.enter_context(watched_outputs(chain.owner, loop.returned))
            shown = {} if loop is None else {"on_decision": loop.note}
            planned = plan if loop is None else loop.bare
            handle: CacheHandle = dit_cache(
                self.target,
                planned,
                blocks=self.blocks,
                scheduler=self.scheduler,
                **shown,  # type: ignore[arg-type]
            )
            stack.callback(handle.remove)
            timer = None
            if loop is not None:
                for chain in chains:
                    for cache in output_caches_of([chain.owner]):
                        cache.on_made = partial(_show_made, loop, repeated_argument(chain.owner)[1])
                timer = FitTimer(loop)
                stack.enter_context(watched_solver(self._scheduler(), timer))
            try:
                results, seconds = self.timed_run(self.target, any(each.payload == "output" for each in plan.pieces))
                seconds -= 0.0 if timer is None else timer.seconds
                stats = handle.stats
            except (WiringError, OutOfMemoryError) as error:
                return Evaluation(plan, 0.0, 0.0, None, 0.0, f"{type(error).__name__}: {error}")
        if not stats.calls:
            raise InvalidSetting(
                "run made no step of the target: it has to draw with the one that it is given, and refer to no other"
            )
        skipped = stats.blocks_total - stats.blocks_run  # of a transformer that stays uncached, nothing is counted
        share = 1.0 - skipped / self.executions
        if loop is not None and not loop.is_over:  # of no use: what it drew is of no plan's weights
            plain = replace(self, fit=Fit.NONE)(plan)
            return replace(plain, blocks=plain.blocks + share)
        score, every = (None, None) if self.reference is None else self._scores(samples_of(results), loop)
        speedup = 1.0 / share if self.seconds is None else self.seconds / seconds
        fitted = plan if loop is None else loop.fitted()
        if loop is None:
            return Evaluation(fitted, seconds, speedup, score, share, every=every)
        is_exact = loop.misfit is not None and loop.misfit < EXACT
        return Evaluation(fitted, seconds, speedup, score, share, fit=self.fit, every=every, is_exact=is_exact)

    def _loop(self, plan: CachePlan) -> ClosedLoop | None:
        """Return what fits the plan's weights; ``None``: they are to stay, or the solver cannot be watched."""
        if self.fit is Fit.NONE or self.solver is None or not can_be_watched(self._scheduler()):
            return None
        pictures = self.solver.outputs.shape[1]
        some = np.arange(pictures) % 2 == 0 if self.fit is Fit.HALF and pictures >= HALVED else None
        return ClosedLoop(plan, self.solver, ANCHORS, some, self.agreed)

    def _scheduler(self) -> Any:
        pipe = self.target.pipe if isinstance(self.target, BlockAdapter) else self.target
        return scheduler_of(pipe, self.scheduler)()

    def _scores(self, samples: Sequence[NDArray[np.float32]], loop: ClosedLoop | None) -> tuple[Score, Score]:
        """Compare the pictures that took no part in the fit, where it is known which, and all of them."""
        assert self.reference is not None
        every = compare(samples, self.reference, self.metrics)
        some = None if loop is None else loop.fitted_on
        if some is None or len(some) != len(samples):
            return every, every
        others = np.flatnonzero(~some).tolist()
        ours, theirs = [samples[each] for each in others], [self.reference[each] for each in others]
        return compare(ours, theirs, self.metrics), every


def _show_made(loop: ClosedLoop, name: str, output: object, arguments: Mapping[str, object], completes: bool) -> None:
    """Show an output to the fit that the transformer has not returned as it is."""
    loop.made(output, arguments.get(name), completes)
