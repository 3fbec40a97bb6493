"""How far the noise falls from step to step of a schedule."""

from __future__ import annotations

import numpy as np

from .recording import Floats, Trace


def noise_levels(times: Floats, axis: str, steps: int) -> Floats:
    """How much of the way is still to go at each time: about 1 at the first step of a schedule, 0 behind its last.

    σ of flow matching is just that; that of other samplers, which begins far above 1, is as σ/(1 + σ) (the same latents
    in the scale of flow matching). Timesteps count in their own largest, or in 1000 where they seem to.

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
    """(T,): how far the noise falls with each step, in the scale of flow matching.

    Args:
        trace: of the transformer.
        steps: of the whole schedule.
    """
    times = falling_times(trace, steps)
    if trace.axis == "step":
        times = steps - times
    ends = trace.steps[-1] == steps - 1 or len(times) < 2  # else another transformer goes on from there
    following = np.append(times[1:], 0.0 if ends else 2 * times[-1] - times[-2])
    found: Floats = np.abs(times - following)
    if trace.axis == "sigma" and times.max() > 1:  # as its level
        found = found / (1.0 + times)
    return found


def falling_times(trace: Trace, steps: int) -> Floats:
    """Its times; those of a sampler that rises from noise to picture, mirrored. Numbers of steps stay what they are."""
    times: Floats = trace.times
    if trace.axis != "step" and len(times) > 1 and times[-1] > times[0]:
        times = times[0] + times[-1] + (times[-1] - times[0]) / (len(times) - 1) - times
    return times
