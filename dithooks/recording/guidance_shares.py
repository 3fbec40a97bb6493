"""Guidance as a weighted sum: the share that each branch's output has in what the solver is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.batch_parts import is_repeated, repeated_argument
from ..engine.output_correction import floating_in

SHARED = 0.02  # of an output, that its branches may leave unexplained: a rounding in half precision does
SINGULAR = 1e-5  # ratio of the branches' least and largest direction: below, their shares cannot be distinguished
Doubles = NDArray[np.float64]


class Branches(NamedTuple):
    """The outputs of a step's branches.

    Args:
        outputs: of each branch, in the order of the calls, or of the parts of a batch.
        in_batch: whether they are equal parts of the batch of the step's only call.
    """

    outputs: Sequence[Tensor]
    in_batch: bool


class StepOutputs:
    """What the calls of a step have returned, and the latents that they were given; copies of the former."""

    def __init__(self) -> None:
        self._calls: list[tuple[Tensor, object]] = []

    def add(self, output: object, latents: object = None, completes: bool = False) -> None:
        """Note what a call has returned.

        Args:
            output: of the transformer, whose first floating tensor counts.
            latents: that the call was given.
            completes: whether this is the output for a whole batch, of which the last one was for a part.
        """
        floating = floating_in(output)
        if not floating:
            return
        if any(each.shape[:1] != floating[0].shape[:1] for each in floating):
            latents = None  # an output without such parts: all are summed by the weights for all
        if completes:
            del self._calls[-1:]
        self._calls.append((floating[0].detach().clone(), latents))  # the pipeline may write into it

    def take(self) -> list[tuple[Tensor, object]]:
        """Return the outputs with their latents, and begin the next step."""
        calls, self._calls = self._calls, []
        return calls


@contextmanager
def watched_outputs(model: nn.Module, note: Callable[[object, object], None]) -> Iterator[None]:
    """Show what a transformer returns, and the latents that it is given, by a hook on it.

    Args:
        model: the transformer.
        note: called with both after each call.
    """
    place, name = repeated_argument(model)

    def show(module: object, args: tuple[object, ...], kwargs: Mapping[str, object], output: object) -> None:
        note(output, args[place] if len(args) > place else kwargs.get(name))

    hook = model.register_forward_hook(show, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def branches_of(calls: Sequence[tuple[Tensor, object]], guided: Tensor) -> Branches:
    """Return the branches of a step: its calls, or the parts of its only call's batch, where every picture is repeated.

    There are none where it has one branch only, or the outputs are no such pictures as the solver is given. A
    variance that a model returns beside them, in as many channels more, is left out.

    Args:
        calls: outputs of the step's calls, with the latents that they were given.
        guided: what the solver is given.
    """
    outputs: Sequence[Tensor] = [_without_variance(output, guided) for output, _ in calls]
    if in_batch := len(calls) == 1 and _is_guided_batch(*calls[0], guided):
        outputs = outputs[0].chunk(len(outputs[0]) // len(guided))
    if len(outputs) < 2 or any(each.shape != guided.shape for each in outputs):
        return Branches((), False)
    return Branches(tuple(outputs), in_batch)


def shares_of(
    branches: Sequence[NDArray[np.float32]], guided: NDArray[np.float32], known: NDArray[np.float64] | None = None
) -> NDArray[np.float64] | None:
    """Return the share of each branch in what the solver is given; ``None``: it is no weighted sum of several.

    Args:
        branches: numbers of the branches' outputs, at some places.
        guided: what the solver is given there.
        known: shares at a step before, which are kept where the outputs are too alike to tell.

    Example:
        >>> one, other = np.array([1.0, 2.0], np.float32), np.array([0.5, 3.0], np.float32)
        >>> shares_of([one, other], 3 * one - 2 * other).round(6).tolist()
        [3.0, -2.0]
    """
    if len(branches) < 2:
        return None
    given = guided.astype(np.float64).ravel()
    columns = np.stack([each.astype(np.float64).ravel() for each in branches], axis=1)
    found, _, _, sizes = np.linalg.lstsq(columns, given, rcond=None)
    shares: NDArray[np.float64] = np.asarray(found, dtype=np.float64)
    if known is not None and len(known) == len(shares) and not sizes[-1] > SINGULAR * sizes[0]:
        shares = known
    if not np.linalg.norm(columns @ shares - given) <= SHARED * np.linalg.norm(given) or not shares.all():
        return None
    return shares


def _without_variance(output: Tensor, guided: Tensor) -> Tensor:
    """Return the channels of an output that the solver is given: half of them, where the others are of a variance."""
    channels = guided.shape[1:2]
    if not channels or output.shape[1:2] != (2 * channels[0],) or output.shape[2:] != guided.shape[2:]:
        return output
    return output[:, : channels[0]]


def _is_guided_batch(output: Tensor, latents: object, guided: Tensor) -> bool:
    """Return whether a call's batch has every picture several times, with another prompt each."""
    count = len(output) // len(guided)
    return count > 1 and isinstance(latents, Tensor) and len(latents) == len(output) and is_repeated(latents, count)
