"""The Gram matrices of one transformer's ranges, summed over its recorded runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..errors import InvalidSetting
from ..predictors.predictor import Moment
from .token_samples import GramPair, Sampled, add_grams


class GramTotals:
    """The Gram matrices of all ranges, summed over branches and runs, so that a run's samples can be dropped.

    Args:
        name: name of the transformer, for messages.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.runs = 0
        self.ranges: Sequence[GramPair] = ()
        self.order: Sequence[int] = ()
        self.moments: dict[int, Moment] = {}
        self.grams: NDArray[np.float64] = np.zeros((0, 0, 0))
        self.squares: NDArray[np.float64] = np.zeros((0, 0))

    @property
    def steps(self) -> list[int]:
        """Steps at which the transformer was called."""
        return sorted(self.moments)

    def add(self, branches: Sequence[Sampled], report: Callable[[int, int], None]) -> None:
        """Add the samples of one run.

        Raises:
            ValueError: the run's steps or noise levels differ from the run before, or a sample is not finite.
        """
        moments = {moment.step: moment for branch in branches for moment in branch.moments}
        if not self.runs:
            self.moments = moments
            size = len(moments)
            self.grams = np.zeros((len(self.ranges), size, size))
            self.squares = np.zeros((len(self.order), size))
        elif moments != self.moments:
            raise InvalidSetting(
                f"{self.name}: run made runs of different schedules ({len(self.moments)} steps, then {len(moments)}, "
                "or other noise levels): record one schedule at a time"
            )
        self.runs += 1
        for branch in branches:
            calls = zip(branch.moments, branch.calls, strict=True)
            step = next((moment.step for moment, call in calls if not _is_finite(call)), None)
            if step is not None:
                raise InvalidSetting(
                    f"{self.name}: at step {step} what its blocks are given or return is not finite: mend that first, "
                    "a dtype with a wider range may do it"
                )
        total = len(self.ranges) * len(branches)
        for number, branch in enumerate(branches):
            done = number * len(self.ranges)
            add_grams(
                branch,
                self.order,
                self.ranges,
                self.steps,
                self.grams,
                self.squares,
                lambda ranges, done=done: report(done + ranges, total),  # type: ignore[misc]
            )


def _is_finite(call: Sequence[Sequence[Tensor]]) -> bool:
    return all(bool(stream.isfinite().all()) for point in call for stream in point)
