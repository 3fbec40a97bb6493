"""How far a job is, on the terminal: each actor, and all together."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

import ray

EVERY = 0.5  # seconds between two looks
PATIENCE = 5.0  # seconds that an answer is waited for
LINES_EVERY = 10.0  # seconds between two lines, where there is no terminal
ALL = "all"
State = dict[str, tuple[int, int]]  # by actor, and of all: rows that are through, and how many of these failed


class Reporter:
    """An actor that other actors tell what they have done, and the driver asks.

    Example:
        >>> reporter = Reporter()
        >>> reporter.tell("chunk a", "1f2e", 2, 0, 4)
        >>> reporter.tell("chunk b", "9c8d", 4, 1, 4)
        >>> reporter.tell("chunk a", "9c8d", 1, 0, 4)  # once more, as the process of the other has ended
        >>> reporter.state()
        {'1f2e': (0, 0), '9c8d': (5, 1)}
    """

    def __init__(self) -> None:
        self._chunks: dict[str, tuple[str, int, int]] = {}
        self._actors: dict[str, None] = {}

    def tell(self, chunk: str, actor: str, through: int, failed: int, rows: int) -> None:
        """So many of a chunk's rows are through."""
        self._actors[actor] = None
        self._chunks[chunk] = (actor, through, failed)

    def state(self) -> State:
        """Rows that are through, and failed ones of them, by actor."""
        found = dict.fromkeys(self._actors, (0, 0))
        for actor, through, failed in self._chunks.values():
            found[actor] = (found[actor][0] + through, found[actor][1] + failed)
        return found


@contextmanager
def shown(total: int, verbose: bool) -> Iterator[Any]:
    """Show on stderr what actors tell meanwhile; nothing that fails here is the job's business.

    On a terminal these are bars, of ``rich`` or else ``tqdm``, if one of them is installed; otherwise lines.

    Args:
        total: rows.
        verbose: show it.

    Yields:
        The actor to tell; ``None``: nobody listens.
    """
    reporter: Any = None
    if verbose:
        with suppress(Exception):
            reporter = ray.remote(num_cpus=0)(Reporter).remote()
    if reporter is None:
        yield None
        return
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(reporter, total, ended), daemon=True)
    watcher.start()
    try:
        yield reporter
    finally:
        ended.set()
        watcher.join(PATIENCE)
        with suppress(Exception):
            ray.kill(reporter)


def _watch(reporter: Any, total: int, ended: threading.Event) -> None:
    display: _JobDisplay | None = None
    try:
        over = False
        while not over:
            over = ended.wait(EVERY)
            with suppress(ray.exceptions.GetTimeoutError):
                state: State = ray.get(reporter.state.remote(), timeout=PATIENCE)
                display = display or _display(total)
                through, failed = (sum(each[part] for each in state.values()) for part in (0, 1))
                display.show({ALL: (through, failed), **state})
    except Exception:
        pass
    finally:
        if display is not None:
            with suppress(Exception):
                display.close()


class _JobDisplay(Protocol):
    def show(self, state: State) -> None: ...

    def close(self) -> None: ...


def _display(total: int) -> _JobDisplay:
    # Not what rich thinks: told by CI's environment variables, it takes a log for a terminal
    if not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        return _JobLines(total)
    for kind in (_JobRich, _JobTqdm):
        with suppress(ImportError):
            return kind(total)
    return _JobLines(total)


class _JobLines:
    """A line now and then, and one in the end."""

    def __init__(self, total: int) -> None:
        self._total, self._last, self._said = total, -LINES_EVERY, ""
        self._text = ""

    def show(self, state: State) -> None:
        self._text = _line(state, self._total)
        if time.monotonic() - self._last >= LINES_EVERY:
            self._say()

    def close(self) -> None:
        self._say()

    def _say(self) -> None:
        if self._text != self._said:
            print(self._text, file=sys.stderr, flush=True)
            self._last, self._said = time.monotonic(), self._text


class _JobRich:
    """A bar of ``rich`` for all rows, and a line for each actor; what is printed meanwhile stays above."""

    def __init__(self, total: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.text import Text

        class Remaining(TimeRemainingColumn):
            """Of all rows: how many are left to an actor, nobody knows."""

            def render(self, task: Task) -> Text:
                return super().render(task) if task.description == ALL else Text("")

        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False),
            TimeElapsedColumn(),
            Remaining(),
            console=Console(stderr=True, force_terminal=True),
            refresh_per_second=2,
            speed_estimate_period=3600,  # one row may take minutes
            transient=True,
            redirect_stdout=sys.stdout is not None and sys.stdout.isatty(),  # results for a pipe are to reach it
        )
        self._total = total
        self._tasks: dict[str, Any] = {}

    def show(self, state: State) -> None:
        for name, (through, failed) in state.items():
            # An actor's bar shows how much of all is its own
            if name not in self._tasks:
                title = name if name == ALL else f"actor {name}"
                self._tasks[name] = self._bars.add_task(title, total=self._total, count="")
            self._bars.update(self._tasks[name], completed=through, count=_count(through, failed, name, self._total))
        self._bars.start()

    def close(self) -> None:
        self._bars.stop()


class _JobTqdm:
    """A bar of ``tqdm`` for all rows, the actors behind it."""

    def __init__(self, total: int) -> None:
        from tqdm import tqdm

        self._bar: Any = tqdm(desc=ALL, total=total, leave=False, file=sys.stderr, dynamic_ncols=True)

    def show(self, state: State) -> None:
        self._bar.n = state[ALL][0]
        self._bar.set_postfix_str(_actors(state), refresh=False)
        self._bar.refresh()

    def close(self) -> None:
        self._bar.close()


def _line(state: State, total: int) -> str:
    """Everything in one line.

    Example:
        >>> _line({"all": (5, 1), "1f2e": (2, 0), "9c8d": (3, 1)}, 8)
        '5 of 8 rows, 1 failed (1f2e: 2; 9c8d: 3, 1 failed)'
    """
    actors = _actors(state)
    return f"{_count(*state[ALL], ALL, total)}{actors and f' ({actors})'}"


def _actors(state: State) -> str:
    return "; ".join(f"{name}: {_count(*each, name, 0)}" for name, each in state.items() if name != ALL)


def _count(through: int, failed: int, name: str, total: int) -> str:
    count = f"{through} of {total} rows" if name == ALL else str(through)
    return count + (f", {failed} failed" if failed else "")
