"""Progress on stderr: bars on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol

ProgressCallback = Callable[[str, int, int | None], None]  # stage, done, total; None where the total is unknown
LINE_EVERY = 10.0  # seconds from one line of a log to the next, at first; later a tenth of the time so far
NARROW = 80  # columns of a terminal, below which bars are short


class ProgressReport(Protocol):
    """A progress callback that takes a note, too."""

    def __call__(
        self, stage: str, done: int, total: int | None, note: str = "", seconds_left: float | None = None
    ) -> None:
        """Show how far a stage is.

        Args:
            stage: the present work; its bar replaces that of another stage.
            done: how much of the stage is done.
            total: how much there is to do; ``None``: unknown.
            note: a text behind the bar, such as the best result so far.
            seconds_left: until all is done, further stages included; ``None``: estimated from ``done`` and ``total``.
        """


@dataclass(frozen=True)
class ProgressBar:
    """One bar: its title, its count, a note behind it, the unit of the count, and the time that is left.

    Example:
        >>> print(ProgressBar("run plans", 1, 5, "best 45.2 dB", seconds_left=95))
        run plans: 1 of 5, best 45.2 dB, about 2 min left
    """

    title: str
    done: int
    total: int | None
    note: str = ""
    unit: str = ""
    seconds_left: float | None = None

    @property
    def count(self) -> str:
        """The amount done, and of how much if known; empty before the first unit of an unknown amount."""
        if not self.done and self.total is None:
            return ""
        count = str(self.done) if self.total is None else f"{self.done} of {self.total}"
        return f"{count} {self.unit}".rstrip()

    def __str__(self) -> str:
        count = self.count and f": {self.count}"
        left = "" if self.seconds_left is None else f", about {time_left(self.seconds_left)}"
        return f"{self.title}{count}{self.note and f', {self.note}'}{left}"


def time_left(seconds: float) -> str:
    """Return the time that is left as a text, no more exact than an estimate is.

    Example:
        >>> [time_left(seconds) for seconds in (0.4, 44, 95, 600, 5400, 200_000)]
        ['1 s left', '44 s left', '2 min left', '10 min left', '1.5 h left', '56 h left']
    """
    if seconds < 59.5:
        return f"{max(1, round(seconds))} s left"
    if seconds < 3570:
        return f"{round(seconds / 60)} min left"
    hours = seconds / 3600
    return f"{hours:.1f} h left" if hours < 9.95 else f"{hours:.0f} h left"


@contextmanager
def progress(verbose: bool = True) -> Iterator[ProgressDisplay]:
    """Show on stderr the progress that is reported inside, and leave the terminal as it was.

    Args:
        verbose: write to stderr at all. Of several processes only rank 0 should: ``verbose and is_rank_0()``.

    Example:
        >>> with progress(verbose=False) as report:
        ...     report("verify", 1, 5, "best so far 45.2 dB at 2.01×")
    """
    display = ProgressDisplay(LINE_EVERY)
    if not verbose:
        display.close()
    try:
        yield display
    finally:
        display.close()


class ProgressDisplay:
    """A display on stderr that appears with the first report.

    On a terminal it shows bars of ``rich``, or else of ``tqdm``, if one of them is installed; elsewhere it writes
    lines. A display that fails, for instance because stderr is closed, is given up without an error.

    Args:
        line_every: seconds from one line to the next where there are no bars; after ten times as long, a tenth of the
            time so far.
    """

    def __init__(self, line_every: float) -> None:
        self._line_every = line_every
        self._display: _Display | None = None
        self._open = True
        self._pace = _Pace()

    def __call__(
        self, stage: str, done: int, total: int | None, note: str = "", seconds_left: float | None = None
    ) -> None:
        """Show how far a stage is."""
        if seconds_left is None:
            seconds_left = self._pace.seconds_left(done, total)
        self.show(ProgressBar(stage, done, total, note, seconds_left=seconds_left))

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        """Show a bar, and its parts below: who did how much of it."""
        if not self._open:
            return
        try:
            self._display = self._display or _new_display(self._line_every)
            self._display.show(bar, parts)
        except Exception:
            self.close()

    def remark(self, line: str) -> None:
        """Write a line that stays, above the bars of what follows."""
        if self._open and sys.stderr is not None:  # else it would be printed to stdout
            self._take_off()
            with suppress(Exception):
                print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Take the bars off the terminal; later reports are ignored."""
        self._open = False
        self._take_off()

    def _take_off(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            with suppress(Exception):
                display.close()


def is_terminal() -> bool:
    """Whether stderr is a terminal that can show bars."""
    return sys.stderr is not None and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


class _Pace:
    """The pace at which something is done; it is measured afresh where another thing is."""

    def __init__(self) -> None:
        self._total: int | None = None
        self._done = self._first = 0
        self._begun_at = 0.0

    def seconds_left(self, done: int, total: int | None) -> float | None:
        """Return the time until all is done, at the pace so far; ``None``: not known."""
        now = time.monotonic()
        if total != self._total or done < self._done:
            self._total, self._first, self._begun_at = total, done, now
        self._done = done
        if total is None or done <= self._first:
            return None
        return (now - self._begun_at) / (done - self._first) * (total - done)


class _Display(Protocol):
    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None: ...

    def close(self) -> None: ...


def _new_display(line_every: float) -> _Display:
    # rich is not asked: with the environment variables of CI, it takes a log for a terminal
    if not is_terminal():
        return _Lines(line_every)
    for kind in (_Rich, _Tqdm):
        with suppress(ImportError):
            return kind()
    return _Lines(line_every)


class _Lines:
    """A line for each new stage, one after so many seconds, and a last one."""

    def __init__(self, every: float) -> None:
        self._every = every
        self._stage: str | None = None
        self._line = self._state = self._printed = ""
        self._begun_at = self._printed_at = time.monotonic()

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        self._line = _line(bar, parts)
        self._state = _line(replace(bar, seconds_left=None), parts)
        now = time.monotonic()
        is_overdue = now - self._printed_at >= max(self._every, (now - self._begun_at) / 10)
        if bar.title != self._stage or is_overdue:
            self._stage = bar.title
            self._print()

    def close(self) -> None:
        self._line = self._state
        self._print()

    def _print(self) -> None:
        if self._state != self._printed and sys.stderr is not None:  # else it would be printed to stdout
            print(self._line, file=sys.stderr, flush=True)
            self._printed, self._printed_at = self._state, time.monotonic()


class _Rich:
    """Bars of ``rich``, each in one line; other output stays above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeElapsedColumn
        from rich.table import Column
        from rich.text import Text

        class Words(ProgressColumn):
            """A text of a bar; one that may be cut is, where the line is too short for it."""

            def __init__(self, words: Callable[[Task], str], may_be_cut: bool = False) -> None:
                super().__init__(Column(no_wrap=not may_be_cut))
                self.words = words

            def render(self, task: Task) -> Text:
                return Text(self.words(task), no_wrap=True, overflow="ellipsis")

        def left(task: Task) -> str:
            until = task.fields["until"]
            return "" if until is None else time_left(until - time.monotonic())

        console = Console(stderr=True, force_terminal=True)
        wide = console.width >= NARROW
        columns = [
            Words(lambda task: task.description),
            BarColumn(30 if wide else 8, table_column=Column(no_wrap=True)),
            Words(lambda task: str(task.fields["count"])),
            *([TimeElapsedColumn(Column(no_wrap=True))] if wide else []),
            Words(left),
            Words(lambda task: str(task.fields["note"]), may_be_cut=True),
        ]
        self._bars = Progress(
            *columns,
            console=console,
            refresh_per_second=2,  # the work that is shown needs the processor
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # results have to reach a pipe
        )
        self._tasks: dict[str, Any] = {}

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        for title in self._tasks.keys() - {each.title for each in (bar, *parts)}:
            self._bars.remove_task(self._tasks.pop(title))
        for each in (bar, *parts):  # a part's bar shows its share of the stage
            part = each is not bar
            count, note = (", ".join(filter(None, [each.count, each.note])), "") if part else (each.count, each.note)
            fields: dict[str, Any] = {"total": bar.total, "completed": each.done, "count": count}
            until = None if each.seconds_left is None else time.monotonic() + each.seconds_left
            fields |= {"note": note, "until": until}
            if each.title in self._tasks:
                self._bars.update(self._tasks[each.title], **fields)
            else:
                self._tasks[each.title] = self._bars.add_task(each.title, **fields)
        self._bars.start()

    def close(self) -> None:
        self._bars.stop()


class _Tqdm:
    """A bar of ``tqdm``, with the parts as text behind it."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._kind: Any = tqdm
        self._stage: str | None = None
        self._bar: Any = None

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        if bar.title != self._stage:
            self.close()
            self._stage = bar.title
            whole = "{desc}" if bar.total is None else "{desc} {bar} {n_fmt} of {total_fmt}"
            form = f"{whole}{{postfix}}"
            given = {"leave": False, "file": sys.stderr, "dynamic_ncols": True, "bar_format": form, "disable": False}
            self._bar = self._kind(desc=bar.title, total=bar.total, **given)
        self._bar.n, self._bar.total = bar.done, bar.total
        left = "" if bar.seconds_left is None else time_left(bar.seconds_left)
        self._bar.set_postfix_str("; ".join(filter(None, [left, bar.note, _joined(parts)])), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _line(bar: ProgressBar, parts: Sequence[ProgressBar]) -> str:
    return f"{bar} ({_joined(parts)})" if parts else str(bar)


def _joined(parts: Sequence[ProgressBar]) -> str:
    return "; ".join(map(str, parts))
