"""What happens in a run, seen from outside: which blocks run at which call, how long each takes, how long all of it."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dithooks.environment.machine import peak_memory, reset_peak_memory, synchronize
from dithooks.recording.stopwatch import OTHER, Stopwatch

from .geometry import Geometry

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")


def blocks_of(transformer: nn.Module) -> list[nn.Module]:
    """In the order in which the model calls them."""
    return [block for name in LISTS for block in getattr(transformer, name, ())]


@dataclass
class Ran:
    """The blocks that ran.

    Args:
        blocks: how many there are.
        calls: of each call of the transformer, the numbers of those that ran.
    """

    blocks: int
    calls: list[list[int]] = field(default_factory=list)

    @property
    def counts(self) -> list[int]:
        """Executions of each block."""
        return [sum(call.count(number) for call in self.calls) for number in range(self.blocks)]

    def picture(self, calls: int) -> str:
        """Of each step whether all blocks ran (●) or some were left out (○); of its calls, where they differ, ◐."""
        shown = []
        for first in range(0, len(self.calls), calls):
            whole = {len(call) == self.blocks for call in self.calls[first : first + calls]}
            shown.append("◐" if len(whole) > 1 else "●" if whole.pop() else "○")
        return "".join(shown)


@contextmanager
def counting(transformer: nn.Module, geometry: Geometry) -> Iterator[Ran]:
    """Which blocks really run. What stands in a block's place may leave it out, so a layer inside of it is asked."""
    found = blocks_of(transformer)
    ran = Ran(len(found))

    def called(number: int) -> Callable[..., None]:
        return lambda *_: ran.calls[-1].append(number)

    with ExitStack() as hooks:
        hooks.enter_context(transformer.register_forward_pre_hook(lambda *_: ran.calls.append([])))
        for number, block in enumerate(found):
            inside: nn.Module = getattr(block, geometry.attends)
            hooks.enter_context(inside.register_forward_pre_hook(called(number)))
        yield ran


@dataclass(frozen=True)
class Times:
    """Of a plain call of the transformer, in milliseconds: each block, and all that is outside of the blocks."""

    block_ms: list[float]
    other_ms: float


def block_times(transformer: nn.Module, run: Callable[[], object]) -> Times:
    """Time every block in one run, by events in the device's stream where it has them."""
    watch, calls = Stopwatch(transformer), 0

    def begins(*_: object) -> None:
        nonlocal calls
        calls += 1
        watch.mark(OTHER)

    def mark(what: int | str | None) -> Callable[..., None]:
        return lambda *_: watch.mark(what)

    found = blocks_of(transformer)
    with ExitStack() as hooks:
        hooks.enter_context(transformer.register_forward_pre_hook(begins))
        hooks.enter_context(transformer.register_forward_hook(mark(None)))
        for number, block in enumerate(found):
            hooks.enter_context(block.register_forward_pre_hook(mark(number)))
            hooks.enter_context(block.register_forward_hook(mark(OTHER)))
        run()
    watch.wait()
    return Times([watch.spent(number) / calls for number in range(len(found))], watch.spent(OTHER) / calls)


@dataclass(frozen=True)
class Timed:
    """A run: till the device was done; till the host was; what it drew; the most memory it took, where that is told."""

    seconds: float
    host_seconds: float
    drawn: Tensor
    peak_bytes: int | None


def timed(device: torch.device, run: Callable[[], Tensor]) -> Timed:
    """Time a run. Garbage is collected before, and not while it lasts."""
    gc.collect()
    was, hosted = gc.isenabled(), device.type == "cpu"  # whose memory nobody counts
    gc.disable()
    try:
        synchronize(device)
        if not hosted:
            reset_peak_memory(device)
        begun = time.perf_counter()
        drawn = run()
        host = time.perf_counter() - begun
        synchronize(device)
        return Timed(time.perf_counter() - begun, host, drawn, None if hosted else peak_memory(device))
    finally:
        if was:
            gc.enable()
