"""The ``dithooks`` command: its parser, and the call of the subcommand that was chosen."""

from __future__ import annotations

import argparse
import sys
from typing import Protocol

from .. import __version__
from ..errors import BrokenPyTorch, DitHooksError
from . import (
    compare_command,
    demo_command,
    env_command,
    generate_command,
    inspect_command,
    profile_command,
    search_command,
)
from .command_parser import Parser
from .extras import check_pytorch

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
INTERRUPTED = 130  # exit code, as shells have it


class Command(Protocol):
    """A module with one subcommand. It imports no more than argparse at its top, and all else in ``run``."""

    SUMMARY: str  # a line of ``dithooks --help``
    DESCRIPTION: str
    EPILOG: str

    def add_arguments(self, parser: Parser) -> None:
        """Add the subcommand's arguments to its parser, those that name files by the parser's own methods."""

    def run(self, args: argparse.Namespace) -> int:
        """Run the subcommand and return the exit code; a ``DitHooksError`` is shown as one line."""


COMMANDS: dict[str, Command] = {
    "demo": demo_command,
    "inspect": inspect_command,
    "search": search_command,
    "generate": generate_command,
    "compare": compare_command,
    "profile": profile_command,
    "env": env_command,
}


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code.

    PyTorch is imported once the command line and the files that it names have been checked, and for ``env`` not at all.

    0: done, all files written. 1: the environment is broken: ``env`` says how, the others cannot import PyTorch. 2: the
    command cannot be done as asked; one line on stderr gives the reason. 3: a target or ``--min-psnr`` was not reached
    (``search``). 130: interrupted; ``search`` and ``generate`` have written their results so far.

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
        args.check_files(args)
        if COMMANDS[args.command] is not env_command:
            check_pytorch()
        return COMMANDS[args.command].run(args)
    except BrokenPyTorch as error:
        print(f"dithooks: error: {error}", file=sys.stderr)
        return 1
    except DitHooksError as error:  # raised on purpose; all other errors are faults and keep their traceback
        print(f"dithooks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dithooks: interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> Parser:
    """Build the parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="dithooks",
        description="Make diffusion transformers faster by reusing block residuals between sampling steps.",
        epilog=EXAMPLES,
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"dithooks {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name, help=command.SUMMARY, description=command.DESCRIPTION, epilog=command.EPILOG, formatter_class=raw
        )
        command.add_arguments(subparser)
        subparser.set_defaults(check_files=subparser.check_files)
    return parser
