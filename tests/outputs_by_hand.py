"""A cache of whole outputs, written by hand and without dithooks: what the payload "output" is compared with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class OutputsByHand:
    """In a transformer's place: calls it at some steps, and at the others combines what it returned at the last two.

    Args:
        model: the transformer.
        step: returns the sampling step of a call, and its noise level.
        computed: steps at which the transformer is called.
        weights: from the noise levels of the computed steps before, the newest first, and of this one.
    """

    def __init__(
        self,
        model: Any,
        step: Callable[[], tuple[int, float]],
        computed: Sequence[int],
        weights: Callable[[list[float], float], Sequence[float]],
    ) -> None:
        self.model, self.step, self.computed, self.weights = model, step, computed, weights
        self.kept: dict[int, list[tuple[float, tuple[torch.Tensor, ...]]]] = {}
        self.now, self.position, self.calls = -1, 0, 0
        self.make: Callable[[tuple[torch.Tensor, ...]], Any] = lambda tensors: tensors[0]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        step, sigma = self.step()
        self.position = self.position + 1 if step == self.now else 0
        self.now = step
        kept = self.kept.setdefault(self.position, [])
        if step not in self.computed:
            weights = self.weights([at for at, _ in kept], sigma)
            columns = zip(*(tensors for _, tensors in kept[: len(weights)]), strict=True)
            return self.make(tuple(sum(w * each for w, each in zip(weights, one, strict=True)) for one in columns))
        self.calls += 1
        output = self.model(*args, **kwargs)
        tensors = (output,) if isinstance(output, torch.Tensor) else tuple(output)
        if isinstance(output, tuple):
            self.make = tuple
        kept.insert(0, (sigma, tuple(tensor.clone() for tensor in tensors)))
        return output


def last(_: list[float], __: float) -> tuple[float, ...]:
    """The last output as it was."""
    return (1.0,)


def line(levels: list[float], now: float) -> tuple[float, ...]:
    """The line through the last two, in the noise level; with one alone, that one."""
    if len(levels) < 2:
        return (1.0,)
    share = (now - levels[1]) / (levels[0] - levels[1])
    return share, 1 - share


def counted(scheduler: Any) -> Callable[[], tuple[int, float]]:
    """The step that a scheduler is at, and its noise level."""

    def step() -> tuple[int, float]:
        index = scheduler.step_index or 0
        return index, float(scheduler.sigmas[index])

    return step
