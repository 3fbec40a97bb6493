"""Is a file whole whose process was killed while it saved? ``python -m bench.checks.kills --count 100``.

For each kind of file, processes save two states of it in turns, and are killed at random moments. What is left has to
be one of the two states. Beside it, the same with a file that is emptied and written in place, as a control.

``--out`` writes ``kills.json`` and ``kills.md`` there. Exit codes: 0 all files were whole; 1 one was not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hostile_files.killing import SAVINGS, in_place, killed  # noqa: E402


def run(count: int) -> list[dict[str, Any]]:
    """Kill so many processes for each kind of file, and as many that write in place."""
    rows = []
    for name, make in SAVINGS.items():
        with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
            saving = make()
            wrong = killed(saving, folder, count)
            control = None if name == "journal" else len(killed(in_place(saving), other, count))
        rows.append({"file": name, "kills": count, "wrong": wrong, "not whole in place": control})
        print(f"{name}: {len(wrong)} of {count} not whole; in place {control}", file=sys.stderr, flush=True)
    return rows


def main() -> int:
    """Kill the processes, and print or write what was left."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.kills", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=100, metavar="N", help="processes of each kind")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = run(args.count)
    date = datetime.date.today().isoformat()
    lines = ["| file | killed | not whole | written in place, not whole |", "|---|---|---|---|"]
    for row in rows:
        control = row["not whole in place"]
        lines.append(
            f"| {row['file']} | {row['kills']} | {len(row['wrong'])} | {'–' if control is None else control} |"
        )
    head = f"By `python -m bench.checks.kills --count {args.count}`, on {machine()}; {date}."
    text = "\n".join(["# Killed while saving", "", head, "", *lines])
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        numbers = {"machine": machine(), "date": date, "kinds": rows}
        write_text(args.out / "kills.json", json.dumps(numbers, indent=1) + "\n")
        write_text(args.out / "kills.md", text + "\n")
    return 1 if any(row["wrong"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
