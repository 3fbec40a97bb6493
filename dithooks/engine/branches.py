"""The branch of a call (conditional, unconditional, …), recognised by its arguments, then by the order of calls.

Order alone goes wrong where guidance is on for part of the steps only: the call that used to come second now comes
first, and would reuse the other branch's residual; or where a run is interrupted and restarted. So a call is compared
with those of the step before: prompts stay the same through a run, and all calls of a step share their latents.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .run import Run


def choose_branch(run: Run, latents: Mapping[str, Tensor], conditioning: Mapping[str, Tensor]) -> int | None:
    """Return the number of the branch that a call belongs to: a new one if no branch fits; ``None`` for another run.

    Of the branches not called at this step, those whose conditioning differs are out; of the others the one with most
    in common is taken, and in a draw the one whose turn it is. Arguments that change at every step are not compared.
    """
    assert run.step is not None
    # What a branch was given before is not compared with what others were: that would wait for the device at every
    # step. A tensor made at each step and given to all its calls (guidance as a number) is not compared either.
    known = {
        name
        for name, now in conditioning.items()
        if any(_one(b.conditioning.get(name), now) for n, b in run.branches.items() if n not in run.used)
    }
    for number in run.used:  # the same prompt on other latents, at one and the same step: another picture
        branch = run.branches[number]
        shared = branch.latents.keys() == latents.keys() and all(_one(branch.latents[k], latents[k]) for k in latents)
        if shared:  # as in most loops, which shows without waiting for the device
            continue
        if not _differing(branch.conditioning, conditioning, known) and _differing(branch.latents, latents, set()):
            return None
    turn, ranks, doubts = len(run.used), {}, []
    free = {number: branch for number, branch in run.branches.items() if number not in run.used}
    for number, branch in free.items():
        differing = _differing(branch.conditioning, conditioning, known)
        run.constant |= set(conditioning) & set(branch.conditioning) - differing
        doubts.append(differing)
        ranks[number] = (-len(differing), number == turn, -number)
    for name in set.intersection(*doubts) - run.constant if doubts else ():
        run.unstable_conditioning.setdefault(name, set()).add(run.step)
    changing = {name for name, steps in run.unstable_conditioning.items() if len(steps) > 1} - run.constant
    fitting = {n: rank for (n, rank), differing in zip(ranks.items(), doubts, strict=True) if differing <= changing}
    if fitting:
        return max(fitting, key=lambda number: fitting[number])
    return turn if turn not in run.branches else max(run.branches) + 1


def _differing(before: Mapping[str, Tensor], now: Mapping[str, Tensor], known: set[str]) -> set[str]:
    """Return the names that only one of two calls has, or under which they have different tensors."""
    return {
        name
        for name in before.keys() | now.keys()
        if not _one(before.get(name), now.get(name)) and (name in known or not _equal(before.get(name), now.get(name)))
    }


def _one(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors are the same object, or the same view of one."""
    if a is None or b is None or a is b:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device or a.device.type == "meta":
        return False
    try:
        return 0 != a.data_ptr() == b.data_ptr() and a.stride() == b.stride() and a.numel() > 0
    except RuntimeError:  # sparse, or without storage, which can show as an address of 0, too
        return False


def _equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors hold the same values, which waits for their device."""
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    try:
        return torch.equal(a, b)
    except (RuntimeError, NotImplementedError):  # on the meta device, or a subclass that does not compare
        return False
