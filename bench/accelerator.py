"""Measure on an accelerator what caching saves on transformers of full size: ``python bench/accelerator.py``.

FLUX.1-dev at 1024 × 1024 and Wan 2.1 at 480 × 832, with random weights made on the device, so that nothing is
downloaded and no text encoder or decoder takes part. Plain, with a static interval, with a plan from one recorded run,
and with a policy that looks; uncompiled, compiled block by block, and compiled as a whole; next to them cache-dit and
diffusers' own caches, which leave out the same blocks at the same steps. Each row has its time, its speed-up, the
limit that the counted block executions set, what the host waited for, memory, and how far its output is from the plain.

It ends after ``--minutes``. What is measured first matters most; what did not fit says so in its row. A part by itself
is measured with ``--only``, and joins what earlier runs on the same machine and versions have left in the file.

Takes the accelerator that PyTorch sees, or ``--device``; where there is none it says so and ends with exit code 0.
``--size tiny`` goes through all of it in less than a minute, on a CPU as well. Writes ``accelerator_<device>.json`` and
``.md``, again after every row. Exit codes: 0 nothing failed, or no accelerator; 1 a row failed; 2 asked wrongly.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

BEGUN = time.monotonic()  # imports count
ROOT = Path(__file__).resolve().parent.parent
RESERVE = 10.0  # seconds to write and leave


def main(argv: list[str] | None = None) -> int:
    """Measure, write, and print the page."""
    if str(ROOT) not in sys.path:  # a checkout is enough: nothing has to be installed
        sys.path.insert(0, str(ROOT))
    import torch

    from bench.large import NAMES
    from dithooks.environment.machine import accelerator

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", help="such as cuda, npu, xpu; cpu to go through the motions")
    parser.add_argument("--size", choices=("full", "tiny"), default="full", help="tiny: a few small blocks")
    parser.add_argument("--quick", action="store_true", help="the same as --size tiny --minutes 1")
    parser.add_argument("--minutes", type=float, default=8.0, help="at most, from the start (default: 8)")
    parser.add_argument("--only", action="append", choices=NAMES, help="a part; repeatable (default: all, in order)")
    parser.add_argument("--rounds", type=int, default=3, help="timed runs of each row, at most (default: 3)")
    parser.add_argument("--backend", help="of torch.compile (default: inductor; for tiny: aot_eager)")
    out = ROOT / "bench" / "results"
    parser.add_argument("--out", type=Path, default=out, metavar="FOLDER", help="of the results (bench/results)")
    args = parser.parse_args(argv)
    size, minutes = ("tiny", min(args.minutes, 1.0)) if args.quick else (args.size, args.minutes)
    device = accelerator() if args.device is None else torch.device(args.device)
    if device is None:
        print("There is no accelerator here, or PyTorch does not see it (`dithooks env` tells): nothing was measured.")
        print("`--device cpu --size tiny` goes through the same on the CPU.")
        return 0
    if args.rounds < 1 or not 0 < minutes < float("inf"):
        parser.error("--rounds and --minutes must be above 0")
    from bench.large.deadline import Deadline
    from bench.large.parts import measure_all
    from bench.large.report import FAILED, Report, page
    from bench.large.session import Session

    backend = args.backend or ("inductor" if size == "full" else "aot_eager")
    report = Report(args.out, device, size, minutes)
    session = Session(device, Deadline(60 * minutes - RESERVE, BEGUN), report, backend, args.rounds)
    measure_all(session, tuple(args.only or NAMES))
    session.write()
    print(page(report.found))
    parts = report.found["parts"].values()
    return 1 if any(each["status"] == FAILED for each in [*report.rows, *parts]) else 0


if __name__ == "__main__":
    if not __package__:  # run as a file: this folder's modules are none that others should find by their bare names
        sys.path[0] = str(ROOT)
    sys.exit(main())
