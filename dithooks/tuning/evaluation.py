"""One plan, run for real: how fast it is, and how close its pictures are to those without a cache."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..blocks.discovery import Blocks
from ..config.cache_plan import CachePlan
from ..environment.torch_api import OutOfMemoryError
from ..errors import InvalidSetting, WiringError
from ..handle import dit_cache
from ..recording.image_metrics import Score, compare, samples_of
from .timed_run import TimedRun


@dataclass(frozen=True)
class Evaluation:
    """What one run of a plan measured.

    Args:
        plan: the plan that was run.
        seconds: the time that the run took.
        speedup: times as fast as the uncached run: in time, or in block executions where the target is of these.
        score: distance of the pictures from those of the uncached run; ``None``: the plan could not be run.
        blocks: block executions of the run, over those of the uncached run.
        failure: why the plan could not be run; empty if it could.
    """

    plan: CachePlan
    seconds: float
    speedup: float
    score: Score | None
    blocks: float
    failure: str = ""

    @property
    def psnr(self) -> float | None:
        """PSNR in dB, by which plans are chosen; ``None``: the plan failed, or its pictures are not finite."""
        return None if self.score is None or self.score.psnr == -math.inf else self.score.psnr


@dataclass(frozen=True, eq=False)
class Evaluator:
    """Runs plans, and compares what they draw with the uncached run.

    Args:
        target: what is cached, as for :func:`dit_cache`.
        timed_run: makes the recorded run again, and times it.
        reference: samples of the uncached run; ``None``: another rank compares.
        seconds: time of the uncached run; ``None``: speed is counted in block executions.
        executions: block executions of the uncached run.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.
    """

    target: object
    timed_run: TimedRun
    reference: Sequence[NDArray[np.float32]] | None
    seconds: float | None
    executions: float
    blocks: Blocks = None
    scheduler: object = None

    def __call__(self, plan: CachePlan) -> Evaluation:
        """Run a plan once. The cache is off again when this returns or raises.

        Raises:
            ValueError: the run makes no step of the target.
            Exception: what ``run`` raises, but for a wiring error or lack of memory: then the evaluation has failed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # whoever uses the plan gets its warnings
            handle = dit_cache(self.target, plan, blocks=self.blocks, scheduler=self.scheduler)
            try:
                results, seconds = self.timed_run(self.target)
                stats = handle.stats
            except (WiringError, OutOfMemoryError) as error:
                return Evaluation(plan, 0.0, 0.0, None, 0.0, f"{type(error).__name__}: {error}")
            finally:
                handle.remove()
        if not stats.calls:
            raise InvalidSetting(
                "run made no step of the target: it has to draw with the one that it is given, and refer to no other"
            )
        score = None if self.reference is None else compare(samples_of(results), self.reference)
        skipped = stats.blocks_total - stats.blocks_run  # of a transformer that stays uncached, nothing is counted
        share = 1.0 - skipped / self.executions
        speedup = 1.0 / share if self.seconds is None else self.seconds / seconds
        return Evaluation(plan, seconds, speedup, score, share)
