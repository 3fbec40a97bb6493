"""Which of a step's calls is this one: conditional, unconditional, …? Told by order, and by what it is conditioned on.

Order alone goes wrong when guidance is on for part of the steps only: the call that used to come second now comes
first, and would be given the other one's residual. Most loops pass the very same embedding tensors at every step,
so a tensor that a branch has been given again and again tells it from the others.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .state import Branch, Run


def choose_branch(run: Run, arguments: Mapping[str, Any]) -> int:
    """The number of the branch that a call with these arguments belongs to; one not known yet is a new branch.

    Of the branches not called at this step, one that lacks a tensor it was given twice running is out; of the others
    the one that shares most tensors with this call is taken, and where that is a draw, the one whose turn it is.
    """
    turn = len(run.used)
    ranks = {}
    for number, branch in run.branches.items():
        if number not in run.used:
            same = _same(branch, arguments)
            if branch.lasting <= same:
                ranks[number] = (len(same), number == turn, -number)
    if ranks:
        return max(ranks, key=lambda number: ranks[number])
    return turn if turn not in run.branches else max(run.branches) + 1


def remember(branch: Branch, arguments: Mapping[str, Any]) -> None:
    """Note which tensors this branch was given, and which of them it was given at its last call, too."""
    branch.lasting = _same(branch, arguments)
    branch.seen = {name: weakref.ref(value) for name, value in arguments.items() if isinstance(value, Tensor)}


def _same(branch: Branch, arguments: Mapping[str, Any]) -> set[str]:
    """Names of the arguments that are the very objects this branch was given last."""
    return {
        name for name, last in branch.seen.items() if (value := arguments.get(name)) is not None and last() is value
    }
