"""Record one run in which everything is computed: what policies would see, and samples of what the ranges do."""

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
from ..engine.residual import effect
from ..errors import InvalidSetting
from ..policies.history import BranchHistory, Decision, Schedule
from ..policies.policy import Policy
from ..policies.reason import Reason
from ..predictors.predictor import Moment

SAMPLE = 2**16  # numbers of a tensor that are kept


@dataclass(frozen=True)
class ChangeWatch(Policy):
    """Compute every call, and look."""

    metric: ClassVar[Literal["change", "rate"] | None] = "change"

    def before(self, step: int, track: BranchHistory, schedule: Schedule) -> Decision:
        return Decision(False, "profile")


@dataclass(frozen=True, eq=False)
class RecordedChanges:
    """One branch of one range in a recorded run.

    Args:
        range: path of the transformer, or of the list that was watched.
        branch: number of the branch.
        schedule: of the run.
        moments: step and σ of its calls.
        probes: for each stream that a threshold looks at, (T, batch, n), a sample of it in float32.
        deltas: (T, n'), a sample of the range's residual, of all its streams.
        norms: (T,), the L2 norm of the picture's residual.
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
        """Steps of the whole schedule, of which the run may have left the first out."""
        return self.schedule.steps or self.moments[-1].step + 1

    def change(self, call: int, since: int, reduce: str = "mean") -> float:
        """mean|r_t − r_s| / mean|r_s| of two calls; of the batch, or of the sample that changed most."""
        axis = None if reduce == "mean" else 1
        pairs = [(probe[call], probe[since]) for probe in self.probes]
        with np.errstate(divide="ignore", invalid="ignore"):
            each = [np.max(np.abs(now - then).mean(axis) / np.abs(then).mean(axis)) for now, then in pairs]
        return float(np.max(each))

    @property
    def changes(self) -> NDArray[np.float32]:
        """(T − 1,), from each call to the next."""
        return np.array([self.change(t, t - 1) for t in range(1, len(self.moments))], dtype=np.float32)

    @property
    def ratios(self) -> tuple[float, ...]:
        """γ of each step of the schedule: ‖Δ_t‖/‖Δ_{t−1}‖; 1 for the first call, and where none was made."""
        found = [1.0] * self.steps
        for moment, ratio in zip(self.moments[1:], self.norms[1:] / self.norms[:-1], strict=True):
            found[moment.step] = float(ratio)
        return tuple(found)

    def decisions(self, policy: Policy) -> list[Decision]:
        """What a policy that looks at changes would have decided, had reuse changed nothing in what it looks at."""
        policy, track, made = policy.for_run(self.schedule), BranchHistory(self.branch), list[Decision]()
        refreshed = 0
        for call, moment in enumerate(self.moments):
            decision = policy.before(moment.step, track, self.schedule)
            if (decision is None or decision.reuse) and track.refreshed is None:
                decision = Decision(False, Reason.NO_ANCHOR)
            if decision is None:
                value = self.change(call, refreshed, policy.reduce)
                decision = policy.judge(moment.step, track, self.schedule, value)
            track.record(moment.step, decision)
            if not decision.reuse:
                refreshed, track.refreshed = call, None if decision.reason == Reason.NON_FINITE else moment.step
            made.append(decision)
        return made


class ChangeRecorder:
    """Keeps samples of what one range does, call by call."""

    def __init__(self, attached: Attachment) -> None:
        self.attached = attached
        self.calls: dict[tuple[int, int], list[tuple[Moment, list[Tensor], Tensor, Tensor]]] = {}
        self.schedule = Schedule()

    def __call__(self, call: Call, deltas: Sequence[Tensor]) -> None:
        assert call.run is not None
        assert call.branch is not None
        seen = [_sampled(each) for each in call.metric_inputs or (torch.zeros(1, 1),)]
        wiring = self.attached.cache.layout.wiring
        main = (None if wiring is None else effect(Capture(deltas=tuple(deltas)), wiring)) or deltas
        norm = torch.linalg.vector_norm(main[0], dtype=torch.float32)
        flat = [delta.reshape(1, -1, delta.shape[-1]) for delta in deltas]
        stride = -(-sum(delta.numel() for delta in deltas) // SAMPLE)
        kept = (call.moment, seen, torch.cat([_sampled(each, stride)[0] for each in flat]), norm)
        self.schedule = call.run.schedule
        self.calls.setdefault((call.run.number, call.branch.history.number), []).append(kept)

    def branches(self) -> list[RecordedChanges]:
        """What was recorded.

        Raises:
            ValueError: several runs were.
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
    """Attached, with a recorder each; and taken off again, whatever happens."""
    recorders = [ChangeRecorder(each) for each in attached]
    try:
        for each, recorder in zip(attached, recorders, strict=True):
            each.cache.decider.on_kept = recorder
            each.attach()
        yield recorders
    finally:
        for each in attached:
            each.detach()
            each.cache.forget()


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
