"""``dithooks inspect``: a model's lists of blocks and the ranges that can be cached."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command_parser import Parser

SUMMARY = "show a model's lists of blocks and the ranges that can be cached"

DESCRIPTION = """Show a model's lists of blocks, what it does between them, which ranges can be cached and which
cannot, and the lines that cache the largest."""

EPILOG = """what TARGET can be:
  WanPipeline                 a pipeline class of diffusers
  WanTransformer3DModel       a transformer class of diffusers; CLASS#VARIANT for one of its variants
  path/to/folder, owner/name  a saved pipeline or transformer, or one in the local cache of the Hugging Face Hub:
                              only its configuration is read, and nothing is downloaded
  path/to/file.py:factory     your own: a function without arguments that returns a pair of the model, the pipeline
  package.module:factory      or a BlockAdapter, and how to call it: a dict of keyword arguments, a tuple of
                              positional ones, or a function that does, without arguments or given the pipeline. A
                              pipeline has to take two sampling steps or more. A small one of its kind shows as
                              much as a large one.

Classes are inspected as tiny models with random weights. A file for `dithooks inspect my_model.py:make`:

  def make():
      model = MyTransformer(depth=4)
      return model, {"x": torch.randn(1, 16, 64), "timestep": torch.tensor(0.5)}
"""


def add_arguments(parser: Parser) -> None:
    """Add the arguments of ``dithooks inspect``."""
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
    parser.add_output("--json", metavar="FILE", help="write it as JSON too; - writes it instead of the tables")
    parser.add_argument("--all", action="store_true", help="a table of all transformer classes; takes minutes")
    parser.add_output("--markdown", type=Path, metavar="FILE", help="with --all: write the table to a file instead")


def run(args: argparse.Namespace) -> int:
    """Print the tables of one target, or of all classes.

    Raises:
        UsageError: options exclude each other, a package is missing, or a file cannot be written.
        TargetError: there is no such target, or it shows no blocks.
    """
    from ..errors import UsageError

    if args.all == (args.target is not None):
        raise UsageError("inspect takes either a TARGET or --all (see dithooks inspect --help)")
    if args.tests < 0:
        raise UsageError(f"--tests is {args.tests}: it must be 0 or more")
    if args.all and (args.blocks or args.json):
        raise UsageError("--all takes no --blocks and no --json")
    if args.markdown is not None and not args.all:
        raise UsageError("--markdown goes with --all only")
    if args.all:
        _show_all(args.markdown)
    else:
        _show_one(args.target, tuple(args.blocks), args.tests, args.json)
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


def _show_all(markdown_to: Path | None) -> None:
    """Print the table of all classes, or write it to a file."""
    _need_rich()
    _need_diffusers()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from ..inspection.model_table import all_rows, markdown, summary, table
    from ..storage.replacement import write_text

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:  # stdout holds the table alone
        task = progress.add_task("", total=None)
        rows, missing = all_rows(
            lambda cls, done, total: progress.update(task, description=cls, completed=done, total=total)
        )
    console = Console()
    if markdown_to is None:
        console.print(table(rows))
    else:
        write_text(markdown_to, markdown(rows, missing))
        console.print(f"{summary(rows)}: {markdown_to}", highlight=False, soft_wrap=True)


def _need_rich() -> None:
    from .extras import extra_needed

    with extra_needed("inspect needs", "rich"):
        import rich  # noqa: F401


def _need_diffusers() -> None:
    from .extras import extra_needed

    with extra_needed("inspect needs", '"dithooks[diffusers]"'):
        import diffusers  # noqa: F401
