"""What ``dithooks compare`` does, from its arguments to a table and a picture."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from ..environment.machine import machine
from ..errors import TargetError
from ..progress_bars import progress
from .cache_settings import Setting, of_file, of_speedup
from .compare_output import check_picture, draw, show
from .comparison import measure
from .output_files import as_json, check_results, write_json, written
from .targets.pipeline_loading import DEMO
from .targets.runnable import Asked, runnable


@dataclass(frozen=True)
class CompareOptions:
    """What ``dithooks compare`` is asked for.

    Raises:
        TargetError: a number out of its range, or nothing to compare with.
    """

    asked: Asked
    plans: tuple[str, ...] = ()
    speedups: tuple[float, ...] = ()
    pairs: int = 3
    out: Path = Path("compare.png")
    json: str | None = None
    quiet: bool = False

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise TargetError(f"--pairs is {self.pairs}: it must be 1 or more")
        if not self.plans and not self.speedups:
            raise TargetError("there is nothing to compare with: give a --plan, or a --target such as 2")


def compare(options: CompareOptions) -> int:
    """Run, print the table to stdout (or JSON, for ``json="-"``) and write the picture.

    Returns:
        The exit code.

    Raises:
        TargetError: it cannot be done as asked.
    """
    with redirect_stdout(sys.stderr) if options.json == "-" else nullcontext():  # what a factory prints is no JSON
        check_picture(options.out)
        file = None if options.json in (None, "-") else Path(options.json or "")
        check_results([options.out, *([] if file is None else [file])], [Path(each) for each in options.plans])
        shipped = options.asked.target == DEMO
        settings = [of_file(each, shipped) for each in options.plans] + [of_speedup(x) for x in options.speedups]
        settings = _told_apart(settings)
        subject = runnable(options.asked)
        with progress(not options.quiet) as report:
            found = measure(subject, settings, options.pairs, report)
    sheet = draw(found, subject.captions)
    if sheet is not None:
        written(options.out, sheet.save)
    for each in found.outcomes:
        for remark in each.remarks:
            print(f"dithooks: {each.setting.name}: {remark}", file=sys.stderr)
    if found.again < math.inf:
        print(f"dithooks: two runs without a cache are {found.again:.1f} dB apart: TARGET does not draw the same each "
              "time, and nothing can come nearer than that", file=sys.stderr)  # fmt: skip
    told = {**subject.told, "pairs": options.pairs, **found.to_dict()}
    told |= {"machine": machine(subject.device), "date": date.today().isoformat()}
    if options.json == "-":
        print(as_json(told))
    else:
        show(found)
        if file is not None:
            write_json(file, told)
    if sheet is None:
        print("dithooks: no picture: what TARGET returns does not look like pictures", file=sys.stderr)
    elif options.json != "-":
        print(f"without a cache above, the others below: {options.out}")
    return 0


def _told_apart(settings: Sequence[Setting]) -> list[Setting]:
    """Names that are there twice get a number."""
    names = [each.name for each in settings]
    return [
        replace(each, name=f"{each.name} #{names[: n + 1].count(each.name)}") if names.count(each.name) > 1 else each
        for n, each in enumerate(settings)
    ]
