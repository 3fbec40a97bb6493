"""Progress on stderr: bars on a terminal, lines in a log."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

ProgressCallback = Callable[[str, int, int | None], None]  # stage, done, total; None where the total is unknown


class ProgressReport(Protocol):
    """A progress callback that takes a note, too."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Show how far a stage is.

        Args:
            stage: what is being done; its bar replaces that of another stage.
            done: how much of the stage is done.
            total: how much there is to do; ``None``: unknown.
            note: a text behind the bar, such as the best result so far.
        """


@dataclass(frozen=True)
class ProgressBar:
    """One bar: its title, its count, a note behind it, and the unit of the count.

    Example:
        >>> print(ProgressBar("run plans", 1, 5, "best so far 45.2 dB"), ProgressBar("plan", 0, None), sep="; ")
        run plans: 1 of 5, best so far 45.2 dB; plan
    """

    title: str
    done: int
    total: int | None
    note: str = ""
    unit: str = ""

    @property
    def count(self) -> str:
        """How much is done, of how much where that is known."""
        count = str(self.done) if self.total is None else f"{self.done} of {self.total}"
        return f"{count} {self.unit}".rstrip()

    def __str__(self) -> str:
        count = f": {self.count}" if self.done or self.total is not None else ""
        return f"{self.title}{count}{self.note and f', {self.note}'}"


@contextmanager
def progress(verbose: bool = True) -> Iterator[ProgressReport]:
    """Show on stderr what is reported inside, and leave the terminal as it was.

    Args:
        verbose: write to stderr at all. Of several processes only rank 0 should: ``verbose and is_rank_0()``.

    Example:
        >>> with progress(verbose=False) as report:
        ...     report("verify", 1, 5, "best so far 45.2 dB at 2.01×")
    """
    if not verbose:
        yield lambda stage, done, total, note="": None
        return
    display = ProgressDisplay()
    try:
        yield display
    finally:
        display.close()


class ProgressDisplay:
    """A display on stderr that appears with the first report.

    On a terminal it shows bars of ``rich``, or else of ``tqdm``, if one of them is installed; elsewhere it writes
    lines. A display that fails, for instance because stderr is closed, is given up without an error.

    Args:
        line_every: seconds from one line to the next where there are no bars; ``None``: a line for each new stage only.
    """

    def __init__(self, line_every: float | None = None) -> None:
        self._line_every = line_every
        self._display: _Display | None = None
        self._open = True

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Show how far a stage is."""
        self.show(ProgressBar(stage, done, total, note))

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        """Show a bar, and its parts below: who did how much of it."""
        if not self._open:
            return
        try:
            self._display = self._display or _new_display(self._line_every)
            self._display.show(bar, parts)
        except Exception:
            self.close()

    def close(self) -> None:
        """Take the bars off the terminal; later reports are ignored."""
        self._open = False
        display, self._display = self._display, None
        if display is not None:
            with suppress(Exception):
                display.close()


class _Display(Protocol):
    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None: ...

    def close(self) -> None: ...


def _new_display(line_every: float | None) -> _Display:
    # rich is not asked: with the environment variables of CI, it takes a log for a terminal
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _Lines(line_every)
    for kind in (_Rich, _Tqdm):
        with suppress(ImportError):
            return kind()
    return _Lines(line_every)


class _Lines:
    """A line for each new stage; with ``every``, also a line after so many seconds, and a last one."""

    def __init__(self, every: float | None = None) -> None:
        self._every = every
        self._stage: str | None = None
        self._line = self._printed = ""
        self._printed_at = 0.0

    def show(self, bar: ProgressBar, parts: Sequence[ProgressBar] = ()) -> None:
        self._line = f"{bar} ({_joined(parts)})" if parts else str(bar)
        overdue = self._every is not None and time.monotonic() - self._printed_at >= self._every
        if bar.title != self._stage or overdue:
            self._stage = bar.title
            self._print()

    def close(self) -> None:
        if self._every is not None:
            self._print()

    def _print(self) -> None:
        if self._line != self._printed:
            print(self._line, file=sys.stderr, flush=True)
            self._printed, self._printed_at = self._line, time.monotonic()


class _Rich:
    """Bars of ``rich``; what is printed meanwhile stays above them."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.text import Text

        class Remaining(TimeRemainingColumn):
            """The time left to the stage: how many of its items a part will get is unknown."""

            def render(self, task: Task) -> Text:
                return Text("") if task.fields["part"] else super().render(task)

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            Remaining(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True, force_terminal=True),
            refresh_per_second=2,  # the work that is shown needs the processor
            speed_estimate_period=3600,  # one item may take minutes
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
            fields |= {"note": note, "part": part}
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
            self._bar = self._kind(desc=bar.title, total=bar.total, leave=False, file=sys.stderr, dynamic_ncols=True)
        self._bar.n, self._bar.total = bar.done, bar.total
        self._bar.set_postfix_str("; ".join(filter(None, [bar.note, _joined(parts)])), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _joined(parts: Sequence[ProgressBar]) -> str:
    return "; ".join(map(str, parts))
