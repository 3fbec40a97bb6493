"""``dithooks demo``: the same pictures without and with the cache, by the pipeline that ships."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .run_arguments import DONE, INTERRUPTED, REFUSED, add_demo_run, add_json, add_quiet, exit_codes

SUMMARY = "draw pictures without and with the cache, by a small pipeline that ships"

USAGE = "[options]"

DESCRIPTION = """Draw the same emoji without and with the cache, with the small pipeline that ships with dithooks: no
network, no accelerator, under two minutes on two CPU cores."""

EPILOG = f"""examples:
  dithooks demo
  dithooks demo --prompt "slice of pizza" --prompt "panda face" --seed 7
  dithooks demo --plan 3x --out faster.png
  dithooks demo --steps 50 --start 4 --interval 3
  dithooks demo --json - > numbers.json

{exit_codes(DONE, REFUSED, INTERRUPTED)}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks demo``."""
    add_demo_run(parser, steps=28, seed=0, guidance=3.0, seeds="where the noise comes from")
    parser.begin_group("how it is cached")
    add = parser.add_argument
    parser.add_plan(
        "--plan",
        ships=lambda args: True,
        metavar="FILE",
        help="a plan or configuration from a file, or a plan that ships: 1.5x, 2x, 3x (default: 2x)",
    )
    add("--start", type=int, metavar="N", help="in place of a plan: the first steps, all computed (default: 6)")
    add("--interval", type=int, metavar="N", help="in place of a plan: from then on every Nth is (default: 2)")
    parser.begin_group("output")
    add("--pairs", type=int, default=3, metavar="N", help="timed runs of each (default: %(default)s)")
    parser.add_output(
        "--out", type=Path, default=Path("demo.png"), metavar="FILE", help="the picture (default: %(default)s)"
    )
    add_json(parser)
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Draw, compare, print the table and write the picture.

    Raises:
        UsageError: a package is missing, an option cannot be followed, or a file cannot be read or written.
    """
    from ..errors import UsageError
    from .required_packages import extra_needed

    with extra_needed("the demo needs", '"dithooks[demo]"'):
        from ..demo import PLAN, demonstration, load_plan

    from .targets.runnable import GUIDANCE, SEED, STEPS

    static = {name: value for name in ("start", "interval") if (value := getattr(args, name)) is not None}
    if static and args.plan is not None:
        raise UsageError(f"--plan goes without --{next(iter(static))}: a plan fixes which steps are computed")
    plan_name = args.plan or PLAN
    try:
        options = demonstration.DemoOptions(
            prompts=tuple(args.prompts or demonstration.PROMPTS),
            steps=STEPS if args.steps is None else args.steps,
            seed=SEED if args.seed is None else args.seed,
            guidance=GUIDANCE if args.guidance is None else args.guidance,
            pairs=args.pairs,
            plan=None if static else load_plan(plan_name),
            plan_name=plan_name,
            **static,
        )
        demonstration.check_ending(args.out)
        pipe = demonstration.load_checked(options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(str(error)) from error
    demonstration.run_demo(pipe, options, out=args.out, json_to=args.json, verbose=not args.quiet)
    return 0
