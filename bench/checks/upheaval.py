"""Is anything lost while a cache is changed? ``python -m bench.checks.upheaval --out bench/results``.

Caches are put on, changed and taken off a small model beside four threads that call it, one of them with asyncio tasks;
SIGINT comes at random moments of attaching, running and removing; and the process is forked under load, whereupon the
child calls the model and takes its cache off. The output of a call tells the steps that it is made of: by that an
oracle counts wrong ones.

``--out`` writes ``upheaval.json`` and ``upheaval.md`` there. Exit codes: 0 nothing was lost; 1 something was.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import races  # noqa: E402

GOOD = ("calls", "reused", "pairs", "Ctrl-C", "too late", "fine")
REFUSED = "RunMismatch: this cache was removed"


def checks(pairs: int, signals: int, forks: int) -> dict[str, Callable[[], Counter]]:
    """The checks by name; driven and compiled models are attached to less often."""
    return {
        f"{pairs} times attached, updated or reset, and removed, while the model is called": lambda: races.race(
            "called", pairs
        ),
        "the same, while its `forward` is called": lambda: races.race("forward", pairs // 10),
        "the same, while its blocks are looped over": lambda: races.race("looped", pairs // 10),
        "the same, while it is called compiled": lambda: races.race("compiled", pairs // 20),
        "`update()` and `remove()` of one handle at once": lambda: races.race_of_changes(300),
        f"{signals} times Ctrl-C in attaching, running or removing": lambda: races.signalled(signals),
        f"{forks} forks under load": lambda: races.forks(forks),
    }


def faults(tally: Counter) -> int:
    """Count what should not have happened."""
    return sum(count for what, count in tally.items() if what not in GOOD and not what.startswith(REFUSED))


def page(found: dict[str, dict], head: str) -> str:
    """The results in Markdown."""
    rows = ["| check | came of it | faults | seconds |", "|---|---|---|---|"]
    for name, each in found.items():
        came = ", ".join(f"{what}: {count:,}" for what, count in each["tally"].items() if count)
        rows.append(f"| {name} | {came} | {each['faults']} | {each['seconds']:.0f} |")
    return "\n".join(["# Threads, Ctrl-C, forks", "", head, "", *rows])


def main() -> int:
    """Run the checks, and print or write what came of them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.upheaval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--pairs", type=int, default=2000, metavar="N", help="times that a cache is attached and removed"
    )
    parser.add_argument("--signals", type=int, default=200, metavar="N", help="of Ctrl-C")
    parser.add_argument("--forks", type=int, default=50, metavar="N", help="number of forks")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = {}
    for name, check in checks(args.pairs, args.signals, args.forks).items():
        began = time.perf_counter()
        tally = check()
        found[name] = {"tally": dict(tally), "faults": faults(tally), "seconds": time.perf_counter() - began}
        print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    given = f"--pairs {args.pairs} --signals {args.signals} --forks {args.forks}"
    today = datetime.date.today().isoformat()
    text = page(found, f"By `python -m bench.checks.upheaval {given}`, on {machine()}; {today}.")
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        figures = {"machine": machine(), "date": today, "checks": found}
        write_text(args.out / "upheaval.json", json.dumps(figures, indent=1) + "\n")
        write_text(args.out / "upheaval.md", text + "\n")
    return 1 if any(each["faults"] for each in found.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
