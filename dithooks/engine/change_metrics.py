"""How much has changed since the last computed step? A number on the device, in float32; asking for it waits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..policies.policy import Reduce

PIECE = 2**24  # numbers


class ChangeMetric(ABC):
    """What one branch is looked at for, and what it has to remember for that.

    Several streams may be looked at: the one that changed most counts, each relative to itself. One that stands still
    has no change relative to itself; it counts only where all of them do.
    """

    keeps_reused: ClassVar[bool] = False  # streams seen in a reused call are kept, too

    def __init__(self, reduce: Reduce) -> None:
        self.reduce = reduce

    def look(self, seen: Sequence[Tensor]) -> Tensor | None:
        """The change in a call, of no dimension, in float32; ``None`` where there is nothing yet to compare with.

        ``seen`` are the streams to measure, each (batch, …).
        """
        sums = self.sums(seen)
        if sums is None:
            return None
        changes = [_reduced(self.change(each), self.reduce) for each in sums]
        if len(changes) == 1:
            return changes[0]
        return _most(torch.stack(changes), torch.stack([self.is_still(each).all() for each in sums]))

    def largest(self, sums: Tensor) -> Tensor:
        """The change of the stream that changed most, wherever it did: (sums, …, streams) → ()."""
        streams = sums.shape[-1]
        changes = self.change(sums).reshape(-1, streams).amax(0)
        return changes[0] if streams == 1 else _most(changes, self.is_still(sums).reshape(-1, streams).all(0))

    def counting(self, sums: Sequence[Tensor]) -> Tensor:
        """(streams, sums), of the sample that counts."""
        each = [(one, self.change(one).argmax().reshape(1)) for one in sums]  # NaN is the largest, here as anywhere
        return torch.cat([one.index_select(1, index) for one, index in each], 1).T

    @abstractmethod
    def sums(self, seen: Sequence[Tensor]) -> list[Tensor] | None:
        """What the change is made of: (sums, samples) of each stream, in float32; with ``"mean"``, of all samples."""

    @abstractmethod
    def change(self, sums: Tensor) -> Tensor:
        """The change that some sums say: (sums, …) → (…)."""

    @abstractmethod
    def is_still(self, sums: Tensor) -> Tensor:
        """Whether the stream does not move, as some sums say: (sums, …) → (…)."""

    @abstractmethod
    def note(self, seen: Sequence[Tensor], output: Sequence[Tensor] | None) -> None:
        """A call is over: computed, with the range's outputs, or reused, without."""

    @abstractmethod
    def clear(self) -> None:
        """Forget."""

    @property
    @abstractmethod
    def held(self) -> list[Tensor]:
        """The remembered streams."""

    @property
    def nbytes(self) -> int:
        """Memory of it."""
        return sum(tensor.nbytes for tensor in {id(tensor): tensor for tensor in self.held}.values())


class RelativeChange(ChangeMetric):
    """mean|r_t − r_s| / mean|r_s|, s being the last computed step.

    Example:
        >>> before, now = torch.tensor([[1.0, 1.0], [4.0, 4.0]]), torch.tensor([[2.0, 2.0], [5.0, 5.0]])
        >>> for gauge in RelativeChange("max"), RelativeChange("mean"):
        ...     gauge.note([before], [before])
        ...     print(round(float(gauge.look([now])), 3))
        1.0
        0.4
    """

    reference: Sequence[Tensor] = ()

    def sums(self, seen: Sequence[Tensor]) -> list[Tensor] | None:
        if not _alike(seen, self.reference):
            return None
        each = zip(seen, self.reference, strict=True)
        return [_rows(_size(now, before, self.reduce), _size(before, None, self.reduce)) for now, before in each]

    def change(self, sums: Tensor) -> Tensor:
        return sums[0] / sums[1]

    def is_still(self, sums: Tensor) -> Tensor:
        return (sums[0] == 0) & (sums[1] == 0)

    def note(self, seen: Sequence[Tensor], output: Sequence[Tensor] | None) -> None:
        if output is not None:
            self.reference = seen

    def clear(self) -> None:
        self.reference = ()

    @property
    def held(self) -> list[Tensor]:
        return list(self.reference)


class OutputChangeEstimate(ChangeMetric):
    """k · mean|x_t − x_{t−1}| / mean|y_s|, with k = mean|y_s − y_r| / mean|x_s − x_r|; s > r: the last computed."""

    keeps_reused: ClassVar[bool] = True

    def __init__(self, reduce: Reduce) -> None:
        super().__init__(reduce)
        self.before: Sequence[Tensor] = ()  # x of the last call
        self.input: Sequence[Tensor] = ()  # x_s and
        self.output: Sequence[Tensor] = ()  # y_s of the last computed one,
        self.sizes: Sequence[Tensor] = ()  # Σ|y_s|,
        self.follows: Sequence[Tensor] = ()  # and what k is made of, Σ|y_s − y_r| and Σ|x_s − x_r|

    def sums(self, seen: Sequence[Tensor]) -> list[Tensor] | None:
        if not self.follows or not _alike(seen, self.before):
            return None
        each = zip(self.follows, seen, self.before, self.sizes, strict=True)
        return [_rows(*k, _size(x, less, self.reduce), size) for k, x, less, size in each]

    def change(self, sums: Tensor) -> Tensor:
        output, given, now, size = sums.unbind()
        # A stream that stays as it is (a prompt), and what becomes of it, too, follows nothing.
        follows = torch.where((output == 0) & (given == 0), output, output / given)
        return follows * now / size

    def is_still(self, sums: Tensor) -> Tensor:
        return (sums[1] == 0) & (sums[2] == 0)

    def note(self, seen: Sequence[Tensor], output: Sequence[Tensor] | None) -> None:
        if output is not None and len(output) != len(seen):
            self.clear()
        elif output is not None:
            self.follows = []
            if _alike(seen, self.input) and _alike(output, self.output):
                each = zip(output, self.output, seen, self.input, strict=True)
                self.follows = [
                    _rows(_size(y, y_r, self.reduce), _size(x, x_r, self.reduce)) for y, y_r, x, x_r in each
                ]
            self.input, self.output = seen, output
            self.sizes = [_size(y, None, self.reduce) for y in output]
        self.before = seen

    def clear(self) -> None:
        self.before = self.input = self.output = self.sizes = self.follows = ()

    @property
    def held(self) -> list[Tensor]:
        return [*self.before, *self.input, *self.output]


METRICS: dict[str, type[ChangeMetric]] = {"change": RelativeChange, "rate": OutputChangeEstimate}


def _alike(now: Sequence[Tensor], before: Sequence[Tensor]) -> bool:
    return len(now) == len(before) > 0 and all(a.shape == b.shape for a, b in zip(now, before, strict=True))


def _most(changes: Tensor, still: Tensor) -> Tensor:
    """The largest of the streams' changes, NaN where one is; without those that stand still, unless all do."""
    return torch.where(still.all(), changes.max(), changes.masked_fill(still, -torch.inf).max())


def _size(tensor: Tensor, less: Tensor | None, reduce: Reduce) -> Tensor:
    """Σ|tensor − less|, one number or one a sample. By pieces: of a video, all in float32 would be gigabytes."""
    tensor, less = _own(tensor), None if less is None else _own(less)
    batch = 1 if reduce == "mean" or tensor.dim() < 2 else tensor.shape[0]
    pieces = [None if each is None else each.reshape(batch, -1).split(PIECE // batch, 1) for each in (tensor, less)]
    total = torch.zeros(batch, dtype=torch.float32, device=tensor.device)
    for number, piece in enumerate(pieces[0] or ()):
        wide = piece.float() if pieces[1] is None else piece.float() - pieces[1][number].float()
        total += torch.linalg.vector_norm(wide, ord=1, dim=1)
    return total


def _own(tensor: Tensor) -> Tensor:
    """Of a tensor that is split over ranks (DTensor), the local part: to add up the ranks is not done unasked."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local()


def _rows(*sums: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*sums))


def _reduced(values: Tensor, reduce: Reduce) -> Tensor:
    return values.max() if reduce == "max" else values.mean()
