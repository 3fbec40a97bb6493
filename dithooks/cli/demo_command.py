"""``dithooks demo``: the same pictures without and with the cache, by the pipeline that ships."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser

SUMMARY = "draw emoji without and with the cache and compare them"

DESCRIPTION = """Draw the same emoji without and with the cache, with the small pipeline that ships with dithooks: no
network, no accelerator, under two minutes on two CPU cores."""

EPILOG = ""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks demo``."""
    add = parser.add_argument
    add("--prompt", action="append", metavar="CAPTION", help="what to draw; repeat it for more pictures")
    add("--steps", type=int, default=28, help="sampling steps (default: %(default)s)")
    add("--seed", type=int, default=0, help="where the noise comes from (default: %(default)s)")
    add("--guidance", type=float, default=3.0, help="guidance scale (default: %(default)s)")
    parser.add_plan(
        "--plan",
        ships=lambda args: True,
        metavar="PLAN",
        help="a file that a search wrote, or one that ships: 1.5x, 2x, 3x (default: 2x)",
    )
    add("--start", type=int, help="no plan, but cache_step_start: first steps, all computed (6)")
    add("--interval", type=int, help="no plan, but cache_step_interval: then every n-th (2)")
    add("--pairs", type=int, default=3, help="timed runs of each kind (default: %(default)s)")
    parser.add_output("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_output("--json", metavar="FILE", help="write the numbers too; - writes them instead of the table")


def run(args: argparse.Namespace) -> int:
    """Draw, compare, print the table and write the picture.

    Raises:
        UsageError: a package is missing, an option cannot be followed, or a file cannot be read or written.
    """
    from ..errors import UsageError
    from .extras import extra_needed

    with extra_needed("the demo needs", '"dithooks[demo]"'):
        from ..demo import PLAN, demonstration, load_plan

    static = {name: value for name in ("start", "interval") if (value := getattr(args, name)) is not None}
    if static and args.plan is not None:
        raise UsageError(f"--plan goes without --{next(iter(static))}: a plan fixes which steps are computed")
    plan_name = args.plan or PLAN
    try:
        options = demonstration.DemoOptions(
            prompts=tuple(args.prompt or demonstration.PROMPTS),
            steps=args.steps,
            seed=args.seed,
            guidance=args.guidance,
            pairs=args.pairs,
            plan=None if static else load_plan(plan_name),
            plan_name=plan_name,
            **static,
        )
        demonstration.check_ending(args.out)
        pipe = demonstration.load_checked(options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    demonstration.run_demo(pipe, options, out=args.out, json_to=args.json)
    return 0
