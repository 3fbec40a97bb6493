"""Plans of a model that other libraries' caches are not compared on: against as few steps as a plan computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from bench.compare.quality import interval, psnr
from bench.compare.subject import Subject
from dithooks import dit_cache, search

ROUNDING = 1e-6  # below the speed-up of a whole number of steps
Row = dict[str, Any]


def against_fewer_steps(
    subject: Subject, computed: Sequence[int], wanted: Tensor | None = None, count: int | None = None, **asked: Any
) -> list[Row]:
    """Rows of the uncached run, and for each number of computed steps, of a plan and of a run of so many steps.

    Args:
        subject: the model; what plans are searched with, and what is drawn.
        computed: numbers of computed steps.
        wanted: pictures to measure the distance to, too: a better sampler's, say.
        count: of test cases; ``None``: all.
        asked: what else :func:`search` is told.
    """
    tested, steps = subject.test[:count], subject.steps
    whole = subject.pictures(subject.draw(tested))

    def row(drawn: str, computed: float, made: Tensor, promised: float | None = None) -> Row:
        near = None if wanted is None else psnr(made, wanted)
        about = {"steps": steps, "drawn": drawn, "computed": computed, "promised": promised}
        return {**about, "to_all_steps": psnr(made, whole), "to_wanted": near}

    rows, recording = [row("all steps", steps, whole)], None
    for each in computed:
        found = search(
            subject.pipe,
            lambda _: subject.pictures(subject.draw(subject.calibration)),
            steps / each - ROUNDING,
            cost="blocks",
            recording=recording,
            verbose=False,
            **asked,
        )
        recording = found.recording
        with dit_cache(subject.pipe, found.plan):
            made = subject.pictures(subject.draw(tested))
        (piece,) = found.plan.pieces
        drawn = f"plan {piece.picture}, {piece.payload}"
        rows.append(row(drawn, steps / found.plan.speedup, made, found.plan.provenance.psnr))
        rows.append(row("fewer steps", each, subject.pictures(subject.draw(tested, each))))
        print(subject.name, each, drawn, f"{np.mean(rows[-2]['to_all_steps']):.1f} dB", flush=True)
    return rows


def table(rows: Sequence[Row], wanted: str = "") -> list[str]:
    """Lines of Markdown.

    Args:
        rows: of :func:`against_fewer_steps`.
        wanted: heading of the distance to the wanted pictures; empty: none were.
    """
    head = ["steps", "drawn by", "computed", "promised", "to all steps", "worst", *([wanted] if wanted else [])]
    lines = [f"| {' | '.join(head)} |", f"|---:|---{'|---:' * (len(head) - 2)}|"]
    for row in rows:
        values, whole = row["to_all_steps"], row["drawn"] == "all steps"
        mean, low, high = interval(values)
        cells = [
            str(row["steps"]),
            row["drawn"],
            f"{row['computed']:g}",
            "–" if row["promised"] is None else f"{row['promised']:.1f} dB",
            "–" if whole else f"{mean:.1f} dB ({low:.1f} to {high:.1f})",
            "–" if whole else f"{min(values):.1f}",
            *([f"{np.mean(row['to_wanted']):.1f} dB"] if wanted else []),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def rounded(row: Row) -> Row:
    """A row for a file."""
    return {name: [round(x, 3) for x in value] if isinstance(value, tuple) else value for name, value in row.items()}
