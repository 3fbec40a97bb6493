"""Decisions that the ranks of a process group make as one, on what all of them have seen.

Where ranks share a model (its weights are sharded, or each has some of the tokens), one that runs a block which another
leaves out waits for it for ever, or is given other weights than its own. So at every call that is decided by a change
metric, or may be reused, the ranks exchange reports in one collective: where each is in its run, its branch's history,
whether it has a residual, and what it has measured. From the same reports all come to the same verdict.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..environment.torch_api import mesh_classes
from ..errors import InvalidSetting, RankMismatch, WrongType
from ..policies.history import BranchHistory
from ..validation import shown
from .change_metrics import ChangeMetric
from .run import Run

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

STREAMS, SUMS = 16, 4  # that there is room for: all ranks send the same number of numbers, whatever they see
SHARE = 0.9  # of the group's own timeout: once that is over, some backends end the process


@dataclass(frozen=True)
class RankReport:
    """The report of one rank on a call: whole numbers of less than 24 bits, as they travel in float32.

    Args:
        range: number of the range among those of the handle.
        step: sampling step of the call.
        steps: number of steps of the run; −1 where it is unknown.
        number: number of the call's branch.
        policy: checksum of the run's policy.
        computed: computed calls of the branch so far.
        reused: reused calls of the branch so far.
        streak: reused calls of the branch since its last computed one.
        refreshed: step of the branch's last computed call; −1 if there was none.
        calls: calls of the run decided so far.
        left_out: reused calls of the run so far.
        branches: calls that a step makes.
        fit: 1 if the rank has a residual to reuse and, where a change is measured, one to compare with; else 0.
        streams: number of streams measured; 0 if the call was decided without.
    """

    range: int
    step: int
    steps: int
    number: int
    policy: int
    computed: int
    reused: int
    streak: int
    refreshed: int
    calls: int
    left_out: int
    branches: int
    fit: int
    streams: int

    @property
    def place(self) -> tuple[int, ...]:
        """The place of the rank in its run."""
        return self.range, self.step, self.steps, self.number

    @property
    def past(self) -> tuple[int, ...]:
        """The history that a decision depends on, beside the change."""
        return self.computed, self.reused, self.streak, self.calls, self.left_out, self.branches

    @property
    def means(self) -> tuple[int, ...]:
        """The numbers that have to be alike on ranks that have a residual; on others they may differ."""
        return self.refreshed, self.streams


class RankVerdict(NamedTuple):
    """The joint result of the ranks' reports: whether histories are alike, all ranks fit, and the change over all."""

    alike: bool
    fit: bool
    value: float | None


class RankConsensus:
    """The ranks that decide as one.

    Args:
        group: of these, this rank among them.
    """

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        self.group = group
        self.ranks = dist.get_process_group_ranks(group)
        # "cpu:gloo,cuda:nccl": the devices that the group's tensors may be on
        self._devices = [each.partition(":")[0] for each in dist.get_backend_config(group).split(",")]

    def report(
        self, place: int, step: int, run: Run, branch: BranchHistory, fit: bool, sums: Sequence[Tensor] | None
    ) -> RankReport:
        """Return what this rank has to say of a call.

        Args:
            place: of the range among the handle's.
            step: sampling step.
            run: that the call belongs to.
            branch: what its branch has done so far.
            fit: whether there is something to reuse here.
            sums: what the change metric has measured.
        """
        return RankReport(
            range=place,
            step=step,
            steps=-1 if run.schedule.steps is None else run.schedule.steps,
            number=len(run.used) - 1,
            policy=checksum(run.policy),
            computed=branch.computed,
            reused=branch.reused,
            streak=branch.streak,
            refreshed=-1 if branch.refreshed is None else branch.refreshed,
            calls=run.history.calls,
            left_out=run.history.reused,
            branches=run.history.branches,
            fit=fit,
            streams=0 if sums is None else len(sums),
        )

    def ask(
        self,
        name: str,
        report: RankReport,
        gauge: ChangeMetric | None,
        sums: Sequence[Tensor] | None,
        near: Iterable[Tensor],
    ) -> RankVerdict:
        """Exchange reports on a call with the other ranks, in one collective in which every rank has to take part.

        Args:
            name: name of the range, for messages.
            report: this rank's report.
            gauge: change metric of the branch.
            sums: the sums that the metric measured; ``None`` if it measured nothing.
            near: tensors of the call, on the device that it runs on.

        Raises:
            RankMismatch: other ranks did not answer in time, are gone, or are at another place in their run.
        """
        head = torch.tensor(astuple(report), dtype=torch.float32)
        sent = torch.cat([head, torch.zeros(STREAMS * SUMS)]).to(self._device(near))
        if gauge is not None and sums is not None:
            seen = gauge.counting(sums)
            if len(seen) > STREAMS:
                raise InvalidSetting(
                    f"{name}: {len(seen)} streams are measured, with process_group at most {STREAMS} can be"
                )
            sent[len(head) :].view(STREAMS, SUMS)[: seen.shape[0], : seen.shape[1]] = seen
        gathered = self._gather(name, report, sent)
        reports = [RankReport(*map(int, each)) for each in gathered[:, : len(head)].tolist()]
        self._check(name, reports)
        fit = all(each.fit for each in reports)
        alike = len({each.past for each in reports}) == 1 and len({each.means for each in reports if each.fit}) <= 1
        if not (alike and fit and report.streams and gauge is not None):
            return RankVerdict(alike, fit, None)
        # (sums, ranks, streams); in float64, in which the order of the ranks makes no difference to speak of
        seen = gathered[:, len(head) :].double().view(-1, STREAMS, SUMS)[:, : report.streams].permute(2, 0, 1)
        return RankVerdict(alike, fit, float(gauge.largest(seen.sum(1) if gauge.reduce == "mean" else seen)))

    def _gather(self, name: str, report: RankReport, sent: Tensor) -> Tensor:
        """Return the numbers of all ranks, as (ranks, numbers) on the CPU."""
        import torch.distributed as dist

        gathered = [torch.empty_like(sent) for _ in self.ranks]
        began = time.monotonic()
        try:
            work = dist.all_gather(gathered, sent, self.group, async_op=True)
            assert work is not None
            patience = self._patience(sent.device)
            work.wait() if patience is None else work.wait(timeout=patience)
            return torch.stack(gathered).cpu()  # the one wait for the device that a decision costs
        except RuntimeError as error:
            why = (str(error) or type(error).__name__).splitlines()[0]
            raise RankMismatch(
                f"{name}, step {report.step}: after {time.monotonic() - began:.1f} s the ranks {self.ranks} of the "
                f"process group have not decided together ({why}). Every one of them has to "
                "make the same steps with as many calls each: has one stopped, or failed? The group's own timeout is "
                "how long is waited: init_process_group(timeout=...), or new_group(timeout=...)"
            ) from error

    def _check(self, name: str, reports: Sequence[RankReport]) -> None:
        """Check that all ranks are at the same call of the same run."""
        if len({each.place for each in reports}) > 1:
            ranges = len({each.range for each in reports}) > 1
            places = ", ".join(
                f"rank {rank} at step {each.step}{'' if each.steps < 0 else f' of {each.steps}'}, call {each.number}"
                + (f", of range {each.range}" if ranges else "")
                for rank, each in zip(self.ranks, reports, strict=True)
            )
            raise RankMismatch(
                f"{name}: the ranks of the process group are not at the same call: {places}. All of them have to make "
                "the same steps with as many calls each; give each a process_group of its own, or none, if they are "
                "to go their own ways"
            )
        if len({each.policy for each in reports}) > 1:
            raise RankMismatch(
                f"{name}: the ranks {self.ranks} of the process group have different policies, or schedules: they "
                "cannot decide as one. Give dit_cache the same config on all of them"
            )

    def _device(self, near: Iterable[Tensor]) -> torch.device:
        if "cpu" in self._devices:
            return torch.device("cpu")
        own = (tensor.device for tensor in near if tensor.device.type in self._devices)
        return next(own, None) or torch.device(self._devices[0])

    def _patience(self, device: torch.device) -> timedelta | None:
        """Return how long to wait; ``None`` where the backend has a time limit of its own that cannot be read."""
        try:
            timeout: timedelta = self.group._get_backend(device).options._timeout
        except (AttributeError, RuntimeError):
            return None
        return timeout * SHARE


def consensus_of(process_group: object) -> RankConsensus | None:
    """The ranks that are to decide as one; ``None`` where it is this one by itself.

    Raises:
        TypeError: not a process group.
        ValueError: this rank is not in it; the mesh has several dimensions; or there is no torch.distributed here.
    """
    if process_group is None:
        return None
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized():
        raise InvalidSetting(
            "process_group was given, but torch.distributed is not initialized: init_process_group(...)"
        )
    group: Any = process_group
    if isinstance(group, mesh_classes()):
        if group.ndim != 1:
            raise InvalidSetting(
                f"process_group is a mesh of {group.ndim} dimensions, {group.mesh_dim_names}: give one of them, "
                "mesh[name], or the flattened mesh of all ranks that share the model"
            )
        group = group.get_group()
    if group == dist.GroupMember.NON_GROUP_MEMBER:
        raise InvalidSetting("this rank is not a member of process_group: new_group(...) returned none to it")
    if not isinstance(group, dist.ProcessGroup):
        raise WrongType(
            "process_group must be a torch.distributed.ProcessGroup or a DeviceMesh of one dimension, "
            f"not {shown(group)} ({type(group).__name__})"
        )
    if dist.get_rank(group) < 0:
        raise InvalidSetting(
            f"rank {dist.get_rank()} is not a member of process_group, whose ranks are "
            f"{dist.get_process_group_ranks(group)}"
        )
    return RankConsensus(group) if dist.get_world_size(group) > 1 else None


def checksum(policy: object) -> int:
    """Of 24 bits."""
    return zlib.crc32(repr(policy).encode()) & 0xFFFFFF
