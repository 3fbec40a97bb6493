"""The report of ``dithooks inspect``: a model's lists of blocks, the ranges that can be cached, and lines to paste."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..blocks.discovery import Blocks
from ..blocks.registry import chains_of
from ..errors import DitHooksError, NothingSeen, TargetError
from .diffusers_class import Subject
from .survey import Survey, survey
from .wording import allowed_of, describe, places, ranges_of, reasons

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

TESTS = 64
STEPS = "cache_step_start=8, cache_step_interval=2"


@dataclass(frozen=True)
class Inspection:
    """A subject with the surveys of its transformers."""

    subject: Subject
    surveys: tuple[Survey, ...]
    blocks: tuple[str, ...] = ()


def inspect(subject: Subject, blocks: tuple[str, ...] = (), tests: int = TESTS) -> Inspection:
    """Survey a subject. Errors of its run pass unchanged.

    Args:
        subject: the subject.
        blocks: paths of the lists to survey; by default, the lists that are found.
        tests: the most ranges that are tried.

    Raises:
        TargetError: the subject has no such list, or none at all, or its run does not call the blocks.
    """
    named: Blocks = list(blocks) or None
    try:
        chains_of(subject.target, named)
    except DitHooksError as error:
        raise TargetError(f"{subject.title}: {' '.join(str(error).split())}") from error
    try:
        surveys = survey(subject.target, subject.run, named, tests)
    except NothingSeen as error:
        raise TargetError(f"{subject.title}: {error}") from error
    return Inspection(subject, tuple(surveys), blocks)


def paste(inspection: Inspection) -> str:
    """Lines of Python that cache the largest range; empty if no range can be cached."""
    subject = inspection.subject
    chosen: dict[tuple[int, int], list[str]] = {}
    named = subject.explicit or bool(inspection.blocks)
    for each in inspection.surveys:
        ranges = ranges_of(each, subject.counts)
        if ranges.largest is None:
            named = True  # without blocks=..., dit_cache would take this list, too, and refuse
            continue
        first, last = ranges.largest
        paths = [one.path for one in each.lists if not one.apart]
        if ranges.kind == "lists":  # count in this list alone: the real model's others may be too small
            paths, named = [paths[ranges.inside.index(ranges.largest)]], True
            first, last = 0, last - first
        chosen.setdefault((first, last), []).extend(paths)
    lines = ["from dithooks import DitCacheConfig, dit_cache", ""]
    for (first, last), paths in chosen.items():
        names = f", blocks={json.dumps(paths[0] if len(paths) == 1 else paths)}" if named or len(chosen) > 1 else ""
        lines += [
            "config = DitCacheConfig(",
            f"    {STEPS}, cache_block_start={first}, cache_num_blocks={last - first + 1}",
            ")",
            f"with dit_cache({subject.variable}, config{names}) as cache:",
            "    ...",
        ]
    return "\n".join(lines) if chosen else ""


def to_json(inspection: Inspection) -> str:
    """The inspection as JSON: paths from the target, ranges in the blocks of the real model where these are known."""
    subject = inspection.subject
    report: dict[str, Any] = {"target": subject.title, "notes": list(subject.notes), "transformers": []}
    for each in inspection.surveys:
        ranges = ranges_of(each, subject.counts)
        listed = [asdict(one) | {"real_number": subject.counts.get(one.path, one.number)} for one in each.lists]
        report["transformers"].append(
            {
                "name": each.name,
                "lists": listed,
                "between": [[places(each, numbers), line] for numbers, line in each.gaps],
                "kind": ranges.kind,
                "blocks": ranges.number,
                "blocks_surveyed": len(each.blocks),
                "largest": ranges.largest,
                "ranges_surveyed": each.ranges,
                "wholes_surveyed": each.wholes,
                "refused": [[blocks, why] for blocks, why in reasons(each)],
                "tested": each.tested,
            }
        )
    return json.dumps(report | {"paste": paste(inspection)}, indent=2, ensure_ascii=False)


def show(inspection: Inspection, console: Console) -> None:
    """Print the inspection."""
    from rich.text import Text

    subject = inspection.subject
    for each in inspection.surveys:
        number = ranges_of(each, subject.counts).number
        title = (
            f"{each.name}: {number} blocks" if each.path or not subject.counts else f"{subject.title}: {number} blocks"
        )
        console.print(Text(title, style="bold"))
        if subject.counts:
            console.print(Text(f"their number: {subject.source}; all else: {_tiny(each)}", style="dim"))
        elif subject.source:
            console.print(Text(f"{_tiny(each)}; {subject.source} is that of no real model", style="dim"))
        console.print(_lists(each, subject))
        console.print(_facts(each, subject))
        console.print()
    for note in subject.notes:
        console.print(Text(note, style="dim"))
    if subject.notes:
        console.print()
    console.print(Text(paste(inspection) or "No range can be cached: there is nothing to paste."), soft_wrap=True)


def _lists(survey: Survey, subject: Subject) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("list", no_wrap=True)
    table.add_column("blocks", justify="right")
    table.add_column("pattern and streams", overflow="fold")
    for each in survey.lists:
        if not each.apart:
            name = Text(each.path).append(f"\n  {', '.join(each.classes)}", style="dim")
            number = str(subject.counts.get(each.path, each.number))
            table.add_row(name, number, Text("\n".join((each.pattern or "not clear", *each.streams))))
    return table


def _facts(survey: Survey, subject: Subject) -> Table:
    from rich.table import Table
    from rich.text import Text

    ranges, blocks = ranges_of(survey, subject.counts), len(survey.blocks)
    possible, allowed = blocks * (blocks + 1) // 2, len(allowed_of(survey))
    result = "all can be cached" if allowed == possible else f"{allowed} can be cached, {possible - allowed} cannot"
    rest = "" if survey.tested >= allowed else "; in the others, the streams were followed only"
    rows = [("in between", f"{places(survey, numbers)}: {line}") for numbers, line in survey.gaps]
    rows = rows or [("in between", "nothing is done to the streams")]
    rows += [
        ("apart", f"{each.path} ({subject.counts.get(each.path, each.number)} {', '.join(each.classes)}): {each.apart}")
        for each in survey.lists
        if each.apart
    ]
    rows += [("ranges", describe(ranges) + ("" if ranges.real else ", counted in the tiny model"))]
    rows += [("tried", f"{survey.tested} of {possible} ranges{rest}; {result}")]
    rows += [("refused", f"{where}: {why}") for where, why in reasons(survey)]
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    former = ""
    for name, line in rows:
        table.add_row("" if name == former else name, Text(line))
        former = name
    return table


def _tiny(survey: Survey) -> str:
    return f"a tiny random model of {len(survey.blocks)} blocks"
