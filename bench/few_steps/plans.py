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

import torch

from bench.compare.alone import ROUNDING, Row, against_fewer_steps, rounded, table
from bench.compare.emoji import Emoji
from bench.compare.few import FewSteps
from dithooks import record, search
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

from . import STEPS

LEAST = 2  # computed steps
QUICK = 4  # test cases, to try it out
FLOOR, WANTED = 35.0, (40.0, 35.0, 30.0, 25.0)  # dB


def answers(student: FewSteps) -> list[Row]:
    """What a search answers to a PSNR."""

    def run(_: Any) -> Any:
        return student.pictures(student.draw(student.calibration))

    rows, recording = [], record(student.pipe, run)
    for asked in ({"min_psnr": FLOOR}, *({"target_psnr": wanted} for wanted in WANTED)):
        (name, level), target = next(iter(asked.items())), student.steps / (student.steps - 1) - ROUNDING
        options: dict[str, Any] = {"cost": "blocks", "recording": recording, "verbose": False, **asked}
        try:
            found = search(student.pipe, run, target, **options)
            answer = f"{found.plan.speedup:.2f}×, {found.plan.provenance.psnr:.1f} dB"
            answer += "" if found.reached else ", not reached"
        except RuntimeError as error:
            answer = str(error)
        rows.append({"steps": student.steps, "asked": f"{name}={level:g}", "answer": answer})
        print(rows[-1], flush=True)
    return rows


def report(rows: Sequence[Row], asked: Sequence[Row], cases: int) -> str:
    """In Markdown."""
    lines = [
        "# Plans for few steps",
        "",
        f"PSNR of {cases} test pictures, which nothing was fitted on: to the run with all steps, mean with a 95 %",
        f"interval and worst, and to the teacher's, drawn with 28 steps. On {machine()}.",
        "",
        *table(rows, "to the teacher"),
        "",
        "What `search` answers where it is asked for a PSNR:",
        "",
        "| steps | asked | answer |",
        "|---:|---|---|",
        *(f"| {row['steps']} | `{row['asked']}` | {row['answer']} |" for row in asked),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="four test cases, four steps")
    options = parser.parse_args(arguments)
    count, grids = (QUICK, STEPS[-1:]) if options.quick else (None, STEPS)
    torch.set_num_threads(1)
    teacher = Emoji()
    drawn = teacher.pictures(teacher.draw(teacher.test[:count]))
    rows, asked = list[Row](), list[Row]()
    for steps in grids:
        student = FewSteps(steps)
        rows += against_fewer_steps(student, range(steps - 1, LEAST - 1, -1), drawn, count)
        asked += answers(student)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(), "rows": [rounded(row) for row in rows], "asked": asked}
    write_text(options.out / "few_steps_plans.json", json.dumps(kept).replace('{"steps"', '\n{"steps"') + "\n")
    write_text(options.out / "few_steps_plans.md", report(rows, asked, len(drawn)))


if __name__ == "__main__":
    main()
