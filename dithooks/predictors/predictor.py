"""What: the residual of a reused step, as weights of those stored. Plain numbers; tensors are combined elsewhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from ..policies.history import Schedule


class Moment(NamedTuple):
    """Where in the run a call stands: its step, and σ, or what stands for it.

    ``axis`` says what ``time`` is: ``"sigma"``, ``"timestep"`` (where no σ is known; for flow matching that is σ but
    for a factor) or ``"step"``.
    """

    step: int
    time: float
    axis: str = "sigma"


class Predictor(ABC):
    """Says how much of each stored residual makes that of a reused step. Subclasses are frozen dataclasses."""

    takes_the_last: ClassVar[bool] = False  # always, and as it is

    @property
    @abstractmethod
    def anchors(self) -> int:
        """How many residuals it takes, at most."""

    @abstractmethod
    def weights(self, anchors: Sequence[Moment], now: Moment) -> tuple[float, ...] | None:
        """A weight for each of the first so many anchors, of which ``anchors`` has at least one, the newest first.

        ``None``: these are not the anchors it was made for; the line through the last two is taken then.
        """

    @property
    def needs_sigmas(self) -> bool:
        """Whether it asks for the noise level of a step."""
        return self.anchors > 1

    def remark(self, schedule: Schedule) -> str | None:
        """What is to be said at the start of a run."""
        return None
