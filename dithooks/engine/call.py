"""One call of the transformer while it runs: a stage and a mode."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ..blocks.observation import Observation
from ..policies.history import Decision
from ..predictors.predictor import Moment
from .arguments import Signature
from .noise_probe import NoiseProbe
from .run import Branch, Run
from .sessions import Session
from .step_source import StepSource

_START = Moment(0, 0.0)


class Stage(Enum):
    """Where a call stands with regard to the range."""

    BEFORE = "before the range"
    INSIDE = "inside the range"
    AFTER = "after the range"


class Mode(Enum):
    """What happens to the blocks of the range in a call."""

    PLAIN = "run"
    CAPTURE = "run, and the residual is taken"
    UNDECIDED = "a policy looks at the first block"
    REUSE = "skipped"
    MISMATCH = "were to be skipped; run and captured, as the residual did not fit"


BEFORE, INSIDE, AFTER = Stage
PLAIN, CAPTURE, UNDECIDED, REUSE, MISMATCH = Mode


class Shortcut(Enum):
    """What stand-ins between the two ends of the range may do at once in a thread, without asking."""

    ASK = "ask"
    SKIP = "pass on the streams"
    RUN = "run the block"


ASK, SKIP, RUN = Shortcut


@dataclass(eq=False)
class Capture:
    """What some blocks were given and returned in one call; −h_in and h_out by value."""

    entry: list[Tensor] | dict[str, Tensor] | None = None  # −h_in: by stream or, while the wiring is unknown, by name
    exit: tuple[Tensor | None, ...] = ()  # h_out by position, while the wiring is unknown
    deltas: tuple[Tensor, ...] = ()  # Δ for each output, once known
    output: tuple[Tensor, ...] | None = None  # h_out of the streams that are measured, where it is asked for
    complete: bool = False  # the last block has returned


@dataclass(eq=False)
class Call:
    """One call of the transformer, in the thread that makes it.

    A computed call goes from BEFORE to INSIDE to AFTER in mode CAPTURE (PLAIN, where its residual is of no use); a
    reused one does so in mode REUSE. Compiled code reads and writes the upper part only: a number that changes with
    every step would recompile it.
    """

    mode: Mode = PLAIN
    stage: Stage = BEFORE
    stale: bool = False  # set by ActiveCalls: the range changed since the call began, which is followed no longer
    keeps: bool = False  # its residual would be of use, if it is computed
    compiled: bool = False  # compiled code ran it, and may write its next outputs where those of this call lie
    deltas: tuple[Tensor, ...] = ()  # reused: Δ̂ for each output
    streams: tuple[Tensor, ...] = ()  # reused: h_in, while the range is passed over
    results: list[Tensor] | None = None  # reused: h_in + Δ̂
    versions: list[int] | None = None  # of the results, where these themselves are handed on from block to block
    range: Capture | None = None  # of the range, where its residual is taken
    lead: Capture | None = None  # of the blocks before the range, where they decide
    metric_inputs: tuple[Tensor, ...] | None = None  # what the change metric looks at
    probe: NoiseProbe | None = None  # reused, but only to see how the streams are handed on

    moment: Moment = _START
    signature: Signature = ()
    branch: Branch | None = None
    run: Run | None = None
    session: weakref.ref[Session] | None = None  # a call that an exception ended does not keep a request alive
    step_source: StepSource | None = None  # the session's, when the call was decided
    decision: Decision | None = None  # as made so far; of an undecided call: this rank's; None: of a repeated one
    observation: Observation | None = None
    marks: list[object] | None = None  # its beginning, that of its range, the range's end, its end


def is_passing(call: Call) -> bool:
    """Whether a call is between the first block of a skipped range and the last."""
    return call.stage is INSIDE and (call.mode is REUSE or call.mode is UNDECIDED)
