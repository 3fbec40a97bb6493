"""``dithooks inspect``: a model's lists of blocks and the ranges that can be cached."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser
from .run_arguments import (
    DONE,
    FACTORY,
    FAILED,
    INTERRUPTED,
    REFUSED,
    add_json,
    add_model,
    add_quiet,
    exit_codes,
)

SUMMARY = "show a model's lists of blocks and the ranges that can be cached"

USAGE = "MODEL [options], or --all [options]"

DESCRIPTION = """Show a model's lists of blocks, what it does between them, which ranges can be cached and which
cannot, and the lines that cache the largest."""

EPILOG = f"""what MODEL can be:
  WanPipeline              a pipeline class of diffusers
  WanTransformer3DModel    a transformer class of diffusers; CLASS#VARIANT for one of its variants
  path/to/folder           a saved pipeline or transformer: only its configuration is read
  owner/name               the same, in the local cache of the Hugging Face Hub; nothing is downloaded
{FACTORY}

A pipeline of a factory has to take two sampling steps or more. A small one of its kind shows as much as a large one.
Classes are inspected as tiny models with random weights. A file for dithooks inspect my_model.py:make:

  def make():
      model = MyTransformer(depth=4)
      return model, {{"x": torch.randn(1, 16, 64), "timestep": torch.tensor(0.5)}}

{exit_codes(DONE, FAILED, REFUSED, INTERRUPTED)}"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks inspect``."""
    add_model(parser, nargs="?")
    parser.begin_group("what is shown")
    add = parser.add_argument
    add(
        "--blocks",
        action="append",
        default=[],
        metavar="PATH",
        help="a list of blocks; repeatable (default: those that are found)",
    )
    add(
        "--tests",
        type=int,
        default=64,
        metavar="N",
        help="the most ranges to try out, each by three calls (default: %(default)s)",
    )
    add("--all", action="store_true", help="in place of a MODEL: a table of all transformer classes; takes minutes")
    parser.begin_group("output")
    parser.add_output("--markdown", type=Path, metavar="FILE", help="with --all: write the table to a file instead")
    add_json(parser, "tables")
    add_quiet(parser)


def run(args: argparse.Namespace) -> int:
    """Print the tables of one target, or of all classes.

    Raises:
        UsageError: options exclude each other, a package is missing, or a file cannot be written.
        TargetError: there is no such target, or it shows no blocks.
    """
    from ..errors import UsageError

    if args.all == (args.model is not None):
        raise UsageError("inspect takes either a MODEL or --all (see dithooks inspect --help)")
    if args.tests < 0:
        raise UsageError(f"--tests is {args.tests}: it must be 0 or more")
    if args.all and (args.blocks or args.json):
        raise UsageError("--all takes no --blocks and no --json")
    if args.markdown is not None and not args.all:
        raise UsageError("--markdown goes with --all only")
    if args.all:
        _show_all(args.markdown, args.quiet)
    else:
        _show_one(args.model, tuple(args.blocks), args.tests, args.json)
    return 0


def _show_one(target: str, blocks: tuple[str, ...], tests: int, json_to: str | None) -> None:
    """Print the tables of a target to stdout (or JSON, for ``json_to="-"``)."""
    if json_to != "-":
        _need_rich()
    if ":" not in target:
        _need_diffusers()
    from ..inspection.model_report import inspect, show, to_json
    from ..storage.replacement import write_text
    from .output_files import json_file
    from .targets.resolver import find_subject

    file = json_file(json_to)
    inspection = inspect(find_subject(target), blocks, tests)
    if json_to == "-":
        print(to_json(inspection))
        return
    from rich.console import Console

    show(inspection, Console())
    if file is not None:
        write_text(file, to_json(inspection) + "\n")


def _show_all(markdown_to: Path | None, quiet: bool) -> None:
    """Print the table of all classes, or write it to a file."""
    _need_rich()
    _need_diffusers()
    from rich.console import Console

    from ..inspection.model_table import all_rows, markdown, summary, table
    from ..progress_bars import progress
    from ..storage.replacement import write_text

    with progress(not quiet) as report:
        rows, missing = all_rows(lambda cls, done, total: report("classes", done, total, cls))
    console = Console()
    if markdown_to is None:
        console.print(table(rows))
    else:
        write_text(markdown_to, markdown(rows, missing))
        console.print(f"{summary(rows)}: {markdown_to}", highlight=False, soft_wrap=True)


def _need_rich() -> None:
    from .required_packages import extra_needed

    with extra_needed("inspect needs", "rich"):
        import rich  # noqa: F401


def _need_diffusers() -> None:
    from .required_packages import extra_needed

    with extra_needed("inspect needs", '"dithooks[diffusers]"'):
        import diffusers  # noqa: F401
