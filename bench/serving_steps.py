"""A server that batches by step, next to others, under a Poisson load: ``python -m bench.serving_steps``.

Requests for the pipeline that ships come at random, at the same moments for each way to serve them: the example
server of ``examples/`` with its plan, (a) the same without a cache, (b) with the plan, one request at a time, and (c)
with the plan, in static batches: those that wait are drawn from the first step to the last by one call of the
pipeline. At one rate all of them are saturated, at the other (a) is not. The ways take turns within a round, and ratios
are of one round; a processor that is shared has wall times of little worth, so seconds of the processor stand beside
them.

What the plan allows: blocks take a share of the time of (a), measured there; of that, what the plan computes is left.
Nothing that other batches cost, or the cache itself, is in it.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from dithooks import PlanTiers, dit_cache
from dithooks.demo import load_pipeline, load_plan
from dithooks.demo.outcome import PROMPTS
from dithooks.engine.range_cache import RangeCache
from dithooks.engine.row_batch import RowBatch
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text
from examples.continuous_batching import EmojiSteps, StepServer

STEPS, BATCH, PLAN = 28, 8, "2x"
OURS, UNCACHED, SINGLE, STATIC = "steps, cache", "(a) steps, no cache", "(b) one by one, cache", "(c) static, cache"
WAYS = (OURS, UNCACHED, SINGLE, STATIC)
GOAL = 0.9  # of what the plan allows


class Static:
    """Draws those that wait by one call of the pipeline, then the next.

    Args:
        pipe: the pipeline.
        plan: attached to it.
    """

    def __init__(self, pipe: Any, plan: Any) -> None:
        self.pipe, self.cache = pipe, dit_cache(pipe, plan)
        self._asked: queue.SimpleQueue[tuple[str, int, Future[Any]] | None] = queue.SimpleQueue()
        self._worker = threading.Thread(target=self._work)
        self._worker.start()

    def submit(self, prompt: str, seed: int, steps: int) -> Future[Any]:
        """Ask for a picture; all are of as many steps."""
        assert steps == STEPS
        future: Future[Any] = Future()
        self._asked.put((prompt, seed, future))
        return future

    def _work(self) -> None:
        while (first := self._asked.get()) is not None:
            batch = [first]
            while len(batch) < BATCH and not self._asked.empty():
                if (more := self._asked.get()) is None:
                    self._asked.put(None)
                    break
                batch.append(more)
            noise = [torch.Generator().manual_seed(seed) for _, seed, _ in batch]
            drawn = self.pipe([prompt for prompt, *_ in batch], num_inference_steps=STEPS, generator=noise).images
            for (*_, future), picture in zip(batch, drawn, strict=True):
                future.set_result(picture)

    def close(self) -> None:
        """Draw those that are here, and end."""
        self._asked.put(None)
        self._worker.join()
        self.cache.remove()


def served(way: str, pipe: Any) -> Any:
    """One of the ways, ready to draw."""
    plan = load_plan(PLAN)
    if way == STATIC:
        return Static(pipe, plan)
    plans, tier = (None, None) if way == UNCACHED else (PlanTiers({PLAN: plan}), PLAN)
    # Without a plan nobody waits for others to compute: more than a batch would only share its time.
    batch, active = {OURS: (BATCH, 2 * BATCH), UNCACHED: (BATCH, BATCH), SINGLE: (1, 1)}[way]
    return StepServer(EmojiSteps(pipe), plans, tier, batch=batch, max_active=active, max_waiting=10**6)


@dataclass
class Run:
    """Requests served in one way, in seconds."""

    way: str
    pictures: int
    wall: float
    cpu: float  # of the processor, by all threads
    cpu_in_blocks: float
    blocks: int  # executions, by row
    calls: int  # in which blocks ran
    latencies: list[float]

    @property
    def row(self) -> dict[str, float]:
        """The figures."""
        ordered, blocks = sorted(self.latencies), max(1, self.blocks)
        return {
            "pictures_per_second": self.pictures / self.wall,
            "cpu_per_picture": self.cpu / self.pictures,
            "p50": median(ordered),
            "p95": ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))],
            "blocks_per_picture": self.blocks / self.pictures,
            "rows_per_call": blocks / max(1, self.calls),
            "share_in_blocks": self.cpu_in_blocks / self.cpu,
        }


@dataclass
class Watch:
    """Counts and times the blocks of a model, by hooks on each."""

    model: nn.Module
    rows: int = 0
    calls: int = 0
    seconds: float = 0.0
    began: float = 0.0

    @property
    def all_blocks(self) -> list[nn.Module]:
        """The blocks, in their order."""
        return [*self.model.transformer_blocks, *self.model.single_transformer_blocks]

    @contextmanager
    def watching(self) -> Iterator[Watch]:
        """Count within this."""
        hooks = []
        for block in self.all_blocks:
            hooks.append(block.register_forward_pre_hook(self._enter, with_kwargs=True))
            hooks.append(block.register_forward_hook(self._leave))
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def _enter(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.rows += (args[0] if args else kwargs["hidden_states"]).shape[0]
        self.calls += 1
        self.began = time.process_time()

    def _leave(self, *_: Any) -> None:
        self.seconds += time.process_time() - self.began


def serve(way: str, pipe: Any, gaps: Sequence[float]) -> Run:
    """Serve requests that come after these gaps, in seconds; what a cache learns by is over when the first comes."""
    watch = Watch(pipe.transformer)
    with watch.watching():
        server = served(way, pipe)
        try:
            for future in [server.submit(PROMPTS[number % len(PROMPTS)], number, steps=STEPS) for number in range(3)]:
                future.result()
            watch.rows, watch.calls, watch.seconds = 0, 0, 0.0
            latencies, asked = list[float](), list[Future[Any]]()
            cpu, begun = time.process_time(), time.perf_counter()
            due = begun
            for number, gap in enumerate(gaps):
                due += gap
                time.sleep(max(0.0, due - time.perf_counter()))
                future = server.submit(PROMPTS[number % len(PROMPTS)], number, steps=STEPS)
                future.add_done_callback(lambda _, due=due: latencies.append(time.perf_counter() - due))
                asked.append(future)
            for future in asked:
                future.result()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - begun
        finally:
            server.close()
    return Run(way, len(gaps), wall, cpu, watch.seconds, watch.rows, watch.calls, latencies)


def rates_of(base: Run, threads: int) -> dict[str, float]:
    """Arrivals per second: more than any way can draw, were its processors idle else; and 80 % of what (a) draws."""
    return {"saturated": 4 * base.pictures / base.cpu * threads, "busy": 0.8 * base.pictures / base.wall}


def poisson(rate: float, count: int, seed: int) -> list[float]:
    """Gaps between arrivals, in seconds."""
    rng = random.Random(seed)
    return [rng.expovariate(rate) for _ in range(count)]


# -- what the cache itself takes -----------------------------------------------------------------------------------

PARTS = {
    "deciding": (RangeCache, "_decide_rows"),
    "fitting and joining residuals": (RowBatch, "settle"),
    "handing out residuals": (RowBatch, "finish"),
    "gathering and scattering": (RowBatch, "run"),
}


@contextmanager
def timed_parts(spent: dict[str, float], watch: Callable[[], float]) -> Iterator[None]:
    """Time what the cache does with rows, in seconds of the processor; blocks are run within the last of these."""
    originals = {name: getattr(cls, method) for name, (cls, method) in PARTS.items()}

    def timed(name: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            begun, blocks = time.process_time(), watch()
            try:
                return originals[name](*args, **kwargs)
            finally:
                spent[name] += time.process_time() - begun - (watch() - blocks)

        return call

    try:
        for name, (cls, method) in PARTS.items():
            setattr(cls, method, timed(name))
        yield
    finally:
        for name, (cls, method) in PARTS.items():
            setattr(cls, method, originals[name])


def shares(pipe: Any, gaps: Sequence[float]) -> dict[str, float]:
    """What the processor's time goes to, as shares, in a run that is not otherwise measured."""
    spent, outer = dict.fromkeys(PARTS, 0.0), Watch(pipe.transformer)
    with outer.watching(), timed_parts(spent, lambda: outer.seconds):
        run = serve(OURS, pipe, gaps)
    found = {"blocks": run.cpu_in_blocks, **spent}
    found["all else: the rest of the model, schedulers, the loop"] = run.cpu - sum(found.values())
    return {name: seconds / run.cpu for name, seconds in found.items()}


# -- rounds --------------------------------------------------------------------------------------------------------


def compared(runs: dict[str, Run]) -> dict[str, float]:
    """One round: what is reached over (a), and what the plan allows."""
    ours, base = runs[OURS].row, runs[UNCACHED].row
    left = ours["blocks_per_picture"] / base["blocks_per_picture"]
    allowed = 1 / (1 - base["share_in_blocks"] * (1 - left))
    wall = ours["pictures_per_second"] / base["pictures_per_second"]
    cpu = base["cpu_per_picture"] / ours["cpu_per_picture"]
    p95 = ours["p95"] / runs[SINGLE].row["p95"]
    return {
        "blocks_left": left,
        "allowed": allowed,
        "faster": wall,
        "faster_by_cpu": cpu,
        "of_allowed": wall / allowed,
        "of_allowed_by_cpu": cpu / allowed,
        "p95_over_single": p95,
    }


def medians(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: median(row[name] for row in rows) for name in rows[0]}


def table(ways: dict[str, dict[str, float]]) -> list[str]:
    """The ways, in Markdown."""
    lines = [
        "| way | pictures/s | processor, s/picture | p50, s | p95, s | block executions/picture | rows in a block |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for way, row in ways.items():
        cells = (
            f"{row['pictures_per_second']:.2f}",
            f"{row['cpu_per_picture']:.3f}",
            f"{row['p50']:.2f}",
            f"{row['p95']:.2f}",
            f"{row['blocks_per_picture']:.0f}",
            f"{row['rows_per_call']:.1f}",
        )
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return lines


def page(figures: dict[str, Any]) -> str:
    """The figures in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in figures["versions"].items())
    lines = [
        "# A server that batches by step, under load",
        "",
        f"By `{figures['command']}`, on {figures['machine']}; {packages}.",
        "",
        f"The pipeline that ships, {STEPS} steps, guidance, the plan for {PLAN}; at most {BATCH} requests compute in a "
        f"call, with two rows each. {figures['requests']} requests come at random, by a Poisson process; "
        f"{figures['rounds']} rounds, in which the ways take turns, and medians of these. Pictures per second count "
        "from the first arrival to the last picture, latencies from a request's arrival to its picture.",
    ]
    for load in figures["loads"]:
        ratio = load["ratios"]
        lines += ["", f"## {load['name'].capitalize()}: {load['rate']:.2f} arrivals per second", ""]
        lines += [*table(load["ways"]), ""]
        if load["name"] == "saturated":
            least, most = load["range"]
            lines += [
                f"Over (a): {ratio['faster']:.2f} × as many pictures per second, {ratio['faster_by_cpu']:.2f} × by the "
                f"processor's time. {ratio['blocks_left']:.1%} of the block executions are left, and blocks are "
                f"{load['ways'][UNCACHED]['share_in_blocks']:.1%} of (a)'s time: the plan allows "
                f"{ratio['allowed']:.2f} ×. Reached of that: {ratio['of_allowed']:.2f} ({least:.2f} … {most:.2f} by "
                f"round), {ratio['of_allowed_by_cpu']:.2f} by the processor's time; wanted: {GOAL:g}.",
                "",
            ]
        lines += [f"Its p95 over that of (b): {ratio['p95_over_single']:.2f}."]
    lines += ["", "## What its time goes to", "", "| part | share |", "|---|---:|"]
    lines += [f"| {name} | {share:.1%} |" for name, share in figures["shares"].items() if share]
    if not all(figures["shares"].values()):
        lines += [
            "",
            "Parts of the cache that stand here for residuals only are in the last row with plans of outputs.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``serving_steps.md`` and ``.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round, few requests, saturated only")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="of the model (default: %(default)s)")
    parser.add_argument("--requests", type=int, help="in each run (default: 64; 16 with --quick)")
    parser.add_argument("--rounds", type=int, help="default: 3; 1 with --quick")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    count, rounds = options.requests or (16 if options.quick else 64), options.rounds or (1 if options.quick else 3)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    rates, loads = rates_of(serve(UNCACHED, pipe, [0.0] * 2 * BATCH), options.threads), []
    for name, rate in list(rates.items())[: 1 if options.quick else None]:
        ratios = list[dict[str, float]]()
        rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for number in range(rounds):
            gaps, runs = poisson(rate, count, number), dict[str, Run]()
            for way in WAYS if number % 2 == 0 else WAYS[::-1]:
                runs[way] = serve(way, pipe, gaps)
                rows[way].append(runs[way].row)
                print(name, number, way, {key: round(value, 3) for key, value in runs[way].row.items()}, flush=True)
            ratios.append(compared(runs))
        found = [each["of_allowed"] for each in ratios]
        loads.append(
            {
                "name": name,
                "rate": rate,
                "ways": {way: medians(each) for way, each in rows.items()},
                "ratios": medians(ratios),
                "range": [min(found), max(found)],
            }
        )
    figures = {
        "command": " ".join(["python -m bench.serving_steps", *(sys.argv[1:] if arguments is None else arguments)]),
        "machine": machine(),
        "versions": versions("diffusers"),
        "requests": count,
        "rounds": rounds,
        "loads": loads,
        "shares": shares(pipe, [0.0] * min(count, 3 * BATCH)),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "serving_steps.json", json.dumps(figures, indent=1) + "\n")
    write_text(options.out / "serving_steps.md", page(figures))
    print(page(figures))


if __name__ == "__main__":
    main()
