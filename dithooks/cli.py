"""The ``dithooks`` command. Each subcommand is a function pair: one adds its arguments, one runs it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from . import __version__

EXAMPLES = """examples:
  dithooks demo
  dithooks demo --prompt "slice of pizza" --prompt "panda face" --seed 7
  dithooks demo --steps 50 --start 4 --interval 3 --out faster.png
  dithooks demo --json - > numbers.json
"""


class UsageError(Exception):
    """What was asked for cannot be done; the text is the one line that the user sees."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0 done, 2 asked wrongly, 130 interrupted.

    Args:
        argv: the arguments after the command's name; those of the process if None.

    Raises:
        SystemExit: after ``--help`` and ``--version``, as argparse does.
    """
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        if args.command is None:
            parser.print_help(sys.stderr)
            return 2
        code: int = args.run(args)
        return code
    except UsageError as error:
        print(f"dithooks: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dithooks: interrupted", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    """The whole command line; importing nothing heavier than argparse."""
    parser = Parser(
        prog="dithooks",
        description="Make diffusion transformers faster by reusing block residuals between sampling steps.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"dithooks {__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    _add_demo(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction[Parser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="draw emoji without and with the cache and compare them",
        description="Draw the same emoji without and with the cache, with the small pipeline that ships with "
        "dithooks: no network, no accelerator, under two minutes on two CPU cores.",
    )
    parser.add_argument(
        "--prompt", action="append", metavar="CAPTION", help="what to draw; repeat it for more pictures"
    )
    parser.add_argument("--steps", type=int, default=28, help="sampling steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="where the noise comes from (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="guidance scale (default: %(default)s)")
    parser.add_argument(
        "--start", type=int, default=6, help="cache_step_start: first steps, all computed (default: %(default)s)"
    )
    parser.add_argument(
        "--interval", type=int, default=2, help="cache_step_interval: then every n-th (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers too; - writes them instead of the table")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    try:
        from .demo import run as demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "dithooks":
            raise  # a fault of ours, not a package that is missing
        raise UsageError(f'the demo needs {package}: pip install "dithooks[demo]"') from error
    try:
        options = demo.DemoOptions(
            prompts=tuple(args.prompt or demo.PROMPTS),
            steps=args.steps,
            seed=args.seed,
            guidance=args.guidance,
            start=args.start,
            interval=args.interval,
            pairs=args.pairs,
        )
        demo.check_outputs(args.out, args.json)
        pipe = demo.load_checked(options)
    except (ValueError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    try:
        demo.run_demo(pipe, options, out=args.out, json_to=args.json)
    except OSError as error:  # a ValueError is no longer the user's here, so it keeps its traceback
        raise UsageError(f"the results cannot be written: {error}") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
