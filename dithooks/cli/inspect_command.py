"""``dithooks inspect``: from its arguments to what it prints and writes."""

from __future__ import annotations

import importlib
from pathlib import Path

from ..errors import TargetError


def show_one(target: str, blocks: tuple[str, ...], tests: int, json_to: str | None) -> None:
    """Print the tables of a target to stdout (or JSON, for ``json_to="-"``).

    Raises:
        TargetError: there is no such target, a package is missing, or the file cannot be written.
    """
    if json_to != "-":
        need("rich", "rich")
    from ..inspection.model_report import inspect, show, to_json
    from .targets.resolver import find_subject

    if ":" not in target:
        need("diffusers", '"dithooks[diffusers]"')
    if json_to not in (None, "-"):
        _check(Path(json_to or ""))
    found = inspect(find_subject(target), blocks, tests)
    if json_to == "-":
        print(to_json(found))
        return
    from rich.console import Console

    show(found, Console())
    if json_to is not None:
        _write(Path(json_to), to_json(found) + "\n")


def show_all(markdown_to: Path | None) -> None:
    """Print the table of all classes, or write it to a file.

    Raises:
        TargetError: a package is missing, or the file cannot be written.
    """
    need("rich", "rich")
    need("diffusers", '"dithooks[diffusers]"')
    if markdown_to is not None:
        _check(markdown_to)
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ..inspection.model_table import all_rows, markdown, summary, table

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    # On stderr, so that stdout holds the result alone.
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=None)
        rows, missing = all_rows(
            lambda cls, done, total: progress.update(task, description=cls, completed=done, total=total)
        )
    console = Console()
    if markdown_to is None:
        console.print(table(rows))
    else:
        _write(markdown_to, markdown(rows, missing))
        console.print(f"{summary(rows)}: {markdown_to}", highlight=False, soft_wrap=True)


def need(package: str, install: str) -> None:
    """See that an optional package is there.

    Raises:
        TargetError: it is not; the message says how to get it.
    """
    try:
        importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:
            raise
        raise TargetError(f"inspect needs {package}: pip install {install}") from error


def _check(path: Path) -> None:
    """Find out before the work whether a file can be written there."""
    if path.is_dir() or not path.parent.is_dir():
        raise TargetError(
            f"{path} cannot be written: {path if path.is_dir() else path.parent} is not a "
            f"{'file' if path.is_dir() else 'folder'}"
        )


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise TargetError(f"{path} cannot be written: {error}") from error
