"""Runs without a cache and with each of several, in turns, and how they differ."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from ..environment.machine import synchronize
from ..errors import TargetError
from ..handle import dit_cache
from ..progress_bars import ProgressReport
from ..recording.image_metrics import Samples, Score, samples_of
from ..recording.image_metrics import compare as scored
from ..stats.types import CacheStats
from ..stats.warning_collector import collect_warnings
from .cache_settings import Setting, cached, summary
from .messages import one_line
from .targets.runnable import Runnable

MOST = 8  # samples in the picture


@dataclass(frozen=True)
class Outcome:
    """What was seen of one setting.

    Args:
        setting: which.
        stats: of its first run.
        decisions: of that, as :func:`~dithooks.cli.cache_settings.summary` has them.
        score: of what it drew.
        samples: the first of these.
        remarks: what the cache had to say.
        seconds: of the timed runs.
        speedups: over the uncached run of the same round.
    """

    setting: Setting
    stats: CacheStats
    decisions: dict[str, Any]
    score: Score
    samples: Samples
    remarks: tuple[str, ...]
    seconds: tuple[float, ...] = ()
    speedups: tuple[float, ...] = ()

    @property
    def speedup(self) -> float:
        """Median: the two runs of a pair met the same weather on the machine."""
        return median(self.speedups)

    def to_dict(self) -> dict[str, Any]:
        """The numbers, fit for JSON: infinity is written as a word, as in plans."""
        told = self.setting.to_dict() | {"seconds": [round(each, 4) for each in self.seconds]}
        told |= {"speedup": round(self.speedup, 4), "blocks_run": self.stats.blocks_run}
        told |= {"blocks_total": self.stats.blocks_total, "bytes_peak": self.stats.bytes_peak}
        scores = {name: value if value is None else _finite(value) for name, value in asdict(self.score).items()}
        return told | scores | {"decisions": self.decisions, "remarks": list(self.remarks)}


@dataclass(frozen=True)
class Comparison:
    """All that was seen.

    Args:
        seconds: of the timed runs without a cache.
        samples: the first that these drew.
        outcomes: of the settings, in the order asked for.
        again: PSNR in dB of a second run without a cache against the first; infinite if it draws the same.
    """

    seconds: tuple[float, ...]
    samples: Samples
    outcomes: tuple[Outcome, ...]
    again: float

    def to_dict(self) -> dict[str, Any]:
        """The numbers, fit for JSON."""
        plain = {"seconds": [round(each, 4) for each in self.seconds], "psnr_of_another_run": _finite(self.again)}
        return {"uncached": plain, "settings": [each.to_dict() for each in self.outcomes]}


def measure(subject: Runnable, settings: Sequence[Setting], pairs: int, report: ProgressReport) -> Comparison:
    """Run without a cache and with each, once for the pictures and ``pairs`` times for the time.

    Raises:
        TargetError: a setting is for another model, or cannot be used here.
    """
    for setting in settings:  # before the first run: it may take minutes
        with _named(setting), collect_warnings([]), one_line():
            dit_cache(subject.target, setting.config).remove()
    total, done = (1 + len(settings)) * (1 + pairs), 0

    def run(name: str) -> tuple[Any, float]:
        nonlocal done
        report(name, done, total)
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
                raise TargetError("TARGET's run made no step with the cache: what is run has to be what is returned")
            score = scored(samples, reference)
        outcomes.append(Outcome(setting, stats, decisions, score, samples[:MOST], tuple(remarks)))
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
    return Comparison(tuple(seconds[0]), reference[:MOST], tuple(timed), again)


class _named:
    """Errors say of which setting they are."""

    def __init__(self, setting: Setting) -> None:
        self._name = setting.name

    def __enter__(self) -> None:
        return None

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, TargetError):
            raise TargetError(f"{self._name}: {error}") from error


def _finite(value: float) -> float | str:
    return float(f"{value:.6g}") if math.isfinite(value) else str(value)
