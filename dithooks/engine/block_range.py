"""Which blocks the range is, and how the streams run through it: as declared, until a call has shown it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ..blocks.observation import Observation, ObservedBlock
from ..blocks.trunk import resolve_lead, wire
from ..blocks.wiring import Wiring
from ..errors import InvalidSetting, WiringError


class LearntRange(NamedTuple):
    """What a call has shown: the blocks in the order in which they count, the wiring of the range and of those before
    it, and whether the range is other blocks than it was thought to be.
    """

    order: tuple[int, ...]
    wiring: Wiring
    leading: Wiring | None
    moved: bool


class BlockRange:
    """A range of a chain's blocks.

    Args:
        observed: all blocks of the chain, list by list; they count in the order in which they are called.
        start: first block of the range.
        end: last block of the range; negative: counted from the last of all.
        weights: of the lists, if those that are no part of the trunk are to be left out.
        leads: whether what the blocks before the range do is captured, too.
        look_at: names of the streams that the policy looks at; empty: those that the wiring names.
        is_fixed: whether the range must not move to other blocks, as these may be in another range.
    """

    def __init__(
        self,
        observed: Sequence[ObservedBlock],
        start: int,
        end: int,
        weights: Mapping[str, int] | None,
        leads: bool,
        look_at: tuple[str, ...] = (),
        is_fixed: bool = False,
    ) -> None:
        self.observed, self.start, self._end, self._weights = observed, start, end, weights
        self.look_at, self._is_fixed = look_at, is_fixed
        self.order: tuple[int, ...] = tuple(range(len(observed)))  # until a call has been seen: list by list
        self.lead = start if leads else 0  # as many blocks
        self.wiring: Wiring | None = None
        self.leading: Wiring | None = None  # of the blocks before the range

    @property
    def end(self) -> int:
        """Last block of the range."""
        return self._last_of(self.order)

    @property
    def first(self) -> str:
        """Path of the range's first block."""
        return self.spot(self.start).path

    @property
    def last(self) -> str:
        """Path of the range's last block."""
        return self.spot(self.end).path

    @property
    def blocks(self) -> tuple[int, ...]:
        """Those of the range, as they are listed."""
        return self.order[self.start : self.end + 1]

    def spot(self, number: int) -> ObservedBlock:
        """A block, by the order in which they count."""
        return self.observed[self.order[number]]

    def read(self, observation: Observation, name: str) -> LearntRange | None:
        """What a call has shown, ``None`` if too little; nothing is taken over yet.

        Raises:
            WiringError: as :func:`~dithooks.blocks.trunk.wire`; or one of several ranges would have to move.
            InvalidSetting: a stream to look at is not there.
        """
        found = wire(observation, self.order, self.start, self._end, self._weights, name)
        if found is None:
            return None
        order, wiring = found
        leading = resolve_lead(observation, order, self.lead) if self.lead else None
        if self.lead and leading is None:
            return None
        if self.look_at:
            looked = wiring if leading is None else leading
            if unknown := [stream for stream in self.look_at if stream not in looked.entry]:
                blocks = "the range" if leading is None else "the blocks before the range"
                raise InvalidSetting(
                    f"look_at: {', '.join(map(repr, unknown))} is no stream of {blocks} of {name}: "
                    f"there are {', '.join(map(repr, looked.entry))}"
                )
            if set(self.look_at) <= set(wiring.entry):
                wiring = replace(wiring, looked_at=self.look_at)
            leading = None if leading is None else replace(leading, looked_at=self.look_at)
        begin = self.start - self.lead
        moved = order[begin : self._last_of(order) + 1] != self.order[begin : self.end + 1]
        if moved and self._is_fixed:
            raise WiringError(
                f"{name}: the blocks of these lists are not called in their order, or not all of them are: name the "
                "lists that count, in the order of their calls, with blocks=..., or leave more_ranges out"
            )
        return LearntRange(order, wiring, leading, moved)

    def become(self, shown: LearntRange) -> None:
        """Take over what a call has shown."""
        self.order, self.wiring, self.leading, _ = shown

    def _last_of(self, order: tuple[int, ...]) -> int:
        return self._end if self._end >= 0 else len(order) + self._end
