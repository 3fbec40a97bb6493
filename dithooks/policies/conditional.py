"""Steps at which one branch of guidance alone is computed: the other keeps the distance that it had to it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..errors import InvalidSetting, WrongType
from ..validation import check_bool, check_count, set_field, shown


@dataclass(frozen=True)
class Conditional:
    """The steps at which one branch of guidance alone is computed, mostly that with the prompt.

    There, what another branch would have returned is taken to be v + δ: v is the output of the computed branch at this
    step, and δ how far the other's was from it at the last step at which both were computed.

    Args:
        branch: number of the branch that is computed: in the order of a step's calls, or of the halves of its batch.
        steps: 1 for each step at which it alone is, and 0 for the others.
        in_batch: whether the branches are the halves of the batch of a step's only call.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, or there is no such step.

    Example:
        >>> Conditional(0, [0, 0, 1, 0]).is_ahead(1), Conditional(0, [0, 0, 1, 0]).is_ahead(2)
        (True, False)
    """

    branch: int
    steps: tuple[int, ...]
    in_batch: bool = field(default=False, metadata={"written": "where given"})

    def __post_init__(self) -> None:
        set_field(self, "branch", check_count("branch", self.branch, 0))
        steps: Any = self.steps
        steps = steps.tolist() if hasattr(steps, "tolist") else steps
        if not isinstance(steps, Iterable) or isinstance(steps, str):
            raise WrongType(f"conditional.steps must be a 1 or 0 for each step, not {shown(self.steps)}")
        bits = tuple(int(bit) if bit in (0, 1) else -1 for bit in steps)
        if -1 in bits or 1 not in bits:
            raise InvalidSetting(
                f"conditional.steps={shown(self.steps)}: give a 1 for each step at which one branch alone is computed, "
                "a 0 for each other one, and leave conditional out if there is none"
            )
        set_field(self, "steps", bits)
        if check_bool("in_batch", self.in_batch) and self.branch > 1:
            raise InvalidSetting(f"branch={self.branch} with in_batch: the halves of a batch are 0 and 1")

    def at(self, step: int) -> bool:
        """Return whether the branch alone is computed at a step."""
        return step < len(self.steps) and bool(self.steps[step])

    def is_ahead(self, step: int) -> bool:
        """Return whether there is such a step after this one."""
        return 1 in self.steps[step + 1 :]


def check_conditional(conditional: object, steps: Sequence[int], called: tuple[int, int] | None = None) -> None:
    """Refuse steps at which one branch alone is computed, but that are reused, or have no step with both before them.

    Args:
        conditional: of a plan or mask; ``None`` fits any.
        steps: 1 (computed) or 0 (reused) for each step.
        called: the first step, and the one after the last; ``None``: all of them.

    Raises:
        WrongType: it is no :class:`Conditional`.
        InvalidSetting: it does not fit the steps.
    """
    if conditional is None:
        return
    if not isinstance(conditional, Conditional):
        raise WrongType(f"conditional must be a Conditional or None, not {shown(conditional)}")
    first, end = called or (0, len(steps))
    if len(conditional.steps) != len(steps):
        raise InvalidSetting(
            f"conditional.steps has {len(conditional.steps)} entries, but there are {len(steps)} steps"
        )
    for step in (step for step, bit in enumerate(conditional.steps) if bit):
        if not first <= step < end:
            raise InvalidSetting(f"conditional.steps has step {step}, at which the transformer is not called: give a 0")
        if not steps[step]:
            raise InvalidSetting(
                f"conditional.steps has step {step}, which is reused: one branch of it is to be computed, so give "
                f"steps a 1 there, or conditional.steps a 0"
            )
        if step == first:
            raise InvalidSetting(
                f"conditional.steps has step {step}, the first: nothing is known of the other branch yet, so give a 0"
            )
