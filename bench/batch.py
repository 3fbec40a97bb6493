"""What a batch over many actors costs beside the drawing: ``python -m bench.batch``.

The pipeline that ships draws captions with Ray Data, with and without its plan for 2×, with one actor and with one for
each core, in pairs. A picture's cost is the seconds of a core in its call. Then the parts that grow with the job and
not with the pictures: starting, handing out chunks, writing, going on with what is there, asking how far it is.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import ray
import torch

from dithooks.demo import PLANS, load_pipeline
from dithooks.demo.outcome import PROMPTS
from dithooks.environment.machine import machine
from dithooks.ray import generate, read
from dithooks.storage.replacement import write_text

STEPS = 28


def noise(pipe: Any, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Instead of drawing: of the size of a picture's file, as it cannot be compressed."""
    return [np.random.default_rng(row["seed"] % 2**32).integers(0, 256, (256, 256, 3), np.uint8) for row in rows]


def dots(pipe: Any, rows: Sequence[dict[str, Any]]) -> list[np.ndarray]:
    """Instead of drawing: one pixel each."""
    return [np.zeros((1, 1, 3), np.uint8) for _ in rows]


def nothing() -> object:
    """Instead of a pipeline."""
    return object()


def prompts_file(folder: Path, rows: int) -> Path:
    """Captions, over and over."""
    path = folder / f"prompts_{rows}.jsonl"
    lines = (json.dumps({"id": number, "prompt": PROMPTS[number % len(PROMPTS)]}) for number in range(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def drawn(folder: Path, rows: int, actors: int, plan: Path | None, number: int) -> dict[str, float]:
    """A job with the pipeline that ships; seconds of each picture's call, and of all."""
    out = folder / f"out_{actors}_{plan is None}_{number}"
    asked = {"options": {"num_inference_steps": STEPS}, "actors": actors, "rows_per_file": 4, "verbose": False}
    report = generate(prompts_file(folder, rows), out, load_pipeline, plan, **asked)
    assert report.failed == 0, report
    table = read(out)
    return {
        "picture": median(table["seconds"].to_pylist()),
        "whole": report.seconds,
        "rate": rows / report.seconds,
        "rows": rows,
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what it returns."""
    begin = time.perf_counter()
    found = call()
    return time.perf_counter() - begin, found


def alone(rows: int, plan: Path | None) -> float:
    """Seconds of a picture in this process, without Ray."""
    from dithooks import CachePlan, dit_cache

    pipe, spent = load_pipeline(), []
    pipe.set_progress_bar_config(disable=True)
    handle = None if plan is None else dit_cache(pipe, CachePlan.load(plan))
    for number in range(rows + 1):
        made = torch.Generator().manual_seed(number)
        prompt = PROMPTS[number % len(PROMPTS)]
        spent.append(timed(lambda made=made, prompt=prompt: pipe(prompt, num_inference_steps=STEPS, generator=made))[0])
    if handle is not None:
        handle.remove()
    return median(spent[1:])


def beside(folder: Path, draw: Callable[..., Any], rows: int, per_file: int, actors: int) -> dict[str, float]:
    """A job that draws nothing: what is left is Ray's, and the files'."""
    asked: dict[str, Any] = {"draw": draw, "actors": actors, "rows_per_file": per_file, "verbose": False}
    path, out = prompts_file(folder, rows), folder / draw.__name__
    few = prompts_file(folder, actors * per_file)
    warm, _ = timed(lambda: generate(few, folder / f"few_{draw.__name__}", nothing, **asked))
    whole, report = timed(lambda: generate(path, out, nothing, **asked))
    again, resumed = timed(lambda: generate(path, out, nothing, **asked))
    assert (report.drawn, resumed.drawn) == (rows, 0), (report, resumed)
    files = sorted(out.glob("*.parquet"))
    size = sum(each.stat().st_size for each in files)
    reading, _ = timed(lambda: [pq.read_table(each, columns=["id", "status"]) for each in files])
    return {
        "rows": rows,
        "files": len(files),
        "first": warm,
        "row_ms": 1e3 * (whole - warm) / rows,
        "file_ms": 1e3 * (whole - warm) / len(files),
        "going_on_ms": 1e3 * again / len(files),
        "reading_ms": 1e3 * reading / len(files),
        "megabytes": size / 1e6,
    }


@ray.remote(num_cpus=0)
class Told:
    """Hears how far actors are."""

    def __init__(self) -> None:
        self.heard = 0

    def note(self, rows: int) -> None:
        """A call has returned."""
        self.heard += rows

    def count(self) -> int:
        """Of all calls."""
        return self.heard


def messages(number: int) -> float:
    """Notes that one actor hears in a second."""
    told = Told.remote()
    ray.get(told.count.remote())

    def send() -> None:
        for _ in range(number):
            told.note.remote(1)
        assert ray.get(told.count.remote()) == number

    return number / timed(send)[0]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """In Markdown."""
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def text_of(found: dict[str, Any]) -> str:
    """The page."""
    drawing, rest, dot = found["drawing"], found["noise"], found["dots"]
    plain, cached = drawing["1 actor, no cache"], drawing["1 actor, plan for 2×"]
    rows = [
        [
            name,
            f"{each['picture']:.3f} s",
            f"{each['rate']:.2f}/s",
        ]
        for name, each in drawing.items()
    ]
    bare = found["alone"]
    hours = {name: 1e6 * drawing[f"1 actor, {name}"]["picture"] / 3600 for name in ("no cache", "plan for 2×")}
    saved = plain["picture"] - cached["picture"]
    return f"""# What a batch costs, in pictures and beside them

{found["machine"]}, {os.cpu_count()} cores, ray {ray.__version__}. `python -m bench.batch`

## Pictures

The pipeline that ships, 28 steps, one caption a call, {found["rows"]} captions a job, one thread an actor; medians of
{found["times"]} jobs by turns. The rate is of the whole job, Ray's start and the loading of the pipeline in it.

{table(["", "a picture's call", "rate of the job"], rows)}

In one process, without Ray, a picture takes {bare["plain"]:.3f} s without a cache and {
        bare["plan"]:.3f} s with the plan:
{bare["plain"] / bare["plan"]:.2f} times as fast. In the job: {plain["picture"] / cached["picture"]:.2f} times.

A million pictures, by the calls of one actor: {hours["no cache"]:.0f} hours of a core without a cache,
{hours["plan for 2×"]:.0f} with the plan. A search of six run equivalents, of four pictures each, is paid back by
{24 * plain["picture"] / saved:.0f} pictures.

## Beside them

Jobs that draw nothing, with {found["actors"]} actors: {rest["rows"]:.0f} pictures of noise, 256 × 256,
{rest["megabytes"] / rest["rows"] * 1e3:.0f} kB each, in {rest["files"]:.0f} files; and {dot["rows"]:.0f} of one pixel,
each in a file of its own, so that handing out is left.

{
        table(
            ["what", "seconds or rate"],
            [
                ["until the first files are there: actors start, and load nothing", f"{dot['first']:.1f} s"],
                ["a picture of noise: encoded and written", f"{rest['row_ms']:.1f} ms"],
                ["a file of one pixel: handed out, written, answered", f"{dot['file_ms']:.1f} ms"],
                ["going on with a finished job: for each file that is there", f"{dot['going_on_ms']:.1f} ms"],
                ["… of which are reading its ids", f"{dot['reading_ms']:.1f} ms"],
                ["notes of how far actors are, that one process hears", f"{found['messages']:,.0f}/s"],
            ],
        )
    }
"""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``batch.md`` and ``batch.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few rows of each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    actors = max(2, os.cpu_count() or 2)
    rows, times, idle, files = (4, 1, 64, 32) if options.quick else (32, 3, 2048, 1024)
    plan = PLANS / "2x.json"
    found: dict[str, Any] = {"machine": machine(), "rows": rows, "times": times, "actors": actors}
    found["alone"] = {"plain": alone(rows, None), "plan": alone(rows, plan)}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kinds = [
            (f"{count} actor{'s' * (count > 1)}, {'no cache' if used is None else 'plan for 2×'}", count, used)
            for count in (1, actors)
            for used in (None, plan)
        ]
        taken: dict[str, list[dict[str, float]]] = {}
        ray.init(address="local", num_cpus=actors, include_dashboard=False, log_to_driver=False)
        try:
            for number in range(times):
                for kind, count, used in kinds if number % 2 == 0 else kinds[::-1]:
                    taken.setdefault(kind, []).append(drawn(folder, rows, count, used, number))
            found["noise"] = beside(folder, noise, idle, 32, actors)
            found["dots"] = beside(folder, dots, files, 1, actors)
            found["messages"] = messages(500 if options.quick else 20_000)
        finally:
            ray.shutdown()
    found["drawing"] = {
        kind: {name: median(each[name] for each in taken[kind]) for name in taken[kind][0]} for kind, _, _ in kinds
    }
    text = text_of(found)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "batch.json", json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    write_text(options.out / "batch.md", text)
    print(text)


if __name__ == "__main__":
    main()
