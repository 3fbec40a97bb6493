"""``dithooks profile``: what one run without a cache says of every threshold."""

from __future__ import annotations

import argparse
import math
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .run_arguments import TARGET, add_target, asked

if TYPE_CHECKING:
    from ..profiling.profile import Profile

DESCRIPTION = """Run TARGET once, reusing nothing, and show how much changes from step to step, in each range and branch
of guidance, and what share of the calls a Threshold policy would reuse."""

EPILOG = f"""{TARGET}
examples:
  dithooks profile demo
  dithooks profile demo --threshold 0.1 --threshold 0.2 --steps 50 --prompt rocket
  dithooks profile my_model.py:make --first 1 --json profile.json

Without --first, each list of blocks is watched by itself, its first block deciding on the others; with it, all of a
transformer's blocks from there on are one range, as in DitCacheConfig(cache_block_start=1, policy=Threshold(0.1)).
exit codes: 0 done; 2 asked wrongly; 130 interrupted.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``dithooks profile`` takes."""
    add = parser.add_argument
    add_target(parser)
    add("--threshold", action="append", type=float, dest="thresholds", metavar="X", help="predict this; repeatable")
    add("--first", type=int, metavar="N", help="first block of the range, those before it decide")
    add("--json", metavar="FILE", help="write the numbers too; - writes them instead of the tables")


def run(args: argparse.Namespace) -> int:
    """Watch one run, and print what was seen.

    Returns:
        The exit code.

    Raises:
        TargetError: it cannot be done as asked.
    """
    from ..config.cache_config import DitCacheConfig
    from ..errors import TargetError
    from ..policies.threshold import Threshold
    from ..profiling.profile import THRESHOLDS, profile
    from ..stats.warning_collector import collect_warnings
    from .messages import one_line
    from .output_files import as_json, check_results, write_json
    from .targets.runnable import Asked, runnable

    thresholds = tuple(args.thresholds or THRESHOLDS)
    if wrong := [value for value in thresholds if not 0 < value < math.inf]:
        raise TargetError(f"--threshold is {wrong[0]:g}: it must be above 0")
    if args.first is not None and args.first < 0:
        raise TargetError(f"--first is {args.first}: it must be 0 or more")
    what = Asked(**asked(args))
    file = None if args.json in (None, "-") else Path(args.json)
    check_results([] if file is None else [file])
    remarks: list[str] = []
    with redirect_stdout(sys.stderr) if args.json == "-" else nullcontext():  # what a factory prints is no JSON
        subject = runnable(what)
        config = None if args.first is None else DitCacheConfig(cache_block_start=args.first, policy=Threshold(0.1))
        with collect_warnings(remarks), one_line():
            found = profile(subject.target, subject.run, config, thresholds=thresholds)
    for remark in remarks:
        print(f"dithooks: {remark}", file=sys.stderr)
    told = subject.told | numbers(found)
    if args.json == "-":
        print(as_json(told))
        return 0
    print(found)
    if file is not None:
        write_json(file, told)
    return 0


def numbers(found: Profile) -> dict[str, Any]:
    """A profile, fit for JSON: what is not finite is None."""

    def finite(values: Any) -> list[float | None]:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]

    branches = []
    for each in found.branches:
        shares = [found.reuse(threshold, each) for threshold in found.thresholds]
        total, skipped = each.schedule.blocks, each.schedule.skipped
        left = [total - share * skipped for share in shares]
        branches.append(
            {
                "range": each.range,
                "branch": each.branch,
                "steps": [moment.step for moment in each.moments],
                "changes": finite(each.changes),
                "ratios": finite(each.ratios),
                "blocks": total,
                "skipped": skipped,
                "reused": finite(shares),
                "blocks_fewer": finite(total / rest if rest else math.inf for rest in left),
            }
        )
    return {"thresholds": list(found.thresholds), "policy": str(found.policy), "branches": branches}
