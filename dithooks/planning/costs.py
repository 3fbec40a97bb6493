"""The price of a plan: the weight of an error at each step, and what skipping blocks saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import InvalidSetting
from ..recording.noise_levels import falling_times, noise_drops, noise_levels
from ..recording.recording import Floats, Recording, Trace
from ..validation import shown

Cost = Literal["time", "blocks"]


def error_weights(
    trace: Trace, steps: int, late_error_weight: float, measured: Sequence[float] | None = None
) -> Floats:
    """Return (R, T): the weight of an error of the residual at each step, for each range.

    The weight is u_t = (σ_t − σ_{t+1})·g_t/‖h_t‖: an error enters the latents in proportion to the sampler's step,
    relative to the norm of the hidden states that it is added to. The steps after it shrink the error or let it grow;
    g_t is the factor that remains at the end. Where g was not measured, it is taken to be w^(−noise level), w being
    ``late_error_weight``; w = 1 stands for a sampler that keeps all errors as they are.

    Args:
        trace: the recorded transformer.
        steps: number of steps of the whole schedule.
        late_error_weight: how many times more an error at the end counts than one at the beginning, > 0.
        measured: g of each step of the schedule, if it was measured.
    """
    size = trace.norms[trace.ranges[:, 1]]  # (R, T), at the end of each range
    relative = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    if measured is None:
        remaining = late_error_weight ** -noise_levels(falling_times(trace, steps), trace.axis, steps)
    else:
        remaining = np.asarray(measured, dtype=np.float64)[trace.steps]
    weights: Floats = noise_drops(trace, steps) * remaining * relative
    return weights


def check_cost(cost: object) -> None:
    """Check that a cost is ``"time"`` or ``"blocks"``.

    Raises:
        ValueError: it is neither.
    """
    if cost not in ("time", "blocks"):
        raise InvalidSetting(f"cost={shown(cost)}: there are 'time', as it was measured, and 'blocks'")


@dataclass(frozen=True, eq=False)
class Savings:
    """The cost of a recorded run, and how much of it a reused step of each range saves.

    Args:
        total: cost of the run, in milliseconds or in block executions.
        step: for each trace an array (ranges + 1,): what one reused step saves, in all runs together; behind the
            ranges, what the call of the whole transformer does.
    """

    total: float
    step: tuple[Floats, ...]

    @classmethod
    def of(cls, recording: Recording, cost: Cost) -> Savings:
        """Take block times as measured (``"time"``), or count every block as 1 and all else as 0 (``"blocks"``).

        Raises:
            ValueError: ``cost`` is neither.
        """
        check_cost(cost)
        saved, total = [], 0.0
        for trace in recording.traces:
            blocks = trace.block_ms if cost == "time" else np.ones(len(trace.blocks))
            before = np.concatenate([[0.0], np.cumsum(blocks)])
            calls = trace.branches * recording.runs  # of one step
            whole = max(trace.call_ms, float(before[-1])) if cost == "time" else float(before[-1])
            saved.append(np.append(before[trace.ranges[:, 1] + 1] - before[trace.ranges[:, 0]], whole) * calls)
            total += float(blocks.sum()) * len(trace.steps) * calls
        return cls(recording.run_ms if cost == "time" else total, tuple(saved))

    def needed(self, speedup: float) -> float:
        """Return what has to be saved for a run to be so many times as fast."""
        return self.total * (1.0 - 1.0 / speedup)

    def speedup(self, saved: float) -> float:
        """Return how many times as fast a run is that saves so much."""
        return self.total / max(self.total - saved, 1e-9)
