"""The ``dithooks`` command. Each subcommand is a function pair: one adds its arguments, one runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__

EXAMPLES = """examples:
  dithooks demo
  dithooks demo --prompt "slice of pizza" --prompt "panda face" --seed 7
  dithooks demo --plan 3x --out faster.png
  dithooks demo --steps 50 --start 4 --interval 3
  dithooks demo --json - > numbers.json
  dithooks inspect FluxPipeline
  dithooks inspect my_model.py:make
  dithooks search demo --target 2.5 --out plan.json
  dithooks search my_model.py:make --target 1.5 --target 2 --out "plan-{target}x.json" --record run.npz
  dithooks generate path/to/pipeline --prompt "a lighthouse" --plan plan.json --out lighthouse.png
  dithooks generate owner/video-model --prompt "a cat walks" --frames 49 --target 2 --out cat.mp4
  dithooks compare demo --plan 2x --plan 3x --target 2 --out compare.png
  dithooks compare my_model.py:make --plan plan.json --json numbers.json
  dithooks profile demo --threshold 0.1 --threshold 0.2
  dithooks env
"""


class UsageError(Exception):
    """What was asked for cannot be done; the text is the one line that the user sees."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done, or written; 1 the environment is broken (``env``); 2 asked wrongly, and said in a line; 3 target not reached
    (``search``); 130 interrupted: ``search`` and ``generate`` have then written what they had.

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
    _add_inspect(commands)
    _add_search(commands)
    _add_generate(commands)
    _add_compare(commands)
    _add_profile(commands)
    _add_env(commands)
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
        "--plan", metavar="PLAN", help="a file that a search wrote, or one that ships: 1.5x, 2x, 3x (default: 2x)"
    )
    parser.add_argument("--start", type=int, help="no plan, but cache_step_start: first steps, all computed (6)")
    parser.add_argument("--interval", type=int, help="no plan, but cache_step_interval: then every n-th (2)")
    parser.add_argument("--pairs", type=int, default=3, help="timed runs of each kind (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("demo.png"), help="the picture (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers too; - writes them instead of the table")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> int:
    try:
        from ..demo import PLAN, load_plan
        from ..demo import demonstration as demo
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "dithooks":
            raise  # a fault of ours, not a package that is missing
        raise UsageError(f'the demo needs {package}: pip install "dithooks[demo]"') from error
    static = {name: value for name in ("start", "interval") if (value := getattr(args, name)) is not None}
    if static and args.plan is not None:
        raise UsageError(f"--plan goes without --{next(iter(static))}: a plan says itself which steps are computed")
    try:
        name = args.plan or PLAN
        options = demo.DemoOptions(
            prompts=tuple(args.prompt or demo.PROMPTS),
            steps=args.steps,
            seed=args.seed,
            guidance=args.guidance,
            pairs=args.pairs,
            plan=None if static else load_plan(name),
            plan_name=name,
            **static,
        )
        demo.check_outputs(args.out, args.json)
        pipe = demo.load_checked(options)
    except (ValueError, TypeError, OSError) as error:
        raise UsageError(" ".join(str(error).split())) from error
    try:
        demo.run_demo(pipe, options, out=args.out, json_to=args.json)
    except OSError as error:  # a ValueError is no longer the user's here, so it keeps its traceback
        raise UsageError(f"the results cannot be written: {error}") from error
    return 0


def _add_inspect(commands: argparse._SubParsersAction[Parser]) -> None:
    from . import inspect_arguments

    about = "show a model's lists of blocks and the ranges that can be cached"
    _add(commands, "inspect", about, inspect_arguments).set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from ..errors import TargetError
    from . import inspect_command as command

    if args.all == (args.target is not None):
        raise UsageError("inspect takes either a TARGET or --all (see dithooks inspect --help)")
    if args.tests < 0:
        raise UsageError(f"--tests is {args.tests}: it must be 0 or more")
    if args.all and (args.blocks or args.json):
        raise UsageError("--all takes no --blocks and no --json")
    if args.markdown is not None and not args.all:
        raise UsageError("--markdown goes with --all only")
    try:
        if args.all:
            command.show_all(args.markdown)
        else:
            command.show_one(args.target, tuple(args.blocks), args.tests, args.json)
    except TargetError as error:  # all others are of the user's own factory, or ours, and keep their traceback
        raise UsageError(" ".join(str(error).split())) from error
    return 0


def _add_search(commands: argparse._SubParsersAction[Parser]) -> None:
    from . import search_arguments

    about = "find the plan for a speed-up that keeps nearest to the pictures without the cache"
    _add(commands, "search", about, search_arguments).set_defaults(run=_search)


def _search(args: argparse.Namespace) -> int:
    from ..errors import TargetError
    from . import search_command

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    given |= {"speedups": tuple(args.speedups or [2.0]), "prompts": tuple(args.prompts)}
    try:
        return search_command.run_search(search_command.SearchOptions(**given))
    except TargetError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _add_generate(commands: argparse._SubParsersAction[Parser]) -> None:
    from . import generate_command

    about = "draw pictures or a video with any pipeline, as it is or made faster"
    _add(commands, "generate", about, generate_command).set_defaults(run=_generate)


def _generate(args: argparse.Namespace) -> int:
    from . import generate_command

    return _told(generate_command.run, args)


def _add_compare(commands: argparse._SubParsersAction[Parser]) -> None:
    from . import compare_command

    about = "run the same without a cache and with each of several, and compare time and pictures"
    _add(commands, "compare", about, compare_command).set_defaults(run=_compare)


def _compare(args: argparse.Namespace) -> int:
    from . import compare_command

    return _told(compare_command.run, args)


def _add_profile(commands: argparse._SubParsersAction[Parser]) -> None:
    from . import profile_command

    about = "show how much changes from step to step, and what thresholds would reuse"
    _add(commands, "profile", about, profile_command).set_defaults(run=_profile)


def _profile(args: argparse.Namespace) -> int:
    from . import profile_command

    return _told(profile_command.run, args)


def _add(commands: argparse._SubParsersAction[Parser], name: str, about: str, module: Any) -> Parser:
    """A subcommand whose arguments are in a module of its own."""
    parser = commands.add_parser(
        name,
        help=about,
        description=module.DESCRIPTION,
        epilog=module.EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    return parser


def _told(run: Callable[[argparse.Namespace], int], args: argparse.Namespace) -> int:
    """Run a command; what it has to say of its asking is a line."""
    from ..errors import TargetError

    try:
        return run(args)
    except TargetError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _add_env(commands: argparse._SubParsersAction[Parser]) -> None:
    from ..environment import env_command as env

    parser = commands.add_parser(
        "env", help="show what is installed and what is wrong with it", description=env.DESCRIPTION
    )
    env.add_arguments(parser)
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    from ..environment import env_command as env

    try:
        return env.run(args.json)
    except env.EnvError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
