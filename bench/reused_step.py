"""What one call of a cached transformer costs, counted: calls, bytecodes, files, graphs. No quiet machine is needed.

Run as ``python -m bench.reused_step``. Two models of 57 blocks: a toy whose blocks are one addition each, and FLUX.1's
geometry (19 + 38 blocks) at 32 channels. With every cache, computed and reused steps take turns; one of each, in the
middle of a run that is not the first, is counted:

- calls: of Python functions (``sys.setprofile``), and apart from these of functions in C;
- bytecodes: that the interpreter executes (``sys.settrace`` with ``f_trace_opcodes``);
- files and functions: of dithooks, that are entered.

Of calls and bytecodes, those of a copy without a cache are taken off, at the same step: of a computed step the plain
copy's, of a reused one those of a copy that only has the blocks that run on it (both models loop over their lists, so
that the lists of the copy are cut). What is left is the cache's own, and what torch does on its behalf.

Counts are of one release of Python: another compiles the same source to other bytecodes.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import dithooks
from bench.costs_peers import DOUBLE, SINGLE, Loop, Steps, call, flux, quiet
from bench.overhead import Spread, cut
from bench.peers.closures import Closures, first_stream, flux_streams
from dithooks import CacheHandle, DitCacheConfig, Fitted, Interval, Mask, Threshold, dit_cache
from dithooks.environment.machine import machine, versions

PACKAGE = str(Path(dithooks.__file__).parent)
STEPS, COMPUTED, REUSED = 12, 6, 7  # of a run, and the two that are counted
OTHERS = "(other packages)"


# -- counting -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """What was executed during one call, by code object.

    Args:
        calls: of Python functions.
        c_calls: of functions in C, made from Python.
        bytecodes: executed.
        functions: calls and bytecodes of each function, by file and qualified name.
    """

    calls: int
    c_calls: int
    bytecodes: int
    functions: dict[tuple[str, str], tuple[int, int]] = field(repr=False)

    @property
    def own(self) -> dict[tuple[str, str], tuple[int, int]]:
        """The functions of dithooks."""
        return {key: value for key, value in self.functions.items() if key[0] != OTHERS}

    @property
    def files(self) -> int:
        """How many source files of dithooks were entered."""
        return len({file for file, _ in self.own})

    def over(self, other: Counts) -> Counts:
        """The difference to another call, function by function; functions alike in both are left out."""
        pairs = {}
        for key in self.functions | other.functions:
            (calls, codes), (less_calls, less_codes) = self.functions.get(key, (0, 0)), other.functions.get(key, (0, 0))
            if (calls, codes) != (less_calls, less_codes):
                pairs[key] = (calls - less_calls, codes - less_codes)
        return Counts(self.calls - other.calls, self.c_calls - other.c_calls, self.bytecodes - other.bytecodes, pairs)

    def by_file(self) -> dict[str, tuple[int, int]]:
        """Calls and bytecodes by file of dithooks, those with most bytecodes first; other packages are one entry."""
        found: dict[str, tuple[int, int]] = {}
        for (file, _), (calls, codes) in self.functions.items():
            before = found.get(file, (0, 0))
            found[file] = (before[0] + calls, before[1] + codes)
        return dict(sorted(found.items(), key=lambda item: (-item[1][1], item[0])))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        numbers = {name: getattr(self, name) for name in ("calls", "c_calls", "bytecodes", "files")}
        return {**numbers, "functions": len(self.own), "by_file": {k: list(v) for k, v in self.by_file().items()}}


def place(code: CodeType) -> tuple[str, str]:
    """File and qualified name of a function; the file is a path in dithooks, or ``OTHERS``."""
    name = getattr(code, "co_qualname", code.co_name)  # Python 3.10 has no qualified names
    if code.co_filename.startswith(PACKAGE + os.sep):
        return code.co_filename[len(PACKAGE) + 1 :].replace(os.sep, "/"), name
    return OTHERS, f"{name} ({Path(code.co_filename).name})"


def profiled(do: Callable[[], object]) -> tuple[Counter[CodeType], int]:
    """Run ``do``; return its calls of Python functions, by code, and the number of those in C."""
    calls: Counter[CodeType] = Counter()
    c_calls = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal c_calls
        if event == "call":
            calls[frame.f_code] += 1
        elif event == "c_call":
            c_calls += 1

    former = sys.getprofile()
    sys.setprofile(profile)
    try:
        do()
    finally:
        sys.setprofile(former)
    return calls, c_calls


def traced(do: Callable[[], object]) -> Counter[CodeType]:
    """Run ``do``; return the bytecodes executed, by code."""
    codes: Counter[CodeType] = Counter()

    def opcode(frame: FrameType, event: str, _: object) -> Any:
        if event == "opcode":
            codes[frame.f_code] += 1
        return opcode

    def trace(frame: FrameType, event: str, _: object) -> Any:
        frame.f_trace_lines, frame.f_trace_opcodes = False, True
        return opcode

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        do()
    finally:
        sys.settrace(former)
    return codes


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage collection: finalizers and weak references' callbacks would be counted where it happens to run."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# -- models, and the caches on them -------------------------------------------------------------------------------


class Addition(nn.Module):
    """h → h + rate · t, the least that a block does."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, h: Tensor, t: Tensor) -> Tensor:
        return h + self.rate * t


class Toy(nn.Module):
    """Additions, one after another, on one stream."""

    def __init__(self, depth: int = DOUBLE + SINGLE) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Addition(0.01 * (number + 1)) for number in range(depth))

    def forward(self, h: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, timestep)
        return h


class ToyLoop(Steps):
    """A loop that calls :class:`Toy`."""

    noise = torch.linspace(-1, 1, 64).reshape(1, 16, 4)

    def arguments(self) -> dict[str, Any]:
        """What the model is given at this step."""
        return {"h": self.latents, "timestep": self.scheduler.timesteps[self.step].reshape(1) / 1000}


def cut_toy(model: nn.Module, kept: int) -> nn.Module:
    """A copy of the toy that has the first so many blocks only."""
    short = Toy(0)
    short.blocks = copy.deepcopy(model.blocks[:kept])
    return short.requires_grad_(False)


@dataclass(frozen=True)
class Model:
    """A model that is cached, with what differs from model to model.

    Args:
        make: builds it.
        loop: of so many steps.
        call: calls it with the loop's arguments, as its users do.
        cut: a copy with the first so many blocks only.
        blocks: all of them, in order.
        streams: of a block, read from its arguments.
    """

    make: Callable[[], nn.Module]
    loop: Callable[[int], Any]
    call: Callable[[nn.Module, dict[str, Any]], Tensor]
    cut: Callable[[nn.Module, int], nn.Module]
    blocks: Callable[[nn.Module], list[nn.Module]]
    streams: Callable[..., tuple[Tensor, ...]]


def call_toy(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """One call of the toy."""
    output: Tensor = model(**arguments)
    return output


MODELS = {
    "toy": Model(
        lambda: Toy().requires_grad_(False), ToyLoop, call_toy, cut_toy, lambda model: [*model.blocks], first_stream
    ),
    "FLUX": Model(
        flux,
        Loop,
        call,
        lambda model, kept: cut(model, kept, 0),
        lambda model: [*model.transformer_blocks, *model.single_transformer_blocks],
        flux_streams,
    ),
}


def interval() -> DitCacheConfig:
    """Every second step computed, from the first."""
    return DitCacheConfig(policy=Interval(0, 2))


def fitted_plan() -> DitCacheConfig:
    """A plan with two residuals, weighted as planning fits them."""
    mask = tuple(int(step % 2 == 0) for step in range(STEPS))
    weights = tuple(None if bit else ((1.0,) if step < 2 else (1.5, -0.5)) for step, bit in enumerate(mask))
    return DitCacheConfig(policy=Mask(mask), predictor=Fitted(weights))


def threshold() -> DitCacheConfig:
    """A policy that looks at what block 0 did, and would reuse every step; two in a row are not allowed."""
    policy = Threshold(1e9, max_warmup_steps=1, max_continuous_cached_steps=1)
    return DitCacheConfig(cache_block_start=1, policy=policy)


CACHES = {"interval": interval, "plan": fitted_plan, "threshold": threshold}
CLOSURES = "closures"  # beside these, see bench/peers/closures.py


class Subject:
    """A model in its sampling loop: plain, with the first ``kept`` blocks only, or with a cache.

    For example ``Subject("FLUX", cache="plan")``.

    Args:
        name: of :data:`MODELS`.
        cache: of :data:`CACHES`, or :data:`CLOSURES`; ``None``: without one.
        kept: blocks of the copy; ``None``: all.
        base: what is copied, if it is there already.
    """

    def __init__(
        self, name: str, cache: str | None = None, kept: int | None = None, base: nn.Module | None = None
    ) -> None:
        kind = MODELS[name]
        base = kind.make() if base is None else base
        self.model = copy.deepcopy(base) if kept is None else kind.cut(base, kept)
        self.loop, self.call = kind.loop(STEPS), kind.call
        self.handle: CacheHandle | None = None
        self.closures: Closures | None = None
        if cache == CLOSURES:
            self.closures = Closures(kind.blocks(self.model), kind.streams)
        elif cache is not None:
            self.handle = dit_cache(self.model, CACHES[cache](), scheduler=self.loop.scheduler)

    def turn(self, observe: Callable[[Callable[[], Tensor]], Tensor] = lambda do: do()) -> bool:
        """Make the next step, its call by way of ``observe``; return whether it was the last of the run."""
        arguments = self.loop.arguments()
        last: bool = self.loop.moved(observe(partial(self.forward, arguments)))
        if last:
            self.loop.begin()
        return last

    def forward(self, arguments: dict[str, Any]) -> Tensor:
        """One call of the model, with what a user has to do for it."""
        if self.closures is not None:
            self.closures.set_step(self.loop.step)
        return self.call(self.model, arguments)


def count(subject: Subject, steps: Iterable[int] = (COMPUTED, REUSED)) -> dict[int, Counts]:
    """Count some steps of a subject's run, after a run in which nothing is counted.

    Calls are counted in the second run, bytecodes in the third.

    Raises:
        RuntimeError: a cache did not compute the even steps and reuse the odd ones.
    """
    wanted = set(steps)
    profiles: dict[int, tuple[Counter[CodeType], int]] = {}
    traces: dict[int, Counter[CodeType]] = {}

    def profile(step: int, do: Callable[[], Tensor]) -> Tensor:
        outputs: list[Tensor] = []
        profiles[step] = profiled(lambda: outputs.append(do()))
        return outputs[0]

    def trace(step: int, do: Callable[[], Tensor]) -> Tensor:
        outputs: list[Tensor] = []
        traces[step] = traced(lambda: outputs.append(do()))
        return outputs[0]

    with torch.inference_mode(), quiet(), uncollected():
        for observe in (None, profile, trace):
            for step in range(STEPS):
                if observe is not None and step in wanted:
                    subject.turn(partial(observe, step))
                else:
                    subject.turn()
    if subject.handle is not None:
        reused = [decision.reuse for decision in subject.handle.decisions][-STEPS:]
        if reused != [step % 2 == 1 for step in range(STEPS)]:
            raise RuntimeError(f"not every second step was reused: {reused}")
    return {step: counted(*profiles[step], traces[step]) for step in sorted(wanted)}


def counted(calls: Counter[CodeType], c_calls: int, codes: Counter[CodeType]) -> Counts:
    """Put together what two looks at the same step have shown."""
    functions: dict[tuple[str, str], tuple[int, int]] = {}
    for code in calls | codes:
        before = functions.get(place(code), (0, 0))
        functions[place(code)] = (before[0] + calls[code], before[1] + codes[code])
    return Counts(sum(calls.values()), c_calls, sum(codes.values()), functions)


def own_counts(name: str, cache: str, base: nn.Module | None = None) -> tuple[Counts, Counts]:
    """What a cache adds to a computed step, and to a reused one; see the top of this file."""
    base = MODELS[name].make() if base is None else base
    cached = count(Subject(name, cache, base=base))
    plain = count(Subject(name, base=base), (COMPUTED,))
    kept = 0 if cache == CLOSURES else CACHES[cache]().cache_block_start
    without = count(Subject(name, kept=kept, base=base), (REUSED,))
    return cached[COMPUTED].over(plain[COMPUTED]), cached[REUSED].over(without[REUSED])
