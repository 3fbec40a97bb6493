"""Are files that are nearly right refused in words? ``python -m bench.checks.hostile_files --count 10000``.

Plans, configurations (also cache-dit's and msmodelslim's), recordings and journals are mutated by their structure: odd
values in every place, names twice, nesting without end, numbers that no machine holds, arrays of another type, shape or
content, archives with bombs, code or false headers; and by their bytes. Each mutant has to be refused by an error of
``dithooks.errors`` of at most 400 characters that names the file, or to be read as something that works: written and
read again, or planned with. None may take more than a second of the processor or 50 MB of memory.

``--only NUMBER`` writes one mutant to the current folder and shows what is said of it. ``--out`` writes
``hostile_files.json`` and ``hostile_files.md`` there. Exit codes: 0 all is as it should be; 1 it is not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from hostile_files.judging import judged, mutant  # noqa: E402
from hostile_files.samples import kinds  # noqa: E402


def run(first: int, count: int) -> dict[str, dict[str, Any]]:
    """Judge mutants, the kinds in turn, and return figures for each kind."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        every = kinds(folder)
        zero = {"mutants": 0, "refused": 0, "seconds": 0.0, "memory": 0}
        figures: dict[str, dict[str, Any]] = {name: {**zero, "wrong": []} for name in every}
        for number in range(first, first + count):
            name = list(every)[number % len(every)]
            kind, found = every[name], figures[name]
            verdict = judged(kind, mutant(number, kind, folder))
            (folder / kind.file).write_bytes(kind.data)  # a journal has to be whole but for one file
            found["mutants"] += 1
            found["refused"] += verdict.refused
            found["seconds"] = max(found["seconds"], verdict.seconds)
            found["memory"] = max(found["memory"], verdict.memory)
            if verdict.wrong:
                found["wrong"].append(f"{number}: {verdict.wrong}")
                print(f"{name} {number}: {verdict.wrong}", file=sys.stderr, flush=True)
            if number % 1000 == 999:
                print(f"{number + 1 - first} of {count}", file=sys.stderr, flush=True)
    return figures


def page(figures: dict[str, dict[str, Any]]) -> str:
    """The figures as a table."""
    lines = ["| file | mutants | refused | read | wrong | most seconds | most MB |", "|---|---|---|---|---|---|---|"]
    for name, found in figures.items():
        read = found["mutants"] - found["refused"]
        lines.append(
            f"| {name} | {found['mutants']} | {found['refused']} | {read} | {len(found['wrong'])} | "
            f"{found['seconds']:.2f} | {found['memory'] / 1e6:.1f} |"
        )
    return "\n".join(lines)


def main() -> int:
    """Judge the mutants, and print or write what came of them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.hostile_files",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--only", type=int, metavar="NUMBER", help="judge this mutant alone, and keep its file")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first mutant")
    parser.add_argument("--count", type=int, default=1000, metavar="N", help="number of mutants")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    if args.only is not None:
        every = kinds(Path.cwd())
        kind = list(every.values())[args.only % len(every)]
        path = mutant(args.only, kind, Path.cwd())
        print(f"{path}: {judged(kind, path)}")
        return 0
    figures = run(args.first, args.count)
    date = datetime.date.today().isoformat()
    named = ", ".join(f"{name} {version}" for name, version in versions("numpy", "pyyaml").items())
    head = f"By `python -m bench.checks.hostile_files --count {args.count}`, on {machine()}, {named}; {date}."
    text = f"# Hostile files\n\n{head}\n\n{page(figures)}"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        numbers = {"machine": machine(), "date": date, "count": args.count, "kinds": figures}
        write_text(args.out / "hostile_files.json", json.dumps(numbers, indent=1) + "\n")
        write_text(args.out / "hostile_files.md", text + "\n")
    return 1 if any(found["wrong"] for found in figures.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
