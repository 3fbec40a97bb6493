"""The branch of a call (conditional, unconditional, a window, …), known by what repeats from step to step.

A step makes several calls, and each call of the next step belongs to one of these. What shows to which: what it is
given, as far as that stayed the same from one step to the next; then the nearest latents, where these are apart as
those of windows are; then the order of calls. Order alone goes wrong where guidance is on for part of the steps only:
the call that used to come second now comes first, and would reuse the other branch's residual.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import inf

from torch import Tensor

from ..environment.torch_api import OutOfMemoryError
from .arguments import CallArguments, Signature
from .run import Branch, Claim, Run
from .timestep_argument import is_same

NEAR = 0.03  # a change so small that even another call's residual would hardly differ
JUMP = 3.0  # times the last change: what drifts so much faster than before may be another call's
APART = 0.8  # as far as latents of other noise are; those of two evaluations of one step are nearer, and do not tell


@dataclass(eq=False)
class Likeness:
    """How a call compares to the last call of one branch.

    Args:
        alike: number of arguments that are the same.
        doubts: conditioning that may or may not change from step to step: the branch had one call, or it jumps.
        misfits: arguments of another form, of which it is not known whether they change.
        conflicts: arguments that were the same at two steps and are not now, and switches that are thrown.
        changes: relative change of the conditioning, by name.
    """

    alike: int = 0
    doubts: set[str] = field(default_factory=set)
    misfits: set[str] = field(default_factory=set)
    conflicts: set[str] = field(default_factory=set)
    changes: dict[str, float] = field(default_factory=dict)

    @property
    def far(self) -> int:
        """Count the doubtful arguments that changed as much as another prompt would."""
        return sum(self.changes[name] >= APART for name in self.doubts)

    @property
    def rank(self) -> tuple[int, int, int]:
        """Return what the likeliest branch has the most of."""
        return -self.far, -len(self.doubts) - len(self.misfits), self.alike


@dataclass(frozen=True)
class Match:
    """The branch of a call.

    Args:
        number: of the branch, which may be a new one.
        claim: the branch whose next call this may be, if that is in doubt: the call then has a new branch, which takes
            the place of the other, unless that is called at the same step, or another one has a better claim.
        changes: how much the conditioning changed since that branch's last call, by name.
        is_doubtful: whether what the branch has kept may be another's: then it must not be reused.
    """

    number: int
    claim: Claim | None = None
    changes: Mapping[str, float] = field(default_factory=dict)
    is_doubtful: bool = False


def choose_branch(run: Run, given: CallArguments) -> Match | None:
    """Return the branch that a call belongs to: a new one if no branch fits; ``None`` for a call of another run."""
    if run.finished and any(_is_next(run.branches[number], given) for number in run.used if number in run.branches):
        return None  # the next picture of a run of one step, say
    free = {number: branch for number, branch in run.branches.items() if number not in run.used}
    # What one branch was given before is not compared by value with what others were: that would wait for the device
    # at every step.
    known = {
        name
        for name, now in given.conditioning.items()
        if any(is_same(branch.given.conditioning.get(name), now) for branch in free.values())
    }
    claims = [branch.claim for number, branch in run.branches.items() if number in run.used]
    claimed = {claim.number: claim.far for claim in sorted(filter(None, claims), reverse=True)}  # the best one last
    likenesses = {number: _compare(branch, given, known) for number, branch in free.items()}
    fitting = {
        number: like
        for number, like in likenesses.items()
        if not like.conflicts
        and not (like.doubts and (claimed.get(number, inf) <= like.far or run.branches[number].called != run.last_step))
    }
    turn = len(run.used)
    new = turn if turn not in run.branches else max(run.branches) + 1
    if not fitting:
        return Match(new)
    best = max(like.rank for like in fitting.values())
    tied = {number: like for number, like in fitting.items() if like.rank == best}
    number, is_doubtful = next(iter(tied)), False
    may_be_left_over = run.epoch is None and run.branches[number].steps == 1
    if len(tied) > 1 or (may_be_left_over and len(run.branches) > 1):
        number, is_doubtful = _nearest(run, given, tied)
    like = tied[number]
    if like.doubts:
        return Match(new, Claim(number, like.far), like.changes)
    rivals = (other for key, other in fitting.items() if run.branches[key].called == run.last_step and key != number)
    return Match(number, None, like.changes, is_doubtful or any(_is_as_near(other, like) for other in rivals))


def settle_claims(run: Run) -> None:
    """At the end of a step, find out which new branches took the place of others, whose next calls they were.

    Those others are not called any more, or only with what they were given before: prompts may take turns. What changed
    as much as another prompt would is known to change only after the second time.
    """
    new = [branch for number, branch in run.branches.items() if number in run.used and branch.claim is not None]
    best: dict[int, int] = {}
    for branch in new:
        number, far = branch.claim  # type: ignore[misc]
        best[number] = min(far, best.get(number, far))
    for branch in new:
        number, far = branch.claim  # type: ignore[misc]
        branch.claim = None
        if number in run.used or far > best[number] or number not in run.branches:  # another call after all
            branch.changes, branch.jumps = {}, set()
            continue
        before = run.branches[number].jumps
        branch.jumps = {name for name, change in branch.changes.items() if change >= APART}
        for name in branch.jumps - before:
            del branch.changes[name]


def _compare(branch: Branch, given: CallArguments, known: set[str]) -> Likeness:
    """Compare a call to a branch's last call."""
    like = Likeness()
    few = _samples(given)
    for name in branch.given.conditioning.keys() | given.conditioning.keys():
        if name in given.latents:  # only now known to be latents
            continue
        before, now = branch.given.conditioning.get(name), given.conditioning.get(name)
        change = 0.0 if is_same(before, now) else inf if name in known else distance(before, now)
        like.changes[name] = change
        last = branch.changes.get(name)
        if change == 0:
            like.alike += 1
        elif now is not None and before is not None and now.numel() <= few:
            pass  # a number for each sample: a noise level, or a strength that fades
        elif last == 0:
            like.conflicts.add(name)
        elif change > _believable(last):
            like.doubts.add(name)
    former, form = _by_name(branch.given.form), _by_name(given.form)
    for name in former.keys() | form.keys():
        was, is_now = former.get(name), form.get(name)
        is_switch = len(was or is_now or ()) == 1  # thrown, nothing could be reused anyway
        if was == is_now:
            like.alike += 1
        elif is_switch or branch.changes.get(f"{name} as form") == 0:
            like.conflicts.add(name)
        else:
            like.misfits.add(name)
        like.changes[f"{name} as form"] = float(was != is_now)
    return like


def _believable(last: float | None) -> float:
    """Return up to which change a drift is believed, after the last change: another prompt is no drift that grew."""
    if last is None:
        return NEAR
    grown = JUMP * last
    if last < APART:
        grown = min(grown, APART)
    return max(NEAR, grown)


def _is_as_near(rival: Likeness, like: Likeness) -> bool:
    """Whether a branch is doubted only as its call is the first, and else fits as well as the one without doubts."""
    return bool(rival.doubts) and all(rival.changes[name] <= like.changes.get(name, -inf) for name in rival.doubts)


def _is_next(branch: Branch, given: CallArguments) -> bool:
    """Whether a call is given what a branch was given at this very step, but other latents."""
    return _are_alike(branch.given.conditioning, given.conditioning) and not _are_alike(
        branch.given.latents, given.latents
    )


def _are_alike(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> bool:
    return before.keys() == now.keys() and all(
        is_same(before[name], now[name]) or distance(before[name], now[name]) == 0 for name in now
    )


def _nearest(run: Run, given: CallArguments, tied: Iterable[int]) -> tuple[int, bool]:
    """Return which of several branches a call goes on from, and whether that is in doubt.

    Those whose conditioning or latents are near come before those that are far, as other windows are; among these, the
    one that came first at the last step. One that was called at one step only, and is far or has rivals, may be left
    over from a run that was broken off at its first step, of which the loop shows nothing.
    """
    branches = {number: run.branches[number] for number in tied}
    called = {number: branch for number, branch in branches.items() if branch.called == run.last_step}
    branches = called or branches
    is_doubtful = False
    for kind in ("conditioning", "latents"):
        distances = {number: _distance(branch.given, given, kind) for number, branch in branches.items()}
        farthest = max(distances.values())
        if farthest >= APART and min(distances.values()) < inf:  # none has the form: that shows elsewhere
            near = {number: branches[number] for number in branches if distances[number] < farthest / 2}
            seen_once = any(branch.steps == 1 for branch in branches.values())
            is_doubtful = is_doubtful or (not near and seen_once and kind == "latents" and run.epoch is None)
            branches = near or branches
    if run.epoch is None and run.source == "timestep":  # whose first step has one evaluation
        rivals = [distances[number] for number, branch in branches.items() if branch.is_first and branch.steps == 1]
        is_doubtful = is_doubtful or len(set(rivals)) > 1
    return min(branches, key=lambda each: (branches[each].position, each)), is_doubtful


def _samples(given: CallArguments) -> int:
    """Return the batch size of a call: a tensor of no more numbers has one for each sample, and shows no prompts."""
    return max((len(latents) for latents in given.latents.values() if latents.dim()), default=1)


def _distance(before: CallArguments, now: CallArguments, kind: str) -> float:
    """Return the largest distance between what two calls were given of one kind."""
    former, few = getattr(before, kind), 0 if kind == "latents" else _samples(now)
    pairs = [(former.get(name), value) for name, value in getattr(now, kind).items() if value.numel() > few]
    return max([0.0 if is_same(*pair) else distance(*pair) for pair in pairs], default=0.0)


def _by_name(form: Signature) -> dict[str, tuple[object, ...]]:
    return {entry[0]: entry[1:] for entry in form}


def distance(a: Tensor | None, b: Tensor | None) -> float:
    """Return ‖a − b‖ / max(‖a‖, ‖b‖), which waits for their device; infinite if they cannot be compared."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return inf
    try:
        if a.is_complex():
            x, y = a, b
        else:
            x, y = a.float(), b.float()
        size = max(float(x.norm()), float(y.norm()))
        apart = float((x - y).norm())
    except OutOfMemoryError:
        raise
    except (RuntimeError, NotImplementedError):  # on the meta device, or a subclass that does not compare
        return inf
    return apart / size if size and apart == apart else (0.0 if apart == 0 else inf)
