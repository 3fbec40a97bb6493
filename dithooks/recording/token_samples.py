"""The token samples of one run, and the Gram matrices of all ranges that are computed from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..predictors.predictor import Moment
from .token_selection import SamplePoint

GramPair = tuple[int, int]
Room = dict[tuple[int, ...], NDArray[np.float64]]


class States(NamedTuple):
    """A sample at one point over T calls: its mean (n,), and the deviation of each call from it (T, n).

    ``columns`` (n,) holds the token and channel of each value, ascending; ``squares`` (T,) are ‖h‖².
    """

    apart: NDArray[np.float32]
    mean: NDArray[np.float32]
    columns: NDArray[np.int64]
    squares: NDArray[np.float64]


@dataclass(eq=False)
class Sampled:
    """The samples of one branch of one run, at every point and step.

    Args:
        points: the points at which tokens are kept, in the order in which a call passes them.
        moments: step and time of each call.
        calls: for each call and point, the kept rows (rows, channels) of each stream.
    """

    points: Sequence[SamplePoint]
    moments: list[Moment] = field(default_factory=list)
    calls: list[list[list[Tensor]]] = field(default_factory=list)

    def shares(self, other: Sampled) -> bool:
        """Whether both branches were called at one step."""
        return not {moment.step for moment in self.moments}.isdisjoint(moment.step for moment in other.moments)

    def extend(self, other: Sampled) -> None:
        """Merge another branch's calls, sorted by step."""
        both = [*zip(self.moments, self.calls, strict=True), *zip(other.moments, other.calls, strict=True)]
        both.sort(key=lambda call: call[0].step)
        self.moments, self.calls = [moment for moment, _ in both], [call for _, call in both]

    def states(self, number: int) -> States:
        """Return the sample at a point over all calls."""
        rows = [torch.cat([stream.float().flatten() for stream in call[number]]) for call in self.calls]
        widths = [stream.shape[-1] for stream in self.calls[0][number] for _ in range(len(stream))]
        ids = self.points[number].ids.tolist()
        parts = [(token << 32) + np.arange(width) for token, width in zip(ids, widths, strict=True)]
        columns = np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
        ascending, states = np.argsort(columns), torch.stack(rows).cpu().numpy()
        if not np.array_equal(ascending, np.arange(len(columns))):
            states, columns = states[:, ascending], columns[ascending]
        mean = states.mean(axis=0)
        return States(states - mean, mean, columns, np.einsum("ij,ij->i", states, states, dtype=np.float64))


def add_grams(
    sampled: Sampled,
    order: Sequence[int],
    ranges: Sequence[GramPair],
    steps: Sequence[int],
    grams: NDArray[np.float64],
    norms: NDArray[np.float64],
    report: Callable[[int], None] = lambda done: None,
) -> None:
    """Add a branch's inner products to the Gram matrices of all ranges, in place.

    A range's residual is the hidden states that leave its last block minus those that enter its first. Neighbouring
    residuals are almost parallel, and only their differences count: products are computed from deviations from the
    mean, in float64. At a step at which the branch was not called, because guidance was off, its nearest call counts,
    so that the branch favours no weights there.

    Args:
        sampled: samples of one branch.
        order: numbers of the blocks in the order of their calls.
        ranges: (R, 2), first and last block of each range.
        steps: the T steps of the Gram matrices.
        grams: (R, T, T), added to.
        norms: (B, T), ‖h‖² of the tokens that leave each block, added to.
        report: called with the number of ranges that are done.
    """
    called = np.array([moment.step for moment in sampled.moments])
    nearest = np.abs(np.subtract.outer(np.array(steps), called)).argmin(axis=1)
    every = np.ix_(nearest, nearest)
    entering = {point.block: number for number, point in enumerate(sampled.points) if point.side == "in"}
    leaving = {point.block: number for number, point in enumerate(sampled.points) if point.side == "out"}
    for before, after in pairwise(order):
        if before not in leaving and after in entering:
            leaving[before] = entering[after]
    states = {number: sampled.states(number) for number in {*entering.values(), *leaving.values()}}
    for block, index in enumerate(order):
        if index in leaving:
            norms[block] += states[leaving[index]].squares[nearest]
    room: Room = {}
    for number, (first, last) in enumerate(ranges):
        a, b = entering.get(order[first]), leaving.get(order[last])
        if a is not None and b is not None:
            grams[number] += gram(*_effect(states[a], states[b], room))[every]
        report(number + 1)


def gram(apart: NDArray[np.float64], mean: NDArray[np.float32]) -> NDArray[np.float64]:
    """Return the inner products (T, T) of residuals, given as their mean (n,) and deviations from it (T, n).

    Example:
        >>> gram(np.array([[0.0, -1.0], [0.0, 1.0]]), np.array([1.0, 3.0], dtype=np.float32))
        array([[ 5.,  9.],
               [ 9., 17.]])
    """
    exact = mean.astype(np.float64)
    cross = apart @ exact
    found: NDArray[np.float64] = apart @ apart.T + cross[:, None] + cross[None, :] + exact @ exact
    return found


def _effect(before: States, after: States, room: Room) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Return the deviations and the mean of ``after`` − ``before``, of the tokens that both have.

    ``room`` is reused by every call, since allocating memory of that size costs more than the subtraction.
    """
    if np.array_equal(before.columns, after.columns):
        shape = before.apart.shape
        out = room[shape] = room[shape] if shape in room else np.empty(shape)
        return np.subtract(after.apart, before.apart, out=out), after.mean - before.mean
    _, left, right = np.intersect1d(before.columns, after.columns, assume_unique=True, return_indices=True)
    apart = after.apart[:, right].astype(np.float64) - before.apart[:, left]
    return apart, after.mean[right] - before.mean[left]
