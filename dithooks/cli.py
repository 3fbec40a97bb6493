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
  dithooks demo --plan 3x --out faster.png
  dithooks demo --steps 50 --start 4 --interval 3
  dithooks demo --json - > numbers.json
  dithooks inspect FluxPipeline
  dithooks inspect my_model.py:make
  dithooks search demo --target 2.5 --out plan.json
  dithooks search my_model.py:make --target 1.5 --target 2 --out "plan-{target}x.json" --record run.npz
  dithooks env
"""

TARGETS = """what TARGET can be:
  WanPipeline                 a pipeline class of diffusers
  WanTransformer3DModel       a transformer class of diffusers; CLASS#VARIANT for one of its variants
  path/to/folder, owner/name  a saved pipeline or transformer, or one in the local cache of the Hugging Face Hub:
                              only its configuration is read, and nothing is downloaded
  path/to/file.py:factory     your own: a function without arguments that returns a pair of the model, the pipeline
  package.module:factory      or a BlockAdapter, and how to call it: a dict of keyword arguments, a tuple of
                              positional ones, or a function that does, without arguments or given the pipeline. A
                              pipeline has to take two sampling steps or more. A small one of its kind tells as
                              much as a large one.

Classes are looked at as tiny models with random weights. A file for `dithooks inspect my_model.py:make`:

  def make():
      model = MyTransformer(depth=4)
      return model, {"x": torch.randn(1, 16, 64), "timestep": torch.tensor(0.5)}
"""

SEARCH = """what TARGET can be:
  demo                        the small pipeline that ships with dithooks
  path/to/file.py:factory     your own: a function without arguments that returns a pair of the pipeline (the model,
  package.module:factory      or a BlockAdapter) and how to call it: a dict of keyword arguments, a tuple of
                              positional ones, or a function that does, without arguments or given the pipeline.
                              What the call returns is compared: pictures, videos or latents. A dict's or tuple's
                              generators begin anew with each run, and so do torch's own; a function has to draw the
                              same each time by itself.

One run is recorded, plans are worked out from it, the best few are run, and the nearest to the recorded one is written.
A file for `dithooks search my_model.py:make`:

  def make():
      pipe = WanPipeline.from_pretrained(..., torch_dtype=torch.bfloat16).to("cuda")
      noise = torch.Generator("cuda").manual_seed(0)
      return pipe, {"prompt": ["a cat", "a street"], "num_inference_steps": 40, "generator": noise}

exit codes: 0 written; 2 asked wrongly; 3 written, but a target was not reached; 130 interrupted, the best so far is
written if there is one.
"""


class UsageError(Exception):
    """What was asked for cannot be done; the text is the one line that the user sees."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message} (see {self.prog} --help)")


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 done; 1 the environment is broken (``env``); 2 asked wrongly; 3 target not reached (``search``); 130 interrupted.

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
        from .demo import PLAN, load_plan
        from .demo import run as demo
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
    parser = commands.add_parser(
        "inspect",
        help="show a model's lists of blocks and the ranges that can be cached",
        description="Show a model's lists of blocks, what it does between them, which ranges can be cached and which\n"
        "cannot, and the lines that cache the largest.",
        epilog=TARGETS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("target", nargs="?", metavar="TARGET", help="what to look at, see below")
    parser.add_argument(
        "--blocks", action="append", default=[], metavar="PATH", help="a list to look at, not those found; repeatable"
    )
    parser.add_argument(
        "--tests",
        type=int,
        default=64,
        metavar="N",
        help="the most ranges to try out, each by three calls (default: %(default)s)",
    )
    parser.add_argument("--json", metavar="FILE", help="write it as JSON too; - writes it instead of the tables")
    parser.add_argument("--all", action="store_true", help="a table of all transformer classes; takes minutes")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="with --all: write the table to a file instead")
    parser.set_defaults(run=_inspect)


def _inspect(args: argparse.Namespace) -> int:
    from .report import command
    from .report.classes import TargetError

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
    parser = commands.add_parser(
        "search",
        help="find the plan for a speed-up that keeps nearest to the pictures without the cache",
        description="Find, for a speed-up, the plan that keeps nearest to the pictures without the cache: which\n"
        "blocks are reused at which steps, and with which weights. A plan is a file for dit_cache and dithooks demo.",
        epilog=SEARCH,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("target", metavar="TARGET", help="what to search a plan for, see below")
    add("--target", action="append", type=float, dest="speedups", metavar="X", help="speed-up (2); repeatable")
    add("--out", default="plan.json", metavar="FILE", help="the plan; with several targets plan-{target}x.json or so")
    add(
        "--steps",
        type=int,
        metavar="N",
        help="sampling steps: those of the demo (28), those a factory's run has to take",
    )
    add("--cost", choices=("time", "blocks"), default="time", help="what the speed-up is of (default: %(default)s)")
    add("--evals", type=int, default=4, metavar="N", help="plans that are run at most (default: %(default)s)")
    add("--climb", type=int, default=0, metavar="N", help="further ones, with one step moved (default: %(default)s)")
    add("--interval", type=int, metavar="K", help="only plans refreshed every K steps, residuals reused as they are")
    add(
        "--no-probe",
        dest="probe",
        action="store_false",
        help="guess what is left of early and late errors, instead of measuring it in one run more",
    )
    add("--generations", type=float, default=6.0, metavar="N", help="blocks run at most, in uncached runs (6; inf)")
    add("--seconds", type=float, default=float("inf"), metavar="S", help="time at most (default: %(default)s)")
    add("--journal", type=Path, metavar="FOLDER", help="keep what was found there, and go on from it")
    add("--record", type=Path, metavar="FILE", help="keep the recorded run too, .npz")
    add("--recording", type=Path, metavar="FILE", help="take a recorded run from there instead of recording one")
    add("--json", metavar="FILE", help="write the numbers too; - writes them instead of the tables")
    add("--quiet", action="store_true", help="show no progress")
    add("--prompt", action="append", default=[], dest="prompts", metavar="CAPTION", help="demo: draw this; repeatable")
    add("--seed", type=int, help="demo: of the first caption; the next has the next (1000)")
    add("--guidance", type=float, help="demo: guidance scale (3.0)")
    parser.set_defaults(run=_search)


def _search(args: argparse.Namespace) -> int:
    from .report import search_command
    from .report.classes import TargetError

    given = {name: value for name, value in vars(args).items() if name not in ("command", "run")}
    given |= {"speedups": tuple(args.speedups or [2.0]), "prompts": tuple(args.prompts)}
    try:
        return search_command.run_search(search_command.SearchOptions(**given))
    except TargetError as error:
        raise UsageError(" ".join(str(error).split())) from error


def _add_env(commands: argparse._SubParsersAction[Parser]) -> None:
    from .report import env

    parser = commands.add_parser(
        "env", help="show what is installed and what is wrong with it", description=env.DESCRIPTION
    )
    env.add_arguments(parser)
    parser.set_defaults(run=_env)


def _env(args: argparse.Namespace) -> int:
    from .report import env

    try:
        return env.run(args.json)
    except env.EnvError as error:
        raise UsageError(str(error)) from error


if __name__ == "__main__":
    sys.exit(main())
