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
import re
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import Tensor, nn

import dithooks
from bench.compiled import Counting, compiled
from bench.costs_peers import DOUBLE, SINGLE, Loop, Steps, call, flux, quiet
from bench.overhead import Spread, cut
from bench.peers.closures import Closures, first_stream, flux_streams
from dithooks import CacheHandle, DitCacheConfig, Fitted, Interval, Mask, Threshold, dit_cache
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

PACKAGE = str(Path(dithooks.__file__).parent)
STEPS, COMPUTED, REUSED = 12, 6, 7  # of a run, and the two that are counted
LIBRARY = re.compile(r"(?:site|dist)-packages[/\\](\w+)")


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
        return {key: value for key, value in self.functions.items() if not key[0].startswith("(")}

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
        """Calls and bytecodes by file of dithooks, and by package of the others; those with most bytecodes first."""
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
    """Where a function is, and its qualified name: a file of dithooks, or a package in parentheses."""
    name, file = getattr(code, "co_qualname", code.co_name), code.co_filename  # Python 3.10 has no qualified names
    if file.startswith(PACKAGE + os.sep):
        return file[len(PACKAGE) + 1 :].replace(os.sep, "/"), name
    library = LIBRARY.search(file)
    kind = library[1] if library else "bench" if file.startswith(str(Path(__file__).parent)) else "Python"
    return f"({kind})", f"{Path(file).name}: {name}"


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


@cache
def original(name: str) -> nn.Module:
    """A model of :data:`MODELS`, to be copied."""
    return MODELS[name].make()


CACHES = {"interval": interval, "plan": fitted_plan, "threshold": threshold}
CLOSURES = "closures"  # beside these, see bench/peers/closures.py


class Subject:
    """A model in its sampling loop: plain, with the first ``kept`` blocks only, or with a cache.

    For example ``Subject("FLUX", cache="plan")``.

    Args:
        name: of :data:`MODELS`.
        cache: of :data:`CACHES`, or :data:`CLOSURES`; ``None``: without one.
        kept: blocks of the copy; ``None``: all.
        base: what is copied, in place of :func:`original`.
    """

    def __init__(
        self, name: str, cache: str | None = None, kept: int | None = None, base: nn.Module | None = None
    ) -> None:
        kind = MODELS[name]
        base = original(name) if base is None else base
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


def own_counts(name: str, kind: str) -> tuple[Counts, Counts]:
    """What a cache adds to a computed step, and to a reused one; see the top of this file."""
    cached = count(Subject(name, kind))
    kept = 0 if kind == CLOSURES else CACHES[kind]().cache_block_start
    return cached[COMPUTED].over(uncached(name)[COMPUTED]), cached[REUSED].over(uncached(name, kept)[REUSED])


@cache
def uncached(name: str, kept: int | None = None) -> dict[int, Counts]:
    """Counts of a copy without a cache, with all blocks or the first so many."""
    return count(Subject(name, kept=kept))


# -- compiled -----------------------------------------------------------------------------------------------------


class Outputs(Counting):
    """A backend that also notes the shapes that each entry of compiled code returns.

    What compiled code stores in Python objects is among what its graph returns.
    """

    def __init__(self) -> None:
        super().__init__()
        self.entered: list[list[tuple[int, ...]]] = []

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        run = super().__call__(module, example_inputs)

        def entered(*args: Any) -> Any:
            results = run(*args)
            self.entered.append([tuple(each.shape) for each in results if isinstance(each, Tensor)])
            return results

        return entered


def compiled_counts(kind: str | None, way: str, base: nn.Module) -> dict[str, Any]:
    """Graphs and breaks of two runs, and what is entered and returned on one step of the second; or the error."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    subject, backend = Subject("FLUX", kind, base=base), Outputs()
    found: dict[str, Any] = {"cache": kind or "none", "way": way}
    compiled(subject.model, way, backend)
    entries: dict[int, list[list[tuple[int, ...]]]] = {}
    try:
        with torch.no_grad(), quiet():
            for step in (*range(STEPS), *range(STEPS)):
                backend.entered = entries[step] = []
                subject.turn()
    except Exception as error:
        return {**found, "error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
    finally:
        breaks = sum(counters["graph_break"].values())
        torch._dynamo.reset()
    steps = {"computed": entries[COMPUTED], "reused": entries[REUSED]}
    outputs = {name: [shape for entry in step for shape in entry] for name, step in steps.items()}
    return {
        **found,
        "graphs": backend.graphs,
        "breaks": breaks,
        "entries": {name: len(step) for name, step in steps.items()},
        "outputs": {name: len(shapes) for name, shapes in outputs.items()},
        "shapes": {name: [list(shape) for shape in sorted(shapes)] for name, shapes in outputs.items()},
    }


# -- times --------------------------------------------------------------------------------------------------------


def times(rounds: int) -> list[dict[str, Any]]:
    """Ratios of times, each of two copies of FLUX at the same step of the same run, which are called in turns.

    Each copy is made anew in each round. Times are the thread's CPU time.
    """
    taken: dict[str, dict[str, list[float]]] = {"computed": {}, "reused": {}}
    for number in range(rounds):
        subjects = {name: Subject("FLUX", name) for name in (*CACHES, CLOSURES)}
        subjects |= {"plain": Subject("FLUX")}
        subjects |= {f"{kept} blocks": Subject("FLUX", kept=kept) for kept in (0, 1)}
        names = list(subjects)
        with torch.inference_mode(), quiet(), uncollected():
            for turn in range(STEPS * 4):
                order = names[(turn + number) % len(names) :] + names[: (turn + number) % len(names)]
                clocked: dict[str, float] = {}
                for name in order[:: 1 if turn % 4 < 2 else -1]:
                    subjects[name].turn(partial(clock, clocked, name))
                if turn >= STEPS and turn % STEPS >= 2:
                    for name, seconds in clocked.items():
                        taken["reused" if turn % 2 else "computed"].setdefault(name, []).append(1e6 * seconds)
    return [ratio_row(step, name, other, taken[step]) for step, name, other in RATIOS]


RATIOS = (
    *(("reused", name, CLOSURES) for name in CACHES),
    *(("reused", name, "1 blocks" if name == "threshold" else "0 blocks") for name in (*CACHES, CLOSURES)),
    *(("computed", name, CLOSURES) for name in CACHES),
    *(("computed", name, "plain") for name in (*CACHES, CLOSURES)),
)


def clock(into: dict[str, float], name: str, do: Callable[[], Tensor]) -> Tensor:
    """Note how long a call takes."""
    begin = time.thread_time()
    output = do()
    into[name] = time.thread_time() - begin
    return output


def ratio_row(step: str, name: str, other: str, taken: dict[str, list[float]]) -> dict[str, Any]:
    """One line of the table: both medians in µs, and the quartiles of the ratios of pairs."""
    ratios = [mine / theirs for mine, theirs in zip(taken[name], taken[other], strict=True)]
    medians = [statistics.median(taken[each]) for each in (name, other)]
    return {"step": step, "cache": name, "over": other, "us": medians, "ratio": vars(Spread.of(ratios))}


# -- all of it ----------------------------------------------------------------------------------------------------


def measure(with_times: bool, rounds: int = 5) -> dict[str, Any]:
    """All results."""
    rows = []
    for name in MODELS:
        for kind in (*CACHES, CLOSURES):
            computed, reused = own_counts(name, kind)
            rows.append({"model": name, "cache": kind, "computed": computed.as_dict(), "reused": reused.as_dict()})
    small = flux(2, 3)
    graphs = [compiled_counts(kind, way, small) for way in COMPILED for kind in (None, *CACHES)]
    return {"rows": rows, "compiled": graphs, "times": times(rounds) if with_times else []}


COMPILED = {
    "whole, fullgraph": "``compile(fullgraph=True)``",
    "blocks, fullgraph": "``compile_repeated_blocks(fullgraph=True)``",
}


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# What one call of a cached transformer costs", "", results["about"], ""]
    lines += [
        "What is executed beyond the model without a cache: on a computed step, beyond the plain copy; on a reused "
        "step, beyond a copy that has only the blocks that run on it. FLUX's own loop over the 57 blocks is in these "
        "counts (`diffusers`, below). Closures check nothing and are a lower bound for wrappers around `forward` "
        "(`bench/peers/closures.py`).",
        "",
    ]
    head = ("model", "cache", "step", "calls", "calls in C", "bytecodes", "files", "functions")
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in results["rows"]:
        for step in ("reused", "computed"):
            cells = [f"{row[step][key]:,}" for key in ("calls", "c_calls", "bytecodes", "files", "functions")]
            lines.append(f"| {row['model']} | {row['cache']} | {step} | {' | '.join(cells)} |")
    lines += ["", "By file, calls and bytecodes of a reused step of FLUX:", ""]
    shown = {r["cache"]: r["reused"]["by_file"] for r in results["rows"] if r["model"] == "FLUX"}
    files = sorted({file for found in shown.values() for file in found}, key=lambda file: _rank(shown, file))
    lines += [f"| | {' | '.join(shown)} |", "|---" * (len(shown) + 1) + "|"]
    for file in files:
        cells = [f"{found[file][0]:,} / {found[file][1]:,}" if file in found else "—" for found in shown.values()]
        lines.append(f"| {file} | {' | '.join(cells)} |")
    lines += ["", "Compiled, FLUX of 2 + 3 blocks; what a graph stores is among its outputs:", ""]
    head = ("cache", "graphs", "breaks", "entries: computed", "reused", "outputs: computed", "reused")
    for way, shown_way in COMPILED.items():
        lines += [f"{shown_way}:", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for row in (row for row in results["compiled"] if row["way"] == way):
            if "error" in row:
                lines.append(f"| {row['cache']} | fails: {row['error']} ||||||")
                continue
            pairs = [row[key][step] for key in ("entries", "outputs") for step in ("computed", "reused")]
            lines.append(f"| {row['cache']} | {row['graphs']} | {row['breaks']} | {' | '.join(map(str, pairs))} |")
        lines.append("")
    if results["times"]:
        lines += ["Times of one call of FLUX, CPU time of the thread; ratios of pairs, median (quartiles):", ""]
        lines += ["| step | cache | µs | over | µs | ratio |", "|---" * 6 + "|"]
        for row in results["times"]:
            ratio = "{median:.2f} ({low:.2f} … {high:.2f})".format(**row["ratio"])
            cells = (row["step"], row["cache"], f"{row['us'][0]:.0f}", row["over"], f"{row['us'][1]:.0f}", ratio)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).rstrip() + "\n"


def _rank(shown: dict[str, dict[str, list[int]]], file: str) -> tuple[int, str]:
    """Most bytecodes first."""
    return -max(found.get(file, [0, 0])[1] for found in shown.values()), file


def main(arguments: list[str] | None = None) -> None:
    """Count what one call of a cached transformer executes; about two minutes, times included."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the numbers to this file only, and no table")
    parser.add_argument("--times", action="store_true", help="take times, too")
    parser.add_argument("--quick", action="store_true", help="one round of times")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    begun = time.perf_counter()
    results = measure(options.times, 1 if options.quick else 5)
    named = ", ".join(f"{name} {number}" for name, number in versions("diffusers").items())
    seconds = time.perf_counter() - begun
    results = {"about": f"{machine()}, {named}; {DOUBLE}+{SINGLE} blocks; {seconds:.0f} s", **results}
    text = json.dumps(results, indent=1) + "\n"
    if options.json is not None:
        write_text(options.json, text)
    else:
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "reused_step.json", text)
        write_text(options.out / "reused_step.md", table(results))
    print(table(results))


if __name__ == "__main__":
    main()
