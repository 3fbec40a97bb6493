"""The noise level at each step of a schedule, and its drop to the next."""

from __future__ import annotations

import numpy as np

from .recording import Floats, Trace


def noise_levels(times: Floats, axis: str, steps: int) -> Floats:
    """Return the noise level at each time, in the scale of flow matching: about 1 at the first step, 0 after the last.

    σ of flow matching is the level itself. σ of other samplers, which begins far above 1, becomes σ/(1 + σ): the same
    latents in the scale of flow matching. Timesteps are divided by 1000, or by the largest of them where this is at
    most 1 or above 1000.

    Example:
        >>> noise_levels(np.array([1.0, 0.5]), "sigma", 2), noise_levels(np.array([0.0, 1.0, 2.0, 3.0]), "step", 4)
        (array([1. , 0.5]), array([1.  , 0.75, 0.5 , 0.25]))
    """
    if axis == "step":
        return 1.0 - times / steps
    largest = float(times.max(initial=0.0))
    if axis == "timestep":
        return times / (1000.0 if 1.0 < largest <= 1000.0 else max(largest, 1e-12))
    return times if largest <= 1.0 else times / (1.0 + times)


def noise_drops(trace: Trace, steps: int) -> Floats:
    """Return (T,): the drop of the noise level with each step.

    Args:
        trace: the recorded transformer.
        steps: number of steps of the whole schedule.
    """
    times = falling_times(trace, steps)
    if trace.axis == "step":
        times = steps - times
    ends = trace.steps[-1] == steps - 1 or len(times) < 2  # else another transformer makes the last steps
    following = np.append(times[1:], 0.0 if ends else 2 * times[-1] - times[-2])
    drops: Floats = np.abs(times - following)
    if trace.axis == "sigma" and times.max() > 1:  # as for the level
        drops = drops / (1.0 + times)
    return drops


def falling_times(trace: Trace, steps: int) -> Floats:
    """Return a trace's times, mirrored where they rise from noise to picture; numbers of steps stay as they are."""
    times: Floats = trace.times
    if trace.axis != "step" and len(times) > 1 and times[-1] > times[0]:
        times = times[0] + times[-1] + (times[-1] - times[0]) / (len(times) - 1) - times
    return times
