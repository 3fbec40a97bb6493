"""What the solver was given at each step of a recorded run, and the latents that it made of that: samples of both."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import RunMismatch
from .guidance_shares import Branches, Doubles, StepOutputs, branches_of, shares_of
from .solver_watch import SolverCall

NUMBERS = 8192  # kept of each picture: for the few weights of a step, they say as much as all of them
MOST = 2**24  # numbers of a whole recording
AFFINE = 0.02  # share of an output's effect that may not be in proportion to it: rounding stays below
PAIR = 2  # branches of guidance
Singles = NDArray[np.float32]


def places_of(numbers: int, pictures: int = 1, steps: int = 1) -> NDArray[np.int64]:
    """Return the places of the numbers that are kept of each picture: drawn at random, always the same ones.

    Args:
        numbers: of a picture.
        pictures: of the run.
        steps: of the run.
    """
    most = max(1, min(NUMBERS, MOST // max(pictures * steps, 1)))
    if numbers <= most:
        return np.arange(numbers)
    return np.sort(np.random.default_rng(0).choice(numbers, most, replace=False))


def stretched(places: NDArray[np.int64], numbers: int, others: int) -> NDArray[np.int64]:
    """Return places that lie in a picture of another size where the given ones lie in theirs.

    As many are returned, so that pictures of all sizes count alike; some may repeat in a smaller one.

    Args:
        places: in a picture of the first size.
        numbers: of a picture of that size; 0: it is not known, and all are of one size.
        others: numbers of a picture of the other size.

    Example:
        >>> stretched(np.array([0, 2, 3]), 4, 8)
        array([0, 4, 6])
    """
    return places if numbers in (0, others) else places * others // numbers


def taken(tensor: Tensor, places: NDArray[np.int64]) -> Singles:
    """Return the numbers at some places of each picture, (pictures, places), on the host."""
    flat = tensor.detach().reshape(len(tensor), -1)
    chosen = flat if len(places) == flat.shape[1] else flat[:, torch.from_numpy(places).to(flat.device)]
    sample: Singles = chosen.float().cpu().numpy().copy()
    return sample


class Response(NamedTuple):
    """How a solver's step answers to the output of the model: following = ``still`` + ``gain``·output.

    Args:
        gain: B of the step.
        still: the latents that would follow on an output of zeros, at the places that are kept.
        misfit: share of the answer that is not in proportion to the output; 0 for a step that is affine in it.
    """

    gain: float
    still: Singles
    misfit: float


def response_of(call: SolverCall, output: Tensor, places: NDArray[np.int64]) -> Response:
    """Find out, by two dry calls, how the latents that follow depend on the output of the model."""
    still = taken(call.dry(torch.zeros_like(output)), places)
    moved = taken(call.dry(output), places) - still
    given = taken(output, places).astype(np.float64)
    square = float((given * given).sum())
    gain = float((moved * given).sum()) / square if square else 0.0
    size = float(np.linalg.norm(moved))
    misfit = float(np.linalg.norm(moved - gain * given)) / size if size else 0.0
    return Response(gain, still, misfit)


@dataclass(frozen=True, eq=False)
class SolverTrace:
    """The solver's steps of a recorded run, with T steps, S pictures and D numbers kept of each.

    Args:
        outputs: (T, S, D), what the solver was given: the outputs of the model, guided.
        latents: (T, S, D), what it returned: the latents of the next step.
        gains: (T,), B of each step: the latents that follow are A + B·output.
        places: (D,), of the numbers that are kept, in a picture's latents.
        numbers: of the latents of a picture of the first run; 0: not known, and all are of one size.
        apart: (T, S, D), s·(v − v_c), what the other branch of guidance adds to the output beyond what it would if it
            returned the same as branch c: s is its share, and v what it has returned. ``None``: guidance was not found
            to be a weighted sum of two branches at every step, or branch c is not the first call of a step.
        conditional: c, the number of the branch with the largest share; ``None`` where ``apart`` is.
        in_batch: whether these branches are halves of a batch.
    """

    outputs: Singles
    latents: Singles
    gains: Doubles
    places: NDArray[np.int64]
    numbers: int = 0
    apart: Singles | None = None
    conditional: int | None = None
    in_batch: bool = False

    def places_in(self, pictures: Tensor) -> NDArray[np.int64]:
        """Return the places of the numbers that are kept of pictures of this size."""
        return stretched(self.places, self.numbers, pictures[0].numel())

    @property
    def gram(self) -> Doubles:
        """(T, T), ⟨g_s, g_t⟩ of the outputs, summed over the pictures."""
        flat = self.outputs.reshape(len(self.outputs), -1).astype(np.float64)
        gram: Doubles = flat @ flat.T
        return gram

    @property
    def apart_squares(self) -> Doubles | None:
        """(T, T), ‖apart_s − apart_t‖², summed over the pictures: what it costs to hold step s's at step t."""
        if self.apart is None:
            return None
        flat = self.apart.reshape(len(self.apart), -1).astype(np.float64)
        inner = flat @ flat.T
        own = np.diagonal(inner)
        squares: Doubles = np.maximum(own[:, None] + own[None] - 2 * inner, 0.0)
        return squares


class Direction(NamedTuple):
    """The two branches of guidance at a step.

    Args:
        apart: what the second has returned less what the first has, at the places that are kept.
        shares: of both in what the solver is given.
        in_batch: whether they are halves of a batch.
    """

    apart: Singles
    shares: Doubles
    in_batch: bool


class SolverRecorder:
    """Records a solver's steps.

    Args:
        now: returns the number of the run and the step of the transformer's latest call.
        steps: of a run, as far as known.
    """

    def __init__(self, now: Callable[[], tuple[int, int] | None], steps: int) -> None:
        self._now, self._steps = now, steps
        self._places: NDArray[np.int64] | None = None
        self._numbers = 0
        self._runs: dict[int, dict[int, tuple[Singles, Singles]]] = {}
        self._gains: dict[int, list[float]] = {}
        self._output: Singles | None = None
        self._outputs = StepOutputs()  # of the transformer, at this step
        self._directions: dict[int, dict[int, Direction]] = {}  # by run and step
        self._failed = False
        self.reason = "its step() is not called"

    def returned(self, output: object, latents: object) -> None:
        """Note what a call of a transformer has returned, and the latents that it was given."""
        if not self._failed:
            self._outputs.add(output, latents)

    def before(self, call: SolverCall) -> None:
        now, calls = self._now(), self._outputs.take()
        if now is None or self._failed:
            return
        numbers = call.output[0].numel()
        if self._places is None:
            self._numbers, self._places = numbers, places_of(numbers, len(call.output), self._steps)
        places = stretched(self._places, self._numbers, numbers)
        answer = response_of(call, call.output, places)
        if answer.misfit > AFFINE:
            raise RunMismatch(
                f"at step {now[1]}, what the scheduler returns does not go with the model's output: {answer.misfit:.1%}"
            )
        self._gains.setdefault(now[1], []).append(answer.gain)
        self._output = taken(call.output, places)
        self._note_guidance(self._directions.setdefault(now[0], {}), now[1], branches_of(calls, call.output), places)

    def after(self, call: SolverCall, following: Tensor) -> None:
        now, output, self._output = self._now(), self._output, None
        if now is None or output is None or self._places is None:
            return
        run = self._runs.setdefault(now[0], {})
        if now[1] in run:
            raise RunMismatch(f"the scheduler makes several steps at step {now[1]}")
        run[now[1]] = output, taken(following, stretched(self._places, self._numbers, following[0].numel()))

    def fails(self, error: Exception) -> None:
        self._failed, self.reason = True, f"{type(error).__name__}: {error}"

    def trace(self, steps: int) -> SolverTrace | None:
        """Return what was recorded of runs of so many steps; ``None``: its steps are others, as ``reason`` says."""
        runs = list(self._runs.values())
        if not runs or self._failed:
            return None
        if any(sorted(run) != list(range(steps)) for run in runs):
            self.reason = f"it does not make one step at each of the {steps} of the run"
            return None
        outputs, latents = (
            np.stack([np.concatenate([run[step][part] for run in runs]) for step in range(steps)]) for part in (0, 1)
        )
        gains = np.array([float(np.mean(self._gains[step])) for step in range(steps)])
        assert self._places is not None
        self.reason = ""
        return SolverTrace(outputs, latents, gains, self._places, self._numbers, *self._guidance(steps))

    def _note_guidance(
        self, known: dict[int, Direction], step: int, branches: Branches, places: NDArray[np.int64]
    ) -> None:
        """Note the branches of a step of a run, if what the solver is given is a weighted sum of two."""
        if len(branches.outputs) != PAIR or self._output is None:
            return
        first, second = (taken(each, places) for each in branches.outputs)
        former = known[step - 1].shares if step - 1 in known else None
        shares = shares_of([first, second], self._output, former)
        if shares is not None:
            known[step] = Direction(second - first, shares, branches.in_batch)

    def _guidance(self, steps: int) -> tuple[Singles, int, bool] | tuple[()]:
        """Return the direction of guidance, the number of the branch that it is seen from, and whether in a batch."""
        found = [[self._directions[run].get(step) for run in self._runs] for step in range(steps)]
        known = [each for of_step in found for each in of_step if each is not None]
        if len(known) < steps * len(self._runs) or len({each.in_batch for each in known}) > 1:
            return ()
        number = int(np.argmax(np.sum([each.shares for each in known], axis=0)))
        in_batch = known[0].in_batch
        if number and not in_batch:  # where the other call is the first, nothing is known yet that it could be made of
            return ()
        other = 1 - number
        rows = [
            np.concatenate([each.apart * each.shares[other] for each in of_step if each is not None])
            for of_step in found
        ]
        return ((other - number) * np.stack(rows)).astype(np.float32), number, in_batch
