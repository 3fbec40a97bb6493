"""A plan at other numbers of steps, noise levels, guidance and sizes than it was fitted for.

``python -m bench.transfer --out bench/results`` writes ``transfer.json`` and ``transfer.md``, and goes on from the rows
that are there; ``--only PART`` makes the rows of one part again, ``--quick`` tries it out.

``search(..., 2.0, steps=(28, 20, 50), cost="blocks")`` finds a plan on calibration cases. What is measured, on test
cases, is the PSNR to the uncached run of the same steps, noise levels, guidance and size, of three plans: *carried
over*, as the search returns it; *the line*, the same without what was fitted at 20 and 50 steps, as a search at 28
steps alone gives it; and *fitted there*, where another search was given these steps, too. Of the steps that the plan
was fitted for, *left out* is the plan without what was fitted at just these.

Guidance and size are measured at 28 steps. *Fitted there* is a plan of a search whose run has this guidance or size,
*as it is* one of a search with the usual ones, and *the line* has the schedule of the latter with forecasts by the line
through the last two outputs, and no corrections. *Mixed* is one plan for all rows of a kind: in the run of its search,
half of as many calibration cases are drawn with the lower of two guidances, or at the usual size, and the others with
the higher one, or at another size.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import dithooks
from bench.compare.emoji import Emoji
from bench.compare.fashion import Fashion
from dithooks import CachePlan, DitCacheConfig, Linear, Mask, dit_cache, search
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

TARGET, STEPS, BETWEEN = 2.0, (28, 20, 50), (24, 36)
GUIDANCES = {"emoji": (2.0, 5.0), "fashion": (1.5, 4.0)}
SHIFTS = (1.5, 3.0)
SIZES = {"emoji": (40, 48), "fashion": (32, 40)}  # in pixels; the last is the other one of a mixed run
PARTS = ("steps", "guidance", "size")
CALIBRATION, TEST = 12, 16
Subject = Emoji | Fashion


@dataclass(frozen=True)
class Row:
    """PSNR in dB of each test case, by plan.

    Args:
        subject: which pipeline.
        where: what differs.
        psnr: by plan.
    """

    subject: str
    where: str
    psnr: dict[str, list[float]]
    part: str = "steps"


@dataclass(frozen=True)
class Setting:
    """What a run is drawn with, besides its steps."""

    guidance: float
    size: int

    @classmethod
    def usual(cls, subject: Subject) -> Setting:
        """What a pipeline is drawn with elsewhere."""
        return cls(type(subject).guidance, type(subject).size)

    def put(self, subject: Subject) -> None:
        """Draw with it from now on."""
        subject.guidance, subject.size = self.guidance, self.size


def found(subject: Subject, steps: Sequence[int], cases: int) -> CachePlan:
    """What a search finds at such numbers of steps."""

    def run(_: object, count: int) -> list[Tensor]:
        return list(subject.pictures(subject.draw(subject.calibration[:cases], count)))

    return search(subject.pipe, run, TARGET, steps=steps, cost="blocks", verbose=False).plan


def found_with(subject: Subject, settings: Sequence[Setting], cases: int) -> CachePlan:
    """What a search finds whose run draws its cases in turns with each of the settings, a batch for each."""

    def run(_: object) -> list[Tensor]:
        pictures: list[Tensor] = []
        for number, setting in enumerate(settings):
            setting.put(subject)
            pictures += subject.pictures(subject.draw(subject.calibration[number : cases : len(settings)], STEPS[0]))
        return pictures

    return search(subject.pipe, run, TARGET, cost="blocks", verbose=False).plan


def by_the_line(plan: CachePlan) -> DitCacheConfig:
    """The schedule of a plan of one transformer, without anything that was fitted."""
    (piece,) = plan.pieces
    when, what = Mask(piece.steps), Linear()
    if piece.payload == "output":
        return DitCacheConfig(policy=when, predictor=what, payload="output")
    return DitCacheConfig(cache_block_start=piece.first, cache_num_blocks=piece.blocks, policy=when, predictor=what)


def without_others(plan: CachePlan) -> CachePlan:
    """The same as if it had been searched at the first number of steps alone."""
    return replace(plan, pieces=tuple(replace(piece, others=()) for piece in plan.pieces))


def without(plan: CachePlan, steps: int) -> CachePlan:
    """The same as if it had not been fitted at one of its numbers of steps."""
    pieces = []
    for piece in plan.pieces:
        first, *others = [replace(each, others=()) for each in (piece, *piece.others) if len(each.steps) != steps]
        pieces.append(replace(first, others=tuple(others)))
    return replace(plan, pieces=tuple(pieces), made=replace(plan.made, steps=len(pieces[0].steps)))


def measured(
    subject: Subject,
    where: str,
    steps: int,
    plans: dict[str, CachePlan] | dict[str, CachePlan | DitCacheConfig],
    cases: int,
    part: str = "steps",
) -> Row:
    """Draw the test cases without a cache and with each plan."""
    test = subject.test[:cases]
    reference = subject.pictures(subject.draw(test, steps))
    psnr = {}
    for name, plan in plans.items():
        with dit_cache(subject.pipe, plan):
            errors = (subject.pictures(subject.draw(test, steps)) - reference).square().flatten(1).mean(1)
        psnr[name] = (-10 * errors.clamp_min(1e-12).log10()).tolist()
    row = Row(subject.name, where, psnr, part)
    print(
        subject.name, where, {name: f"{fmean(each):.2f} / {min(each):.1f}" for name, each in psnr.items()}, flush=True
    )
    return row


@contextmanager
def shifted(subject: Subject, shift: float) -> Iterator[None]:
    """The pipeline with other noise levels of flow matching."""
    former = subject.pipe.scheduler
    subject.pipe.scheduler = type(former).from_config(former.config, shift=shift)
    try:
        yield
    finally:
        subject.pipe.scheduler = former


def rows_of_steps(subject: Subject, calibration: int, test: int) -> Iterator[Row]:
    """The rows of other numbers of steps and other noise levels."""
    plan, more = (found(subject, counts, calibration) for counts in (STEPS, (STEPS[0], *BETWEEN)))
    alone = without_others(plan)
    print(plan, flush=True)
    for steps in BETWEEN:
        plans = {"fitted there": more, "carried over": plan, "the line": alone}
        yield measured(subject, f"{steps} steps", steps, plans, test)
    for steps in sorted(STEPS):
        plans = {"fitted there": plan, "left out": without(plan, steps)}
        yield measured(subject, f"{steps} steps", steps, plans | ({"the line": alone} if steps != 28 else {}), test)
    if "shift" in subject.pipe.scheduler.config:
        for shift in SHIFTS:
            with shifted(subject, shift):
                plans = {"carried over": plan, "the line": alone}
                yield measured(subject, f"28 steps, noise levels shifted by {shift:g}", 28, plans, test)


def rows_of_settings(subject: Subject, part: str, calibration: int, test: int) -> Iterator[Row]:
    """The rows of other guidance, or of other sizes."""
    usual = Setting.usual(subject)
    if part == "guidance":
        lower, higher = (replace(usual, guidance=guidance) for guidance in GUIDANCES[subject.name])
        others, both = [lower, higher], [lower, higher]
    else:
        others = [replace(usual, size=size) for size in SIZES[subject.name]]
        both = [usual, others[-1]]
    home, mixed = found_with(subject, [usual], calibration), found_with(subject, both, calibration)
    for setting in sorted((usual, *others), key=lambda each: (each.guidance, each.size)):
        there = home if setting == usual else found_with(subject, [setting], calibration)
        plans: dict[str, CachePlan | DitCacheConfig] = {"fitted there": there, "mixed": mixed}
        plans |= ({} if setting == usual else {"as it is": home}) | {"the line": by_the_line(home)}
        setting.put(subject)
        where = f"guidance {setting.guidance:g}" if part == "guidance" else f"{setting.size}×{setting.size} pixels"
        yield measured(subject, f"28 steps, {where}", STEPS[0], plans, test, part)
    usual.put(subject)


def table(found_rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    names = ("fitted there", "carried over", "left out", "mixed", "as it is", "the line")
    lines = [
        "# A plan elsewhere than it was fitted",
        "",
        "PSNR in dB to the uncached run of the same steps, noise levels, guidance and size, mean / worst of",
        f"{TEST} test cases. The plans run {TARGET:g}× fewer blocks; they were searched on {CALIBRATION} other cases.",
        f"For other numbers of steps that was with `steps={STEPS}`, and those *fitted there* at 24 and 36 steps with",
        "these besides 28. `bench/transfer.py` says what the columns are.",
        "",
        f"{machine()}, dithooks {dithooks.__version__}",
        "",
        f"| model | run | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in sorted(found_rows, key=lambda row: (row.subject != "fashion", PARTS.index(row.part))):
        cells = [f"{fmean(row.psnr[n]):.1f} / {min(row.psnr[n]):.1f}" if n in row.psnr else "" for n in names]
        lines.append(f"| {row.subject} | {row.where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def former_rows(out: Path | None) -> list[Row]:
    """The rows that a run has left in a folder."""
    file = None if out is None else out / "transfer.json"
    return [] if file is None or not file.is_file() else [Row(**row) for row in json.loads(file.read_text())]


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for transfer.json and transfer.md")
    parser.add_argument("--only", choices=PARTS, help="make the rows of this part again, and leave the others")
    parser.add_argument("--quick", action="store_true", help="few cases, one model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    kinds: Sequence[Callable[[], Subject]] = (Fashion,) if args.quick else (Fashion, Emoji)
    calibration, test = (4, 2) if args.quick else (CALIBRATION, TEST)
    rows = former_rows(args.out)
    for kind, part in product(kinds, PARTS if args.only is None else (args.only,)):
        subject = kind()
        kept = [row for row in rows if (row.subject, row.part) != (subject.name, part)]
        if len(kept) < len(rows) and args.only is None:
            continue
        makes = rows_of_steps if part == "steps" else partial(rows_of_settings, part=part)
        rows = [*kept, *makes(subject, calibration=calibration, test=test)]
        if args.out is not None:
            write_text(args.out / "transfer.json", json.dumps([asdict(row) for row in rows], indent=1) + "\n")
            write_text(args.out / "transfer.md", table(rows))


if __name__ == "__main__":
    main()
