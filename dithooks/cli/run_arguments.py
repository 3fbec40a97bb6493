"""The arguments of commands that run a TARGET: ``dithooks compare`` and ``dithooks profile``."""

from __future__ import annotations

import argparse
from typing import Any

TARGET = """what TARGET can be:
  demo                        the small pipeline that ships with dithooks
  path/to/file.py:factory     your own, as for dithooks search: a function without arguments that returns a pair of the
  package.module:factory      pipeline (the model, or a BlockAdapter) and how to call it: a dict of keyword arguments, a
                              tuple of positional ones, or a function that does, without arguments or given the
                              pipeline. It has to draw the same each time; the generators in a dict are set back before
                              each run.
"""


def add_target(parser: argparse.ArgumentParser) -> None:
    """Add the target, and the options of the demo's pipeline."""
    add = parser.add_argument
    add("subject", metavar="TARGET", help="what to run, see below")
    add("--prompt", action="append", default=[], dest="prompts", metavar="CAPTION", help="demo: draw this; repeatable")
    add("--steps", type=int, metavar="N", help="demo: sampling steps (28)")
    add("--seed", type=int, help="demo: of the first caption; the next has the next (0)")
    add("--guidance", type=float, metavar="G", help="demo: guidance scale (3.0)")


def run_request(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a :class:`~dithooks.cli.targets.runnable.RunRequest`, from the arguments of :func:`add_target`."""
    options = {name: getattr(args, name) for name in ("steps", "seed", "guidance")}
    return {"target": args.subject, "prompts": tuple(args.prompts), **options}
