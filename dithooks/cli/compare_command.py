"""``dithooks compare``: its arguments. What they do is in ``compare_run``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .run_arguments import TARGET, add_target, asked

DESCRIPTION = """Run TARGET without a cache, with each plan, and with each speed-up that is steered to as it runs, in
turns, and compare: time, blocks that ran, memory, and how near what is drawn comes to what is drawn without a cache."""

EPILOG = f"""{TARGET}
examples:
  dithooks compare demo --plan 2x --plan 3x --target 2 --out compare.png
  dithooks compare my_model.py:make --plan plan.json --target 1.5 --target 2 --pairs 5 --json numbers.json
  dithooks compare my_model.py:make --plan plan.json --json - > numbers.json

Of each, the first run is not timed: it gives the pictures, and the cache tests itself in it. The speed-up is the median
over the pairs. PSNR, SSIM and relative L1 are of the pictures against those without a cache; of a video, the picture
shows the frame in the middle. Files that are there are overwritten.
exit codes: 0 done; 2 asked wrongly; 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``dithooks compare`` takes."""
    add = parser.add_argument
    add_target(parser)
    add("--plan", action="append", default=[], dest="plans", metavar="FILE", help="with this plan; repeatable")
    add(
        "--target",
        action="append",
        default=[],
        type=float,
        dest="speedups",
        metavar="X",
        help="steered to this speed-up, in blocks that run; repeatable",
    )
    add("--pairs", type=int, default=3, metavar="N", help="timed runs of each (default: %(default)s)")
    add("--out", type=Path, default=Path("compare.png"), metavar="FILE", help="the picture (default: %(default)s)")
    add("--json", metavar="FILE", help="write the numbers too; - writes them instead of the table")
    add("--quiet", action="store_true", help="show no progress")


def run(args: argparse.Namespace) -> int:
    """Compare what was asked for.

    Returns:
        The exit code.

    Raises:
        TargetError: it cannot be done as asked.
    """
    from .compare_run import CompareOptions, compare
    from .targets.runnable import Asked

    return compare(
        CompareOptions(
            Asked(**asked(args), fresh=True),
            plans=tuple(args.plans),
            speedups=tuple(args.speedups),
            pairs=args.pairs,
            out=args.out,
            json=args.json,
            quiet=args.quiet,
        )
    )
