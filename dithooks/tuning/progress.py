"""How far a search is, on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol


class ProgressReport(Protocol):
    """What is told how far the search is."""

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        """Say it.

        Args:
            stage: what is being done; another one than before takes its place.
            done: how many are.
            total: of how many; ``None``: not known.
            note: what else there is to say: the best so far.
        """


@contextmanager
def progress(verbose: bool = True) -> Iterator[ProgressReport]:
    """Show on stderr what is reported meanwhile, and leave the terminal as it was.

    On a terminal that is a bar, of ``rich`` or else ``tqdm``, if one of them is installed; otherwise a line for each
    stage. A display that fails, on a closed stderr for one, is given up, and the search goes on.

    Args:
        verbose: show it; if not, nothing is written. Of several processes let one do it: ``verbose and leads()``.

    Example:
        >>> with progress(verbose=False) as report:
        ...     report("verify", 1, 5, "best so far 45.2 dB at 2.01×")
    """
    if not verbose:
        yield _silence
        return
    shown = _Shown()
    try:
        yield shown
    finally:
        shown.close()


def _silence(stage: str, done: int, total: int | None, note: str = "") -> None:
    pass


class _Shown:
    """A display that appears with the first report, and whose failure is no one else's."""

    def __init__(self) -> None:
        self._display: _Display | None = None
        self._open = True

    def __call__(self, stage: str, done: int, total: int | None, note: str = "") -> None:
        if not self._open:
            return
        try:
            self._display = self._display or _display()
            self._display.show(stage, done, total, note)
        except Exception:
            self.close()

    def close(self) -> None:
        self._open = False
        display, self._display = self._display, None
        if display is not None:
            with suppress(Exception):
                display.close()


class _Display(Protocol):
    def show(self, stage: str, done: int, total: int | None, note: str) -> None: ...

    def close(self) -> None: ...


def _display() -> _Display:
    # Not what rich thinks: told by CI's environment variables, it takes a log for a terminal
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _Lines()
    for kind in (_Rich, _Tqdm):
        with suppress(ImportError):
            return kind()
    return _Lines()


class _Lines:
    """A line for each stage, as it begins."""

    def __init__(self) -> None:
        self._stage: str | None = None

    def show(self, stage: str, done: int, total: int | None, note: str) -> None:
        if stage != self._stage:
            self._stage = stage
            count = "" if total is None else f": {_count(done, total)}"
            print(f"{stage}{count}{note and f', {note}'}", file=sys.stderr, flush=True)

    def close(self) -> None:
        pass


class _Rich:
    """A bar of ``rich``; what is printed meanwhile stays above it."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True, force_terminal=True),
            refresh_per_second=2,  # the search needs the processor
            speed_estimate_period=3600,  # one candidate may take minutes
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # results for a pipe are to reach it
        )
        self._stage: str | None = None
        self._task: Any = None

    def show(self, stage: str, done: int, total: int | None, note: str) -> None:
        said: dict[str, Any] = {"total": total, "completed": done, "count": _count(done, total), "note": note}
        if stage == self._stage:
            self._bars.update(self._task, **said)
            return
        if self._task is not None:
            self._bars.remove_task(self._task)
        self._stage, self._task = stage, self._bars.add_task(stage, **said)
        self._bars.start()

    def close(self) -> None:
        self._bars.stop()


class _Tqdm:
    """A bar of ``tqdm``."""

    def __init__(self) -> None:
        from tqdm import tqdm

        self._kind: Any = tqdm
        self._stage: str | None = None
        self._bar: Any = None

    def show(self, stage: str, done: int, total: int | None, note: str) -> None:
        if stage != self._stage:
            self.close()
            self._stage = stage
            self._bar = self._kind(desc=stage, total=total, leave=False, file=sys.stderr, dynamic_ncols=True)
        self._bar.n, self._bar.total = done, total
        self._bar.set_postfix_str(note, refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _count(done: int, total: int | None) -> str:
    return str(done) if total is None else f"{done} of {total}"
