"""One run in which everything is computed, recorded: the tensors that policies decide by, and samples of residuals."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..engine.attachment import Attachment
from ..engine.call import Call, Capture
from ..engine.residual import measured_deltas
from ..errors import InvalidSetting
from ..policies.history import BranchHistory, Decision, Schedule
from ..policies.policy import Policy
from ..policies.reason import Reason
from ..predictors.predictor import Moment
from ..stats.log import fold

SAMPLE = 2**16  # elements of a tensor that are kept


@dataclass(frozen=True)
class ChangeWatch(Policy):
    """A policy that computes every call and measures the change."""

    metric: ClassVar[Literal["change", "rate"] | None] = "change"

    def before(self, step: int, track: BranchHistory, schedule: Schedule) -> Decision:
        return Decision(False, "profile")


@dataclass(frozen=True, eq=False)
class RecordedChanges:
    """One branch of one range in a recorded run of T calls.

    Args:
        range: the path of the transformer, or of the list of blocks.
        branch: the number of the branch.
        schedule: the schedule of the run.
        moments: the step and the noise level of each call.
        probes: for each stream that a threshold compares, a sample of it in float32, (T, batch, n).
        deltas: a sample of the range's residual, of all its streams, (T, n').
        norms: the L2 norm of the residual of each stream that is looked at, (T, streams).
    """

    range: str
    branch: int
    schedule: Schedule
    moments: tuple[Moment, ...]
    probes: tuple[NDArray[np.float32], ...]
    deltas: NDArray[np.float32]
    norms: NDArray[np.float32]

    @property
    def steps(self) -> int:
        """The number of steps of the schedule, of which the run may have left out the first."""
        return self.schedule.steps or self.moments[-1].step + 1

    def change(self, call: int, since: int, reduce: str = "mean") -> float:
        """mean|r_t − r_s| / mean|r_s| of two calls, t and s: over the batch, or for the sample that changed most.

        Of several streams, the largest; one that is zero in both calls counts only where all are.
        """
        axis = None if reduce == "mean" else 1
        pairs = [(probe[call], probe[since]) for probe in self.probes]
        pairs = [pair for pair in pairs if np.any(pair)] or pairs
        with np.errstate(divide="ignore", invalid="ignore"):
            streams = [np.max(np.abs(now - then).mean(axis) / np.abs(then).mean(axis)) for now, then in pairs]
        return float(np.max(streams))

    @property
    def changes(self) -> NDArray[np.float32]:
        """The change from each call to the next, (T − 1,)."""
        return np.array([self.change(t, t - 1) for t in range(1, len(self.moments))], dtype=np.float32)

    @property
    def ratios(self) -> tuple[float, ...]:
        """γ of each step of the schedule: ‖Δ_t‖/‖Δ_{t−1}‖; 1 for the first call, and for a step without a call.

        Of several streams, of the one for which Σ|log γ| is largest.
        """
        ratios = [1.0] * self.steps
        with np.errstate(divide="ignore", invalid="ignore"):
            of_streams = self.norms[1:] / self.norms[:-1]
            moves = np.abs(np.log(of_streams)).sum(0)
        stream = int(np.argmax(np.where(np.isfinite(moves), moves, -1)))
        for moment, ratio in zip(self.moments[1:], of_streams[:, stream], strict=True):
            ratios[moment.step] = float(ratio)
        return tuple(ratios)

    def decisions(self, policy: Policy) -> list[Decision]:
        """The decisions of a policy on this run, on the assumption that reuse leaves the compared tensors unchanged."""
        policy, track, made = policy.for_run(self.schedule), BranchHistory(self.branch), list[Decision]()
        refreshed = 0
        for call, moment in enumerate(self.moments):
            decision = policy.before(moment.step, track, self.schedule)
            if (decision is None or decision.reuse) and track.refreshed is None:
                decision = Decision(False, Reason.NO_ANCHOR)
            if decision is None:
                value = self.change(call, refreshed, policy.reduce)
                decision = policy.judge(moment.step, track, self.schedule, value)
            fold(track, moment.step, decision)
            if not decision.reuse:
                refreshed, track.refreshed = call, None if decision.reason == Reason.NON_FINITE else moment.step
            made.append(decision)
        return made


class ChangeRecorder:
    """A recorder of one range, which keeps samples of each call."""

    def __init__(self, attached: Attachment) -> None:
        self.attached = attached
        self.calls: dict[tuple[int, int], list[tuple[Moment, list[Tensor], Tensor, Tensor]]] = {}
        self.schedule = Schedule()

    def __call__(self, call: Call, deltas: Sequence[Tensor]) -> None:
        assert call.run is not None
        assert call.branch is not None
        seen = [_sampled(each) for each in call.metric_inputs or (torch.zeros(1, 1),)]
        wiring = self.attached.cache.block_range.wiring
        main = (None if wiring is None else measured_deltas(Capture(deltas=tuple(deltas)), wiring)) or deltas
        norm = torch.stack([torch.linalg.vector_norm(each, dtype=torch.float32) for each in main])
        flat = [delta.reshape(1, -1, delta.shape[-1]) for delta in deltas]
        stride = -(-sum(delta.numel() for delta in deltas) // SAMPLE)
        kept = (call.moment, seen, torch.cat([_sampled(each, stride)[0] for each in flat]), norm)
        self.schedule = call.run.schedule
        self.calls.setdefault((call.run.number, call.branch.history.number), []).append(kept)

    def branches(self) -> list[RecordedChanges]:
        """The recorded branches.

        Raises:
            InvalidSetting: there was more than one run.
        """
        log = self.attached.log
        if len(runs := {run for run, _ in self.calls}) > 1:
            raise InvalidSetting(f"call made {len(runs)} runs of {log.name}: profile one at a time")
        found = []
        for (_, number), calls in sorted(self.calls.items()):
            moments, probes, deltas, norms = zip(*calls, strict=True)
            # The number of blocks is not known before the first call is over.
            schedule = replace(self.schedule, blocks=log.blocks, skipped=log.skippable)
            streams = tuple(_array(stream) for stream in zip(*probes, strict=True))
            found.append(RecordedChanges(log.name, number, schedule, moments, streams, _array(deltas), _array(norms)))
        return found


@contextmanager
def recording(attached: Sequence[Attachment]) -> Iterator[list[ChangeRecorder]]:
    """Attach a recorder to each attachment, and detach all of them at the end, also after an error."""
    recorders = [ChangeRecorder(each) for each in attached]
    try:
        for each, recorder in zip(attached, recorders, strict=True):
            each.cache.decider.on_anchor = recorder
            each.attach()
        yield recorders
    finally:
        for each in attached:
            each.detach()
            each.cache.forget()


def _sampled(tensor: Tensor, stride: int | None = None) -> Tensor:
    """Copy every ``stride``-th element of each sample of a batch, the same ones at every call, (batch, n)."""
    flat = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    stride = stride or -(-flat.numel() // SAMPLE)
    while math.gcd(stride, tensor.shape[-1]) > 1:  # a common divisor would pick the same channels of every token
        stride += 1
    return flat[:, ::stride].clone()


def _array(tensors: Sequence[Tensor]) -> NDArray[np.float32]:
    array: NDArray[np.float32] = torch.stack([tensor.float() for tensor in tensors]).cpu().numpy()
    return array
