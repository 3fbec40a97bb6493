"""One call of the transformer while it runs: its stage, its mode, and its tensors."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from enum import Enum

from torch import Tensor

from ..blocks.observation import Observation
from ..policies.history import Decision
from ..predictors.predictor import Moment
from .additions import AdditionSum
from .arguments import Signature
from .noise_probe import NoiseProbe
from .run import Branch, Run
from .sessions import Session
from .step_source import StepSource

_START = Moment(0, 0.0)


class Stage(Enum):
    """How far a call has come with regard to the range."""

    BEFORE = "before the range"
    INSIDE = "inside the range"
    AFTER = "after the range"


class Mode(Enum):
    """What happens to the blocks of the range in a call."""

    PLAIN = "run"
    CAPTURE = "run, and the residual is taken"
    UNDECIDED = "decided at the first block, by a measured change"
    REUSE = "skipped"
    MADE = "skipped as a whole, and the output made of another branch's at this step"
    HALF = "run for half the batch, and the output of the other half made of that"
    MISMATCH = "was to be skipped, but the residual did not fit: run and captured"
    ROWS = "run for some rows of the batch, and skipped for others"


BEFORE, INSIDE, AFTER = Stage
PLAIN, CAPTURE, UNDECIDED, REUSE, MADE, HALF, MISMATCH, ROWS = Mode
LEFT_OUT = REUSE, MADE, HALF  # in whole or in part


class Shortcut(Enum):
    """The shortcut that inner stand-ins of a thread may take without asking the cache."""

    ASK = "ask the cache"
    SKIP = "return the streams from the arguments"
    RUN = "run the block"
    LOOK = "run the block, and show the cache its output"  # only ever the cache's answer


ASK, SKIP, RUN, LOOK = Shortcut


@dataclass(eq=False)
class Capture:
    """Input and output of some blocks in one call; −h_in and h_out are copies."""

    entry: list[Tensor] | dict[str, Tensor] | None = None  # −h_in by stream; by argument while the wiring is unknown
    exit: tuple[Tensor | None, ...] = ()  # h_out by position, while the wiring is unknown
    deltas: tuple[Tensor, ...] = ()  # Δ of each output, once computed
    output: tuple[Tensor, ...] | None = None  # h_out of the measured streams, if asked for
    complete: bool = False  # the last block has returned


@dataclass(eq=False)
class Call:
    """One call of the transformer, in the thread that makes it.

    A computed call goes from BEFORE to INSIDE to AFTER in mode CAPTURE, or PLAIN if its residual would never be reused;
    a reused call does so in mode REUSE. Those that are MADE or HALF enter no range. Compiled code reads and writes only
    the fields above the empty line: a number that changes with every step would recompile it.
    """

    mode: Mode = PLAIN
    stage: Stage = BEFORE
    stale: bool = False  # set by ActiveCalls: the range changed since the call began, so the cache ignores it
    keeps: bool = False  # if computed, its residual may be reused
    compiled: bool = False  # compiled code ran it, and may write its next outputs into the memory of these
    deltas: tuple[Tensor, ...] = ()  # reused: Δ̂ of each output; made: that output
    streams: tuple[Tensor, ...] = ()  # reused: h_in, while inside the range
    results: list[Tensor] | None = None  # reused: h_in + Δ̂
    versions: list[int] | None = None  # of results and streams, if the results are handed on without a copy
    counted: tuple[bool, ...] = ()  # by output: what the model adds between the blocks is this call's own
    sums: AdditionSum | None = None  # computed: of these additions, while inside the range
    range: Capture | None = None  # of the range, if its residual is taken
    lead: Capture | None = None  # of the blocks before the range, if the change metric uses them
    metric_inputs: tuple[Tensor, ...] | None = None  # inputs of the change metric
    probe: NoiseProbe | None = None  # set in a call that only tests how the model hands on the streams

    moment: Moment = _START
    signature: Signature = ()
    branch: Branch | None = None
    run: Run | None = None
    session: weakref.ref[Session] | None = None  # weak: a call ended by an exception must not keep a request alive
    step_source: StepSource | None = None  # the session's, when the call was decided
    decision: Decision | None = None  # while undecided, this rank's own; None in a repeated call
    observation: Observation | None = None
    marks: list[object] | None = None  # times: call begins, range begins, range ends, call ends


def is_passing(call: Call) -> bool:
    """Return whether a call is between the first and last block of a range that is or may be skipped."""
    return call.stage is INSIDE and (call.mode is REUSE or call.mode is UNDECIDED or call.mode is ROWS)
