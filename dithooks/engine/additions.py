"""What a model adds to the streams between the blocks of a range, separated from the effect of the blocks themselves.

ControlNets and adapters do so: ``x = block(x); x = x + control[i]``. What leaves a range less what enters it holds what
was added at that step. So it is summed up on a computed step and taken out of the residual; on a reused one, the
streams pass through the model's own loop, which adds the terms of that step.

That is right for what does not depend on the stream that it is added to. Whether it does, the model is asked with noise
(``Verification.additions``): a stream that is scaled, gated or overwritten on its way has its noise changed. Such a
stream is not counted: its residual is kept and added as a whole, with what was done to it at the last computed step.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..blocks.stream_transforms import Stream, StreamTransform, Unrelated, build, streams_of
from ..blocks.wiring import Wiring
from .arguments import Signature

NOTICEABLE = 0.01  # change of what was added, relative to its size; rounding is below it


class Additions:
    """The known additions between the blocks of one range.

    A residual says by its signature whether additions were taken out of it, so that the two kinds are never mixed: once
    they are counted, residuals from before are not reused.
    """

    def __init__(self) -> None:
        self.signature: Signature = ()  # an entry that says of each output whether its additions are counted; or none
        self.ask: Callable[[frozenset[str]], None] | None = None  # asks the model, before a call with such arguments
        self.asked: set[frozenset[str]] = set()  # names of the arguments of calls for which it was asked
        self.were_seen = False  # on a reused step, though the model had been asked and added nothing
        self.is_watched = True  # reused steps are compared, to warn if what was not counted changes
        self._former: tuple[weakref.ref[object], list[Tensor | None]] | None = None

    @property
    def counted(self) -> tuple[bool, ...]:
        """For each output of the range, whether its additions are counted at each step; empty if none are."""
        return self.signature[0][1] if self.signature else ()

    def count(self, outputs: Sequence[bool]) -> None:
        """Count the additions to these outputs from the next call on."""
        if any(outputs):
            self.signature, self.ask, self.is_watched, self._former = (("between", tuple(outputs)),), None, False, None

    def changed(self, branch: object, added: list[Tensor | None]) -> bool:
        """Return whether other things were added at a reused step of a branch than at the first that was seen."""
        former = self._former
        if former is None or former[0]() is None:
            self._former = weakref.ref(branch), added
            return False
        if former[0]() is not branch:
            return False
        return any(_differ(now, before) for now, before in zip(added, former[1], strict=True))

    def forget(self) -> None:
        """Drop the tensors held."""
        self._former = None


class AdditionSum:
    """The sum of the terms that are added between the blocks of a range in one computed call.

    What was added on the way is followed through the model's joins and cuts, as the streams are.

    Args:
        wiring: of the range.
        has_versions: whether tensors count the writes into them; they do not in compiled code.
    """

    def __init__(self, wiring: Wiring, has_versions: bool) -> None:
        self.wiring, self.has_versions = wiring, has_versions
        self._next = 0  # number of the block to come
        self._sums: dict[str, Tensor] = {}  # by argument of the block under way; those without additions are left out
        self._returned: list[tuple[Tensor, int] | None] = []  # what the last block returned, and versions
        self._copies: list[Tensor] = []  # of these, as the model may write into them; of those that go on
        self._left: list[Tensor | None] = []  # sums of the additions to these

    def enter(self, offset: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Add up what reaches a block more than the block before returned."""
        if offset != self._next:  # the model left out a block, or calls one again: the sum is not known
            self._next = -1
            return
        if not offset:
            return
        joint, io = self.wiring.joints[offset - 1], self.wiring.block_ios[offset]
        sums = {name: self._sums[former] for name, former in joint.same.items() if former in self._sums}
        for name, made in joint.made.items():
            value = io.read(name, args, kwargs)
            if type(made) is Stream and self._is_as_returned(value, made.number):
                total = self._left[made.number]
            else:
                before = build(made, self._copies, value.shape) if isinstance(value, Tensor) else None
                if before is None:
                    self._next = -1
                    return
                total = value - before
                if (carried := self._carried(made, value.shape)) is not None:
                    total = total + carried
            if total is not None:
                sums[name] = total
        self._sums = sums
        self._returned, self._copies, self._left = [], [], []

    def leave(self, offset: int, output: Any) -> None:
        """Copy what a block returns."""
        if offset != self._next:
            return
        self._next = offset + 1
        io, joint = self.wiring.block_ios[offset], self.wiring.joints[offset]
        values = io.reader.take(output)[1]
        needed = {number for made in joint.made.values() for number in streams_of(made)}
        self._left = [None if name is None else self._sums.get(name) for name in io.carries]
        if len(values) != len(io.carries) or not all(isinstance(values[number], Tensor) for number in needed):
            self._next = -1
            return
        tensors = [value for value in values if isinstance(value, Tensor)]
        self._copies = [value.clone() if number in needed else tensors[0] for number, value in enumerate(values)]
        if self.has_versions:
            tracked = [number in needed and not value.is_inference() for number, value in enumerate(values)]
            self._returned = [(v, v._version) if has else None for v, has in zip(values, tracked, strict=True)]

    def taken_from(self, deltas: Sequence[Tensor], counted: Sequence[bool]) -> tuple[Tensor, ...]:
        """Return residuals without what was added to the outputs that count; none if that is not known."""
        if self._next != len(self.wiring.joints) or len(deltas) != len(counted):
            return ()
        pure = []
        for name, delta, counts in zip(self.wiring.arrives_as, deltas, counted, strict=True):
            total = self._sums.get(name) if name is not None and counts else None
            if total is not None and total.shape != delta.shape:
                return ()
            pure.append(delta if total is None else (delta - total).to(delta.dtype))
        return tuple(pure)

    def _is_as_returned(self, value: Any, number: int) -> bool:
        returned = self._returned[number] if self._returned else None
        return returned is not None and returned[0] is value and returned[0]._version == returned[1]

    def _carried(self, made: StreamTransform, shape: torch.Size) -> Tensor | None:
        """Return what was added earlier, in the form that the model brings the streams into here."""
        numbers = set(streams_of(made))
        if all(self._left[number] is None for number in numbers):
            return None
        parts = [
            torch.zeros_like(copy) if left is None else left
            for copy, left in zip(self._copies, self._left, strict=True)
        ]
        return build(made, parts, shape)


def added(wiring: Wiring, arrived: Sequence[Any], streams: Sequence[Tensor]) -> list[Tensor | None]:
    """Return what was added on the way to the range's last block, for each of its outputs that is a tensor.

    Args:
        wiring: of the range.
        arrived: what the last block is given for each of these outputs.
        streams: what the first stand-in handed on.
    """
    found: list[Tensor | None] = []
    for bridge, value in zip(wiring.outputs, arrived, strict=True):
        known = isinstance(value, Tensor) and not isinstance(bridge, Unrelated)
        before = build(bridge, streams, value.shape) if known else None
        found.append(None if before is None else value - before)
    return found


def arriving(wiring: Wiring, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """Return what the range's last block is given, for each of its outputs that is a tensor."""
    io = wiring.block_ios[-1]
    return [None if name is None else io.read(name, args, kwargs) for name in wiring.arrives_as]


def _differ(now: Tensor | None, before: Tensor | None) -> bool:
    if now is None or before is None or now.shape != before.shape:
        return now is not before
    return bool((now.float() - before.float()).norm() > NOTICEABLE * before.float().norm())
