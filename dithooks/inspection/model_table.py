"""The table of all transformer classes: which lists of blocks each has, and which ranges of them can be cached."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import TargetError
from ..tiny import names, of_class
from .diffusers_class import of_transformer
from .model_report import inspect
from .survey import Survey
from .wording import Kind, ranges_of, reasons, said

if TYPE_CHECKING:
    from rich.table import Table

COMMAND = "dithooks inspect --all --markdown docs/models.md"
HEAD = ("class", "blocks", "pattern", "ranges")


@dataclass(frozen=True)
class TableRow:
    """A class, or those of its variants with which it comes out alike.

    Args:
        cls: the class, with the variant if it does not come out as the plain class does.
        variants: others that come out alike.
        lists: of the trunk, each with its number of blocks.
        patterns: of these.
        kind: which ranges can be cached, in a word.
        ranges: in words.
        reason: why not any; empty where any can, and one if there are several.
    """

    cls: str
    variants: tuple[str, ...]
    lists: tuple[tuple[str, str], ...]
    patterns: tuple[str, ...]
    kind: Kind
    ranges: str
    reason: str


def classes() -> tuple[str, ...]:
    """The transformer classes that are known, sorted as people do."""
    return tuple(sorted({name.partition("#")[0] for name in names()}, key=str.lower))


def rows_of(cls: str) -> list[TableRow]:
    """The rows of a class: one, unless a variant comes out differently.

    Raises:
        TargetError: the installed diffusers has no such class.

    Example:
        >>> row, = rows_of("FluxTransformer2DModel")
        >>> row.lists, row.ranges, row.variants
        ((('transformer_blocks', '19'), ('single_transformer_blocks', '38')), 'any range in 0–56', ('controlnet',))
    """
    rows: list[TableRow] = []
    for name in of_class(cls):
        subject = of_transformer(name)
        row = _row(name, inspect(subject).surveys, subject.counts)
        alike = next((i for i, other in enumerate(rows) if replace(other, cls=row.cls, variants=()) == row), None)
        if alike is None:
            rows.append(row)
        else:
            known = rows[alike]
            rows[alike] = replace(known, variants=(*known.variants, name.partition("#")[2]))
    return rows


def all_rows(
    report: Callable[[str, int, int], None] = lambda cls, done, total: None,
) -> tuple[list[TableRow], list[str]]:
    """The rows of all classes, and the classes that the installed diffusers does not have.

    Args:
        report: called before every class with its name, the number done and the number of all.
    """
    rows, missing = [], []
    for done, cls in enumerate(classes()):
        report(cls, done, len(classes()))
        try:
            rows += rows_of(cls)
        except TargetError:
            missing.append(cls)
    return rows, missing


def summary(rows: Iterable[TableRow]) -> str:
    """How many classes come out how, by their plain variants."""
    count = Counter(row.kind for row in rows if "#" not in row.cls)
    some = count["lists"] + count["some"]
    return (
        f"{count.total()} classes: in {count['any']}, any range of blocks can be cached, in {some} some ranges, "
        f"in {count['single']} single blocks only, in {count['none']} none"
    )


def markdown(rows: Iterable[TableRow], missing: Iterable[str] = ()) -> str:
    """The table as a page of the documentation."""
    rows = list(rows)
    lines = [
        "# Models",
        "",
        f"{summary(rows)}.",
        f"Made by `{COMMAND}` with {versions()}.",
        "",
        "Each class was built small, with random weights, and run; what is said here was seen then, not declared. All",
        "ranges whose streams can be followed were tried out on the tiny model: cached, and the call compared with the",
        "plain one. The numbers of blocks, and ranges counted in them, are those of the class's default configuration;",
        "with \\*, those of the tiny model, where the default is that of no real one. `Class#variant` is another way",
        "to configure or call a class; variants that come out as the plain class does are listed with it.",
        "",
        "Patterns are `0: (h, e) -> (h, e)`, `1: (h, e) -> (e, h)`, `2: (h, e) -> h`, `3: h -> h`, `4: h -> (h, e)`",
        "and `5: h -> (e, h)`: what a block takes and returns, h being the denoised stream and e the second one, as a",
        "rule the text. Blocks that fit none are described by the names of their streams.",
        "",
        f"| {' | '.join(HEAD)} |",
        f"|{' --- |' * len(HEAD)}",
        *(markdown_row(row) for row in rows),
    ]
    absent = list(missing)
    if absent:
        lines += ["", f"Not in this version of diffusers: {', '.join(f'`{cls}`' for cls in absent)}."]
    return "\n".join(lines) + "\n"


def markdown_row(row: TableRow) -> str:
    """A line of the table."""
    variants = f"<br>also {', '.join(f'`#{name}`' for name in row.variants)}" if row.variants else ""
    blocks = "<br>".join(f"`{path}` {number}".replace("*", "\\*") for path, number in row.lists)
    patterns = "<br>".join(f"`{each}`" for each in row.patterns)
    reason = f": {row.reason.replace('|', '/')}" if row.reason else ""
    return f"| `{row.cls}`{variants} | {blocks} | {patterns} | {row.ranges}{reason} |"


def table(rows: Iterable[TableRow]) -> Table:
    """The table for a terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=summary(rows), caption=versions())
    grid.add_column("class and blocks", no_wrap=True)
    grid.add_column("pattern", overflow="fold")
    grid.add_column("ranges", overflow="fold")
    for row in rows:
        name = Text(row.cls, style="bold").append("".join(f"\n  also #{other}" for other in row.variants), style="dim")
        grid.add_row(name, "", Text(row.ranges + (f": {row.reason}" if row.reason else "")))
        for (path, number), pattern in zip(row.lists, row.patterns, strict=True):
            grid.add_row(f"  {path} {number}", Text(pattern), "")
    return grid


def versions() -> str:
    """What the table was made with."""
    diffusers = importlib.import_module("diffusers")
    return f"diffusers {diffusers.__version__}, torch {torch.__version__.partition('+')[0]}"


def _row(name: str, surveys: tuple[Survey, ...], counts: Mapping[str, int]) -> TableRow:
    trunk = [each for found in surveys for each in found.lists if not each.apart]
    ranges = ranges_of(surveys[0], counts)  # where there are several, they are alike
    return TableRow(
        name,
        (),
        tuple((each.path, str(counts[each.path]) if each.path in counts else f"{each.number}*") for each in trunk),
        tuple(each.pattern or "not clear" for each in trunk),
        ranges.kind,
        said(ranges) + ("" if ranges.real else f", of the {len(surveys[0].blocks)} blocks of the tiny model"),
        next((why for _, why in reasons(surveys[0])), ""),
    )
