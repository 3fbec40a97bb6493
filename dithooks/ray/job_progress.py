"""The progress of a job on the terminal: each actor, and all together."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Any

import ray

from ..progress_bars import ProgressBar, ProgressDisplay

POLL_SECONDS = 0.5  # between two questions to the progress actor
TIMEOUT = 5.0  # seconds that an answer is waited for
LINE_EVERY = 10.0  # seconds between two lines, where there is no terminal
Progress = dict[str, tuple[int, int]]  # by actor: rows that are through, and how many of these failed


class ProgressActor:
    """An actor of Ray that collects what drawing actors report, for the driver to show.

    Example:
        >>> actor = ProgressActor()
        >>> actor.report("chunk a", "1f2e", 2, 0)
        >>> actor.report("chunk b", "9c8d", 4, 1)
        >>> actor.report("chunk a", "9c8d", 1, 0)  # once more, as the process of the other has ended
        >>> actor.progress()
        {'1f2e': (0, 0), '9c8d': (5, 1)}
    """

    def __init__(self) -> None:
        self._chunks: dict[str, tuple[str, int, int]] = {}
        self._actors: dict[str, None] = {}

    def report(self, chunk: str, actor: str, through: int, failed: int) -> None:
        """Note how many of a chunk's rows are through, and how many of these failed."""
        self._actors[actor] = None
        self._chunks[chunk] = (actor, through, failed)

    def progress(self) -> Progress:
        """Add up by actor the rows that are through, and those of them that failed."""
        sums = dict.fromkeys(self._actors, (0, 0))
        for actor, through, failed in self._chunks.values():
            sums[actor] = (sums[actor][0] + through, sums[actor][1] + failed)
        return sums


@contextmanager
def job_progress(total: int, verbose: bool) -> Iterator[Any]:
    """Show on stderr what actors report meanwhile; a failure to do so is ignored.

    Args:
        total: rows of the job.
        verbose: show progress at all.

    Yields:
        The actor to report to; ``None``: there is none.
    """
    collector: Any = None
    if verbose:
        with suppress(Exception):
            collector = ray.remote(num_cpus=0)(ProgressActor).remote()
    if collector is None:
        yield None
        return
    ended: SimpleQueue[None] = SimpleQueue()  # to put something never waits, also where a fork has met a reader
    watcher = threading.Thread(target=_watch, args=(collector, total, ended), daemon=True)
    watcher.start()
    try:
        yield collector
    finally:
        ended.put(None)
        watcher.join(TIMEOUT)
        with suppress(Exception):
            ray.kill(collector)


def _watch(collector: Any, total: int, ended: SimpleQueue[None]) -> None:
    display = ProgressDisplay(LINE_EVERY)
    with suppress(Exception):
        over = False
        while not over:
            with suppress(Empty):
                ended.get(timeout=POLL_SECONDS)
                over = True
            with suppress(ray.exceptions.GetTimeoutError):
                display.show(*bars_of(ray.get(collector.progress.remote(), timeout=TIMEOUT), total))
    display.close()


def bars_of(progress: Progress, total: int) -> tuple[ProgressBar, list[ProgressBar]]:
    """A bar for all rows, and one for each actor.

    Example:
        >>> whole, parts = bars_of({"1f2e": (2, 0), "9c8d": (3, 1)}, 8)
        >>> print(whole, *parts, sep="; ")
        all: 5 of 8 rows, 1 failed; actor 1f2e: 2; actor 9c8d: 3, 1 failed
    """
    through, failed = (sum(counts[part] for counts in progress.values()) for part in (0, 1))
    parts = [ProgressBar(f"actor {name}", *_counted(*counts, None)) for name, counts in progress.items()]
    return ProgressBar("all", *_counted(through, failed, total), unit="rows"), parts


def _counted(through: int, failed: int, total: int | None) -> tuple[int, int | None, str]:
    return through, total, f"{failed} failed" if failed else ""
