"""Does every call get its own branch's residual? ``python -m bench.checks.loops --count 20000 [--jobs 2]``.

Random sampling loops are played on a tiny transformer whose output names the call that its residual was captured in:
guidance, windows, halves of a batch, skipped layers; Euler and loops of higher order; steps told by scopes, schedulers
and timesteps under many names; runs that are broken off; two pipelines, and two threads. An oracle that knows the truth
counts wrong residuals, the calls that could have been reused, and loops that reuse nothing and say nothing about it.

``--loop NUMBER`` plays one loop and prints its calls; ``--only DIMENSION=VALUE`` plays those of one kind, such as
``clock=scope``. ``--out`` writes ``loops.json`` and ``loops.md`` there. Exit codes: 0 all is as it should be; 1 a
residual was wrong, a loop silent or refused, or less than nine tenths reused.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import datetime
import json
import multiprocessing
import sys
from pathlib import Path

import torch

from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from random_loops.tally import LEAST, Tally, page, run_loops, story  # noqa: E402

PORTION = 500  # loops that a process plays at a time


def played(first: int, count: int, only: dict[str, str]) -> Tally:
    """Play a portion of the loops."""
    torch.set_num_threads(1)
    return run_loops(first, count, only)


def run(first: int, count: int, jobs: int, only: dict[str, str]) -> Tally:
    """Play loops in several processes, and return the tally of all."""
    tally = Tally()
    starts = range(first, first + count, PORTION)
    sizes = [min(PORTION, first + count - start) for start in starts]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        for part in pool.map(played, starts, sizes, [only] * len(sizes)):
            tally.merge(part)
            total = tally.total
            print(f"{total.loops} loops, {len(tally.wrong)} wrong, {total.ratio:.1%}", file=sys.stderr, flush=True)
    return tally


def write(tally: Tally, folder: Path, text: str) -> None:
    """Write the tally to a folder, as JSON and Markdown."""
    shares = [
        {"dimension": dimension, "value": value, **dataclasses.asdict(share)}
        for (dimension, value), share in sorted(tally.shares.items())
    ]
    figures = {**vars(tally), "shares": shares, "machine": machine(), "date": datetime.date.today().isoformat()}
    write_text(folder / "loops.json", json.dumps(figures, indent=1) + "\n")
    write_text(folder / "loops.md", text + "\n")


def main() -> int:
    """Play the loops, and print or write what came of them."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks.loops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loop", type=int, metavar="NUMBER", help="play this loop alone, and print its calls")
    parser.add_argument("--first", type=int, default=0, metavar="NUMBER", help="number of the first loop")
    parser.add_argument("--count", type=int, default=2000, metavar="N", help="number of loops")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="number of processes")
    parser.add_argument("--only", action="append", default=[], metavar="DIMENSION=VALUE", help="repeatable")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.loop is not None:
        print(story(args.loop))
        return 0
    tally = run(args.first, args.count, args.jobs, dict(each.split("=", 1) for each in args.only))
    begin = f"--first {args.first} " if args.first else ""
    command = f"python -m bench.checks.loops {begin}--count {args.count}"
    head = f"By `{command}`, on {machine()}; {datetime.date.today().isoformat()}."
    text = f"# Random sampling loops\n\n{head}\n\n{page(tally)}"
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write(tally, args.out, text)
    return 1 if tally.wrong or tally.silent or tally.refused or tally.total.ratio < LEAST else 0


if __name__ == "__main__":
    sys.exit(main())
