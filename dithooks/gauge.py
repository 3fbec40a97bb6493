"""How much has changed since the last computed step? A number on the device, in float32; asking for it waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

Reduce = Literal["mean", "max"]
PIECE = 2**24  # numbers


class Gauge(ABC):
    """What one branch is looked at for, and what it has to remember for that."""

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce

    @abstractmethod
    def look(self, seen: Tensor) -> Tensor | None:
        """The change in a call, of no dimension, in float32; ``None`` where there is nothing yet to compare with.

        ``seen`` is what is looked at, (batch, …).
        """

    @abstractmethod
    def note(self, seen: Tensor, output: Tensor | None) -> None:
        """A call is over: computed, with the range's output, or reused, without."""

    @abstractmethod
    def clear(self) -> None:
        """Forget."""

    @property
    @abstractmethod
    def held(self) -> list[Tensor]:
        """What is remembered."""

    @property
    def nbytes(self) -> int:
        """Memory of it."""
        return sum(tensor.nbytes for tensor in self.held)


class Change(Gauge):
    """mean|r_t − r_s| / mean|r_s|, s being the last computed step."""

    reference: Tensor | None = None

    def look(self, seen: Tensor) -> Tensor | None:
        if self.reference is None or self.reference.shape != seen.shape:
            return None
        return ratio(seen, self.reference, self.reduce)

    def note(self, seen: Tensor, output: Tensor | None) -> None:
        if output is not None:
            self.reference = seen

    def clear(self) -> None:
        self.reference = None

    @property
    def held(self) -> list[Tensor]:
        return [] if self.reference is None else [self.reference]


class Rate(Gauge):
    """k · mean|x_t − x_{t−1}| / mean|y_s|, with k = mean|y_s − y_r| / mean|x_s − x_r|; s > r: the last computed."""

    def __init__(self, reduce: Reduce) -> None:
        super().__init__(reduce)
        self.before: Tensor | None = None  # x of the last call
        self.input: Tensor | None = None  # x_s and
        self.output: Tensor | None = None  # y_s of the last computed one,
        self.size: Tensor = torch.ones(())  # mean|y_s|,
        self.follows: Tensor | None = None  # and k

    def look(self, seen: Tensor) -> Tensor | None:
        if self.follows is None or self.before is None or self.output is None or self.before.shape != seen.shape:
            return None
        return _reduced(self.follows * _size(seen, self.before, self.reduce) / self.size, self.reduce)

    def note(self, seen: Tensor, output: Tensor | None) -> None:
        if output is not None:
            if self.output is not None and self.input is not None and self.output.shape == output.shape:
                change = _size(seen, self.input, self.reduce)
                self.follows = _size(output, self.output, self.reduce) / change
            self.input, self.output, self.size = seen, output, _size(output, None, self.reduce)
        self.before = seen

    def clear(self) -> None:
        self.before = self.input = self.output = self.follows = None

    @property
    def held(self) -> list[Tensor]:
        tensors = (self.before, self.input, self.output)  # the first two are one after a computed step
        return list({id(tensor): tensor for tensor in tensors if tensor is not None}.values())


def ratio(now: Tensor, before: Tensor, reduce: Reduce) -> Tensor:
    """mean|now − before| / mean|before|, over the whole batch or the largest of its samples'; in float32.

    Args:
        now: (batch, …).
        before: of the same shape.
        reduce: ``"mean"`` or ``"max"``.

    Example:
        >>> before, now = torch.tensor([[1.0, 1.0], [4.0, 4.0]]), torch.tensor([[2.0, 2.0], [5.0, 5.0]])
        >>> float(ratio(now, before, "max")), round(float(ratio(now, before, "mean")), 3)
        (1.0, 0.4)
    """
    return _reduced(_size(now, before, reduce) / _size(before, None, reduce), reduce)


def _size(tensor: Tensor, less: Tensor | None, reduce: Reduce) -> Tensor:
    """Σ|tensor − less|, one number or one a sample. By pieces: of a video, all in float32 would be gigabytes."""
    batch = 1 if reduce == "mean" or tensor.dim() < 2 else tensor.shape[0]
    pieces = [None if each is None else each.reshape(batch, -1).split(PIECE // batch, 1) for each in (tensor, less)]
    total = torch.zeros(batch, dtype=torch.float32, device=tensor.device)
    for number, piece in enumerate(pieces[0] or ()):
        wide = piece.float() if pieces[1] is None else piece.float() - pieces[1][number].float()
        total += torch.linalg.vector_norm(wide, ord=1, dim=1)
    return total


def _reduced(values: Tensor, reduce: Reduce) -> Tensor:
    return values.max() if reduce == "max" else values.mean()
