"""``dithooks env``: the installed versions, and the cause if an accelerator does not work.

It runs where PyTorch cannot be imported, too: neither the package nor the command line imports it by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .run_arguments import REFUSED, add_json, exit_codes

SUMMARY = "show what is installed, what is missing, and what is wrong"

USAGE = "[options]"

DESCRIPTION = """Show what is installed, which accelerator PyTorch sees, and what keeps it from working. Works where
PyTorch cannot be imported, too."""

SOUND, BROKEN = "0    the environment is sound", "1    something is broken, and the output names it"
EPILOG = f"{exit_codes(SOUND, BROKEN, REFUSED)}"


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks env``."""
    parser.begin_group("output")
    add_json(parser, "text")


def run(args: argparse.Namespace) -> int:
    """Examine the environment and print a report; return 0 if it is sound, else 1.

    Raises:
        UsageError: the file cannot be written.
    """
    from ..environment import env_report
    from .output_files import as_json, write_json

    file = None if args.json in (None, "-") else Path(args.json)
    report = env_report.look()
    if args.json == "-":
        print(as_json(report))
    else:
        env_report.show(report)
    if file is not None:
        write_json(file, report)
    return 0 if report["sound"] else 1
