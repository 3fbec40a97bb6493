"""What an error of a reused step's residual is worth, and what leaving blocks out saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InvalidSetting
from ..recording.noise_levels import Floats, falling, levels, spans
from ..recording.recording import Recording, Trace

Cost = Literal["time", "blocks"]


def worth(trace: Trace, steps: int, late_error_weight: float, measured: Sequence[float] | None = None) -> Floats:
    """(R, T): what an error of the residual counts at each step, for each range.

    u_t = (σ_t − σ_{t+1})·g_t/‖h_t‖: an error goes into the latents with the sampler's step, relative to the size of
    what it is added to. What follows it then makes up for some of it, or makes it worse: g_t is what is left of it.
    Where that was not measured, it is taken to be w^(−level), w being ``late_error_weight``: how many times more an
    error at the very end counts than one at the very beginning. 1 is for a sampler that forgets nothing.

    Args:
        trace: of the transformer.
        steps: of the whole schedule.
        late_error_weight: > 0.
        measured: of each step of the schedule, what is left of an error.
    """
    size = trace.norms[trace.ranges[:, 1]]  # (R, T), where the range ends
    relative = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    if measured is None:
        left = late_error_weight ** -levels(falling(trace, steps), trace.axis, steps)
    else:
        left = np.asarray(measured, dtype=np.float64)[trace.steps]
    found: Floats = spans(trace, steps) * left * relative
    return found


def checked_cost(cost: object) -> None:
    """See that it is one.

    Raises:
        ValueError: another word.
    """
    if cost not in ("time", "blocks"):
        raise InvalidSetting(f"cost={cost!r}: there are 'time', as it was measured, and 'blocks'")


@dataclass(frozen=True, eq=False)
class Savings:
    """What a recorded run costs, and how much of it a reused step of each range saves.

    Args:
        total: of the run, in milliseconds, or in block executions.
        step: (ranges) of each trace, what one reused step of all runs saves.
    """

    total: float
    step: tuple[Floats, ...]

    @classmethod
    def of(cls, recording: Recording, cost: Cost) -> Savings:
        """Measured (``"time"``), or with blocks that cost all the same and nothing else (``"blocks"``).

        Raises:
            ValueError: another word.
        """
        checked_cost(cost)
        saved, total = [], 0.0
        for trace in recording.traces:
            each = trace.block_ms if cost == "time" else np.ones(len(trace.blocks))
            upto = np.concatenate([[0.0], np.cumsum(each)])
            saved.append((upto[trace.ranges[:, 1] + 1] - upto[trace.ranges[:, 0]]) * trace.branches * recording.runs)
            total += float(each.sum()) * trace.branches * len(trace.steps) * recording.runs
        return cls(recording.run_ms if cost == "time" else total, tuple(saved))

    def needed(self, speedup: float) -> float:
        """What has to be saved for a run to be so many times as fast."""
        return self.total * (1.0 - 1.0 / speedup)

    def speedup(self, saved: float) -> float:
        """How many times as fast a run is that saves so much."""
        return self.total / max(self.total - saved, 1e-9)
