"""What another search costs on the same model: msmodelslim's for its DiT cache, next to ``search``.

``python -m bench.search_cost --out bench/results`` writes ``search_cost.json`` and ``search_cost.md``; ``--searches``
measures this package's searches alone again, and keeps the adaptor's rows that are there. It needs
msmodelslim 26.1.0 and what that writes and reads videos with; best in an environment of its own:
``pip install --no-deps msmodelslim==26.1.0`` and ``pip install opencv-python-headless "imageio[ffmpeg]"``.

Both search the shipped demo pipeline, 28 steps at guidance 3.0, with the same four captions and seeds, drawn in one
batch, for the same speed-ups. ``DitCacheAdaptor.search`` is called as it comes, with its own choice of configurations
and its own videos to compare; only its constructor is left out, as that wraps the blocks of one list, and the pipeline
has two. The configurations that it asks for are run by ``dit_cache`` instead, which reuses what its own hooks would.
Its interval is 2, or the next that it does not refuse. (Of N blocks it would run N − l ranges of the least length that
it deems fast enough, l, and up to 45 longer ones.) ``search`` runs at its defaults, with the target in block
executions, once among plans of its own kind, and once among those that the adaptor's four numbers can say. What all
have found is then measured on the 32 test pictures of ``bench/search.py``; run equivalents are block
executions over those of one uncached run of the four pictures.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

import dithooks
from bench.search import CALIBRATION, GUIDANCE, Bench
from dithooks import CachePlan, DitCacheConfig, dit_cache, plan, record, search
from dithooks.demo import load_pipeline
from dithooks.demo.draw import CAPTIONS
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

try:
    from msmodelslim.pytorch.multi_modal.dit_cache import DitCacheAdaptor, DitCacheSearchConfig
except ImportError as error:
    raise SystemExit(
        f"msmodelslim cannot be imported ({error}): pip install --no-deps msmodelslim==26.1.0, and pip install "
        'opencv-python-headless "imageio[ffmpeg]"'
    ) from None

STEPS = 28
TARGETS = (1.3, 2.0)  # its default, and the most that it takes
INTERVALS = range(2, 7)


@dataclass(frozen=True)
class Row:
    """One search.

    Args:
        target: times fewer blocks.
        method: whose.
        found: the configuration or plan; or why there is none.
        runs: of the pipeline, the uncached one included.
        run_equivalents: block executions over those of an uncached run.
        seconds: that it took.
        speedup: times fewer blocks that what was found runs, and
        psnr: its PSNR in dB, by test picture; empty: nothing was found.
    """

    target: float
    method: str
    found: str
    runs: int
    run_equivalents: float
    seconds: float
    speedup: float | None = None
    psnr: tuple[float, ...] = ()


class Runner:
    """Draws what an adaptor has set, as its user's callback."""

    def __init__(self, bench: Bench, blocks: int, ratio: float, interval: int) -> None:
        self.bench, self.runs = bench, 0
        self.adaptor = object.__new__(DitCacheAdaptor)
        self.adaptor.search_config = DitCacheSearchConfig(ratio, blocks, bench.steps, interval)
        self.adaptor.pipeline = bench.pipe
        self.adaptor._temp_cache_dir = None

    def __call__(self, _: Any) -> list[NDArray[np.uint8]]:
        """Videos (frames, height, width, 3) of one frame."""
        self.runs += 1
        config = self.adaptor.dit_cache_config
        with dit_cache(self.bench.pipe, static(config), verify=False) if self.adaptor.enable_cache else nullcontext():
            pictures = self.bench.calibrate()
        pixels: NDArray[np.uint8] = pictures.mul(255).round().byte().permute(0, 2, 3, 1).numpy()
        return [each[None] for each in pixels]


def static(config: Any) -> DitCacheConfig:
    """Its four numbers are dithooks' own."""
    return DitCacheConfig(**dict(config))


def adaptors(bench: Bench, target: float) -> Iterator[Row]:
    """The adaptor's search, and before it those that it gave up."""
    for interval in INTERVALS:
        runner = Runner(bench, bench.executions.blocks, target, interval)
        name = f"DitCacheAdaptor.search, interval {interval}"
        before, begun = bench.executions.count, time.perf_counter()
        try:
            with elsewhere():
                config = runner.adaptor.search(runner, prompts_num=len(CALIBRATION))
            refusal = ""
        except ValueError as error:
            refusal = str(error).partition(":")[0]
        spent = (bench.executions.count - before) / bench.uncached, time.perf_counter() - begun
        if refusal:
            yield Row(target, name, refusal, runner.runs, *spent)
            continue
        values, speedup = bench.measure(static(config))
        last = config.cache_block_start + config.cache_num_blocks - 1
        shown = f"blocks {config.cache_block_start}–{last}, every {interval} steps from step {config.cache_step_start}"
        yield Row(target, name, shown, runner.runs, *spent, speedup, values)
        return


@contextmanager
def elsewhere() -> Iterator[None]:
    """In a folder that is gone in the end: the adaptor keeps its videos where it is called."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


def ours(bench: Bench, target: float, name: str = "search", **options: Any) -> Row:
    """The search of this package; with an interval, among plans that the adaptor's four numbers can say."""
    before, runs = bench.executions.count, 0

    def run(_: Any) -> list[Tensor]:
        nonlocal runs
        runs += 1
        return list(bench.calibrate())

    result = search(bench.pipe, run, target, cost="blocks", verbose=False, **options)
    run_equivalents = (bench.executions.count - before) / bench.uncached
    values, speedup = bench.measure(result.plan)
    return Row(target, name, shown(result.plan), runs, run_equivalents, result.seconds, speedup, values)


def planned(bench: Bench, target: float) -> Row:
    """A plan from one recorded run alone."""
    before, begun = bench.executions.count, time.perf_counter()
    found = plan(record(bench.pipe, bench.calibrate), target, cost="blocks")
    run_equivalents, seconds = (bench.executions.count - before) / bench.uncached, time.perf_counter() - begun
    values, speedup = bench.measure(found)
    return Row(target, "record and plan, nothing else run", shown(found), 1, run_equivalents, seconds, speedup, values)


def shown(plan: CachePlan) -> str:
    """Where and when."""
    blocks = [f"blocks {each.first}–{each.first + each.blocks - 1}" for each in plan.pieces]
    where = ["output" if each.payload == "output" else of for each, of in zip(plan.pieces, blocks, strict=True)]
    return ", ".join(f"{of}, {each.picture}" for each, of in zip(plan.pieces, where, strict=True))


def table(rows: Sequence[Row], about: str) -> str:
    """Markdown."""
    head = ("target", "", "runs", "run equivalents", "seconds", "blocks", "PSNR", "found")
    lines = ["# What a search costs", "", about, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [f"{row.target:g}×", row.method, str(row.runs), f"{row.run_equivalents:.1f}", f"{row.seconds:.0f}"]
        reached = "" if row.speedup is None else f"{row.speedup:.2f}×"
        quality = f"{fmean(row.psnr):.1f} / {min(row.psnr):.1f}" if row.psnr else ""
        lines.append(f"| {' | '.join([*cells, reached, quality, row.found])} |")
    return "\n".join(lines) + "\n"


def rows_of_adaptors(file: Path) -> tuple[list[Row], str]:
    """Rows of an earlier run, and the machine that it was made on."""
    before = json.loads(file.read_text(encoding="utf-8"))
    rows = [Row(**row) for row in before["rows"] if row["method"].startswith("DitCacheAdaptor")]
    return rows, before["about"].rpartition("\n")[2].partition(";")[0]


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``search_cost.json`` and ``search_cost.md``, again after every search."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="eight test pictures, 1.3x only")
    parser.add_argument("--searches", action="store_true", help="measure this package's searches alone again")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    (pipe := load_pipeline()).set_progress_bar_config(disable=True)
    bench = Bench(pipe, STEPS, CAPTIONS[::4] if options.quick else CAPTIONS)
    about = (
        f"Searches for the same pipeline, {STEPS} steps, guidance {GUIDANCE:g}, with the same {len(CALIBRATION)} "
        f"captions in one batch: runs of the pipeline, block\nexecutions over those of one uncached run "
        f"(run equivalents), and seconds. Of what was found: how many times fewer blocks run, and\nPSNR in dB to the "
        f"uncached run, mean / worst of {len(bench.test)} other pictures. msmodelslim {version('msmodelslim')} says "
        f"which configurations to try,\ndithooks runs them.\n\n"
        f"{machine()}, diffusers {version('diffusers')}, dithooks {dithooks.__version__}"
    )
    rows, adaptors_rows = list[Row](), adaptors
    if options.searches:
        kept, made_on = rows_of_adaptors(options.out / "search_cost.json")
        adaptors_rows = lambda _, target: (row for row in kept if row.target == target)  # noqa: E731
        about += f"; DitCacheAdaptor's rows are of an earlier run,\non {made_on}"
    for target in TARGETS[:1] if options.quick else TARGETS:
        least = INTERVALS[0]
        for row in (
            *adaptors_rows(bench, target),
            ours(bench, target, f"search, interval {least} or more", interval=least),
            ours(bench, target),
            planned(bench, target),
        ):
            rows.append(row)
            print(
                f"{row.target:g}x {row.method}: {row.runs} runs, {row.run_equivalents:.2f} run equivalents", flush=True
            )
            text = json.dumps({"about": about, "steps": STEPS, "rows": [*map(asdict, rows)]}, indent=1)
            write_text(options.out / "search_cost.json", text + "\n")
            write_text(options.out / "search_cost.md", table(rows, about))


if __name__ == "__main__":
    main()
