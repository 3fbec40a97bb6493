"""When to reuse and what to add: every policy with every predictor, at equal numbers of blocks run.

``python -m bench.policies --out bench/results`` writes ``policies.json`` and ``policies.md``; ``--quick`` tries it out.

The shipped demo pipeline draws the evaluation captions in 28 steps at guidance 3.0 (two calls a step, 12 blocks),
without the cache and with each pair at 1.5, 2 and 3 times fewer block executions. A picture's PSNR is that to its
uncached twin, in floats of 0…1. What has to be known beforehand comes from calibration captions and seeds that are not
evaluated: magnitude ratios, fitted coefficients, and thresholds, which are found for each predictor by bisection, until
the speed-up in blocks is within 2% of the target or six tries are over; the nearest counts. Policies that look at the
picture draw each in a run of its own. The others decide alike for all of them and draw them in one batch, which gives
the same pictures; only they are measured with the predictors by step number, as σ falls by equal steps here, so that
these have the very weights of those in σ. Warm-up is a sixth of the steps computed, EasyCache's two at least.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

import dithooks
from dithooks import Budget, DitCacheConfig, EasyCache, Fitted, Interval, Linear, MagnitudeRatio, Mask, Reuse, Taylor
from dithooks.demo import load_pipeline
from dithooks.demo.demonstration import psnr
from dithooks.demo.draw import CAPTIONS
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.environment.machine import machine
from dithooks.policies.history import BranchHistory, Schedule
from dithooks.policies.policy import Policy
from dithooks.policies.threshold import Threshold
from dithooks.predictors.predictor import Predictor
from dithooks.profiling.profile import Profile, profile
from dithooks.storage.replacement import write_text

Names = tuple[str, ...]
CALIBRATION = ("cat face", "watermelon", "taxi", "grinning face")
SEED, SEED_BEFORE = 0, 1000  # of the first caption; the next has the next
STEPS, GUIDANCE = 28, 3.0
TARGETS = {1.5: "slow", 2.0: "medium", 3.0: "fast"}  # and the presets for them
NEAR, TRIES, WITHIN = 0.02, 6, 0.05  # of the target: a threshold is good, so often it is tried; a row has landed
LOOKING: tuple[Predictor, ...] = (Reuse(), Linear(), Taylor(2))
FIXED: tuple[Predictor, ...] = (*LOOKING, Taylor(1, axis="step"), Taylor(2, axis="step"))


@dataclass(frozen=True)
class Entry:
    """A policy, made for a target and, where it has a ``guess``, a threshold; ``first`` block of the range."""

    name: str
    make: Callable[[float, float], Policy]
    first: int = 0
    guess: float | None = None

    def config(self, target: float, threshold: float, predictor: Predictor) -> DitCacheConfig:
        return DitCacheConfig(cache_block_start=self.first, policy=self.make(target, threshold), predictor=predictor)


@dataclass(frozen=True)
class Row:
    """One measurement: ``speedup`` is blocks of the uncached runs over those that ran, PSNR in dB by picture."""

    policy: str
    predictor: str
    target: float
    parameters: str
    speedup: float
    psnr_mean: float
    psnr_min: float
    psnr: tuple[float, ...]

    @property
    def landed(self) -> bool:
        return abs(self.speedup / self.target - 1) <= WITHIN


def entries(ratios: tuple[tuple[float, ...], ...]) -> list[Entry]:
    """All that are measured."""
    return [
        Entry("Interval", lambda to, _: interval(to)),
        Entry("Mask, preset", lambda to, _: Mask(TARGETS[to])),
        Entry("Mask, even", lambda to, _: Mask(even(round(STEPS / to)))),
        Entry("MagnitudeRatio", lambda to, x: MagnitudeRatio(ratios, x, retention_ratio=warmup(to) / STEPS), guess=0.1),
        Entry("EasyCache", lambda to, x: EasyCache(x, max_warmup_steps=max(2, warmup(to))), guess=0.1),
        Entry("Threshold, F=0", lambda to, x: Threshold(x, max_warmup_steps=warmup(to)), guess=0.1),
        Entry("Threshold, F=1", lambda to, x: Threshold(x, max_warmup_steps=warmup(to)), first=1, guess=0.1),
        Entry("Mask + Threshold, F=1", both, first=1, guess=0.1),
        Entry("Budget, F=0", lambda to, _: Budget(to)),
        Entry("Budget, F=1", lambda to, _: Budget(to), first=1),
    ]


def warmup(target: float) -> int:
    """A sixth of the computed steps, as the presets and budgets have it."""
    return max(1, int(STEPS / target) // 6)


def interval(target: float) -> Interval:
    """The one that lands nearest to the target; of several, the shortest, and that which starts first."""
    choices = [Interval(start, every) for every in range(2, STEPS) for start in range(STEPS)]
    computed = {each: each.start - (each.start - STEPS) // each.interval for each in choices}
    return min(choices, key=lambda each: abs(math.log(computed[each] * target / STEPS)))


def even(count: int) -> tuple[int, ...]:
    """A mask with so many refreshes, at equal distances."""
    places = {round(STEPS * k / count) for k in range(count)}
    return tuple(int(step in places) for step in range(STEPS))


def both(target: float, threshold: float) -> Mask:
    """Half of the refreshes at equal distances, others where the threshold puts them."""
    return Mask(even(round(STEPS / target / 2)), dynamic=Threshold(threshold, max_warmup_steps=warmup(target)))


@cache
def recorded(pipe: EmojiPipeline, prompts: Names) -> Profile:
    """One uncached run of the prompts, in a batch, watched."""
    return profile(pipe, lambda: draw(pipe, prompts, SEED_BEFORE), DitCacheConfig(0, 2))


def recorded_ratios(pipe: EmojiPipeline, prompts: Names) -> tuple[tuple[float, ...], ...]:
    """For :class:`MagnitudeRatio`: a list a branch."""
    return recorded(pipe, prompts).ratios()


def fitted(pipe: EmojiPipeline, prompts: Names, mask: Sequence[int]) -> Fitted:
    """The predictor for a mask whose coefficients fit the prompts best."""
    return recorded(pipe, prompts).fitted(mask)


def draw(pipe: EmojiPipeline, prompts: Names, seed: int) -> Tensor:
    """Pictures (batch, 3, 32, 32) in 0…1, each from a seed of its own."""
    return pipe(
        prompts,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        generator=[torch.Generator().manual_seed(seed + number) for number in range(len(prompts))],
        output_type="pt",
    ).images


def cached(pipe: EmojiPipeline, config: DitCacheConfig, prompts: Names, seed: int) -> tuple[Tensor, float]:
    """Pictures, and how many times fewer blocks they took."""
    with dithooks.dit_cache(pipe, config) as handle:
        if config.when.metric is None:
            pictures = draw(pipe, prompts, seed)
        else:
            pictures = torch.cat([draw(pipe, (prompt,), seed + number) for number, prompt in enumerate(prompts)])
        return pictures, handle.stats.blocks_total / handle.stats.blocks_run


def tuned(pipe: EmojiPipeline, entry: Entry, target: float, what: Predictor, guess: float) -> float:
    """Of the thresholds tried, the one whose speed-up is nearest to the target."""
    low, high, best = 0.0, math.inf, (math.inf, guess)
    for _ in range(TRIES):
        miss = math.log(cached(pipe, entry.config(target, guess, what), CALIBRATION, SEED_BEFORE)[1] / target)
        best = min(best, (abs(miss), guess))
        if best[0] < NEAR:
            break
        low, high = (guess, high) if miss < 0 else (low, guess)
        guess = math.sqrt(low * high) if 0 < low < high < math.inf else guess * 1.3 ** (1 if miss < 0 else -1)
    return best[1]


def predictors(pipe: EmojiPipeline, policy: Policy) -> tuple[Predictor, ...]:
    """Those that a policy is measured with."""
    if policy.metric is not None:
        return LOOKING
    if not isinstance(policy, (Interval, Mask)):
        return FIXED
    made, known = policy.for_run(Schedule(STEPS)), Schedule(STEPS)
    return *FIXED, fitted(
        pipe, CALIBRATION, [not made.before(step, BranchHistory(), known).reuse for step in range(STEPS)]
    )


def measure(pipe: EmojiPipeline, targets: Sequence[float], prompts: Names) -> Iterator[Row]:
    """All rows, one by one."""
    plain = draw(pipe, prompts, SEED)
    for entry in entries(recorded_ratios(pipe, CALIBRATION)):
        threshold = entry.guess or 0.0
        for target in targets:
            for predictor in predictors(pipe, entry.make(target, threshold)):
                if entry.guess is not None:  # where one predictor's threshold is, the next one's is near
                    threshold = tuned(pipe, entry, target, predictor, threshold)
                config = entry.config(target, threshold, predictor)
                pictures, speedup = cached(pipe, config, prompts, SEED)
                values = psnr(pictures, plain)
                name = "Fitted" if isinstance(predictor, Fitted) else str(predictor)
                what = (entry.name, name, target, str(config.when))
                yield Row(*what, speedup, fmean(values), min(values), values)


def tables(rows: Sequence[Row], about: str) -> str:
    """Markdown: a table for each target; policies down, predictors across."""
    lines = ["# Policies and predictors at equal numbers of blocks run", "", about]
    columns = list(dict.fromkeys(row.predictor for row in rows))
    for target in dict.fromkeys(row.target for row in rows):
        lines += ["", f"## {target:g}x fewer blocks", "", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1)]
        for name in dict.fromkeys(row.policy for row in rows if row.target == target):
            here = {row.predictor: row for row in rows if (row.policy, row.target) == (name, target)}
            best = max((row.psnr_mean for row in here.values() if row.landed), default=math.inf)
            missed = "" if all(row.landed for row in here.values()) else f" (†: not within {WITHIN:.0%})"
            shown = (cell(here[column], best) if column in here else "" for column in columns)
            lines.append(" | ".join([f"| {name}{missed}", *shown]) + " |")
    return "\n".join(lines) + "\n"


def cell(row: Row, best: float) -> str:
    """Mean, worst and speed-up; the row's best in bold."""
    mean = f"**{row.psnr_mean:.1f}**" if row.psnr_mean == best else f"{row.psnr_mean:.1f}"
    return f"{mean} / {row.psnr_min:.1f} @ {row.speedup:.2f}×{'' if row.landed else '†'}"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``policies.json`` and ``policies.md``, again after every policy."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="four captions, 2x only")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    prompts = CAPTIONS[::4] if options.quick else CAPTIONS
    targets = (2.0,) if options.quick else tuple(TARGETS)
    (pipe := load_pipeline()).set_progress_bar_config(disable=True)
    about = (
        f"PSNR in dB to the uncached run, mean / worst of {len(prompts)} captions, and the speed-up in blocks reached; "
        f"bold: the best of a row.\n{STEPS} steps, guidance {GUIDANCE:g}; calibrated on {len(CALIBRATION)} other "
        f"captions and seeds. F: blocks before the range, which always run.\n\n{machine()}, "
        f"diffusers {version('diffusers')}, dithooks {dithooks.__version__}"
    )
    results: dict[str, Any] = {"about": about, "evaluation": prompts, "calibration": CALIBRATION}
    rows: list[Row] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in measure(pipe, targets, prompts):
            rows.append(row)
            print(f"{row.target:g}x {row.policy}, {row.predictor}: {cell(row, math.inf)}  {row.parameters}", flush=True)
            results |= {"warnings": sorted({str(each.message) for each in caught}), "rows": [*map(asdict, rows)]}
            write_text(options.out / "policies.json", json.dumps(results, indent=1) + "\n")
            write_text(options.out / "policies.md", tables(rows, about))


if __name__ == "__main__":
    main()
