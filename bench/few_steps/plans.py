"""What a plan can give where a run has few steps: ``python -m bench.few_steps.plans``.

The distilled pipeline draws with 8, 6 and 4 steps. For each number of steps, and each number of calls that may be left
out, ``search`` is given the comparison's calibration cases, and its plan draws the test cases. Beside it stands what
needs no cache: the same pipeline with as few steps as the plan computes. Two PSNRs count: to the run with all steps,
which is what a plan promises, and to the picture that the teacher draws from the same noise with 28 steps, which is
what is wanted in the end. At last ``search`` is asked for a floor, ``min_psnr``, and for the fastest plan of a PSNR,
``target_psnr``. Writes ``few_steps_plans.json`` and ``few_steps_plans.md``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.compare.emoji import Emoji
from bench.compare.few import FewSteps
from bench.compare.quality import interval, psnr
from dithooks import dit_cache, search
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

from . import STEPS

LEAST = 2  # computed steps
FLOOR, WANTED = 35.0, (40.0, 35.0, 30.0, 25.0)  # dB
ROUNDING = 1e-6


def measure(student: FewSteps, teacher: Tensor, count: int | None = None) -> list[dict[str, Any]]:
    """A row for each number of computed steps, and what a search answers to a PSNR.

    Args:
        student: the distilled pipeline, with its number of steps.
        teacher: the pictures that the teacher draws of the test cases.
        count: of test cases; ``None``: all.
    """
    tested, steps = student.test[:count], student.steps
    whole = student.pictures(student.draw(tested))

    def run(_: Any) -> Tensor:
        return student.pictures(student.draw(student.calibration))

    def row(drawn: str, computed: float, made: Tensor, promised: float | None = None) -> dict[str, Any]:
        figures = {"to_all_steps": psnr(made, whole), "to_teacher": psnr(made, teacher)}
        return {"steps": steps, "drawn": drawn, "computed": computed, "promised": promised, **figures}

    rows, recording = [row("all steps", steps, whole)], None
    for computed in range(steps - 1, LEAST - 1, -1):
        found = search(
            student.pipe, run, steps / computed - ROUNDING, cost="blocks", recording=recording, verbose=False
        )
        recording = found.recording
        with dit_cache(student.pipe, found.plan):
            made = student.pictures(student.draw(tested))
        (piece,) = found.plan.pieces
        rows.append(row(f"plan {piece.picture}", steps / found.plan.speedup, made, found.plan.provenance.psnr))
        rows.append(row("fewer steps", computed, student.pictures(student.draw(tested, computed))))
        print(steps, computed, piece.picture, f"{np.mean(rows[-2]['to_all_steps']):.1f} dB", flush=True)
    for asked in ({"min_psnr": FLOOR}, *({"target_psnr": wanted} for wanted in WANTED)):
        (name, level), target = next(iter(asked.items())), steps / (steps - 1) - ROUNDING
        said: dict[str, Any] = {"steps": steps, "asked": f"{name}={level:g}"}
        try:
            found = search(student.pipe, run, target, cost="blocks", recording=recording, verbose=False, **asked)
            said |= {"answer": f"{found.plan.speedup:.2f}×, {found.plan.provenance.psnr:.1f} dB"}
            said["answer"] += "" if found.reached else ", not reached"
        except RuntimeError as error:
            said["answer"] = str(error)
        rows.append(said)
        print(said, flush=True)
    return rows


def report(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| steps | drawn by | computed | to all steps | worst | to the teacher |",
        "|---:|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        if "asked" in row:
            continue
        values, whole = row["to_all_steps"], row["drawn"] == "all steps"
        mean, low, high = interval(values)
        near = "–" if whole else f"{mean:.1f} dB ({low:.1f} to {high:.1f})"
        worst = "–" if whole else f"{min(values):.1f}"
        lines.append(
            f"| {row['steps']} | {row['drawn']} | {row['computed']:g} | {near} | {worst} | "
            f"{np.mean(row['to_teacher']):.1f} dB |"
        )
    lines += [
        "",
        "What `search` answers where it is asked for a PSNR:",
        "",
        "| steps | asked | answer |",
        "|---:|---|---|",
    ]
    lines += [f"| {row['steps']} | `{row['asked']}` | {row['answer']} |" for row in rows if "asked" in row]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--count", type=int, help="of test cases (default: all)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    teacher = Emoji()
    drawn = teacher.pictures(teacher.draw(teacher.test[: options.count]))
    rows = [row for steps in STEPS for row in measure(FewSteps(steps), drawn, options.count)]
    options.out.mkdir(parents=True, exist_ok=True)
    kept = [
        {name: [round(x, 3) for x in value] if isinstance(value, tuple) else value for name, value in row.items()}
        for row in rows
    ]
    text = json.dumps({"machine": machine(), "rows": kept}).replace('{"steps"', '\n{"steps"')
    write_text(options.out / "few_steps_plans.json", text + "\n")
    cases = len(drawn)
    intro = (
        f"# Plans for few steps\n\nPSNR of {cases} test pictures, which nothing was fitted on: to the run "
        f"with all steps, mean with a 95 % interval and worst, and to\nthe teacher's, "
        f"drawn with 28 steps. On {machine()}.\n\n"
    )
    write_text(options.out / "few_steps_plans.md", intro + report(rows) + "\n")


if __name__ == "__main__":
    main()
