"""What a cache costs in Python: of computed steps, of reused ones, of attaching and of removing.

Run as ``python -m bench.overhead``. The model is FLUX.1's geometry, 19 double-stream blocks and 38 single-stream ones
of diffusers' own class, at 32 channels and 21 tokens, so that next to nothing but Python is left of a call. Every cache
has a copy of its own, and plain copies stand beside them. In each turn all of them make one sampling step, in an order
that changes; a figure is the median, over the turns, of the difference to the plain copy in the very same turn. In each
round the copies are made anew, in another order, so that where their weights lie cancels out.

Computed steps: every block runs, and the cache keeps what it would need later. Reused steps: every block that the cache
can leave out is left out. What is beside the blocks (embeddings, the last layer) is measured with a copy that has no
blocks, and taken off. Some caches always run the first block, or the first of each list; that is measured with copies
that have these only, and taken off, too: what is left is the cost of passing over the others and adding the residual.

Times are the process's own CPU time, of one thread, which other processes disturb least; wall times are beside them.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.costs_peers import (
    BLOCKS,
    DOUBLE,
    METHODS,
    SINGLE,
    Loop,
    Method,
    Missing,
    Mode,
    Remove,
    call,
    flux,
    quiet,
)
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

CLOCKS: dict[str, Callable[[], float]] = {"cpu": time.process_time, "wall": time.perf_counter}
Times = dict[str, float]  # in seconds, by clock


@dataclass(frozen=True)
class Spread:
    """A median with the quartiles beside it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else [*values] * 3
        return cls(middle, low, high)

    def __str__(self) -> str:
        return f"{self.median:.1f} ({self.low:.1f} … {self.high:.1f})"


@dataclass
class Subject:
    """A copy of the model in one round, with a cache or without, in the middle of its run."""

    model: nn.Module
    loop: Loop
    method: Method | None
    remove: Remove | None = None

    def turn(self) -> tuple[int, Times]:
        """One step; returns which, and how long the call took."""
        step, arguments = self.loop.step, self.loop.arguments()
        before = {name: clock() for name, clock in CLOCKS.items()}
        velocity = call(self.model, arguments)
        taken = {name: clock() - before[name] for name, clock in CLOCKS.items()}
        self.loop.moved(velocity)
        return step, taken


@dataclass
class Series:
    """All that was measured in one mode: for each turn, who took how long, where it counts."""

    turns: list[dict[str, Times]] = field(default_factory=list)

    def differences(self, name: str, other: str, clock: str) -> list[float]:
        """In µs, of the turns in which both count."""
        both = [turn for turn in self.turns if name in turn and other in turn]
        return [1e6 * (turn[name][clock] - turn[other][clock]) for turn in both]

    def times(self, name: str, clock: str) -> list[float]:
        """In µs."""
        return [1e6 * turn[name][clock] for turn in self.turns if name in turn]


def cut(model: nn.Module, double: int, single: int) -> nn.Module:
    """A copy that has the first so many blocks of each list only."""
    kept = copy.copy(model)
    kept._modules = dict(model._modules)
    kept._modules["transformer_blocks"] = model.transformer_blocks[:double]
    kept._modules["single_transformer_blocks"] = model.single_transformer_blocks[:single]
    return copy.deepcopy(kept)


def plain_name(method: Method | None, double: int = DOUBLE, single: int = SINGLE) -> str:
    """Of the copy without a cache that a method is compared with."""
    shape = "" if method is None or method.prepare is None else f" {method.prepare.__name__}"
    return f"plain{shape} {double}+{single}"


def blocks_run(method: Method, mode: Mode, base: nn.Module, steps: int = 12) -> dict[int, tuple[int, int]]:
    """Of each step, how many blocks of each list have run, as seen by a layer that each of them calls first.

    Raises:
        Missing: the library is not installed, or has found nothing to attach to.
    """
    model, loop, ran = copy.deepcopy(base), Loop(steps), dict[int, list[int]]()
    first = (
        [block.norm1 for block in model.transformer_blocks],
        [block.norm for block in model.single_transformer_blocks],
    )
    for kind, layers in enumerate(first):
        for layer in layers:

            def count(*_: Any, kind: int = kind) -> None:
                ran.setdefault(loop.step, [0, 0])[kind] += 1

            layer.register_forward_pre_hook(count)
    if method.prepare is not None:
        method.prepare(model)
    method.attach(model, mode, loop)
    while not loop.moved(call(model, loop.arguments())):
        pass
    return {step: (ran.get(step, [0, 0])[0], ran.get(step, [0, 0])[1]) for step in range(steps)}


def measure(
    methods: Sequence[Method], mode: Mode, base: nn.Module, run: dict[str, tuple[int, int]], steps: int, number: int
) -> Series:
    """One round: every method's copy makes a run, step by step and in turns with the others and the plain ones."""
    wanted: list[tuple[str, Method | None, int, int]] = []
    for method in methods:
        wanted.append((method.name, method, DOUBLE, SINGLE))
        shapes = {(DOUBLE, SINGLE)} if mode == "computed" else {(0, 0), run[method.name]}
        for double, single in shapes:
            if (name := plain_name(method, double, single)) not in [each[0] for each in wanted]:
                wanted.append((name, method, double, single))
    wanted = wanted[number % len(wanted) :] + wanted[: number % len(wanted)]
    subjects = {}
    for name, method, double, single in wanted:
        model, loop, plain = cut(base, double, single), Loop(steps), name.startswith("plain")
        if method is not None and method.prepare is not None:
            method.prepare(model)
        subjects[name] = Subject(model, loop, None if plain else method)
    for subject in subjects.values():
        if subject.method is not None:
            subject.remove = subject.method.attach(subject.model, mode, subject.loop)
    gc.collect()
    gc.freeze()  # what is there is not looked through again while times are taken
    series, names = Series(), list(subjects)
    for turn in range(steps):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        taken = {}
        for name in order[:: 1 if turn % 2 else -1]:
            subject = subjects[name]
            step, times = subject.turn()
            if subject.method is None or subject.method.timed(mode, step, steps):
                taken[name] = times
        series.turns.append(taken)
    gc.unfreeze()
    for subject in subjects.values():
        if subject.remove is not None:
            subject.remove()
    return series


def attaching(method: Method, base: nn.Module, times: int) -> dict[str, Any]:
    """What it takes, in ms, to attach, to make the first call (over a plain one before it), and to remove."""
    found: dict[str, list[float]] = {"attach": [], "first_call": [], "remove": []}
    for _ in range(times + 1):
        model, loop = copy.deepcopy(base), Loop(8)
        if method.prepare is not None:
            method.prepare(model)
        arguments = loop.arguments()
        plain = min(_timed(lambda: call(model, arguments))[0] for _ in range(2))  # noqa: B023
        gc.collect()
        attach, remove = _timed(lambda: method.attach(model, "computed", loop))  # noqa: B023
        first, _ = _timed(lambda: call(model, arguments))  # noqa: B023
        found["attach"].append(attach)
        found["first_call"].append(first - plain)
        if remove is not None:
            found["remove"].append(_timed(remove)[0])
    return {name: vars(Spread.of(values[1:])) if values else None for name, values in found.items()}


def _timed(do: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = do()
    return 1e3 * (time.process_time() - begin), result


def row(method: Method, series: dict[str, Series], run: dict[str, dict[str, tuple[int, int]]]) -> dict[str, Any]:
    """The figures of a method, in µs: per block where it computes, per step where it reuses."""
    found: dict[str, Any] = {"name": method.name, "library": method.library, "note": method.note}
    if series["computed"].times(method.name, "cpu"):
        for clock in CLOCKS:
            cost = series["computed"].differences(method.name, plain_name(method), clock)
            found[f"computed_{clock}"] = vars(Spread.of(cost))
            found[f"per_block_{clock}"] = vars(Spread.of([each / BLOCKS for each in cost]))
    if series["reused"].times(method.name, "cpu"):
        ran = run["reused"][method.name]
        found["blocks_run"] = list(ran)
        for clock in CLOCKS:
            found[f"step_{clock}"] = vars(Spread.of(series["reused"].times(method.name, clock)))
            beside = series["reused"].differences(method.name, plain_name(method, 0, 0), clock)
            found[f"reused_{clock}"] = vars(Spread.of(beside))
            if ran != (DOUBLE, SINGLE):
                passing = series["reused"].differences(method.name, plain_name(method, *ran), clock)
                found[f"passing_{clock}"] = vars(Spread.of(passing))
    return found


def lowest(rows: Sequence[dict[str, Any]], key: str) -> dict[str, dict[str, Any] | None]:
    """The cheapest of ours and of theirs, among those whose figure is of the whole trunk."""
    found: dict[str, dict[str, Any] | None] = {}
    for who in ("ours", "theirs"):
        own = [each for each in rows if (each["library"] == "dithooks") == (who == "ours") and key in each]
        found[who] = min(own, key=lambda each: each[key]["median"], default=None)
    return found


VERDICTS = (
    ("computed_cpu", "computed step, over the plain one"),
    ("reused_cpu", "reused step, with the blocks that still run"),
    ("passing_cpu", "reused step, without these"),
)


def shown(found: dict[str, Any], key: str, scale: float = 1.0) -> str:
    """A figure of a row, or a dash."""
    each = found.get(key)
    return "—" if each is None else str(Spread(*(value * scale for value in each.values())))


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = ["# What a cache costs in Python", "", results["about"], ""]
    head = ("", "computed: µs per block", "per step", "reused: blocks run", "µs per step", "without these blocks")
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    rows = [each for each in results["rows"] if "missing" not in each]
    for each in rows:
        ran = "+".join(map(str, each["blocks_run"])) if "blocks_run" in each else "—"
        cells = [shown(each, "per_block_cpu"), shown(each, "computed_cpu"), ran]
        cells += [shown(each, "reused_cpu"), shown(each, "passing_cpu")]
        lines.append(f"| {each['name']} | {' | '.join(cells)} |")
    lines += [f"| {each['name']} | {each['missing']} |||||" for each in results["rows"] if "missing" in each]
    lines += ["", "CPU time, median (quartiles). By the wall clock, medians:", ""]
    lines += ["| | computed: µs per block | reused: µs per step | without these blocks |", "|---" * 4 + "|"]
    for each in rows:
        walls = (f"{each[key]['median']:.1f}" if key in each else "—" for key in WALLS)
        lines.append(f"| {each['name']} | {' | '.join(walls)} |")
    lines += ["", "Attaching and removing, ms of CPU time (quartiles), 57 blocks; the first call over a plain one:", ""]
    lines += ["| | attach | first call | remove |", "|---" * 4 + "|"]
    for each in rows:
        if costs := each.get("attaching"):
            cells = [shown(costs, name) for name in ("attach", "first_call", "remove")]
            lines.append(f"| {each['name']} | {' | '.join(cells)} |")
    lines += ["", "The cheapest of each side, µs:", "", "| | dithooks | others | ratio |", "|---" * 4 + "|"]
    for key, what in VERDICTS:
        best = lowest(rows, key)
        if (ours := best["ours"]) is not None and (theirs := best["theirs"]) is not None:
            a, b = ours[key]["median"], theirs[key]["median"]
            cells = f"{ours['name']}: {a:.1f} | {theirs['name']}: {b:.1f} | {a / b if b > 0 else math.nan:.2f}"
            lines.append(f"| {what} | {cells} |")
    lines += ["", "Notes:", ""]
    lines += [f"- {each['name']}: {each['note']}" for each in rows if each["note"]]
    return "\n".join(lines) + "\n"


WALLS = ("per_block_wall", "reused_wall", "passing_wall")


def main(arguments: list[str] | None = None) -> None:
    """Measure what caches cost in Python (computed steps, reused steps, attaching), in turns; a few minutes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one short round of each")
    parser.add_argument("--rounds", type=int, default=5, help="of each kind (default: %(default)s)")
    parser.add_argument("--only", default="", help="methods whose name has this")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rounds, steps, times = (1, 12, 2) if options.quick else (options.rounds, 40, 8)
    with torch.inference_mode(), quiet():
        measure_all(options.out, [each for each in METHODS if options.only in each.name], rounds, steps, times)


def measure_all(out: Path, methods: Sequence[Method], rounds: int, steps: int, times: int) -> dict[str, Any]:
    """All rows, written again after every round."""
    begun, base = time.perf_counter(), flux()
    run: dict[str, dict[str, tuple[int, int]]] = {"computed": {}, "reused": {}}
    missing: dict[str, str] = {}
    for method in methods:
        try:
            for mode in method.modes:
                seen = blocks_run(method, mode, base)
                counted = {seen[step] for step in seen if method.timed(mode, step, len(seen))}
                if len(counted) != 1 or (mode == "computed" and counted != {(DOUBLE, SINGLE)}):
                    raise RuntimeError(f"{method.name}, {mode}: not what it is to be: {seen}")
                run[mode][method.name] = counted.pop()
        except Missing as error:
            missing[method.name] = str(error)
    there = [method for method in methods if method.name not in missing]
    series: dict[str, Series] = {"computed": Series(), "reused": Series()}
    results: dict[str, Any] = {}
    attached: dict[str, Any] = {}

    def write() -> None:
        plain = series["computed"].times(plain_name(None), "cpu")
        named = ", ".join(f"{name} {number}" for name, number in known.items())
        call_ms = Spread.of(plain or [math.nan]).median / 1e3
        turns = f"{len(series['computed'].turns)} and {len(series['reused'].turns)} turns"
        about = (
            f"{machine()}, {named}; {DOUBLE}+{SINGLE} blocks, 32 channels, 21 tokens; a plain call takes "
            f"{call_ms:.1f} ms of CPU time; {turns}; {time.perf_counter() - begun:.0f} s in all"
        )
        rows = [
            {"name": m.name, "missing": missing[m.name]} if m.name in missing else row(m, series, run) for m in methods
        ]
        for each in rows:
            each["attaching"] = attached.get(each["name"])
        results.update(about=about, blocks=[DOUBLE, SINGLE], rows=rows)
        write_text(out / "overhead.json", json.dumps(results, indent=1) + "\n")
        write_text(out / "overhead.md", table(results))

    known = versions("dithooks", "cache-dit", "diffusers", "msmodelslim")
    for number in range(rounds):
        for mode in ("computed", "reused"):
            with_mode = [method for method in there if mode in method.modes]
            series[mode].turns += measure(with_mode, mode, base, run[mode], steps, number).turns
            write()
            print(f"{time.perf_counter() - begun:5.0f} s  round {number + 1} of {rounds}, {mode}", flush=True)
    for method in there:
        attached[method.name] = attaching(method, base, times)
        write()
    print(table(results))
    return results


if __name__ == "__main__":
    main()
