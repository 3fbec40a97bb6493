"""``dithooks inspect``: its arguments. What they do is in ``command``."""

from __future__ import annotations

import argparse
from pathlib import Path

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
                              pipeline has to take two sampling steps or more. A small one of its kind tells as
                              much as a large one.

Classes are looked at as tiny models with random weights. A file for `dithooks inspect my_model.py:make`:

  def make():
      model = MyTransformer(depth=4)
      return model, {"x": torch.randn(1, 16, 64), "timestep": torch.tensor(0.5)}
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What ``dithooks inspect`` takes."""
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
