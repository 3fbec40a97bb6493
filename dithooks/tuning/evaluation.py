"""Run a plan for real, and see what it did: how fast, and how near to the pictures without it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..blocks.discovery import Blocks
from ..config.cache_plan import CachePlan
from ..errors import InvalidSetting, WiringError
from ..handle import dit_cache
from ..recording.image_metrics import Score, compare, samples_of
from .repeat_run import Drawing


@dataclass(frozen=True)
class Evaluation:
    """One plan, and what was seen of it.

    Args:
        plan: what was run.
        seconds: that the run took.
        speedup: over the uncached run, in time; or in block executions, where these are what is to be saved.
        score: of its pictures against those of the uncached run; ``None``: it could not be run.
        blocks: share of the uncached run's block executions that took place.
        failure: why it could not be run; empty if it could.
    """

    plan: CachePlan
    seconds: float
    speedup: float
    score: Score | None
    blocks: float
    failure: str = ""

    @property
    def worth(self) -> float | None:
        """What plans are chosen by: PSNR in dB; ``None`` where its pictures are not finite."""
        return None if self.score is None or self.score.psnr == -math.inf else self.score.psnr


@dataclass(frozen=True, eq=False)
class Verifier:
    """Runs plans.

    Args:
        target: what is cached.
        drawing: draws, and says how many seconds it took.
        reference: what it drew without the cache; ``None``: another rank compares.
        seconds: that this took; ``None``: speed is of block executions.
        executions: of blocks in it.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.
    """

    target: object
    drawing: Drawing
    reference: Sequence[NDArray[np.float32]] | None
    seconds: float | None
    executions: float
    blocks: Blocks = None
    scheduler: object = None

    def __call__(self, plan: CachePlan) -> Evaluation:
        """Run a plan once. The cache is off again when this returns or raises.

        Raises:
            ValueError: the run makes no step of the target.
            Exception: whatever ``run`` raises, but for a range whose streams turn out not to be followed.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what there is to say of a plan is said when it is used
            handle = dit_cache(self.target, plan, blocks=self.blocks, scheduler=self.scheduler)
            try:
                results, seconds = self.drawing(self.target)
                stats = handle.stats
            except (WiringError, torch.OutOfMemoryError) as error:
                return Evaluation(plan, 0.0, 0.0, None, 0.0, f"{type(error).__name__}: {error}")
            finally:
                handle.remove()
        if not stats.calls:
            raise InvalidSetting(
                "run made no step of the target: it has to draw with the one that it is given, and refer to no other"
            )
        score = None if self.reference is None else compare(samples_of(results), self.reference)
        left_out = stats.blocks_total - stats.blocks_run  # nothing is counted of a transformer that stays uncached
        share = 1.0 - left_out / self.executions
        return Evaluation(plan, seconds, 1.0 / share if self.seconds is None else self.seconds / seconds, score, share)
