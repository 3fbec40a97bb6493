"""The table of all transformer classes: their lists of blocks, and what of them can be cached."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import TargetError
from ..tiny import names, of_class
from .diffusers_class import of_transformer, quiet, tiny
from .model_report import inspect
from .output_trial import why_not_left_out
from .survey import Survey
from .wording import Kind, describe, ranges_of, reasons

if TYPE_CHECKING:
    from rich.table import Table

COMMAND = "dithooks inspect --all --markdown docs/models.md"
HEAD = ("class", "blocks", "pattern", "ranges", "output")


@dataclass(frozen=True)
class TableRow:
    """A row of the table: a class with the variants whose results are the same.

    Args:
        cls: the class, with the name of the variant if its results differ from those of the plain class.
        variants: other variants with the same results.
        lists: the lists of the trunk, each with its number of blocks.
        patterns: the pattern of each list.
        kind: the ranges that can be cached, in a word.
        ranges: the ranges that can be cached, in a line.
        reason: a reason why some range cannot be cached; empty if all can.
        output: whether the whole can be left out, ``"yes"``, or else why not.
    """

    cls: str
    variants: tuple[str, ...]
    lists: tuple[tuple[str, str], ...]
    patterns: tuple[str, ...]
    kind: Kind
    ranges: str
    reason: str
    output: str


def classes() -> tuple[str, ...]:
    """The transformer classes that are known, sorted without regard to case."""
    return tuple(sorted({name.partition("#")[0] for name in names()}, key=str.lower))


def rows_of(cls: str) -> list[TableRow]:
    """The rows of a class: one, and one more for each variant with other results.

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
        row = _row(name, inspect(subject).surveys, subject.counts, _output(name))
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
        report: called before each class with its name, the number of classes done and of all.
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
    """The number of classes for each kind of result, by their plain variants."""
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
        "Each class was built small, with random weights, and run; the table holds what was observed in that run. All",
        "ranges whose streams can be followed were tried out on the tiny model: cached, and the call compared with the",
        "plain one. The numbers of blocks, and ranges counted in them, are those of the class's default configuration;",
        "with \\*, those of the tiny model, where the default is that of no real one. `Class#variant` is another way",
        "to configure or call a class; variants that come out as the plain class does are listed with it. The last",
        'column says whether the whole call can be left out (`payload="output"`), tried on the tiny model, too.',
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
    """A row of the table in Markdown."""
    variants = f"<br>also {', '.join(f'`#{name}`' for name in row.variants)}" if row.variants else ""
    blocks = "<br>".join(f"`{path}` {number}".replace("*", "\\*") for path, number in row.lists)
    patterns = "<br>".join(f"`{each}`" for each in row.patterns)
    reason = f": {row.reason.replace('|', '/')}" if row.reason else ""
    return f"| `{row.cls}`{variants} | {blocks} | {patterns} | {row.ranges}{reason} | {row.output} |"


def table(rows: Iterable[TableRow]) -> Table:
    """The table for a terminal, by ``rich``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, title=summary(rows), caption=versions())
    grid.add_column("class and blocks", no_wrap=True)
    grid.add_column("pattern", overflow="fold")
    grid.add_column("ranges", overflow="fold")
    grid.add_column("output", overflow="fold")
    for row in rows:
        name = Text(row.cls, style="bold").append("".join(f"\n  also #{other}" for other in row.variants), style="dim")
        grid.add_row(name, "", Text(row.ranges + (f": {row.reason}" if row.reason else "")), row.output)
        for (path, number), pattern in zip(row.lists, row.patterns, strict=True):
            grid.add_row(f"  {path} {number}", Text(pattern), "", "")
    return grid


def versions() -> str:
    """The versions of diffusers and torch."""
    diffusers = importlib.import_module("diffusers")
    return f"diffusers {diffusers.__version__}, torch {torch.__version__.partition('+')[0]}"


def _output(name: str) -> str:
    model, inputs = tiny(name)
    with quiet():
        return why_not_left_out(model, inputs) or "yes"


def _row(name: str, surveys: tuple[Survey, ...], counts: Mapping[str, int], output: str) -> TableRow:
    trunk = [each for survey in surveys for each in survey.lists if not each.apart]
    ranges = ranges_of(surveys[0], counts)  # of several transformers, all are of this class
    return TableRow(
        name,
        (),
        tuple((each.path, str(counts[each.path]) if each.path in counts else f"{each.number}*") for each in trunk),
        tuple(each.pattern or "not clear" for each in trunk),
        ranges.kind,
        describe(ranges) + ("" if ranges.real else f", of the {len(surveys[0].blocks)} blocks of the tiny model"),
        next((why for _, why in reasons(surveys[0])), ""),
        output,
    )
