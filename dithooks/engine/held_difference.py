"""The difference of two branches' outputs, held at steps at which one of the two is computed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import isfinite
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..policies.conditional import Conditional
from ..policies.history import Decision
from ..policies.reason import Reason
from ..stats.timing import is_capturing
from .anchor import Anchor
from .arguments import Signature
from .batch_dimensions import RowSelection, UnknownForm
from .call import HALF, MADE, MISMATCH, Call, Capture
from .decider import COMPUTE, DECISION, CallDecider, what_has_changed
from .finite_check import is_beyond
from .output_form import form_of
from .output_rows import OutputRows
from .part_decider import parts_of, repeated_latents
from .run import Branch, Run
from .timestep_argument import is_same

HALVES = 2
MADE_OF_ANOTHER = DECISION[True][Reason.CONDITIONAL]
HALF_OF_BATCH = COMPUTE[Reason.CONDITIONAL]


class GivenArguments(NamedTuple):
    """Arguments that a transformer is to be called with in place of those of a call: half the rows of the batch."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class HeldDifference:
    """What makes the output of one branch from that of another, computed at the same step, and their difference.

    Example: with ``Conditional(0, (0, 1))`` and two calls a step, whose outputs at step 0 were v and v − 3, the second
    call of step 1 returns w − 3, w being what the first one has returned there, and the transformer is not called.

    Args:
        decider: of the transformer's calls.
        model: the transformer.
        rows: makes calls with some rows of a batch.
        given: returns the arguments of the call under way in this thread.
    """

    def __init__(
        self,
        decider: CallDecider,
        model: nn.Module,
        rows: OutputRows,
        given: Callable[[], tuple[tuple[Any, ...], dict[str, Any]]],
    ) -> None:
        self._model, self._rows, self._given = model, rows, given
        self._form = decider.config.dtype, decider.config.cache_device

    # -- before a call -----------------------------------------------------------------------------------------

    def decide(self, call: Call, run: Run, branch: Branch) -> Decision:
        """Decide a call of a step at which one branch alone is computed; if it is left out, ``call`` has its output.

        Args:
            call: of one of the branches, or of a batch of both.
            run: of the call.
            branch: of the call.
        """
        conditional = _conditional_of(run)
        if conditional.in_batch:
            why = self._why_whole(call, run, branch)
            return HALF_OF_BATCH if why is None else COMPUTE[why]
        if branch.history.number == conditional.branch:
            return COMPUTE[Reason.MASK]
        own = self._output_at(call.moment.step, run, conditional)
        if own is None or not _are_the_same(_partner(run, conditional), branch):
            return COMPUTE[Reason.NO_CONDITIONAL]
        why = self._why_not_held(call, branch, (*call.signature, *own.signature), own)
        form = _partner(run, conditional).output_form
        if why is None and (form is None or branch.output_form is None or not branch.output_form.is_like(form)):
            why = Reason.SHAPE
        if why is not None:
            return COMPUTE[why]
        call.deltas = _sums(own.kept, branch.held[0])
        return MADE_OF_ANOTHER

    def _why_not_held(self, call: Call, branch: Branch, signature: Signature, own: Anchor | None) -> Reason | None:
        """Return why no difference can be added to this step's output; ``None``: one can."""
        if not branch.held or branch.held[0].moment.step >= call.moment.step:
            return Reason.NO_DIFFERENCE
        held = branch.held[0]
        if held.signature != signature:
            return what_has_changed(held.signature, signature)
        if branch.output_form is None or not branch.output_form.fits(branch.given):
            return Reason.SHAPE
        check = held.check
        if check is None or check.is_out_of_reach:
            return None
        if not isfinite(check.peak):
            return Reason.NOT_FINITE
        others = [] if own is None or own.check is None else [own.check]
        return Reason.NOT_FINITE if check.is_narrow and is_beyond([check, *others], [1.0] * (1 + len(others))) else None

    def _why_whole(self, call: Call, run: Run, branch: Branch) -> Reason | None:
        """Return why a batch has to be computed whole; ``None``: one half of it is enough."""
        # Compared at every such step: two pictures of one seed begin with the same latents, and part.
        if not run.checks or parts_of(self._model, run, branch, HALVES, again=True) != HALVES:
            return Reason.NO_CONDITIONAL  # nor where ranks share the model: they would have to find it out alike
        if why := self._why_not_held(call, branch, call.signature, None):
            return why
        args, kwargs = self._given()
        return None if self._rows.knows(_batch(self._model, branch), args, kwargs) else Reason.NO_CONDITIONAL

    def half(self, call: Call) -> Any:
        """Return the arguments of a call with the half of its batch that is computed.

        ``NotImplemented``: it is not known after all which part of some argument is whose; so all of it is computed.
        """
        run, branch = _of(call)
        batch, number = _batch(self._model, branch), _conditional_of(run).branch
        count = batch // HALVES
        args, kwargs = self._given()
        rows = RowSelection(range(number * count, (number + 1) * count), batch)
        try:
            some = GivenArguments(*self._rows.some(args, kwargs, rows))
        except UnknownForm:
            call.mode, call.range = MISMATCH, Capture()
            return NotImplemented
        call.mode = HALF
        return some

    # -- after it ----------------------------------------------------------------------------------------------

    def whole(self, call: Call, output: Any) -> Any:
        """Return the output for a whole batch, of that for half of it; ``NotImplemented`` if the two do not fit."""
        run, branch = _of(call)
        taken, form = form_of(output, branch.given), branch.output_form
        assert form is not None
        if taken is None or not branch.held or (taken[0].builder, taken[0].slots) != (form.builder, form.slots):
            return NotImplemented
        own, held = taken[1], branch.held[0]
        if _forms(own) != [(each.shape, *form) for each, form in zip(held.kept, held.forms, strict=True)]:
            return NotImplemented
        halves = [(each, other) for each, other in zip(own, _sums(own, held), strict=True)]
        ordered = halves if _conditional_of(run).branch == 0 else [(other, each) for each, other in halves]
        return form.build([torch.cat(pair) for pair in ordered])

    def take(self, call: Call, tensors: Sequence[Tensor], output: Any) -> None:
        """Keep the difference to the other branch, where a later step may need it; free an earlier one.

        Args:
            call: that is over, and whose output is kept.
            tensors: copies of what the output holds.
            output: of the transformer, or made of another branch's.
        """
        run, branch = _of(call)
        conditional, step = None if run.policy is None else run.policy.conditional, call.moment.step
        if conditional is None:
            return
        is_ahead = conditional.is_ahead(step)
        if call.mode in (MADE, HALF):
            branch.held = branch.held if is_ahead else []
        elif conditional.in_batch:
            branch.held = self._of_halves(call, conditional, tensors) if is_ahead else []
            args, kwargs = self._given()
            if branch.held and not self._rows.knows(batch := _batch(self._model, branch), args, kwargs):
                self._rows.learn(batch, args, kwargs, output)
        elif branch.history.number == conditional.branch:
            branch.written = _writes(branch)
            # Kept as it is only where what is kept for reuse is of another dtype, or on another device.
            is_needed = self._form != (None, None) and (is_ahead or conditional.at(step))
            branch.held = [self._kept(call, call.signature, tensors, as_it_is=True)] if is_needed else []
        else:
            branch.held = self._of_calls(call, conditional, tensors) if is_ahead else []

    def _of_calls(self, call: Call, conditional: Conditional, tensors: Sequence[Tensor]) -> list[Anchor]:
        """Return the difference of a call's output to that of the computed branch at this step, if there is one."""
        run, branch = _of(call)
        own = self._output_at(call.moment.step, run, conditional)
        if own is None or own.signature[0] != call.signature[0]:  # the weights have changed between the two
            return []
        if _forms(own.kept) != _forms(tensors) or not _are_the_same(_partner(run, conditional), branch):
            return []
        apart = [_difference(other, each) for each, other in zip(own.kept, tensors, strict=True)]
        return [self._kept(call, (*call.signature, *own.signature), apart)]

    def _of_halves(self, call: Call, conditional: Conditional, tensors: Sequence[Tensor]) -> list[Anchor]:
        """Return the difference of a batch's other half to the computed one, if it has halves."""
        run, branch = _of(call)
        batch = _batch(self._model, branch)
        if not run.checks or any(each.shape[:1] != (batch,) for each in tensors):
            return []
        if parts_of(self._model, run, branch, HALVES) != HALVES:
            return []
        halves = [each.chunk(HALVES) for each in tensors]
        apart = [_difference(pair[1 - conditional.branch], pair[conditional.branch]) for pair in halves]
        return [self._kept(call, call.signature, apart)]

    def _kept(self, call: Call, signature: Signature, tensors: Sequence[Tensor], as_it_is: bool = False) -> Anchor:
        run, _ = _of(call)
        form = (None, None) if as_it_is else self._form
        return Anchor.keep(call.moment, signature, tensors, *form, is_checked=run.checks)

    def _output_at(self, step: int, run: Run, conditional: Conditional) -> Anchor | None:
        """Return what the computed branch has returned at a step; ``None``: it was not called, or nothing was kept."""
        partner = run.branches.get(conditional.branch)
        if partner is None or partner.interrupted or conditional.branch not in run.used:
            return None
        known = partner.anchors if self._form == (None, None) else partner.held
        return known[0] if known and known[0].moment.step == step else None


def _of(call: Call) -> tuple[Run, Branch]:
    assert call.run is not None
    assert call.branch is not None
    return call.run, call.branch


def _conditional_of(run: Run) -> Conditional:
    conditional = None if run.policy is None else run.policy.conditional
    assert conditional is not None
    return conditional


def _partner(run: Run, conditional: Conditional) -> Branch:
    return run.branches[conditional.branch]


def _batch(model: nn.Module, branch: Branch) -> int:
    """Return the number of rows of the latents of a branch's call; 0: not known."""
    latents = repeated_latents(model, branch.given)
    return 0 if latents is None or not latents.dim() else len(latents)


def _writes(branch: Branch) -> list[int | None]:
    """Return torch's count of the writes into each tensor of a branch's latents; inference tensors have none."""
    return [None if each.is_inference() else each._version for each in branch.given.latents.values()]


def _are_the_same(partner: Branch, branch: Branch) -> bool:
    """Return whether two calls are given the same latents; if they are not one object, this waits for the device."""
    former, latter = partner.given.latents, branch.given.latents
    if not former or former.keys() != latter.keys() or partner.written != _writes(partner):
        return False  # what was written into since its call is no longer what that was given
    return all(_is_equal(former[path], latter[path]) for path in former)


def _is_equal(one: Tensor, other: Tensor) -> bool:
    if is_same(one, other):
        return True
    if (one.shape, one.dtype, one.device) != (other.shape, other.dtype, other.device):
        return False
    local: Sequence[Any] = [getattr(each, "to_local", lambda each=each: each)() for each in (one, other)]
    return not local[0].is_meta and not is_capturing(local[0].device) and torch.equal(*local)


def _forms(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    return [(each.shape, each.dtype, each.device) for each in tensors]


def _difference(one: Tensor, other: Tensor) -> Tensor:
    """Return one less the other, in float32 at least until it is done."""
    wide = torch.promote_types(one.dtype, torch.float32)
    return (one.to(wide) - other.to(wide)).to(one.dtype)


def _sums(tensors: Sequence[Tensor], held: Anchor) -> tuple[Tensor, ...]:
    """Return tensors with the differences added that are held, as new ones, summed in float32 at least."""
    made = []
    for own, apart, (dtype, device) in zip(tensors, held.kept, held.forms, strict=True):
        wide = torch.promote_types(dtype, torch.float32)
        made.append((own.to(wide) + apart.to(device, non_blocking=True).to(wide)).to(dtype))
    return tuple(made)
