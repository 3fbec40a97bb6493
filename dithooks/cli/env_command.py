"""``dithooks env``: what is installed here, and what keeps the accelerator from working.

It runs where PyTorch cannot be imported, too: neither the package nor the command line imports it by itself.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser

SUMMARY = "show what is installed and what is wrong with it"

DESCRIPTION = """Show what is installed, which accelerator PyTorch sees, and what keeps it from working. Works where
PyTorch cannot be imported, too."""

EPILOG = """Exit codes: 0 the environment is sound; 1 something is broken, and the output names it; 2 the command cannot
be run as given.
"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks env``."""
    parser.add_output("--json", metavar="FILE", help="write it as JSON too; - writes it instead of the text")


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
