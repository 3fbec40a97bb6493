"""``dithooks compare``: the same runs without a cache and with each of several settings, by time and by pictures."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from .command_parser import Parser
from .option_checks import add_metric
from .run_arguments import (
    DONE,
    FAILED,
    INTERRUPTED,
    MODEL,
    REFUSED,
    add_demo_run,
    add_json,
    add_model,
    add_payload,
    add_quiet,
    add_target,
    exit_codes,
    run_request,
)

SUMMARY = "compare time and pictures without a cache and with each of several"

USAGE = "MODEL [options]"

DESCRIPTION = """Run MODEL without a cache, with each plan, and with each speed-up that is steered to as it runs, in
turns, and compare: time, blocks that ran, memory, and how near the pictures come to those without a cache."""

TARGET_MISSED = 3  # exit code
MISSED = "3    done, but a --target was not reached"

EPILOG = f"""{MODEL}
examples:
  dithooks compare demo --plan 2x --plan 3x --target 2 --out compare.png
  dithooks compare my_model.py:make --plan plan.json --target 1.5 --target 2 --pairs 5 --json numbers.json
  dithooks compare my_model.py:make --plan plan.json --json - > numbers.json

The first run with each is not timed: it gives the pictures, and the cache tests itself in it. The speed-up is the
median over the pairs. PSNR, SSIM and relative L1 are of the pictures against those without a cache; of a video, the
picture shows the frame in the middle. Files that exist are overwritten.

{exit_codes(DONE, FAILED, REFUSED, MISSED, INTERRUPTED)}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks compare``."""
    add_model(parser)
    add_demo_run(parser, steps=28, seed=0, guidance=3.0)
    parser.begin_group("how it is cached")
    parser.add_plan(
        "--plan",
        ships=lambda args: args.model == "demo",
        action="append",
        default=[],
        dest="plans",
        metavar="FILE",
        help="with this plan or configuration, or each of the tiers in the file; repeatable",
    )
    add_target(
        parser,
        dest="speedups",
        action="append",
        default=[],
        help="with a policy that steers to this speed-up, in blocks that run; repeatable",
    )
    add_payload(parser)
    parser.begin_group("output")
    parser.add_argument("--pairs", type=int, default=3, metavar="N", help="timed runs of each (default: %(default)s)")
    add_metric(parser)
    parser.add_output(
        "--out",
        type=Path,
        default=Path("compare.png"),
        metavar="FILE",
        help="the picture, or with the ending .html a page of pictures, differences, steps and figures "
        "(default: %(default)s)",
    )
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Run each setting, print the table (or JSON, for ``--json -``) and write the picture.

    Raises:
        UsageError: an option cannot be followed, or a file cannot be read or written.
        TargetError: there is no such target.
        DitHooksError: as :func:`dithooks.dit_cache`.
    """
    from datetime import date

    from ..environment.machine import machine
    from ..errors import UsageError
    from ..integrations.diffusers_bars import hidden_bars
    from ..progress_bars import progress
    from ..storage.replacement import replacing, write_text
    from .cache_settings import all_from_file, for_speedup, numbered
    from .compare_output import draw, show
    from .comparison import measure
    from .html_report import comparison_page
    from .media import check_suffix
    from .option_checks import check_installed, check_least
    from .output_files import as_json, json_file, stdout_kept_for_json, write_json
    from .targets.pipeline_loading import DEMO
    from .targets.runnable import RunRequest, runnable

    request = RunRequest(**run_request(args), fresh=True)
    check_least(args, pairs=1)
    check_installed(args.metrics)
    if not args.plans and not args.speedups:
        raise UsageError("there is nothing to compare with: give a --plan, or a --target such as 2")
    if args.payload != "residual" and not args.speedups:
        raise UsageError(f"--payload {args.payload} goes with --target: a plan says itself what it forecasts")
    file = json_file(args.json)
    with stdout_kept_for_json(args.json):
        is_page = args.out.suffix.lower() in (".html", ".htm")
        if not is_page:
            check_suffix(args.out, video=False)
        shipped = request.model == DEMO
        plans = [setting for plan in args.plans for setting in all_from_file(plan, shipped)]
        settings = numbered(plans + [for_speedup(speedup, args.payload) for speedup in args.speedups])
        subject = runnable(request)
        with progress(not args.quiet) as report, hidden_bars(subject.target):
            comparison = measure(subject, settings, args.pairs, report, args.metrics)
    numbers = {**subject.description, "pairs": args.pairs, **comparison.to_dict()}
    made = {"machine": machine(subject.device), "date": date.today().isoformat()}
    numbers |= made
    sheet = None if is_page else draw(comparison, subject.captions)
    if is_page:
        write_text(args.out, comparison_page(comparison, subject.captions, {**subject.description, **made}))
    if sheet is not None:
        with replacing(args.out) as draft:
            sheet.save(draft)
    for outcome in comparison.outcomes:
        for remark in outcome.remarks:
            print(f"dithooks: {outcome.setting.name}: {remark}", file=sys.stderr)
    if comparison.again < math.inf:
        print(f"dithooks: two runs without a cache are {comparison.again:.1f} dB apart: MODEL does not draw the same "
              "each time, and nothing can come nearer than that", file=sys.stderr)  # fmt: skip
    if args.json == "-":
        print(as_json(numbers))
    else:
        show(comparison)
        if file is not None:
            write_json(file, numbers)
    if is_page:
        if args.json != "-":
            print(f"pictures, differences, steps and figures: {args.out}")
    elif sheet is None:
        print("dithooks: no picture: what MODEL returns does not look like pictures", file=sys.stderr)
    elif args.json != "-":
        print(f"without a cache above, the others below: {args.out}")
    missed = [each for each in comparison.outcomes if each.setting.is_missed_by(each.stats)]
    for each in missed:
        print(f"dithooks: {each.setting.missed(each.stats)}", file=sys.stderr)
    return TARGET_MISSED if missed else 0
