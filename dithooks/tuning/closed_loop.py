"""The closed-loop fit: the weights of a plan, found step by step on the cached trajectory that they make.

At a step of the cached run, let f_k be what may be combined: the output of the call that was just made, if one was, and
the outputs of the last computed steps. The solver makes A + B·y of an output y. The weights are

    w = argmin ‖A + B Σ w_k f_k − x‖² + ridge·‖B f‖²·‖w − w₀‖²

with x the latents that the uncached run had after this step: so each step takes back what it can of the error that the
steps before have left. They are applied at once, and the run goes on with them. w₀ is the line through the last two
outputs where nothing was computed, and the output as it is where it was. The solver is given the guided output; with
one set of weights for all calls of a step, that is the same sum of guided outputs, however guidance is made.

A step at which one branch alone is computed counts as a computed one: the output of the other, which is made of that
and a difference that is held, is one of the f_k. It leaves an error behind, as a forecast does: so it is corrected, and
so is the step after it.

Where guidance makes several calls, or one on a batch of the same latents with several prompts, of which the solver is
given Σ s_b v_b, each branch has weights of its own: the f_k are the s_b v_b then. The shares s_b are found from what
the model returns and the solver is given. Weights for all branches are fitted as well, for runs that have others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ..config.cache_plan import CachePlan
from ..config.transformer_plan import TransformerPlan
from ..errors import RunMismatch
from ..policies.reason import Reason
from ..predictors.fitted import BranchWeights, StepWeights
from ..predictors.polynomial import lagrange_weights
from ..predictors.predictor import Moment
from ..recording.guidance_shares import StepOutputs, branches_of, shares_of
from ..recording.recording import Floats
from ..recording.solver_trace import AFFINE, SolverTrace, response_of, taken
from ..recording.solver_watch import SolverCall
from ..stats.types import CallRecord

RIDGE_FORECAST, RIDGE_CORRECTION = 3e-4, 1e-2  # relative to the mean square of the summands
RIDGE_BRANCH = 2e-4  # likewise: to the weights for all branches, which fewer pictures are enough for
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


class Part(NamedTuple):
    """An output that a sum may be made of.

    Args:
        step: at which it was computed.
        guided: what the solver was given.
        branches: what the model has returned, in the order of its calls; none where that is not known.
    """

    step: int
    guided: Tensor
    branches: tuple[Tensor, ...]


@dataclass(eq=False)
class ClosedLoop:
    """Fits a plan's weights while it is run; shown the solver's steps, and the decision on each call.

    Args:
        plan: the computed steps and the payload; its corrections are not read.
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
    _own: dict[int, Normal] = field(default_factory=dict)  # of the branches, one after another
    _outputs: StepOutputs = field(default_factory=StepOutputs)  # of this step's calls
    _in_batch: set[bool] = field(default_factory=set)  # whether the branches that were found are parts of a batch
    _shares: NDArray[np.float64] | None = None  # of each branch in what the solver is given; None: not known
    _known_shares: NDArray[np.float64] | None = None  # the latest of the run that were
    _kept: dict[int, list[Part]] = field(default_factory=dict)  # by piece, the newest first
    # by piece: calls of its last step, one for each branch, and how many rows the model has returned in one
    _calls: dict[int, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    _step: int = -1
    _was_inexact: bool = False  # at the last step, not all that there was to be computed was
    _rows: slice = field(default_factory=lambda: slice(0, 0))  # of the pictures of the run under way

    @property
    def bare(self) -> CachePlan:
        """The plan as it is run meanwhile: without corrections."""
        return replace(
            self.plan,
            pieces=tuple(replace(each, corrections=None, branches=(), in_batch=False) for each in self.plan.pieces),
        )

    # -- what the run shows --------------------------------------------------------------------------------------

    def note(self, record: CallRecord) -> None:
        """Note the decision on a call of a transformer."""
        self._records.append(record)

    def returned(self, output: object, latents: object = None) -> None:
        """Note what a call of a transformer has returned, and the latents that it was given."""
        self._outputs.add(output, latents)

    def made(self, output: object, latents: object, completes: bool) -> None:
        """Note an output that was made of another branch's, where that alone was computed.

        Args:
            output: what the call is given in place of the transformer's.
            latents: that the call was given.
            completes: whether it is for a whole batch, for half of which the transformer has just returned.
        """
        self._outputs.add(output, latents, completes)

    def before(self, call: SolverCall) -> None:
        """Fit the weights of this step, and give the solver the output that they make."""
        if self.error is not None:
            return
        every, self._records = self._records, []
        raw = self._outputs.take()
        step = every[-1].step if every else (self._step + 1) % len(self.reference.outputs)
        self._begin(step, len(call.output))
        place = next((n for n, piece in enumerate(self.plan.pieces) if _is_called(piece, step)), None)
        if place is None:
            return
        # The first range is the one whose steps the corrections go by.
        behind = tuple(each.span for each in self.plan.pieces[place].more_ranges)
        records = [record for record in every if not behind or not record.range.endswith(behind)]
        is_reused = any(_is_forecast(record) for record in records)
        if not is_reused and not self.plan.pieces[place].steps[step]:
            self.misfit = float("inf")  # guidance begins or ends: the plan by itself may have other anchors
        ranges = {record.range for record in records}
        if len(ranges) > 1 and not all(_is_forecast(record) == is_reused for record in records):
            raise RunMismatch(f"at step {step}, one of several transformers is computed, and another one is not")
        piece, kept = self.plan.pieces[place], self._kept.setdefault(place, [])
        known = self._calls.get(place)
        rows = tuple(raw[0][0].shape[:1]) if raw else known[1] if known else ()  # a call that is left out returns none
        if known is not None and known != (len(records), rows):
            kept.clear()  # guidance begins or ends: a sum across that is not what weights of the outputs make
        self._calls[place] = len(records), rows
        calls = 0 if len(ranges) > 1 else len(records)
        if len(raw) != calls:
            raw = []  # not known whose they are
        branches = branches_of(raw, call.output)
        own = [] if is_reused and piece.payload == "output" else [self._part(step, call, branches.outputs)]
        if own and own[0].branches:
            self._in_batch.add(branches.in_batch)
        most = piece.predictor.anchors if piece.payload == "output" else self.anchors
        parts = [*own, *kept[: most - len(own)]]
        is_inexact = any(record.reuse for record in every)
        is_inexact = is_inexact or (piece.conditional is not None and piece.conditional.at(step))
        fits = (is_inexact or self._was_inexact) and len(parts) + (not own) > 1
        if own and min(len(piece.coefficients[step] or ()), most) > len(kept):
            fits = False  # some branch has no planned forecast, which is what would be corrected
        if not is_reused:
            kept.insert(0, own[0]._replace(guided=call.output.clone()))
            del kept[most:]
        self._was_inexact = is_inexact
        if not own:
            guided = [part.guided for part in parts]
            self._check_guidance(call, step, guided, piece.coefficients[step] or ())
        if fits:
            start = self._line(piece, step, [part.step for part in parts]) if not own else _as_it_is(len(parts))
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
        own = self._own if len(self._in_batch) == 1 else {}  # a plan's branches are of one kind
        every, by_branch, in_batch = self.agreed(
            [
                *(
                    {step: tuple(map(float, each.weights())) for step, each in normals.items()}
                    for normals in (self._normals, own)
                ),
                self._in_batch == {True},
            ]
        )
        pieces = tuple(_with_weights(piece, every, by_branch, in_batch) for piece in self.plan.pieces)
        return replace(self.plan, pieces=pieces)

    # -- inside --------------------------------------------------------------------------------------------------

    def _begin(self, step: int, pictures: int) -> None:
        """Note the step; where it goes back, another run of the calibration has begun."""
        if step <= self._step or self._step < 0:
            self._kept, self._was_inexact, self._known_shares = {}, False, None
            begin = self._rows.stop if self._step >= 0 else 0
            self._rows = slice(begin, begin + pictures)
        if step not in (0, self._step + 1) or self._rows.stop > self.reference.outputs.shape[1]:
            raise RunMismatch(
                f"step {step} of {pictures} pictures follows on step {self._step}: the run is not the recorded one"
            )
        self._step = step

    def _part(self, step: int, call: SolverCall, raw: Sequence[Tensor]) -> Part:
        """Return what a step's calls have given, with the branches if the solver is given a weighted sum of them."""
        places = self.reference.places_in(call.output)
        sampled = [taken(each, places) for each in raw]
        self._shares = shares_of(sampled, taken(call.output, places), self._known_shares) if raw else None
        if self._shares is None:
            return Part(step, call.output, ())
        self._known_shares = self._shares
        return Part(step, call.output, tuple(raw))

    def _check_guidance(self, call: SolverCall, step: int, parts: Sequence[Tensor], weights: Sequence[float]) -> None:
        """Refuse guidance that does not make of sums of the model's outputs the same sum of guided ones."""
        if len(weights) > len(parts):
            return
        places = self.reference.places_in(call.output)
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

    def _fit(self, call: SolverCall, step: int, parts: Sequence[Part], start: Floats, ridge: float) -> None:
        """Fit the weights for all branches, and those of each where they are known; the latter count if they are."""
        weights, problem = None, None
        guided, shares = [part.guided for part in parts], self._shares_of(step, parts)
        terms = guided if shares is None else [each for share in shares for each in _branch(parts, *share)]
        try:
            aim = self._aim(call, step, guided[0])
            weights = self._solve(self._normals, step, guided, aim, start, ridge)
            if shares is not None:
                weights = self._solve(self._own, step, terms, aim, np.tile(weights, len(shares)), RIDGE_BRANCH)
        except Exception as error:  # the other ranks wait for what this one has found
            problem = error
        weights = self.agreed(weights)
        if weights is None:
            raise problem or RunMismatch("rank 0 could not fit the weights")
        call.replace(_sum(terms, weights))

    def _shares_of(self, step: int, parts: Sequence[Part]) -> list[tuple[int, float]] | None:
        """Return each branch's number and share in what the solver is given; ``None``: a part's are not known."""
        shares, known = self._shares, self._own.get(step)
        if shares is None or any(len(part.branches) != len(shares) for part in parts):
            return None
        if known is not None and len(known.start) != len(shares) * len(parts):
            return None  # guidance of an earlier run had other calls
        return [(number, float(share)) for number, share in enumerate(shares)]

    def _aim(self, call: SolverCall, step: int, output: Tensor) -> Floats:
        """Return the output that would lead to the latents of the uncached run, (pictures, numbers)."""
        answer = response_of(call, output, self.reference.places_in(output))
        if answer.misfit > AFFINE or not answer.gain:
            raise RunMismatch(f"at step {step}, the scheduler's answer does not go with the model's output")
        following = self.reference.latents[step, self._rows].astype(np.float64)
        return np.asarray((following - answer.still) / answer.gain)

    def _solve(
        self,
        normals: dict[int, Normal],
        step: int,
        terms: Sequence[Tensor],
        aim: Floats,
        start: Floats,
        ridge: float,
    ) -> Floats:
        """Add what the step shows to its normal equations, and return the weights that solve them."""
        places = self.reference.places_in(terms[0])
        known = np.stack([taken(term, places) for term in terms]).astype(np.float64)
        if self.fitted_on is not None:
            some = self.fitted_on[self._rows]
            known, aim = known[:, some], aim[some]
        if known.shape[1]:
            self._add(normals, step, known, aim, start, ridge)
        return normals[step].weights() if step in normals else start

    def _add(
        self, normals: dict[int, Normal], step: int, known: Floats, aim: Floats, start: Floats, ridge: float
    ) -> None:
        """Add the pictures of a run, (K, pictures, numbers), to the normal equations; the worst count most."""
        errors = np.square(np.tensordot(start, known, 1) - aim).mean(1)
        counts = np.clip(errors / max(float(errors.mean()), 1e-300), 1e-3, 1e3) ** EMPHASIS
        matrix = np.einsum("jsd,ksd,s->jk", known, known, counts, optimize=True)
        aimed = np.einsum("ksd,sd,s->k", known, aim, counts, optimize=True)
        if step in normals:
            normals[step].add(matrix, aimed)
            normals[step].start = start
        else:
            normals[step] = Normal(matrix, aimed, start, ridge)


ByStep = Mapping[int, tuple[float, ...]]


def _is_forecast(record: CallRecord) -> bool:
    """Return whether a call was left out, and not made of another branch's at its step."""
    return record.reuse and record.reason != Reason.CONDITIONAL


def _with_weights(piece: TransformerPlan, found: ByStep, own: ByStep, in_batch: bool) -> TransformerPlan:
    """Return a piece with weights for all branches, and those of each: where a step has none, those for all."""
    counts = {len(own[step]) // len(found[step]) for step in own if _is_called(piece, step)}
    branches = []
    if len(counts) == 1:
        for number in range(*counts):
            parts = {step: own[step][number * len(each) :][: len(each)] for step, each in found.items() if step in own}
            branches.append(BranchWeights(*_weights(piece, {**found, **parts})))
    coefficients, corrections = _weights(piece, found)
    return replace(
        piece,
        coefficients=coefficients,
        corrections=corrections,
        branches=tuple(branches),
        in_batch=in_batch and bool(branches),
    )


def _weights(piece: TransformerPlan, found: ByStep) -> tuple[StepWeights, StepWeights | None]:
    """Return a piece's coefficients and corrections with what was found."""
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
    return tuple(coefficients), some


def _branch(parts: Sequence[Part], number: int, share: float) -> list[Tensor]:
    """Return what one branch adds to what the solver is given, of each part."""
    return [part.branches[number].float() * share for part in parts]


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
