"""The closed-loop fit: the weights of a plan, found step by step on the cached trajectory that they make.

At a step of the cached run, let f_k be what may be combined: the output of the call that was just made, if one was, and
the outputs of the last computed steps. The solver makes A + B·y of an output y. The weights are

    w = argmin ‖A + B Σ w_k f_k − x‖² + ridge·‖B f‖²·‖w − w₀‖²

with x the latents that the uncached run had after this step: so each step takes back what it can of the error that the
steps before have left. They are applied at once, and the run goes on with them. w₀ is the line through the last two
outputs where nothing was computed, and the output as it is where it was. The solver is given the guided output; with
one set of weights for all calls of a step, that is the same sum of guided outputs, however guidance is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan
from ..errors import RunMismatch
from ..predictors.polynomial import lagrange_weights
from ..predictors.predictor import Moment
from ..recording.recording import Floats
from ..recording.solver_trace import AFFINE, SolverTrace, response_of, taken
from ..recording.solver_watch import SolverCall
from ..stats.types import CallRecord

RIDGE_FORECAST, RIDGE_CORRECTION = 3e-4, 1e-2  # relative to the mean square of what is combined
LINEAR = 0.05  # of an output, that guidance may add to a weighted sum: rounding in half precision does not reach that
EMPHASIS = 0.25  # power of a picture's error by which it counts in the fit: the worst counts, too


@dataclass
class Normal:
    """The normal equations of one step, summed over the runs of the calibration.

    Args:
        matrix: (K, K), ⟨f_j, f_k⟩.
        aim: (K,), ⟨f_k, (x − A)/B⟩.
        start: (K,), w₀.
        ridge: strength of the pull to it.
    """

    matrix: Floats
    aim: Floats
    start: Floats
    ridge: float

    def add(self, matrix: Floats, aim: Floats) -> None:
        """Add another run's."""
        self.matrix = np.asarray(self.matrix + matrix)
        self.aim = np.asarray(self.aim + aim)

    def weights(self) -> Floats:
        """Return the weights that solve them."""
        pull = self.ridge * float(np.trace(self.matrix)) / len(self.start)
        if not pull > 0:
            return self.start
        matrix = self.matrix + pull * np.eye(len(self.start))
        return np.asarray(np.linalg.solve(matrix, self.aim + pull * self.start), dtype=np.float64)


@dataclass(eq=False)
class ClosedLoop:
    """Fits a plan's weights while it is run; shown the solver's steps, and the decision on each call.

    Args:
        plan: which steps are computed, and what is forecast at the others; its corrections are not read.
        reference: the solver's steps of the uncached run.
        anchors: outputs that an output is made of, its own included, where residuals are forecast; where outputs are,
            the plan says it.
        fitted_on: (pictures,), whether each takes part in the fit; the others go along. ``None``: all do.
        agreed: returns what rank 0 has found, on all ranks.
    """

    plan: CachePlan
    reference: SolverTrace
    anchors: int
    fitted_on: NDArray[np.bool_] | None = None
    agreed: Callable[[Any], Any] = lambda found: found
    error: Exception | None = None
    misfit: float | None = None  # of guided outputs, as sums of earlier ones, at most; None: not seen
    _records: list[CallRecord] = field(default_factory=list)
    _normals: dict[int, Normal] = field(default_factory=dict)
    _kept: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)  # by piece: step and output, newest first
    _calls: dict[int, int] = field(default_factory=dict)  # by piece: of its last step, one for each branch
    _step: int = -1
    _was_reused: bool = False
    _rows: slice = field(default_factory=lambda: slice(0, 0))  # of the pictures of the run under way

    @property
    def bare(self) -> CachePlan:
        """The plan as it is run meanwhile: without corrections."""
        return replace(self.plan, pieces=tuple(replace(piece, corrections=None) for piece in self.plan.pieces))

    # -- what the run shows --------------------------------------------------------------------------------------

    def note(self, record: CallRecord) -> None:
        """Note the decision on a call of a transformer."""
        self._records.append(record)

    def before(self, call: SolverCall) -> None:
        """Fit the weights of this step, and give the solver the output that they make."""
        if self.error is not None:
            return
        records, self._records = self._records, []
        step = records[-1].step if records else (self._step + 1) % len(self.reference.outputs)
        self._begin(step, len(call.output))
        place = next((n for n, piece in enumerate(self.plan.pieces) if _is_called(piece, step)), None)
        if place is None:
            return
        is_reused = any(record.reuse for record in records)
        if len({record.range for record in records}) > 1 and not all(record.reuse == is_reused for record in records):
            raise RunMismatch(f"at step {step}, one of several transformers is computed, and another one is not")
        piece, kept = self.plan.pieces[place], self._kept.setdefault(place, [])
        if self._calls.setdefault(place, len(records)) != len(records):
            kept.clear()  # guidance begins or ends: a sum across that is not what weights of the outputs make
            self._calls[place] = len(records)
        own = [] if is_reused and piece.payload == "output" else [call.output]
        most = piece.predictor.anchors if piece.payload == "output" else self.anchors
        parts = [*own, *(output for _, output in kept[: most - len(own)])]
        fits = (is_reused or self._was_reused) and len(parts) + (not own) > 1
        if own and min(len(piece.coefficients[step] or ()), most) > len(kept):
            fits = False  # some branch has no planned forecast, which is what would be corrected
        if not is_reused:
            kept.insert(0, (step, call.output.clone()))
            del kept[most:]
        self._was_reused = is_reused
        if not own:
            self._check_guidance(call, step, parts, piece.coefficients[step] or ())
        if fits:
            start = self._line(piece, step, [at for at, _ in kept[: len(parts)]]) if not own else _as_it_is(len(parts))
            self._fit(call, step, parts, start, RIDGE_CORRECTION if own else RIDGE_FORECAST)

    def after(self, call: SolverCall, following: Tensor) -> None:
        """Do nothing: what follows was known before."""

    def fails(self, error: Exception) -> None:
        """Note why the fit cannot go on."""
        self.error = self.error or error

    @property
    def is_over(self) -> bool:
        """Whether all steps of the recorded run were shown, and fitted where they had to be."""
        return self.error is None and self._step == len(self.reference.outputs) - 1

    # -- what comes of it ----------------------------------------------------------------------------------------

    def fitted(self) -> CachePlan:
        """Return the plan with the weights that were found.

        Raises:
            RunMismatch: the run has not shown all steps.
        """
        if self.error is not None:
            raise RunMismatch(f"the fit broke off: {self.error}") from self.error
        if self._step != len(self.reference.outputs) - 1:
            raise RunMismatch(
                f"the solver made {self._step + 1} steps, and {len(self.reference.outputs)} were recorded"
            )
        found = self.agreed({step: tuple(map(float, each.weights())) for step, each in self._normals.items()})
        return replace(self.plan, pieces=tuple(_with_weights(piece, found) for piece in self.plan.pieces))

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, step: int, pictures: int) -> None:
        """Note the step; where it goes back, another run of the calibration has begun."""
        if step <= self._step or self._step < 0:
            self._kept, self._was_reused = {}, False
            begin = self._rows.stop if self._step >= 0 else 0
            self._rows = slice(begin, begin + pictures)
        if step not in (0, self._step + 1) or self._rows.stop > self.reference.outputs.shape[1]:
            raise RunMismatch(
                f"step {step} of {pictures} pictures follows on step {self._step}: the run is not the recorded one"
            )
        self._step = step

    def _check_guidance(self, call: SolverCall, step: int, parts: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Refuse guidance that does not make of sums of the model's outputs the same sum of guided ones."""
        if len(weights) > len(parts):
            return
        places = self.reference.places
        given = taken(call.output, places).astype(np.float64)
        summed = np.tensordot(weights, np.stack([taken(part, places) for part in parts[: len(weights)]]), 1)
        size = float(np.linalg.norm(given))
        misfit = float(np.linalg.norm(given - summed)) / size if size else 0.0
        self.misfit = max(self.misfit or 0.0, misfit)
        if misfit > LINEAR:
            raise RunMismatch(f"at step {step}, the pipeline makes more of the model's outputs than a weighted sum")

    def _line(self, piece: TransformerPlan, step: int, known: Sequence[int]) -> Floats:
        """Return the weights of the line through the last two outputs, in σ."""
        start, times = np.zeros(len(known)), piece.sigmas
        moments = [Moment(at, float(at) if times is None else times[at], piece.axis) for at in (*known[:2], step)]
        start[: len(moments) - 1] = lagrange_weights(moments[:-1], moments[-1], "sigma" if times else "step")
        return start

    def _fit(self, call: SolverCall, step: int, parts: Sequence[Tensor], start: Floats, ridge: float) -> None:
        weights, problem = None, None
        try:
            self._solve(call, step, parts, start, ridge)
            weights = self._normals[step].weights() if step in self._normals else start
        except Exception as error:  # the other ranks wait for what this one has found
            problem = error
        weights = self.agreed(weights)
        if weights is None:
            raise problem or RunMismatch("rank 0 could not fit the weights")
        call.replace(_sum(parts, weights))

    def _solve(self, call: SolverCall, step: int, parts: Sequence[Tensor], start: Floats, ridge: float) -> None:
        """Add what the step shows to its normal equations."""
        answer = response_of(call, parts[0], self.reference.places)
        if answer.misfit > AFFINE or not answer.gain:
            raise RunMismatch(f"at step {step}, the scheduler's answer does not go with the model's output")
        known = np.stack([taken(part, self.reference.places) for part in parts]).astype(np.float64)
        following = self.reference.latents[step, self._rows].astype(np.float64)
        aim = (following - answer.still) / answer.gain
        if self.fitted_on is not None:
            some = self.fitted_on[self._rows]
            known, aim = known[:, some], aim[some]
        if known.shape[1]:
            self._add(step, known, aim, start, ridge)

    def _add(self, step: int, known: Floats, aim: Floats, start: Floats, ridge: float) -> None:
        """Add the pictures of a run, (K, pictures, numbers), to the normal equations; the worst count most."""
        errors = np.square(np.tensordot(start, known, 1) - aim).mean(1)
        counts = np.clip(errors / max(float(errors.mean()), 1e-300), 1e-3, 1e3) ** EMPHASIS
        matrix = np.einsum("jsd,ksd,s->jk", known, known, counts, optimize=True)
        aimed = np.einsum("ksd,sd,s->k", known, aim, counts, optimize=True)
        if step in self._normals:
            self._normals[step].add(matrix, aimed)
        else:
            self._normals[step] = Normal(matrix, aimed, start, ridge)


def _with_weights(piece: TransformerPlan, found: Mapping[int, tuple[float, ...]]) -> TransformerPlan:
    coefficients = list(piece.coefficients)
    corrections: list[tuple[float, ...] | None] = [None] * len(piece.steps)
    for step, weights in found.items():
        if not _is_called(piece, step):
            continue
        if piece.payload == "output" and not piece.steps[step]:
            coefficients[step] = weights
        else:
            corrections[step] = weights
    some = None if all(each is None for each in corrections) else tuple(corrections)
    return replace(piece, coefficients=tuple(coefficients), corrections=some)


def _sum(parts: Sequence[Tensor], weights: Floats) -> Tensor:
    total = parts[0].float() * float(weights[0])
    for part, weight in zip(parts[1:], weights[1:], strict=True):
        total.add_(part.float(), alpha=float(weight))
    return total


def _as_it_is(count: int) -> Floats:
    start = np.zeros(count)
    start[0] = 1.0
    return start


def _is_called(piece: TransformerPlan, step: int) -> bool:
    return piece.called is None or piece.called[0] <= step < piece.called[1]
