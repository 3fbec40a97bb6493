"""What a searched plan is worth: against schedules that need no search, at equal numbers of blocks run.

``python -m bench.search --steps 28 --out bench/results`` writes ``search_28.json`` and ``search_28.md``; ``--quick``
tries it out, and ``--searches`` measures the searches alone again, and keeps the other rows that are there.

The shipped demo pipeline draws at guidance 3.0 (two calls a step, 12 blocks). For each target, in block executions,
``search`` at its defaults is given four calibration captions, and its plan draws 32 test pictures, 16 other captions
with two seeds each, in one batch, which gives the same pictures as one by one. A picture's PSNR is that to its uncached
twin, in floats of 0…1; a difference is the mean over the pictures of the found plan's PSNR minus the other's, with a
95 % interval from 10,000 bootstrap samples of the pictures. Next to it:

- ``plan`` from the same recording, nothing run; and ``search`` with 5 % of the tokens recorded.
- Static intervals and ranges, ``DitCacheConfig`` with its four numbers and plain reuse: every interval of 2 to 6, every
  second start in the first half and every range of half the blocks at least, where these reach the target and are not
  7 % beyond it. Chosen on the calibration pictures; of the best few there, the best on the test pictures counts.
- Schedules over all blocks, with the most steps reused that the target needs: t_k = end·(1 − (1 − k/(K − 1))^b), k from
  0 to K − 1, ending in the last step or the one before (or, ``end`` being the number of steps, k/K), rounded to steps
  that differ; b = 1 uniform, b < 1 growing intervals, b > 1 shrinking ones; with plain reuse and with a line through
  the last two residuals. Of each kind all are drawn for every fifth test picture, and the best few of them for all of
  them: the best there counts. So these are chosen on the very pictures they are measured on, which the plans are not.

Block executions are counted where each block calls its attention; a search's cost is in run equivalents, the
executions of one uncached run of its calibration pictures.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib.metadata import version
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dithooks
from dithooks import CachePlan, DitCacheConfig, Linear, Mask, Reuse, Taylor, dit_cache, plan, search
from dithooks.demo import load_pipeline
from dithooks.demo.demonstration import psnr
from dithooks.demo.draw import CAPTIONS
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.environment.machine import machine
from dithooks.predictors.predictor import Predictor
from dithooks.storage.replacement import write_text

CALIBRATION = ("cat face", "watermelon", "taxi", "grinning face")
CALIBRATION_SEED, TEST_SEEDS = 1000, (0, 100)  # of the first caption; the next has the next
GUIDANCE = 3.0
TARGETS = (2.0, 2.5, 3.0)
SHARE = 0.05  # of the tokens
BENDS = (0.6, 0.75, 0.9, 1.0, 1.15, 1.3, 1.5, 1.75)
INTERVALS, BEYOND, START_EVERY = range(2, 7), 1.07, 2  # of the grid; how far over the target; steps between starts
SCREEN, FINALISTS = 5, 2  # every fifth picture tells which two are drawn for all
FOUND = "search"


@dataclass(frozen=True)
class Candidate:
    """One configuration of a kind, and how it is shown."""

    config: DitCacheConfig
    shown: str


@dataclass(frozen=True)
class Row:
    """One measurement.

    Args:
        target: times fewer blocks.
        method: what was measured.
        group: ``"own"``, ``"baseline"``, or ``"harder"``: a baseline that leans towards what searches find.
        shown: which plan or configuration it was.
        tried: of so many.
        speedup: blocks of the uncached run over those that ran.
        psnr: in dB, by picture.
        run_equivalents: what finding it cost, and
        seconds: how long it took; ``None``: no search.
    """

    target: float
    method: str
    group: str
    shown: str
    tried: int
    speedup: float
    psnr: tuple[float, ...]
    run_equivalents: float | None = None
    seconds: float | None = None

    @property
    def mean(self) -> float:
        return fmean(self.psnr)

    def over(self, other: Row) -> tuple[float, float, float]:
        """How much better it is: the mean difference by picture, with a 95 % interval."""
        differences = np.subtract(self.psnr, other.psnr)
        means = np.random.default_rng(0).choice(differences, (10_000, differences.size)).mean(1)
        low, high = np.percentile(means, (2.5, 97.5))
        return float(differences.mean()), float(low), float(high)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "psnr_mean": self.mean, "psnr_min": min(self.psnr)}


class Executions:
    """Counts the blocks that run, by a child that each calls exactly once; where one is skipped, so is its child."""

    def __init__(self, transformer: nn.Module) -> None:
        self.count = 0
        blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
        self.blocks = len(blocks)
        for block in blocks:
            block.attn.register_forward_pre_hook(self)

    def __call__(self, *_: Any) -> None:
        self.count += 1


@dataclass(eq=False)
class Bench:
    """The pipeline, what is drawn with it, and that without a cache: drawn at once, as no cache may be on for it."""

    pipe: EmojiPipeline
    steps: int
    captions: tuple[str, ...] = CAPTIONS
    bends: tuple[float, ...] = BENDS

    def __post_init__(self) -> None:
        self.executions = Executions(self.pipe.transformer)
        self.calibration = self.calibrate()
        self.uncached = self.executions.count
        self.test = [(caption, seed + number) for seed in TEST_SEEDS for number, caption in enumerate(self.captions)]
        self.plain = self.draw(self.test)

    def draw(self, pictures: Sequence[tuple[str, int]]) -> Tensor:
        """Pictures (batch, 3, 32, 32) in 0…1, of captions and seeds."""
        return self.pipe(
            [caption for caption, _ in pictures],
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for _, seed in pictures],
            output_type="pt",
        ).images

    def calibrate(self, _: Any = None) -> Tensor:
        """What a search is given to run."""
        return self.draw([(caption, CALIBRATION_SEED + number) for number, caption in enumerate(CALIBRATION)])

    def calibrated(self, config: DitCacheConfig) -> float:
        """Mean PSNR of the calibration pictures."""
        with dit_cache(self.pipe, config):
            return fmean(psnr(self.calibrate(), self.calibration))

    def measure(self, config: DitCacheConfig | CachePlan, every: int = 1) -> tuple[tuple[float, ...], float]:
        """PSNR of every so many test pictures, and how many times fewer blocks they took."""
        with dit_cache(self.pipe, config) as handle:
            values = psnr(self.draw(self.test[::every]), self.plain[::every])
            return values, handle.stats.blocks_total / handle.stats.blocks_run

    def best(self, screened: Sequence[tuple[float, Candidate]]) -> tuple[str, float, tuple[float, ...]]:
        """Of the few that did best before, the one that is best on all test pictures: shown, speed-up, PSNR."""
        found = []
        for _, candidate in sorted(screened, key=lambda each: -each[0])[:FINALISTS]:
            values, speedup = self.measure(candidate.config)
            found.append((candidate.shown, speedup, values))
        return max(found, key=lambda each: fmean(each[2]))


# -- what was searched ------------------------------------------------------------------------------------------


def searched(bench: Bench, target: float) -> Iterator[Row]:
    """The found plan, and its cheaper siblings."""
    for method, share in ((FOUND, 1.0), (f"search, {SHARE:.0%} of the tokens", SHARE)):
        before, ran = bench.executions.count, []

        def run(_: Any, ran: list[int] = ran) -> Tensor:
            pictures = bench.calibrate()
            ran.append(bench.executions.count)
            return pictures

        result = search(bench.pipe, run, target, cost="blocks", share=share, verbose=False)
        run_equivalents = (bench.executions.count - before) / bench.uncached
        tried = len(result.evaluations)
        yield planned(bench, target, method, result.plan, tried, run_equivalents, result.seconds)
        if share == 1.0:
            recorded = (ran[0] - before) / bench.uncached
            alone = plan(result.recording, target, cost="blocks")
            yield planned(bench, target, "plan, nothing run", alone, 1, recorded, result.recording.recorded_ms / 1e3)


def planned(
    bench: Bench, target: float, method: str, found: CachePlan, tried: int, run_equivalents: float, seconds: float
) -> Row:
    """A plan, measured."""
    values, speedup = bench.measure(found)
    shown = ", ".join(
        f"{piece.picture} blocks {piece.first}–{piece.first + piece.blocks - 1}, "
        f"{max(len(weights or ()) for weights in piece.coefficients)} {piece.payload}s"
        for piece in found.pieces
    )
    return Row(target, method, "own", shown, tried, speedup, values, run_equivalents, seconds)


# -- what needs no search ---------------------------------------------------------------------------------------


def static(bench: Bench, target: float) -> Iterator[Row]:
    """The best of the grid of static intervals and ranges with plain reuse."""
    candidates = grid(bench.steps, bench.executions.blocks, target)
    screened = [(bench.calibrated(each.config), each) for each in candidates]
    if screened:
        shown, speedup, values = bench.best(screened)
        yield Row(target, "static interval and range, Reuse", "baseline", shown, len(screened), speedup, values)


def grid(steps: int, blocks: int, target: float) -> list[Candidate]:
    """All static configurations that land between the target and a little beyond."""
    found = []
    for every, start in product(INTERVALS, range(0, steps // 2 + 1, START_EVERY)):
        reused = sum((step - start) % every > 0 for step in range(start, steps))
        for count in range(blocks // 2, blocks + 1):
            if not target <= 1 / (1 - reused * count / (steps * blocks)) <= target * BEYOND:
                continue
            for first in range(blocks - count + 1):
                shown = f"blocks {first}–{first + count - 1}, every {every} steps from step {start}"
                found.append(Candidate(DitCacheConfig(start, every, first, count), shown))
    return found


def schedules(bench: Bench, target: float) -> Iterator[Row]:
    """The best schedule of each kind with each predictor."""
    count = int(bench.steps / target)
    kinds = {
        "uniform": [bend for bend in bench.bends if bend == 1],
        "growing": [bend for bend in bench.bends if bend < 1],
        "shrinking": [bend for bend in bench.bends if bend > 1],
    }
    for kind, bends in kinds.items():
        masks = {spread(bench.steps, count, bench.steps - before, bend) for before in range(3) for bend in bends}
        masks = sorted(mask for mask in masks if sum(mask) == count)
        for name, predictor in predictors(bench.pipe, bench.steps).items():
            candidates = [Candidate(DitCacheConfig(policy=Mask(m), predictor=predictor), picture(m)) for m in masks]
            screened = [(fmean(bench.measure(each.config, SCREEN)[0]), each) for each in candidates]
            shown, speedup, values = bench.best(screened)
            group = "harder" if kind == "shrinking" else "baseline"
            yield Row(target, f"{kind} intervals, {name}", group, shown, len(screened), speedup, values)


def spread(steps: int, count: int, end: int, bend: float) -> tuple[int, ...]:
    """A mask with so many refreshes, as the module's text has it."""
    chosen: set[int] = set()
    for k in range(count):
        share = k / (count - (end < steps))
        place = round(end * (1 - (1 - share) ** bend))
        while place in chosen:
            place += 1
        chosen.add(place)
    return tuple(int(step in chosen) for step in range(steps))


def predictors(pipe: EmojiPipeline, steps: int) -> dict[str, Predictor]:
    """Those that need no calibration. Where σ falls by equal steps, a line by step number is the line in σ."""
    found: dict[str, Predictor] = {"Reuse": Reuse(), "Linear": Linear()}
    if equal_steps(pipe, steps):
        return found
    return {**found, "Taylor 1 by step": Taylor(1, axis="step")}


def equal_steps(pipe: EmojiPipeline, steps: int) -> bool:
    """Whether all steps are at equal distances in σ."""
    pipe.scheduler.set_timesteps(steps)
    falls = pipe.scheduler.sigmas[:-1].double().diff()  # the last is where the last step leads
    return bool((falls - falls.mean()).abs().max() < 1e-5)


def picture(mask: Sequence[int]) -> str:
    return "".join("○●"[bit] for bit in mask)


# -- output -----------------------------------------------------------------------------------------------------


def measure(bench: Bench, targets: Sequence[float], kept: Sequence[Row]) -> Iterator[Row]:
    """All rows, one by one; those that need no search are measured only if none are kept."""
    for target in targets:
        yield from searched(bench, target)
        if kept:
            yield from (row for row in kept if row.target == target)
        else:
            yield from static(bench, target)
            yield from schedules(bench, target)


def rows_without_a_search(file: Path) -> tuple[list[Row], str]:
    """Rows of an earlier run, and the machine that it was made on."""
    before = json.loads(file.read_text(encoding="utf-8"))
    names = {each.name for each in fields(Row)}
    rows = [Row(**{name: row[name] for name in names}) for row in before["rows"] if row["group"] != "own"]
    made_on = before["about"].rpartition("\n")[2].partition(";")[0]
    return [replace(row, psnr=tuple(row.psnr)) for row in rows], made_on


def tables(rows: Sequence[Row], about: str, steps: int) -> str:
    """Markdown: a summary, then a table and the schedules for each target."""
    lines = [f"# What a search finds, at equal numbers of blocks run: {steps} steps", "", about]
    targets = list(dict.fromkeys(row.target for row in rows))
    lines += ["", "| | search | best that needs none | difference | best of shrinking intervals | difference |"]
    lines += ["|---" * 6 + "|"]
    for target in targets:
        found = next(row for row in rows if (row.target, row.method) == (target, FOUND))
        cells = [f"{target:g}x", f"**{found.mean:.1f}**"]
        for group in ("baseline", "harder"):
            others = [row for row in rows if (row.target, row.group) == (target, group)]
            if best := max(others, key=lambda row: row.mean, default=None):
                cells += [f"{best.mean:.1f}: {best.method}", difference(found, best)]
        lines.append(f"| {' | '.join(cells)} |")
    for target in targets:
        here = [row for row in rows if row.target == target]
        head = ("", "PSNR", "blocks", "search better by", "run equivalents", "seconds", "tried")
        lines += ["", f"## {target:g}x fewer blocks", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        lines += [f"| {' | '.join(cells_of(row, here[0]))} |" for row in here]
        lines += ["", "```text", *(f"{row.method:<34}{row.shown}" for row in here), "```"]
    return "\n".join(lines) + "\n"


def cells_of(row: Row, found: Row) -> list[str]:
    """Of a line of a target's table."""
    spent = ["", ""] if row.run_equivalents is None else [f"{row.run_equivalents:.2f}", f"{row.seconds:.0f}"]
    name, better = (f"**{row.method}**", "") if row is found else (row.method, difference(found, row))
    return [name, f"{row.mean:.1f} / {min(row.psnr):.1f}", f"{row.speedup:.2f}×", better, *spent, str(row.tried)]


def difference(found: Row, other: Row) -> str:
    mean, low, high = found.over(other)
    return f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``search_STEPS.json`` and ``search_STEPS.md``, again after every row."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--steps", type=int, default=28, help="default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="eight pictures, few schedules, 2x only")
    parser.add_argument("--searches", action="store_true", help="measure the searches alone again")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    (pipe := load_pipeline()).set_progress_bar_config(disable=True)
    small = {"captions": CAPTIONS[::4], "bends": (0.75, 1.0, 1.3)} if options.quick else {}
    bench = Bench(pipe, options.steps, **small)
    line = "which is that by step number too, as σ falls by equal steps" if equal_steps(pipe, options.steps) else "in σ"
    about = (
        f"PSNR in dB to the uncached run, mean / worst of {len(bench.test)} pictures ({len(bench.captions)} captions, "
        f"{len(TEST_SEEDS)} seeds each), {bench.steps} steps,\nguidance {GUIDANCE:g}; how many times fewer blocks ran; "
        f"by how much the search is better, mean by picture with a 95 % interval;\nwhat finding it took, in block "
        f"executions of one uncached run (run equivalents) and seconds; how many were tried. The plans\nwere searched "
        f"with {len(CALIBRATION)} other captions and seeds, and the static configurations chosen with them; the last "
        f"{FINALISTS} of these, and\nall that follow, were chosen on the test pictures themselves. Linear: the line "
        f"through the last two residuals,\n{line}.\n\n"
        f"{machine()}, diffusers {version('diffusers')}, dithooks {dithooks.__version__}"
    )
    stem, rows, kept = options.out / f"search_{options.steps}", [], []
    if options.searches:
        kept, made_on = rows_without_a_search(stem.with_suffix(".json"))
        about += f"; what needs no search is of an earlier run,\non {made_on}"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in measure(bench, (2.0,) if options.quick else TARGETS, kept):
            rows.append(row)
            seconds = time.perf_counter() - begun
            print(
                f"{seconds:5.0f} s  {row.target:g}x {row.method}: {row.mean:.2f} / {min(row.psnr):.2f} @ "
                f"{row.speedup:.3f}x  {row.shown}",
                flush=True,
            )
            results = {"about": about, "steps": options.steps, "calibration": CALIBRATION, "test": bench.test}
            results |= {"seconds": seconds, "warnings": sorted({str(each.message) for each in caught})}
            write_text(
                stem.with_suffix(".json"),
                json.dumps({**results, "rows": [each.to_dict() for each in rows]}, indent=1) + "\n",
            )
            taken = f"{about}; {seconds:.0f} s in all"
            write_text(stem.with_suffix(".md"), tables(rows, taken, options.steps))


if __name__ == "__main__":
    main()
