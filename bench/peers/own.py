"""This library: searched plans; a preset, which needs no search; and the control, which has to change nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor

import dithooks
from bench.compare.subject import Subject, counting
from bench.peers.peer import Attached, Method, Spent
from dithooks import CachePlan, DitCacheConfig, Linear, Mask, dit_cache, search
from dithooks.config.transformer_plan import TransformerPlan

LIBRARY = "dithooks"
TARGETS = (1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
PRESETS = ("slow", "medium", "fast", "ultra")
SEARCH, CONTROL = "search", "interval 1"  # how the two are known


@contextmanager
def searched(subject: Subject, target: float) -> Iterator[Attached]:
    """The plan that ``search`` finds at its defaults, counted in block executions, on the calibration cases."""
    transformer, cases = subject.pipe.transformer, subject.calibration
    with counting(transformer) as whole:
        subject.draw(cases)

    def drawn(_: object) -> list[Tensor]:
        return list(subject.pictures(subject.draw(cases)))

    begun = time.perf_counter()
    with counting(transformer) as work:
        found = search(subject.pipe, drawn, target, cost="blocks", verbose=False)
    count = sum(1 for _ in whole.done)
    probed = found.recording.sensitivity is not None
    runs = 1 + probed + len(found.evaluations)
    spent = Spent(work.executions(whole) / count, time.perf_counter() - begun, runs)
    with dit_cache(subject.pipe, found.plan):
        yield Attached(shown=shown(found.plan), spent=spent)


def shown(plan: CachePlan) -> str:
    """When, where and from how many residuals or outputs."""
    return ", ".join(
        f"{piece.picture} {'output' if piece.payload == 'output' else blocks(piece)}, {piece.predictor.anchors} kept"
        for piece in plan.pieces
    )


def blocks(piece: TransformerPlan) -> str:
    """The range of a piece."""
    return f"blocks {piece.first}–{piece.first + piece.blocks - 1}"


def configured(make: Callable[[Any], DitCacheConfig]) -> Callable[[Subject, Any], AbstractContextManager[Attached]]:
    """A configuration made of the knob's value."""

    @contextmanager
    def attach(subject: Subject, value: Any) -> Iterator[Attached]:
        with dit_cache(subject.pipe, config := make(value)):
            yield Attached(shown=str(config.when))

    return attach


def preset(name: str) -> DitCacheConfig:
    """All blocks, and a line through the last two residuals."""
    return DitCacheConfig(policy=Mask(name), predictor=Linear())


def control(interval: int) -> DitCacheConfig:
    """Attached, and every step computed."""
    return DitCacheConfig(cache_step_start=0, cache_step_interval=interval)


def methods() -> list[Method]:
    """Those of this library that are measured."""
    library = f"{LIBRARY} {dithooks.__version__}"
    return [
        Method(library, CONTROL, "interval", (1,), configured(control)),
        Method(library, SEARCH, "target", TARGETS, searched),
        Method(library, "preset, Linear", "mask", PRESETS, configured(preset)),
    ]
