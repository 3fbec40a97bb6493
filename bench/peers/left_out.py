"""Steps left out whole: what the model would have returned is forecast from the steps that were computed.

What Spectrum and DPCache have in common. Forecast is what the model returns, so that nothing of it runs; or the hidden
state behind its last block, so that what stands before and behind the blocks does. Nothing is checked, and nothing can
be taken off: a method is given a copy of the transformer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from bench.compare.subject import Subject, lists
from bench.peers.closures import first_stream, flux_streams
from bench.peers.peer import Clock, clock

Place = Literal["output", "hidden state"]
PLACES: tuple[Place, ...] = get_args(Place)
Weights = Callable[[Sequence[int], int], Sequence[float]]  # of the values at these steps, for a step behind them


class Recorded:
    """Values that were computed in a run, by call of a step: (step, value), oldest first.

    Args:
        most: to keep of each call; 0 for all.
    """

    def __init__(self, most: int = 0) -> None:
        self.most = most
        self.kept: dict[int, list[tuple[int, Tensor]]] = {}

    def keep(self, now: Clock, value: Tensor) -> None:
        """Append what was computed now; a run that begins drops what is left of the one before."""
        if now.begins:
            self.kept.clear()
        kept = self.kept.setdefault(now.call, [])
        kept.append((now.step, value))
        if self.most:
            del kept[: -self.most]

    def forecast(self, now: Clock, weights: Weights) -> Tensor:
        """The weighted sum of what was kept."""
        steps, values = zip(*self.kept[now.call], strict=True)
        parts = [weight * value for weight, value in zip(weights(steps, now.step), values, strict=True)]
        return torch.stack(parts).sum(0)


@contextmanager
def leaving_out(
    subject: Subject, place: Place, computed: Collection[int], weights: Weights, most: int = 0
) -> Iterator[None]:
    """Compute these steps only, the first of all among them, and forecast the others from the ``most`` last ones."""
    recorded = Recorded(most)

    def given(now: Clock) -> Tensor | None:
        return None if now.step in computed else recorded.forecast(now, weights)

    with watched(subject, place, given, recorded.keep):
        yield


@contextmanager
def watched(
    subject: Subject,
    place: Place,
    given: Callable[[Clock], Tensor | None],
    taken: Callable[[Clock, Tensor], None],
) -> Iterator[None]:
    """Every call of the transformer returns what is ``given`` for it; else it runs, and what comes out is ``taken``."""
    transformer = subject.pipe.transformer
    stand_in: list[Tensor | None] = [None]  # of this call

    def ask(now: Clock) -> None:
        stand_in[0] = given(now)

    with clock(subject, ask) as now:

        def whole(forward: Callable[..., Any]) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                if stand_in[0] is not None:
                    return (stand_in[0],)
                output = forward(*args, **kwargs)
                taken(now, output[0])
                return output

            return called

        def block(forward: Callable[..., Any], flux: bool, last: bool) -> Callable[..., Any]:
            def called(*args: Any, **kwargs: Any) -> Any:
                if stand_in[0] is None:
                    output = forward(*args, **kwargs)
                    if last:
                        taken(now, output[-1] if flux else output)
                    return output
                streams = flux_streams(args, kwargs) if flux else first_stream(args, kwargs)
                if last:
                    streams = (*streams[:-1], stand_in[0])
                return streams if flux else streams[0]

            return called

        if place == "output":
            transformer.forward = whole(transformer.forward)
        else:
            blocks: list[nn.Module] = [each for piece in lists(transformer) for each in piece]
            for each in blocks:
                flux = type(each).__name__.startswith("Flux")  # two streams, text first; the others have one
                each.forward = block(each.forward, flux, each is blocks[-1])
        yield


def line(steps: Sequence[int], step: int) -> list[float]:
    """Through the last two values; one alone is held."""
    if len(steps) == 1:
        return [1.0]
    ahead = (step - steps[-1]) / (steps[-1] - steps[-2])
    return [0.0] * (len(steps) - 2) + [-ahead, 1 + ahead]


def marks(computed: Collection[int], steps: int) -> str:
    """The schedule, a mark a step."""
    return "".join("●" if step in computed else "○" for step in range(steps))
