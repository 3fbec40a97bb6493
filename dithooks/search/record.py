"""Record one run in which everything is computed: what policies would see, and samples of what the ranges do."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..attachment import Attachment
from ..capture import effect
from ..policy.base import Decision, Policy, Schedule, Track
from ..predictor import Moment
from ..state import Call, Capture

SAMPLE = 2**16  # numbers of a tensor that are kept


@dataclass(frozen=True)
class Watch(Policy):
    """Compute every call, and look."""

    gauge: ClassVar[Literal["change", "rate"] | None] = "change"

    def before(self, step: int, track: Track, schedule: Schedule) -> Decision:
        return Decision(False, "profile")


@dataclass(frozen=True, eq=False)
class Recorded:
    """One branch of one range in a recorded run.

    Args:
        range: path of the transformer, or of the list that was watched.
        branch: number of the branch.
        moments: step and σ of its calls.
        probes: (T, batch, n), a sample of what a threshold looks at, float32.
        deltas: (T, n'), a sample of the range's residual, of all its streams.
        norms: (T,), the L2 norm of the picture's residual.
        blocks: of the transformer (or list), and
        skipped: of these in the range.
    """

    range: str
    branch: int
    moments: tuple[Moment, ...]
    probes: NDArray[np.float32]
    deltas: NDArray[np.float32]
    norms: NDArray[np.float32]
    blocks: int
    skipped: int

    def change(self, step: int, since: int, reduce: str = "mean") -> float:
        """mean|r_t − r_s| / mean|r_s| of the t-th and s-th call; of the batch, or of the sample that changed most."""
        now, then = self.probes[step], self.probes[since]
        axis = None if reduce == "mean" else 1
        return float(np.max(np.abs(now - then).mean(axis) / np.abs(then).mean(axis)))

    @property
    def changes(self) -> NDArray[np.float32]:
        """(T − 1,), from each call to the next."""
        return np.array([self.change(t, t - 1) for t in range(1, len(self.moments))], dtype=np.float32)

    @property
    def ratios(self) -> tuple[float, ...]:
        """γ of each call, for :class:`MagnitudeRatio`: ‖Δ_t‖/‖Δ_{t−1}‖, 1 for the first."""
        return (1.0, *(float(ratio) for ratio in self.norms[1:] / self.norms[:-1]))

    def decisions(self, policy: Policy) -> list[Decision]:
        """What a policy that looks at changes would have decided, had reuse changed nothing in what it looks at."""
        steps = len(self.moments)
        schedule = Schedule(steps, 0, None, self.blocks, self.skipped)
        policy, track, made = policy.for_run(schedule), Track(self.branch), list[Decision]()
        for step in range(steps):
            decision = policy.before(step, track, schedule)
            if decision is None or (decision.reuse and track.refreshed is None):
                if track.refreshed is None:
                    decision = Decision(False, "no anchor")
                else:
                    value = self.change(step, track.refreshed, policy.reduce)
                    decision = policy.judge(step, track, schedule, value)
            track.note(step, decision)
            if not decision.reuse:
                track.refreshed = step
            made.append(decision)
        return made


class Recorder:
    """Keeps samples of what one range does, call by call."""

    def __init__(self, attached: Attachment) -> None:
        self.attached = attached
        self.calls: dict[tuple[int, int], list[tuple[Moment, Tensor, Tensor, Tensor]]] = {}

    def __call__(self, call: Call, deltas: Sequence[Tensor]) -> None:
        assert call.run is not None
        assert call.branch is not None
        seen = call.seen if call.seen is not None else torch.zeros(1, 1)
        wiring = self.attached.flow.wiring
        main = None if wiring is None else effect(Capture(deltas=tuple(deltas)), wiring)
        norm = torch.linalg.vector_norm(deltas[0] if main is None else main, dtype=torch.float32)
        flat = [delta.reshape(1, -1, delta.shape[-1]) for delta in deltas]
        stride = -(-sum(delta.numel() for delta in deltas) // SAMPLE)
        kept = (call.moment, _sampled(seen), torch.cat([_sampled(each, stride)[0] for each in flat]), norm)
        self.calls.setdefault((call.run.number, call.branch.track.number), []).append(kept)

    def branches(self) -> list[Recorded]:
        """What was recorded.

        Raises:
            ValueError: several runs were.
        """
        ledger, flow = self.attached.ledger, self.attached.flow
        if len(runs := {run for run, _ in self.calls}) > 1:
            raise ValueError(f"call made {len(runs)} runs of {ledger.name}: profile one at a time")
        found = []
        for (_, number), calls in sorted(self.calls.items()):
            moments, probes, deltas, norms = zip(*calls, strict=True)
            found.append(
                Recorded(
                    ledger.name,
                    number,
                    moments,
                    _array(probes),
                    _array(deltas),
                    _array(norms),
                    blocks=ledger.blocks,
                    skipped=flow.end - flow.start + 1,
                )
            )
        return found


@contextmanager
def recording(attached: Sequence[Attachment]) -> Iterator[list[Recorder]]:
    """Attached, with a recorder each; and taken off again, whatever happens."""
    recorders = [Recorder(each) for each in attached]
    try:
        for each, recorder in zip(attached, recorders, strict=True):
            each.flow.runs.on_kept = recorder
            each.attach()
        yield recorders
    finally:
        for each in attached:
            each.detach()
            each.flow.forget()


def _sampled(tensor: Tensor, stride: int | None = None) -> Tensor:
    """(batch, n): every ``stride``-th number of each sample of a batch, the same ones at every call; a copy."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    stride = stride or -(-flat.numel() // SAMPLE)
    while math.gcd(stride, tensor.shape[-1]) > 1:  # or it would be the same channels of every token
        stride += 1
    return flat[:, ::stride].clone()


def _array(tensors: Sequence[Tensor]) -> NDArray[np.float32]:
    array: NDArray[np.float32] = torch.stack([tensor.float() for tensor in tensors]).cpu().numpy()
    return array
