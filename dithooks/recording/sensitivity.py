"""The sensitivity of each step: how much of an error there remains in the picture, measured in one more run.

Some samplers and models correct early errors, others amplify them, and few treat the last steps like those in the
middle: no one weight for late errors is right for all. So the recorded run is made once more, with everything computed,
except that for every sample, at one step of its own, the last block returns what it returned at the step before. This
is the kind of error that a cache makes. The distance of the sample from the recorded one, over the size of the error,
is the sensitivity of its step. Single samples differ by factors, but neighbouring steps do not: a smooth curve is
fitted to all samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..blocks.block_io import take_apart
from ..engine.replay import replaying
from .image_metrics import Samples, samples_of, sums
from .noise_levels import noise_drops
from .rank_broadcast import broadcast_from_rank_0, is_rank_0
from .recording import Floats, Recording

MIN_SAMPLES = 4  # below, a guess is better than the measurement
PARTS = 3  # of a batch with guidance, at most: without prompt, with it, and perturbed
LENGTH = 0.4  # of the curve's covariance, as a share of the run
SPREAD, NOISE = 1.5, 0.6  # deviations in e-folds: of the curve, and of samples from it
ROUNDING = 1 / 6  # what two roundings add to the squared difference of whole numbers


class CallPosition(NamedTuple):
    """The position of a call of a transformer: number of the pipeline's run, step, and branch."""

    run: int
    step: int
    branch: int


def sensitivity(
    run: Callable[[], Any], lasts: Sequence[tuple[nn.Module, Sequence[CallPosition]]], recording: Recording
) -> tuple[float, ...] | None:
    """Measure the sensitivity of each step; ``None``: the run has too few samples, or not one for each result.

    Args:
        run: makes the recorded run once more, and returns what it draws.
        lasts: the last block of each transformer, with its calls in the recorded run.
        recording: the recording of the run, with its results.
    """
    # Ranks other than 0 may return nothing, but have to make the run all the same.
    reference = samples_of(recording.results) if is_rank_0() and recording.results is not None else []
    total = broadcast_from_rank_0(len(reference))
    each = total // max(recording.runs, 1)
    disturbed = disturbed_steps([calls for _, calls in lasts], total)
    if total < MIN_SAMPLES or each * recording.runs != total or not disturbed:
        return None
    with ExitStack() as stack:
        errors = [stack.enter_context(disturb(block, calls, each, disturbed)) for block, calls in lasts]
        found = run()
    if not is_rank_0():
        return broadcast_from_rank_0(None)
    squares = {n: torch.stack(parts).double().sum(0) for each in errors for n, parts in each.items()}
    relative = {n: float((error / size).sqrt()) for n, (error, size) in squares.items()}
    return broadcast_from_rank_0(curve(relative, final_errors(samples_of(found), reference), disturbed, recording))


def curve(
    errors: Mapping[int, float], final: Sequence[float], steps: Mapping[int, int], recording: Recording
) -> tuple[float, ...] | None:
    """Return each step's sensitivity, with a geometric mean of 1; ``None``: too few samples were disturbed.

    Args:
        errors: relative error of what the last block returned, by sample.
        final: distance of each sample from its reference in the end.
        steps: the step at which each sample was disturbed.
        recording: the recording of the run.
    """
    drops: dict[int, float] = {}
    for trace in recording.traces:
        drops |= dict(zip(trace.steps.tolist(), noise_drops(trace, recording.steps).tolist(), strict=True))
    places, gains = [], []
    for number, error in errors.items():
        caused = drops.get(steps[number], 0.0) * error
        if 0 < caused < np.inf and 0 < final[number] < np.inf:
            places.append(steps[number] / max(recording.steps - 1, 1))
            gains.append(np.log(final[number] / caused))
    if len(gains) < MIN_SAMPLES:
        return None
    logs = smooth_curve(np.array(places), np.array(gains), np.linspace(0, 1, recording.steps))
    return tuple(np.exp(logs - logs.mean()).tolist())


def disturbed_steps(sequences: Sequence[Sequence[CallPosition]], samples: int) -> dict[int, int]:
    """Return the step at which each sample is disturbed, evenly spread over all steps that have one before.

    Example: of four steps the first has none before; five samples.
        >>> disturbed_steps([[CallPosition(0, step, 0) for step in range(4)]], 5)
        {0: 1, 1: 1, 2: 2, 3: 3, 4: 3}
    """
    steps = [sorted({call.step for call in calls}) for calls in sequences]
    places = sorted({step for each in steps for step in each[1:]})
    if not places:
        return {}
    return {n: places[round(n * (len(places) - 1) / max(samples - 1, 1))] for n in range(samples)}


@contextmanager
def disturb(
    block: nn.Module, calls: Sequence[CallPosition], each: int, steps: Mapping[int, int]
) -> Iterator[dict[int, list[Tensor]]]:
    """Disturb a block's outputs inside; yield, by sample, the squared norms of each error and of the disturbed output.

    The rows of a batch are the samples in their order, once more for each part of a batch with guidance. The rows of
    larger batches are something else, such as the frames of a video, and are not disturbed.

    Args:
        block: the block whose outputs are replaced.
        calls: positions of the block's calls, in their order.
        each: samples of one run of the pipeline.
        steps: the step at which each sample is disturbed.
    """
    former: dict[int, tuple[int, list[Tensor]]] = {}  # by branch: the run, and the last outputs
    squares: dict[int, list[Tensor]] = {}
    sizes = [each * parts for parts in range(1, PARTS + 1)]
    numbers = {run: place for place, run in enumerate(dict.fromkeys(call.run for call in calls))}
    coming = iter(calls)

    def replace_rows(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if replaying.get() or (now := next(coming, None)) is None:
            return
        values = [v for v in take_apart(output)[1] if type(v) is Tensor and v.is_floating_point() and v.dim()]
        values = [value for value in values if len(value) in sizes]
        run, before = former.get(now.branch, (now.run, []))
        former[now.branch] = now.run, [value.clone() for value in values]
        if run != now.run or [then.shape for then in before] != [value.shape for value in values]:
            return
        for row in range(each):
            number = numbers[now.run] * each + row
            if steps[number] == now.step:
                for value, then in zip(values, before, strict=True):
                    pair = then[row::each] - value[row::each], value[row::each]
                    norms = [torch.linalg.vector_norm(part, dtype=torch.float32) for part in pair]
                    squares.setdefault(number, []).append(torch.stack(norms) ** 2)
                    value[row::each] = then[row::each]  # in place, as the output may have any form

    hook = block.register_forward_hook(replace_rows, with_kwargs=True)
    try:
        yield squares
    finally:
        hook.remove()


def final_errors(found: Samples, reference: Samples) -> list[float]:
    """Return each sample's root mean square distance from its reference; of whole numbers, without that of rounding.

    Where rounding hides most of the distance, the values that differ are counted: of normally distributed errors much
    smaller than one, √(2/π) times their deviation is the share of values that are rounded one higher or lower.
    """
    distances = []
    for ours, theirs in zip(found, reference, strict=True):
        mean = sums(ours, theirs)[0] / theirs.size
        if not np.array_equal(theirs, np.rint(theirs)):
            distances.append(mean**0.5)
        else:
            distances.append(mean * (np.pi / 2) ** 0.5 if mean < 0.4 else (mean - ROUNDING) ** 0.5)
    return distances


def smooth_curve(places: Floats, values: Floats, at: Floats) -> Floats:
    """Return the likeliest curve through noisy values: the mean of a Gaussian process with an unknown level.

    See Rasmussen and Williams, Gaussian Processes for Machine Learning (2006), section 2.2, with a squared exponential
    covariance.

    Args:
        places: places of the values, in 0…1.
        values: the noisy values.
        at: places at which to return the curve.

    Example: a few values on a line; far from all of them the curve tends to their mean level.
        >>> places, values = np.array([0.2, 0.4, 0.6, 0.8]), np.array([-1.0, -0.5, 0.0, 0.5])
        >>> smooth_curve(places, values, np.array([0.3, 0.7])).round(1)
        array([-0.7,  0.2])
    """

    def covariance(one: Floats, other: Floats) -> Floats:
        values: Floats = SPREAD**2 * np.exp(-0.5 * ((one[:, None] - other[None]) / LENGTH) ** 2)
        return values

    noisy = covariance(places, places) + NOISE**2 * np.eye(len(places))
    solved = np.linalg.solve(noisy, np.stack([values, np.ones_like(values)], axis=1))
    level = solved[:, 0].sum() / solved[:, 1].sum()  # generalised least squares
    curve: Floats = level + covariance(at, places) @ (solved[:, 0] - level * solved[:, 1])
    return curve
