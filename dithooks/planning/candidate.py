"""A plan before it is run: how it is priced, the ranges and schedules that are chosen, and what they save and cost."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from ..config.transformer_plan import Payload

StepMode = Literal["whole", "tail", "conditional"]  # of the steps of a plan, beside those that are reused
MODES: tuple[StepMode, ...] = ("whole", "tail", "conditional")


class Variant(NamedTuple):
    """How schedules are priced: the residuals that a forecast is made of, and the weights of errors by step.

    Args:
        anchors: residuals that a forecast is made of.
        late_error_weight: how many times more an error at the end counts than one at the beginning. ``None``: the
            measured sensitivity counts, or else ``planner.DEFAULT_LATE_ERROR_WEIGHT``.
        power: of the measured sensitivity: 1 takes it as it is, 0 weighs all steps alike.
        payload: the forecast: ``"residual"`` of a range, or ``"output"`` of the whole transformer.
        space: where errors are weighed: in the ``"hidden"`` states of each range; or, for all blocks at once, in the
            ``"output"`` that the solver is given, by how far it moves the latents.
        mode: which steps there are: ``"whole"``, the whole range computed or reused; ``"tail"``, where the blocks are
            in two ranges with a schedule each, so that the last ones may run alone; ``"conditional"``, one branch of
            guidance alone, with outputs as the payload, and errors weighed in their space.
        carries: with the mode ``"conditional"``, whether what is held at a step counts in the forecasts after it, too.
    """

    anchors: int = 2
    late_error_weight: float | None = None
    power: float = 1.0
    payload: Payload = "residual"
    space: Literal["hidden", "output"] = "hidden"
    mode: StepMode = "whole"
    carries: bool = True


class Choice(NamedTuple):
    """A range of one transformer, and its schedule: a 1 for each of the transformer's steps that computes it.

    With the payload ``"output"``, the range is the whole transformer.

    Args:
        trace: number of the transformer.
        first: first block of the range.
        last: last block of the range.
        computed: a 1 for each step that is computed.
        payload: the forecast.
        tail: with the mode ``"tail"``, the range of the blocks behind, with its schedule.
        conditional: a 1 for each computed step at which one branch of guidance alone is; empty: there is none.
    """

    trace: int
    first: int
    last: int
    computed: tuple[int, ...]
    payload: Payload = "residual"
    tail: tuple[Choice, ...] = ()
    conditional: tuple[int, ...] = ()


@dataclass(frozen=True)
class Candidate:
    """A plan that has not been run: its speed-up and error are predicted from the recording.

    Args:
        choices: one for each transformer that is cached.
        variant: how the schedules were priced.
        speedup: predicted speed-up.
        error: predicted error: √Σ over reused stretches of ‖weighted error of the residual‖² relative to ‖h‖.
        reaches: whether the speed-up is at least the target.
        target: the speed-up that was asked for.
    """

    choices: tuple[Choice, ...]
    variant: Variant
    speedup: float
    error: float
    reaches: bool = True
    target: float = 1.0


class Option(NamedTuple):
    """One schedule of one range of a trace: what it saves, and what it costs. ``Option()`` caches nothing."""

    saved: float = 0.0
    cost: float = 0.0
    range: int = 0
    refreshes: int = 0
    computed: tuple[int, ...] = ()  # the schedule; empty: the best with so many refreshes, solved when it is chosen
    tail: tuple[Option, ...] = ()  # of the blocks behind the range, its cost and saving counted in
