"""What was imported of another engine, run and compared, as JSON and as a table."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text


def report(
    name: str,
    title: str,
    packages: Sequence[str],
    columns: dict[str, str],
    cases: dict[str, Callable[[], dict[str, Any]]],
    remarks: Sequence[str],
    out: Path | None,
) -> int:
    """Run all cases, print them as a table, and write both forms; an error of a case is one of the script.

    Args:
        name: of the module below ``bench.checks``, and of the files.
        title: of the page.
        packages: whose versions are told.
        columns: keys of a case's figures, and their heads.
        cases: by what they show; each returns figures, with ``ok`` among them.
        remarks: sentences above the table.
        out: folder of the files; ``None``: none are written.

    Returns:
        The exit code: 0 if all cases are ok, else 1.
    """
    figures = {}
    for what, case in cases.items():
        figures[what] = case()
        print(what, figures[what], flush=True)
    found = {
        "machine": machine(),
        "date": datetime.date.today().isoformat(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
        "cases": figures,
    }
    versions = ", ".join(f"{package} {version}" for package, version in found["versions"].items())
    lines = [
        f"# {title}",
        "",
        f"By `python -m bench.checks.{name}`, on {found['machine']}; {versions}; {found['date']}.",
    ]
    lines += ["", *remarks, "", f"| run | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    lines += [f"| {what} | {' | '.join(_shown(row[key]) for key in columns)} |" for what, row in figures.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_text(out / f"engines_{name}.json", json.dumps(found, indent=1) + "\n")
        write_text(out / f"engines_{name}.md", text)
    return 0 if all(row["ok"] for row in figures.values()) else 1


def _shown(value: Any) -> str:
    return {True: "yes", False: "**no**"}[value] if isinstance(value, bool) else f"{value}"
