"""What an error of a reused step's residual is worth, and what leaving blocks out saves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from .recording import Recording, Trace

Floats = NDArray[np.float64]  # on the host, as all of planning
Cost = Literal["time", "blocks"]


def levels(times: Floats, axis: str, steps: int) -> Floats:
    """How much of the way is still to go at each time: about 1 at the first step of a schedule, 0 behind its last.

    σ of flow matching is just that; that of other samplers, which begins far above 1, is as σ/(1 + σ) (the same latents
    in the scale of flow matching). Timesteps count in their own largest, or in 1000 where they seem to.

    Example:
        >>> levels(np.array([1.0, 0.5]), "sigma", 2), levels(np.array([0.0, 1.0, 2.0, 3.0]), "step", 4)
        (array([1. , 0.5]), array([1.  , 0.75, 0.5 , 0.25]))
    """
    if axis == "step":
        return 1.0 - times / steps
    largest = float(times.max(initial=0.0))
    if axis == "timestep":
        return times / (1000.0 if 1.0 < largest <= 1000.0 else max(largest, 1e-12))
    return times if largest <= 1.0 else times / (1.0 + times)


def worth(trace: Trace, steps: int, late: float, measured: Sequence[float] | None = None) -> Floats:
    """(R, T): what an error of the residual counts at each step, for each range.

    u_t = (σ_t − σ_{t+1})·g_t/‖h_t‖: an error goes into the latents with the sampler's step, relative to the size of
    what it is added to. What follows it then makes up for some of it, or makes it worse: g_t is what is left of it.
    Where that was not measured, it is taken to be late^(−level): ``late`` says how many times more an error at the very
    end counts than one at the very beginning. 1 is for a sampler that forgets nothing.

    Args:
        trace: of the transformer.
        steps: of the whole schedule.
        late: > 0.
        measured: of each step of the schedule, what is left of an error.
    """
    size = trace.norms[trace.ranges[:, 1]]  # (R, T), where the range ends
    relative = np.divide(1.0, size, out=np.zeros_like(size), where=size > 0)
    if measured is None:
        left = late ** -levels(_falling(trace, steps), trace.axis, steps)
    else:
        left = np.asarray(measured, dtype=np.float64)[trace.steps]
    found: Floats = spans(trace, steps) * left * relative
    return found


def spans(trace: Trace, steps: int) -> Floats:
    """(T,): how far the noise falls with each step, in the scale of flow matching.

    Args:
        trace: of the transformer.
        steps: of the whole schedule.
    """
    times = _falling(trace, steps)
    if trace.axis == "step":
        times = steps - times
    ends = trace.steps[-1] == steps - 1 or len(times) < 2  # else another transformer goes on from there
    following = np.append(times[1:], 0.0 if ends else 2 * times[-1] - times[-2])
    found: Floats = np.abs(times - following)
    if trace.axis == "sigma" and times.max() > 1:  # as its level
        found = found / (1.0 + times)
    return found


def _falling(trace: Trace, steps: int) -> Floats:
    """Its times; those of a sampler that rises from noise to picture, mirrored. Numbers of steps stay what they are."""
    times: Floats = trace.times
    if trace.axis != "step" and len(times) > 1 and times[-1] > times[0]:
        times = times[0] + times[-1] + (times[-1] - times[0]) / (len(times) - 1) - times
    return times


def checked_cost(cost: object) -> None:
    """See that it is one.

    Raises:
        ValueError: another word.
    """
    if cost not in ("time", "blocks"):
        raise ValueError(f"cost={cost!r}: there are 'time', as it was measured, and 'blocks'")


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
