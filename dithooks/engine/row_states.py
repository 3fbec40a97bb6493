"""The state of the rows of batches: a decider for each plan among them, and each row's call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting
from ..fork import ForkLock
from ..policies.history import BranchHistory, Decision, Schedule
from ..policies.reason import Reason
from ..stats.log import fold
from ..validation import shown
from .anchor import Anchor
from .arguments import CallArguments, Signature, tensors_in
from .call import MISMATCH, REUSE, UNDECIDED, Call, Capture
from .decider import CallDecider
from .output_correction import OutputCorrection
from .requests import Request
from .residual import clones
from .row import PlacedRow
from .row_part_decider import RowPartDecider, row_decider_for
from .run import Branch, Run
from .sessions import Session


@dataclass(eq=False)
class RowCall:
    """One row of a batch, as a call of its own.

    Args:
        number: of the row in the batch.
        call: decided by the row's own plan.
        decider: of its plan.
    """

    number: int
    call: Call
    decider: CallDecider

    @property
    def is_reused(self) -> bool:
        """Whether a forecast residual takes the place of its blocks."""
        return self.call.mode is REUSE

    @property
    def looks(self) -> bool:
        """Whether its change is measured, which may decide it."""
        return self.call.branch is not None and self.call.branch.metric is not None

    @property
    def captures(self) -> bool:
        """Whether its residual is to be kept."""
        return self.call.range is not None

    def compute(self) -> None:
        """Let it be computed after all, as its residual does not fit."""
        self.call.mode, self.call.deltas, self.call.range = MISMATCH, (), Capture()
        self.call.metric_inputs = clones(self.call.metric_inputs)


class RowStates(ForkLock):
    """The states of the rows of one range or transformer, by plan, request and branch.

    Args:
        decider: the cache's own.
        config_of: returns the configuration of this range by a plan; ``None``: by what the cache was attached with.
        sees_blocks: whether what policies look at passes through blocks, where each row's part of it is seen.
    """

    def __init__(
        self, decider: CallDecider, config_of: Callable[[Any], DitCacheConfig], sees_blocks: bool = True
    ) -> None:
        self._own, self._config_of, self._sees_blocks = decider, config_of, sees_blocks
        self._deciders: list[tuple[Any, CallDecider]] = []
        self._weights = decider.weights_of_batches()
        self._lengths: weakref.WeakKeyDictionary[Branch, int | None] = weakref.WeakKeyDictionary()
        super().__init__()

    def decider(self, plan: Any) -> CallDecider:
        """Return the decider of rows by a plan.

        Raises:
            InvalidSetting: its policy decides by looking, in a way in which rows cannot.
        """
        found = self._known(plan)
        if found is not None:
            return found
        config = self._config_of(plan)
        if config.when.metric is not None:
            self._refuse_looks(config)
        with self.lock:
            found = self._known(plan)  # another thread may have made one meanwhile
            if found is None:
                found = self._own.for_rows(config, self._weights, row_decider_for(config))
                self._deciders.append((plan, found))
        return found

    def _known(self, plan: Any) -> CallDecider | None:
        """Return the decider of rows by a plan, or by an equal one; ``None``: there is none yet."""
        for known, decider in self._deciders:
            if known is plan:  # before any are compared, field by field
                return decider
        return next((decider for known, decider in self._deciders if known == plan), None)

    def knows(self, plan: Any) -> bool:
        """Return whether there is a decider of rows by a plan already."""
        return self._known(plan) is not None

    def _refuse_looks(self, config: DitCacheConfig) -> None:
        """Refuse a policy that measures where its rows cannot be looked at one by one."""
        own, subject = self._own.config, f"{self._own.name}: {type(config.when).__name__} looks at each row"
        remedy = "give the request a plan, Mask, Interval or MagnitudeRatio"
        if not self._sees_blocks:
            raise InvalidSetting(f"{subject}, which payload='output' does not show: {remedy}")
        if self._own.consensus is not None:
            raise InvalidSetting(f"{subject}, and the ranks of a process_group decide on whole batches only: {remedy}")
        if (config.when.metric, config.look_at) != (own.when.metric, own.look_at):
            looked = "does not look" if own.when.metric is None else "looks at something else"
            raise InvalidSetting(
                f"{subject}, and {type(own.when).__name__}, which the cache was attached with, {looked}: attach it "
                f"with a policy that measures so, or {remedy}"
            )

    def has_finished(self, session: Session) -> bool:
        """Return whether a request has no run here that goes on."""
        return all(decider.has_finished(session) for _, decider in self._deciders)

    @property
    def nbytes(self) -> int:
        """Memory that all rows hold, in bytes."""
        return sum(decider.bytes_held() for _, decider in self._deciders)

    def drop(self) -> list[Run]:
        """Drop all that is kept, and return the runs."""
        return [run for _, decider in self._deciders for run in decider.drop()]

    def clear_branch(self, sessions: Sequence[Session], number: int) -> None:
        """Drop the residuals of one branch of some requests."""
        for _, decider in self._deciders:
            for session in sessions:
                decider.clear_branch(session, number)

    def decide(self, rows: Sequence[PlacedRow], arguments: Mapping[str, Any], more: Signature = ()) -> list[RowCall]:
        """Decide each row by its plan.

        Args:
            rows: of the batch.
            arguments: of the batch, by name.
            more: on which residuals depend, beside the streams themselves.
        """
        plans = {id(row.plan): row.plan for row in rows}
        deciders = {key: self.decider(plan) for key, plan in plans.items()}  # first: it may raise
        self._weights.begin()
        batch = self._own.given_to(arguments)
        forms = row_forms(batch, arguments, len(rows), more)
        for key, decider in deciders.items():
            if isinstance(decider, RowPartDecider):
                for numbers in _requests([(n, row.session) for n, row in enumerate(rows) if id(row.plan) == key]):
                    for number in numbers:
                        forms[number] = decider.given_to_row(forms[number], batch, numbers)
        calls = []
        for number, (row, form) in enumerate(zip(rows, forms, strict=True)):
            decider = deciders[id(row.plan)]
            call = decider.decide(None, True, False, (row.session, row.scope, form))
            if call.run is not None:
                call.run.in_flight = False  # the request's next row belongs to the same run
            calls.append(RowCall(number, call, decider))
        for each in calls:
            if each.call.run is not None:
                each.call.run.in_flight = True
        return calls

    def judge(self, rows: Sequence[RowCall], seen: tuple[Tensor, ...] | None) -> None:
        """Decide the rows that only a look decides, each by its own change; the device is read once for all of them.

        Args:
            rows: of the batch.
            seen: the streams to measure, of the whole batch; ``None`` if this call does not show it.
        """
        fits = seen is not None and all(each.dim() and each.shape[0] == len(rows) for each in seen)
        changes: list[Tensor] = []
        places: dict[int, int] = {}  # among the changes, by row
        for row in rows:
            if not row.looks:
                continue
            call, number = row.call, row.number
            if seen is not None and fits:
                call.metric_inputs = tuple(each[number : number + 1] for each in seen)
            if call.mode is UNDECIDED and (change := _change_of(call)) is not None:
                places[number] = len(changes)
                changes.append(change)
        values = torch.stack(changes).tolist() if changes else []  # waits for the device, once for the batch
        for row in rows:
            call = row.call
            if call.mode is UNDECIDED:
                row.decider.settle(call, values[places[row.number]] if row.number in places else None)
            branch = call.branch
            if not row.is_reused or (branch is not None and branch.metric is not None and branch.metric.keeps_reused):
                # A copy: the model may write into it, and the others' memory is not to be held as long as this row's.
                call.metric_inputs = clones(call.metric_inputs)

    def commit(self, rows: Sequence[RowCall]) -> None:
        """Commit the rows of a finished batch."""
        is_captured = False
        for row in rows:
            row.decider.commit(row.call)
            is_captured = is_captured or row.captures
            if row.call.run is not None:
                row.call.run.in_flight = False
        if is_captured:  # each has noted what the rows of its own plan hold
            self._own.log.hold_all(self.nbytes + self._own.bytes_held())

    def costs(self, request: Request) -> list[float]:
        """Return the share of blocks that run at each step of a request, if nothing unforeseen happens.

        A step that only a look decides counts as computed.
        """
        assert request.steps is not None
        decider = self.decider(request.plan)
        blocks, skipped = decider.log.blocks, decider.log.skippable
        sigmas = None if request.sigmas is None else tuple(request.sigmas)
        schedule = Schedule(request.steps, 0, sigmas, blocks, skipped)
        policy, history, shares = decider.policy.for_run(schedule), BranchHistory(), []
        for step in range(request.steps):
            decision = policy.before(step, history, schedule)
            if decision is None or (decision.reuse and history.refreshed is None):
                decision = Decision(False, Reason.NO_ANCHOR)
            fold(history, step, decision)
            if not decision.reuse:
                history.refreshed = step
            shares.append(1 - skipped / blocks if decision.reuse else 1.0)
        return shares

    # -- the width of a stream -------------------------------------------------------------------------------------

    def refitted(
        self,
        row: RowCall,
        deltas: Sequence[Tensor],
        shapes: Sequence[torch.Size],
        may_change: Sequence[bool],
        mask: Any,
    ) -> tuple[Tensor, ...] | None:
        """Return residuals of a row in other widths, trimmed or padded where its prompt is; ``None`` if that is unsafe.

        Args:
            row: of the batch.
            deltas: its residuals, with a first dimension of 1.
            shapes: that they are to have.
            may_change: for each, whether it is of a stream whose width may change: a prompt's.
            mask: returns the mask of the present batch for a width: which tokens of it are the rows' own.
        """
        made = []
        for delta, shape, may in zip(deltas, shapes, may_change, strict=True):
            if delta.shape == shape:
                made.append(delta)
                continue
            dim = _changed_dim(delta.shape, shape)
            length = self._length(row, shape[dim], mask) if may and dim is not None else None
            if dim is None or length is None or length > min(shape[dim], delta.shape[dim]):
                return None
            made.append(_resized(delta, dim, shape[dim]))
        return tuple(made)

    def unify(self, row: RowCall, deltas: Sequence[Tensor], may_change: Sequence[bool], mask: Any) -> None:
        """Bring a row's earlier residuals to the widths of a new one, so that they can be added up."""
        branch = row.call.branch
        assert branch is not None
        shapes = [delta.shape for delta in deltas]
        if not deltas or all(anchor.shapes == shapes for anchor in branch.anchors):
            return
        fitting: list[Anchor] = []
        for anchor in branch.anchors:
            kept = (
                self.refitted(row, anchor.kept, shapes, may_change, mask) if len(anchor.kept) == len(shapes) else None
            )
            if kept is not None:
                fitting.append(replace(anchor, kept=kept))
        branch.anchors = fitting

    def _length(self, row: RowCall, width: int, mask: Any) -> int | None:
        """Return how many tokens of a prompt are a row's own; ``None`` if they are not known to come first."""
        branch = row.call.branch
        assert branch is not None
        if branch not in self._lengths:
            found = mask(width)
            if found is None:
                return None
            own = found[row.number].flatten()
            own = own > -1 if own.is_floating_point() and bool((own < 0).any()) else own != 0
            count = int(own.sum())  # waits for the device, once for each branch of a request
            self._lengths[branch] = count if bool(own[:count].all()) else None
        return self._lengths[branch]


def row_forms(
    given: CallArguments, arguments: Mapping[str, Any], batch: int, more: Signature = ()
) -> list[CallArguments]:
    """Return what of a batch's form each row's residual depends on: not the number of rows, nor a prompt's width.

    Of lists without tensors that have an item for each row, such as the sizes of pictures, it is the row's own item.
    """
    shared = list(more)
    for name, *rest in given.form:
        if rest and isinstance(rest[0], torch.Size):
            sizes = tuple(rest[0])
            rest[0] = sizes[1:] if name in given.latents else ("dimensions", len(sizes))
        shared.append((name, *rest))
    listed = {
        name: value
        for name, value in arguments.items()
        if type(value) in (list, tuple) and len(value) == batch and not any(tensors_in(name, value))
    }
    forms = [CallArguments({}, frozenset()) for _ in range(batch if listed else 1)]
    for number, form in enumerate(forms):
        form.form = tuple((e[0], shown(listed[e[0]][number])) if e[0] in listed else e for e in shared)
        form.scales = given.scales
    return forms if listed else forms * batch


def _requests(rows: Sequence[tuple[int, Session]]) -> list[list[int]]:
    """Return the numbers of the rows of each request."""
    found: dict[int, list[int]] = {}
    for number, session in rows:
        found.setdefault(id(session), []).append(number)
    return list(found.values())


def mask_among(arguments: Mapping[str, Any], batch: int) -> Callable[[int], Tensor | None]:
    """Return a function that finds the mask of a prompt by its width among a transformer's arguments."""

    def find(width: int) -> Tensor | None:
        tensors = [pair for name, value in arguments.items() for pair in tensors_in(name, value)]
        for path, tensor in tensors:
            is_mask = tensor.dtype is torch.bool or "mask" in path
            if is_mask and tensor.dim() == 2 and tuple(tensor.shape) == (batch, width):
                return tensor
        return None

    return find


def corrections_of(rows: Sequence[RowCall]) -> dict[int, OutputCorrection]:
    """Return the corrections of the rows whose plans have some, by the row's number."""
    return {row.number: OutputCorrection(row.decider) for row in rows if row.decider.corrects}


def _change_of(call: Call) -> Tensor | None:
    """Return the change that a row shows, on the device."""
    metric = None if call.branch is None else call.branch.metric
    return None if metric is None or call.metric_inputs is None else metric.look(call.metric_inputs)


def capture_of(rows: Sequence[RowCall]) -> Capture | None:
    """Return a place for the residuals of a batch, if one of its rows is to keep its own."""
    return Capture() if any(row.captures for row in rows) else None


def _changed_dim(one: torch.Size, other: torch.Size) -> int | None:
    """Return the one dimension, neither the first nor the last, in which two shapes differ."""
    if len(one) != len(other):
        return None
    dims = [dim for dim, (a, b) in enumerate(zip(one, other, strict=True)) if a != b]
    return dims[0] if len(dims) == 1 and 0 < dims[0] < len(one) - 1 else None


def _resized(delta: Tensor, dim: int, width: int) -> Tensor:
    """Return a residual cut off at its end, or with zeros there."""
    if width <= delta.shape[dim]:
        return delta.narrow(dim, 0, width)
    spare = [*delta.shape]
    spare[dim] = width - delta.shape[dim]
    return torch.cat([delta, delta.new_zeros(spare)], dim)
