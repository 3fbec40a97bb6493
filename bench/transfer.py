"""A plan at other numbers of steps, other guidance and other noise levels than it was fitted for.

``python -m bench.transfer --out bench/results`` writes ``transfer.json`` and ``transfer.md``; ``--quick`` tries it out.

``search(..., 2.0, steps=(28, 20, 50), cost="blocks")`` finds a plan on calibration cases. What is measured, on test
cases, is the PSNR to the uncached run of the same steps, guidance and noise levels, of three plans: *carried over*, as
the search returns it; *the line*, the same without what was fitted at 20 and 50 steps, as a search at 28 steps alone
gives it; and *fitted there*, where another search was given these steps, too. Of the steps that the plan was fitted
for, *left out* is the plan without what was fitted at just these.
"""

from __future__ import annotations

import argparse
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

import dithooks
from bench.compare.emoji import Emoji
from bench.compare.fashion import Fashion
from dithooks import CachePlan, dit_cache, search
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

TARGET, STEPS, BETWEEN = 2.0, (28, 20, 50), (24, 36)
GUIDANCES = {"emoji": (2.0, 5.0), "fashion": (1.5, 4.0)}
SHIFTS = (1.5, 3.0)
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


def found(subject: Subject, steps: Sequence[int], cases: int) -> CachePlan:
    """What a search finds at such numbers of steps."""

    def run(_: object, count: int) -> list[Tensor]:
        return list(subject.pictures(subject.draw(subject.calibration[:cases], count)))

    return search(subject.pipe, run, TARGET, steps=steps, cost="blocks", verbose=False).plan


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


def measured(subject: Subject, where: str, steps: int, plans: dict[str, CachePlan], cases: int) -> Row:
    """Draw the test cases without a cache and with each plan."""
    test = subject.test[:cases]
    reference = subject.pictures(subject.draw(test, steps))
    psnr = {}
    for name, plan in plans.items():
        with dit_cache(subject.pipe, plan):
            errors = (subject.pictures(subject.draw(test, steps)) - reference).square().flatten(1).mean(1)
        psnr[name] = (-10 * errors.clamp_min(1e-12).log10()).tolist()
    row = Row(subject.name, where, psnr)
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


def rows(subject: Subject, calibration: int, test: int) -> Iterator[Row]:
    """All rows of one pipeline."""
    plan, more = (found(subject, counts, calibration) for counts in (STEPS, (STEPS[0], *BETWEEN)))
    alone = without_others(plan)
    print(plan, flush=True)
    for steps in BETWEEN:
        plans = {"fitted there": more, "carried over": plan, "the line": alone}
        yield measured(subject, f"{steps} steps", steps, plans, test)
    for steps in sorted(STEPS):
        plans = {"fitted there": plan, "left out": without(plan, steps)}
        yield measured(subject, f"{steps} steps", steps, plans | ({"the line": alone} if steps != 28 else {}), test)
    former = subject.guidance
    for guidance in GUIDANCES[subject.name]:
        subject.guidance = guidance
        yield measured(subject, f"28 steps, guidance {guidance:g}", 28, {"as it is": plan}, test)
    subject.guidance = former
    if "shift" in subject.pipe.scheduler.config:
        for shift in SHIFTS:
            with shifted(subject, shift):
                plans = {"carried over": plan, "the line": alone}
                yield measured(subject, f"28 steps, noise levels shifted by {shift:g}", 28, plans, test)


def table(found_rows: Sequence[Row]) -> str:
    """The rows as Markdown."""
    names = ("fitted there", "carried over", "left out", "as it is", "the line")
    lines = [
        "# A plan elsewhere than it was fitted",
        "",
        f"PSNR in dB to the uncached run of the same steps, guidance and noise levels, mean / worst of {TEST} test",
        f"cases. The plans run {TARGET:g}× fewer blocks; they were searched on {CALIBRATION} other cases, with",
        f"`steps={STEPS}`, and those *fitted there* at 24 and 36 steps with these besides 28. `bench/transfer.py` says",
        "what the columns are.",
        "",
        f"{machine()}, dithooks {dithooks.__version__}",
        "",
        f"| model | run | {' | '.join(names)} |",
        f"|---|---|{'---|' * len(names)}",
    ]
    for row in found_rows:
        cells = [f"{fmean(row.psnr[n]):.1f} / {min(row.psnr[n]):.1f}" if n in row.psnr else "" for n in names]
        lines.append(f"| {row.subject} | {row.where} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for transfer.json and transfer.md")
    parser.add_argument("--quick", action="store_true", help="few cases, one model")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", UserWarning)
    kinds: Sequence[Callable[[], Subject]] = (Fashion,) if args.quick else (Fashion, Emoji)
    calibration, test = (4, 2) if args.quick else (CALIBRATION, TEST)
    all_rows: list[Row] = []
    for kind in kinds:
        for row in rows(kind(), calibration, test):
            all_rows.append(row)
            if args.out is not None:
                write_text(args.out / "transfer.json", json.dumps([asdict(each) for each in all_rows], indent=1) + "\n")
                write_text(args.out / "transfer.md", table(all_rows))


if __name__ == "__main__":
    main()
