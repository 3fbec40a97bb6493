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
from .command_parser import Parser, wrapped
from .required_packages import check_pytorch
from .standard_streams import outlasting_streams

EPILOG = """the same in every command:
  MODEL        what is run: demo, your own (file.py:function), a saved pipeline; see dithooks COMMAND --help
  --plan FILE  a plan or configuration to cache with
  --target X   the speed-up that is asked for
  --steps N    sampling steps
  --out FILE   where the result goes
  --json FILE  where the figures go; - for stdout

examples:
  dithooks demo
  dithooks inspect FluxPipeline
  dithooks search my_model.py:make --target 2 --out plan.json
  dithooks compare my_model.py:make --plan plan.json --target 2
  dithooks generate path/to/pipeline --prompt "a lighthouse" --plan plan.json
  dithooks profile demo --threshold 0.1 --threshold 0.2

exit codes:
  0    done, all files written
  1    env: something is broken; else: MODEL's own code has failed, and its traceback is shown
  2    cannot be done as asked; one line on stderr says why
  3    done, but a target was not reached: search, compare, generate
  130  interrupted; search and generate have written what they had
"""
FAILED, INTERRUPTED = 1, 130  # exit codes, as Python and shells have them


class Command(Protocol):
    """A module with one subcommand. It imports no more than argparse at its top, and all else in ``run``."""

    SUMMARY: str  # a line of ``dithooks --help``
    USAGE: str  # the arguments, in short
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

    0: done, all files written. 1: the environment is broken (``env`` says how, the others cannot import PyTorch), or
    the model's own code has failed. 2: the command cannot be done as asked; one line on stderr gives the reason. 3: a
    target was not reached (``search``, ``compare``, ``generate``). 130: interrupted; ``search`` and ``generate`` have
    written their results so far. A stdout or stderr that is closed changes none of these: what is printed to it is
    dropped, and all files are written.

    Args:
        argv: the arguments after the command's name; those of the process if None.

    Raises:
        SystemExit: after ``--help`` and ``--version``, as argparse does.
    """
    with outlasting_streams():
        return _run(build_parser(), argv)


def _run(parser: Parser, argv: list[str] | None) -> int:
    """Run the command that arguments name."""
    try:
        args, unknown = parser.parse_known_args(argv)
        if args.command is None and not unknown:
            parser.print_help(sys.stderr)
            return 2
        (args.parser if args.command else parser).refuse_unknown(unknown)
        args.parser.check_files(args)
        if COMMANDS[args.command] is not env_command:
            check_pytorch()
        code = COMMANDS[args.command].run(args)
        sys.stdout.flush()  # may raise
        return code
    except BrokenPyTorch as error:
        print(f"dithooks: error: {error}", file=sys.stderr)
        return 1
    except DitHooksError as error:  # raised on purpose; all other errors are faults and keep their traceback
        print(f"dithooks: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("dithooks: interrupted", file=sys.stderr)
        return INTERRUPTED
    except (Exception, SystemExit) as error:  # sys.exit() in a file of the user, too
        from .user_errors import user_traceback

        if (shown := user_traceback(error)) is None:
            raise
        print(f"{shown}dithooks: error: {args.model} raised this: it is not of dithooks", file=sys.stderr)
        return FAILED


def build_parser() -> Parser:
    """Build the parser of the whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = Parser(
        prog="dithooks",
        description=wrapped("Make diffusion transformers faster by reusing earlier results at some sampling steps."),
        epilog=wrapped(EPILOG),
        formatter_class=raw,
    )
    parser.add_argument("--version", action="version", version=f"dithooks {__version__}")
    subparsers = parser.add_subparsers(title="commands", dest="command", metavar="COMMAND")
    for name, command in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=command.SUMMARY,
            usage=f"dithooks {name} {command.USAGE}",
            description=wrapped(command.DESCRIPTION),
            epilog=wrapped(command.EPILOG),
            formatter_class=raw,
        )
        command.add_arguments(subparser)
        subparser.set_defaults(parser=subparser)
    return parser
