"""The selection of tokens to keep at each boundary of the blocks: everywhere the same tokens.

Every token of a stream gets a number where it first appears. Where a stream is passed on, concatenated, sliced or
transposed, its numbers follow, by the stream transforms of the wiring. So a token's hidden states can be compared at
any two boundaries that it reaches, and their difference is a range's residual.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

import torch
from torch import Tensor

from ..blocks.block_io import BlockIO, Form
from ..blocks.observation import BlockCall, Observation
from ..blocks.stream_matching import block_io_of
from ..blocks.stream_transforms import build
from ..blocks.wiring import gap
from ..errors import WiringError

Side = Literal["in", "out"]


@dataclass(eq=False)
class SamplePoint:
    """One side of a block, and the rows of its streams that are kept; a row is a token of one sample of a batch.

    Args:
        block: number of the block among the observed ones.
        side: ``"in"`` for the block's inputs, ``"out"`` for its outputs.
        streams: form of each stream, and number of each row (0: none), by argument name (in) or output position (out).
        rows: indices of the rows that are kept, by stream.
        ids: numbers of the kept rows, in the order of a sample.
    """

    block: int
    side: Side
    streams: Mapping[str | int, tuple[Form, Tensor]]
    rows: dict[str | int, Tensor] = field(default_factory=dict)
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    @property
    def tokens(self) -> int:
        """Number of rows of all streams."""
        return sum(prod(form[0][:-1]) for form, _ in self.streams.values())

    @property
    def nbytes(self) -> int:
        """Size of all streams in bytes."""
        return sum(prod(form[0]) * form[1].itemsize for form, _ in self.streams.values())

    def choose(self, kept: Tensor) -> None:
        """Keep the rows whose numbers are marked in ``kept``."""
        self.rows = {
            name: rows for name, (_, numbers) in self.streams.items() if len(rows := kept[numbers].nonzero().flatten())
        }
        self.ids = torch.cat([self.ids, *(self.streams[name][1][rows] for name, rows in self.rows.items())])
        self.streams = {name: (form, numbers[:0]) for name, (form, numbers) in self.streams.items()}

    def take(self, read: Callable[[str | int], Any]) -> list[Tensor] | None:
        """Copy the kept rows of one call's streams; ``None``: a stream has another shape than when it was observed."""
        kept = []
        for name, rows in self.rows.items():
            value = read(name)
            if not isinstance(value, Tensor) or value.shape != self.streams[name][0][0]:
                return None
            if rows.device != value.device:
                rows = self.rows[name] = rows.to(value.device)
            kept.append(value.detach().reshape(-1, value.shape[-1]).index_select(0, rows))
        return kept


def points_of(
    observation: Observation,
    order: Sequence[int],
    altered: Container[int] = (),
    share: float = 1.0,
    memory: float = float("inf"),
) -> list[SamplePoint]:
    """Return the boundaries of the blocks in ``order``, with the tokens to keep there.

    A block's outputs get a point of their own where the next block is not given all of them unchanged.

    Args:
        observation: observation of one call.
        order: numbers of the blocks in the order of their calls.
        altered: blocks whose outputs the model writes into before it passes them on.
        share: largest share of the tokens to keep.
        memory: largest size of one call's sample in bytes; at least one token of each stream is kept.
    """
    numbering = _Numbering()
    calls = {call.index: call for call in reversed(observation.calls)}
    points: list[SamplePoint] = []
    ids: dict[str, Tensor] = {}
    for place, index in enumerate(order):
        call = calls.get(index)
        if call is None:
            ids = {}
            continue
        try:
            io = block_io_of(observation, call)
        except WiringError:
            ids = {}
            continue
        entering = _entering(call, io, ids, numbering)
        points.append(
            SamplePoint(index, "in", {name: (call.inputs[name], numbers) for name, numbers in entering.items()})
        )
        leaving = _leaving(call, io, entering, numbering)
        following = calls.get(order[place + 1]) if place + 1 < len(order) else None
        ids, exact = {}, False
        if following is not None:
            ids, exact = _handed(observation, call, io, leaving, entering, following)
        if not exact or index in altered:
            forms: dict[str | int, tuple[Form, Tensor]] = {
                p: (form, leaving[p]) for p, form in enumerate(call.outputs) if form is not None and p in leaving
            }
            points.append(SamplePoint(index, "out", forms))
    whole = sum(point.nbytes for point in points)
    kept = numbering.chosen(min(share, memory / max(whole, 1)))
    for point in points:
        point.choose(kept)
    return points


class _Numbering:
    """Gives tokens their numbers, from 1."""

    def __init__(self) -> None:
        self.groups: list[tuple[int, int]] = []
        self.next = 1

    def more(self, count: int) -> Tensor:
        """Return numbers for so many new rows."""
        self.groups.append((self.next, count))
        self.next += count
        return torch.arange(self.next - count, self.next)

    def chosen(self, share: float) -> Tensor:
        """Return a mask (numbers + 1,) of those to keep: a share of each stream, at least one, always the same."""
        kept = torch.zeros(self.next, dtype=torch.bool)
        generator = torch.Generator().manual_seed(0)
        for first, count in self.groups:
            some = torch.randperm(count, generator=generator)[: min(count, max(1, int(count * share)))]
            kept[first + some] = True
        return kept


def _entering(call: BlockCall, io: BlockIO, ids: Mapping[str, Tensor], numbering: _Numbering) -> dict[str, Tensor]:
    """Return the row numbers of a block's input streams: known ones, no token twice, or else new ones."""
    found: dict[str, Tensor] = {}
    names = [name for name in io.carries if name is not None]
    known = torch.zeros(1, dtype=torch.int64)
    for name in [*ids, *(name for name in names if name not in ids)]:
        numbers = ids.get(name, torch.zeros(prod(call.inputs[name][0][:-1]), dtype=torch.int64)).clone()
        new = torch.isin(numbers, known)
        numbers[new] = numbering.more(int(new.sum()))
        found[name] = numbers
        known = torch.cat([known, numbers])
    return {name: found[name] for name in names}


def _leaving(call: BlockCall, io: BlockIO, entering: Mapping[str, Tensor], numbering: _Numbering) -> dict[int, Tensor]:
    """Return the row numbers of each output: those of the argument that it carries on, if their forms agree."""
    found = {}
    for position, (name, form) in enumerate(zip(io.carries, call.outputs, strict=True)):
        if form is not None:
            same = name is not None and call.inputs[name][0] == form[0]
            found[position] = entering[name] if same and name is not None else numbering.more(prod(form[0][:-1]))
    return found


def _handed(
    observation: Observation,
    before: BlockCall,
    sender: BlockIO,
    leaving: Mapping[int, Tensor],
    entering: Mapping[str, Tensor],
    after: BlockCall,
) -> tuple[dict[str, Tensor], bool]:
    """Return the row numbers of the next block's inputs, and whether these are all outputs of this block, unchanged."""
    try:
        taker = block_io_of(observation, after)
    except WiringError:
        return {}, False
    between = gap(observation, before, sender, after, taker)
    shown: list[Tensor] = []
    for position, form in enumerate(before.outputs):
        shape = (1, 1) if form is None else (*form[0][:-1], 1)
        shown.append(leaving.get(position, torch.zeros(1, dtype=torch.int64)).reshape(shape))
    ids: dict[str, Tensor] = {}
    fed = before.fed if before.next is after else {}
    names = [name for name in taker.carries if name is not None]
    for name in sorted(names, key=lambda name: name not in fed.values()):  # the tensors themselves before similar ones
        form = after.inputs[name]
        if name in between.made:
            made = build(between.made[name], shown, torch.Size((*form[0][:-1], 1)))
            if made is not None:
                ids[name] = made.flatten()
        elif before.next is after and after.same.get(name) in entering:
            ids[name] = entering[after.same[name]]
    return ids, all(fed.get(p) in names for p, name in enumerate(sender.carries) if name is not None)
