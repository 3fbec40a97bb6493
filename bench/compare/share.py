"""What share of a run is spent in the blocks of each model of the comparison: ``python -m bench.compare.share``.

A cache saves nothing else; fewer steps save all of it. One test case is recorded without a cache, block by block, a few
times; the median counts. With a share of s, K times fewer blocks are 1 / (1 − s + s / K) times as fast at most.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import torch

from bench.compare.subject import Subject
from bench.compare.sweep import SUBJECTS, subject_named
from dithooks import record
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

TIMES = 5
FEWER = (2.0, 2.5, 3.0, 4.0)


def share(subject: Subject, times: int) -> float:
    """The blocks' share of a run's time."""
    found = []
    for _ in range(times + 1):  # the first is to warm up
        run = record(subject.pipe, lambda _: subject.draw(subject.test[:1]))
        (trace,) = run.traces
        found.append(float(trace.block_ms.sum()) * trace.branches * len(trace.steps) / run.run_ms)
    return median(found[1:])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``compare_share.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="once each")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    heads = [f"{fewer:g}× fewer blocks: faster, at most" for fewer in FEWER]
    rows = [["model", "in blocks", *heads], ["---"] * (2 + len(FEWER))]
    for name in SUBJECTS:
        part = share(subject_named(name), 1 if options.quick else TIMES)
        rows.append([name, f"{part:.1%}", *(f"{1 / (1 - part + part / fewer):.2f}×" for fewer in FEWER)])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    text = f"# What share of a run is spent in blocks\n\n{machine()}\n\n{table}\n"
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "compare_share.md", text)
    print(text)


if __name__ == "__main__":
    main()
