"""``dithooks profile``: how much changes in one run without a cache, and what each threshold would reuse."""

from __future__ import annotations

import argparse
import math
import sys
from typing import TYPE_CHECKING, Any

from .command_parser import Parser
from .run_arguments import (
    DONE,
    FAILED,
    INTERRUPTED,
    MODEL,
    REFUSED,
    add_demo_run,
    add_json,
    add_model,
    add_quiet,
    exit_codes,
    run_request,
)

if TYPE_CHECKING:
    from ..profiling.profile import Profile

SUMMARY = "show how much changes from step to step, and what thresholds would reuse"

USAGE = "MODEL [options]"

DESCRIPTION = """Run MODEL once, reusing nothing, and show how much changes from step to step, in each range and branch
of guidance, and what share of the calls a Threshold policy would reuse."""

EPILOG = f"""{MODEL}
examples:
  dithooks profile demo
  dithooks profile demo --threshold 0.1 --threshold 0.2 --steps 50 --prompt rocket
  dithooks profile my_model.py:make --first 1 --json profile.json

Without --first, each list of blocks is one range, and its first block decides on the others; with it, a transformer's
blocks from there on are one range, as in DitCacheConfig(cache_block_start=1, policy=Threshold(0.1)).

{exit_codes(DONE, FAILED, REFUSED, INTERRUPTED)}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks profile``."""
    add_model(parser)
    add_demo_run(parser, steps=28, seed=0, guidance=3.0)
    parser.begin_group("what is shown")
    add = parser.add_argument
    add(
        "--threshold",
        action="append",
        type=float,
        dest="thresholds",
        metavar="X",
        help="what this would reuse; repeatable (default: nine from 0.01 to 0.32)",
    )
    add(
        "--first",
        type=int,
        metavar="N",
        help="first block of the range; those before it decide (default: each list of blocks is a range)",
    )
    parser.begin_group("output")
    add_json(parser, "tables")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Profile one run and print the tables (or JSON, for ``--json -``).

    Raises:
        UsageError: an option cannot be followed, or a file cannot be written.
        TargetError: there is no such target.
        DitHooksError: as :func:`dithooks.profile`.
    """
    from contextlib import ExitStack

    from ..config.cache_config import DitCacheConfig
    from ..errors import UsageError
    from ..integrations.diffusers_bars import hidden_bars
    from ..policies.threshold import Threshold
    from ..profiling.profile import THRESHOLDS, profile
    from ..progress_bars import is_terminal
    from ..stats.text_table import output_width
    from ..stats.warning_collector import collect_warnings
    from .messages import one_line
    from .option_checks import check_least
    from .output_files import as_json, json_file, stdout_kept_for_json, write_json
    from .targets.runnable import RunRequest, runnable

    thresholds = tuple(args.thresholds or THRESHOLDS)
    if wrong := [value for value in thresholds if not 0 < value < math.inf]:
        raise UsageError(f"--threshold is {wrong[0]:g}: it must be above 0")
    check_least(args, first=0)
    request = RunRequest(**run_request(args))
    file = json_file(args.json)
    remarks: list[str] = []
    with stdout_kept_for_json(args.json), ExitStack() as stack:
        subject = runnable(request)
        if args.quiet or not is_terminal():
            stack.enter_context(hidden_bars(subject.target))
        config = None if args.first is None else DitCacheConfig(cache_block_start=args.first, policy=Threshold(0.1))
        with collect_warnings(remarks), one_line():
            seen = profile(subject.target, subject.run, config, thresholds=thresholds)
    for remark in remarks:
        print(f"dithooks: {remark}", file=sys.stderr)
    description = subject.description | numbers(seen)
    if args.json == "-":
        print(as_json(description))
        return 0
    print(seen.to_text(output_width()))
    if file is not None:
        write_json(file, description)
    return 0


def numbers(profiled: Profile) -> dict[str, Any]:
    """A profile, fit for JSON: a number that is not finite is None."""

    def finite(values: Any) -> list[float | None]:
        return [float(f"{value:.6g}") if math.isfinite(value) else None for value in values]

    branches = []
    for each in profiled.branches:
        shares = [profiled.reuse(threshold, each) for threshold in profiled.thresholds]
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
    return {"thresholds": list(profiled.thresholds), "policy": str(profiled.policy), "branches": branches}
