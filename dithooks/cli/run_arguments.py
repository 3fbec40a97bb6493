"""What commands have in common: their model, the options that mean the same in each of them, and their exit codes."""

from __future__ import annotations

import argparse
from typing import Any

from .command_parser import Parser

FACTORY = """  path/to/file.py:factory  your own: a function without arguments that returns a pair, the pipeline (the model, or a BlockAdapter) and how to call it: a dict of keyword arguments, a tuple of positional ones, or a function that does, without arguments or given the pipeline
  package.module:factory   the same, of a module"""  # noqa: E501 wrapped where it is shown
MODEL = f"""what MODEL can be:
  demo                     the small pipeline that ships with dithooks
{FACTORY}

A factory has to draw the same each time: generators in its dict or tuple are set back before each run, and so are those of torch.
"""  # noqa: E501
SEEDS = "of the first prompt; the next has the next"
DONE = "0    done"
FAILED = "1    MODEL's own code has failed; its traceback is shown"
REFUSED = "2    cannot be done as asked; one line says why"
INTERRUPTED = "130  interrupted"


def exit_codes(*codes: str) -> str:
    """The exit codes of a command, as its help shows them."""
    return "exit codes:\n" + "".join(f"  {each}\n" for each in codes)


def add_model(parser: Parser, **options: Any) -> None:
    """Add the model that a command is about."""
    parser.add_argument("model", metavar="MODEL", help="what is run, see below", **options)


def add_demo_run(parser: Parser, steps: int, seed: int, guidance: float, seeds: str = SEEDS) -> None:
    """Add the options of the demo's runs, with their defaults; a factory chooses what it draws."""
    parser.begin_group("what the demo draws")
    add = parser.add_argument
    add("--prompt", action="append", default=[], dest="prompts", metavar="TEXT", help="draw this; repeatable")
    add("--steps", type=int, metavar="N", help=f"sampling steps (default: {steps})")
    add("--guidance", type=float, metavar="G", help=f"guidance scale (default: {guidance:g})")
    add("--seed", type=int, metavar="N", help=f"{seeds} (default: {seed})")


def add_target(parser: Parser, *, dest: str = "target", help: str, **options: Any) -> None:
    """Add the speed-up that is asked for."""
    parser.add_argument("--target", type=float, dest=dest, metavar="X", help=help, **options)


def add_payload(parser: Parser) -> None:
    """Add the choice of the payload, which is forecast at reused steps."""
    parser.add_argument(
        "--payload",
        choices=("residual", "output"),
        default="residual",
        help="with --target: forecast the residual of the blocks, or the output of the whole transformer, whose call "
        "is then left out (default: %(default)s)",
    )


def add_json(parser: Parser, replaced: str = "table") -> None:
    """Add the file of a command's figures."""
    parser.add_output("--json", metavar="FILE", help=f"write the figures, too; - prints them instead of the {replaced}")


def add_quiet(parser: Parser) -> None:
    """Add the switch that hides progress."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run_request(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`~dithooks.cli.targets.runnable.RunRequest`, from the arguments of a command."""
    options = {name: getattr(args, name) for name in ("steps", "seed", "guidance")}
    return {"model": args.model, "prompts": tuple(args.prompts), **options}
