"""The base class of predictors: the residual of a reused step as a weighted sum of the residuals that are kept.

A predictor returns plain numbers; the engine sums the tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from ..policies.history import Schedule


class Moment(NamedTuple):
    """The place of a call in a run: its step, and its time.

    ``axis`` names what ``time`` is: ``"sigma"``, the noise level; ``"timestep"``, where no σ is known (σ times a
    constant, for flow matching); or ``"step"``.

    Example:
        >>> Moment(3, 0.75)
        Moment(step=3, time=0.75, axis='sigma')
    """

    step: int
    time: float
    axis: str = "sigma"


class Predictor(ABC):
    """What to add on a reused step: a weight for each of the last residuals. Subclasses are frozen dataclasses.

    Example: the mean of the last two residuals.
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Mean(Predictor):
        ...     anchors = 2
        ...     def weights(self, anchors, now):
        ...         return tuple(1 / len(anchors) for _ in anchors[:2])
        >>> Mean().weights([Moment(4, 0.6), Moment(3, 0.7)], Moment(5, 0.5))
        (0.5, 0.5)
    """

    takes_the_last: ClassVar[bool] = False  # whether it always returns the newest residual unchanged

    @property
    @abstractmethod
    def anchors(self) -> int:
        """The number of residuals that it takes, at most."""

    @abstractmethod
    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        """Return a weight for each of the first anchors, the newest first; those without a weight are left out.

        ``None``: there are no weights for these anchors; the line through the last two is used then.

        Args:
            anchors: the moments of the residuals that are kept, the newest first; at least one.
            now: the moment of the reused call.
        """

    @property
    def outputs(self) -> int:
        """The number of outputs of earlier computed steps that it corrects an output with, at most."""
        return 0

    @property
    def corrects(self) -> frozenset[bool]:
        """What outputs it corrects: ``True`` for those made with a forecast residual, ``False`` for computed ones."""
        return frozenset()

    def output_weights(
        self, outputs: Sequence[Moment], now: Moment, is_forecast: bool = False
    ) -> tuple[float, ...] | None:
        """Return the weights by which a call's output is corrected, its own first; ``None``: it is used as it is.

        None at all, (): it should be corrected, but no weights are known for it, so that it is used as it is.

        Args:
            outputs: the moments of the computed steps before whose outputs are kept, the newest first.
            now: the moment of the call.
            is_forecast: whether it was made with a forecast residual.
        """
        return None

    @property
    def by_branch(self) -> bool:
        """Whether branches of guidance have weights of their own."""
        return False

    def of_branch(self, number: int, count: int) -> Predictor:
        """Return the predictor of one branch of guidance: mostly this one, for all.

        Args:
            number: of the branch, in the order of the calls of a step.
            count: of branches in the run.
        """
        return self

    @property
    def parts(self) -> int:
        """The number of branches with weights of their own that are equal parts of each call's batch; 1: none are."""
        return 1

    @property
    def needs_sigmas(self) -> bool:
        """Whether the noise levels of the run are needed."""
        return self.anchors > 1

    def warning_at_start(self, schedule: Schedule) -> str | None:
        """Return the warning for the user at the start of a run with this schedule, if any."""
        return None
