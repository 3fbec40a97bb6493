"""Runs without a cache and with each of several settings, in turns, and how they differ."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from ..environment.machine import synchronize
from ..errors import DitHooksError, TargetError, UsageError
from ..handle import dit_cache
from ..progress_bars import ProgressReport
from ..recording.image_metrics import Metric, Samples, Score, samples_of
from ..recording.image_metrics import compare as scored
from ..stats.types import CacheStats
from ..stats.warning_collector import collect_warnings
from .cache_settings import CacheSetting, cached, summary
from .messages import one_line
from .targets.runnable import Runnable

PICTURED = 8  # samples in the picture


@dataclass(frozen=True)
class Outcome:
    """The measurements of one setting.

    Args:
        setting: the setting.
        stats: the statistics of its first run.
        decisions: the decisions of its first run, by :func:`~dithooks.cli.cache_settings.summary`.
        score: the distance of its samples from those without a cache.
        samples: the first of its samples, for the picture.
        remarks: the warnings of the cache.
        seconds: the time of each timed run.
        speedups: the speed-up of each timed run over the uncached run of the same pair.
    """

    setting: CacheSetting
    stats: CacheStats
    decisions: dict[str, Any]
    score: Score
    samples: Samples
    remarks: tuple[str, ...]
    seconds: tuple[float, ...] = ()
    speedups: tuple[float, ...] = ()

    @property
    def speedup(self) -> float:
        """The median over the pairs: the two runs of a pair found the machine in the same state."""
        return median(self.speedups)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, fit for JSON: infinity is written as a word, as in plans."""
        numbers = self.setting.to_dict() | {"seconds": [round(seconds, 4) for seconds in self.seconds]}
        numbers |= {"speedup": round(self.speedup, 4), "blocks_run": self.stats.blocks_run}
        numbers |= {"blocks_total": self.stats.blocks_total, "bytes_peak": self.stats.bytes_peak}
        scores = {name: value if value is None else _finite(value) for name, value in asdict(self.score).items()}
        return numbers | scores | {"decisions": self.decisions, "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Comparison:
    """The measurements of all settings, and of the runs without a cache.

    Args:
        seconds: the time of each timed run without a cache.
        samples: the first samples without a cache, for the picture.
        outcomes: the measurements of each setting, in the order given.
        again: PSNR in dB of a second run without a cache against the first; infinite if it draws the same.
    """

    seconds: tuple[float, ...]
    samples: Samples
    outcomes: tuple[Outcome, ...]
    again: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers, fit for JSON."""
        plain = {"seconds": [round(seconds, 4) for seconds in self.seconds], "psnr_of_another_run": _finite(self.again)}
        return {"uncached": plain, "settings": [outcome.to_dict() for outcome in self.outcomes]}


def measure(
    subject: Runnable,
    settings: Sequence[CacheSetting],
    pairs: int,
    report: ProgressReport,
    metrics: Collection[Metric] = (),
) -> Comparison:
    """Run without a cache and with each setting, once for the pictures and ``pairs`` times for the time.

    Args:
        subject: the pipeline or model, and its run.
        settings: the ways to cache.
        pairs: timed runs of each.
        report: called before each run with its name, the number of runs done and of all.
        metrics: the measures, as for :func:`~dithooks.recording.image_metrics.compare`.

    Raises:
        UsageError: a setting is for another model, or cannot be used here; the message begins with its name.
    """
    for setting in settings:  # before the first run: it may take minutes
        with _named(setting), collect_warnings([]), one_line():
            dit_cache(subject.target, setting.config).remove()
    total, done = (1 + len(settings)) * (1 + pairs), 0

    def run(name: str) -> tuple[Any, float]:
        nonlocal done
        report(name, done, total)
        gc.collect()  # else it may fall into one run and not into the other
        synchronize(subject.device)
        begin = time.perf_counter()
        result = subject.run()
        synchronize(subject.device)
        done += 1
        return result, time.perf_counter() - begin

    with one_line():
        reference = samples_of(run("without a cache")[0])
    outcomes = []
    for setting in settings:
        remarks: list[str] = []
        with _named(setting), cached(subject.target, setting, remarks) as handle:
            samples = samples_of(run(setting.name)[0])
            stats, decisions = handle.stats, summary(handle.decisions, 0)
            if not stats.calls:
                raise TargetError("MODEL's run made no step with the cache: what is run has to be what is returned")
            score = scored(samples, reference, metrics)
        outcomes.append(Outcome(setting, stats, decisions, score, samples[:PICTURED], tuple(remarks)))
    seconds, again = [list[float]() for _ in range(1 + len(settings))], math.inf
    for number in range(pairs):
        order = range(1 + len(settings))
        for which in order if number % 2 == 0 else reversed(order):  # a machine that slows down favours none
            if which == 0:
                result, spent = run("without a cache")
                if number == 0:
                    again = scored(samples_of(result), reference).psnr
            else:
                setting = settings[which - 1]
                with _named(setting), cached(subject.target, setting, [], verify=False):
                    _, spent = run(setting.name)
            seconds[which].append(spent)
    timed = [
        replace(each, seconds=tuple(own), speedups=tuple(p / c for p, c in zip(seconds[0], own, strict=True)))
        for each, own in zip(outcomes, seconds[1:], strict=True)
    ]
    return Comparison(tuple(seconds[0]), reference[:PICTURED], tuple(timed), again)


class _named:
    """Begin the message of an error in the block with the name of the setting."""

    def __init__(self, setting: CacheSetting) -> None:
        self._name = setting.name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, DitHooksError):
            raise UsageError(f"{self._name}: {error}") from error


def _finite(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
