"""How near few steps come to the teacher's picture: ``python -m bench.few_steps.measure``.

Each of the comparison's test cases is drawn by the teacher, with 28 steps and guidance 3.0, and from the same noise by
the distilled model and by the undistilled one with the same guidance, which takes two calls a step; so that is drawn
with half as many steps as well, and with as many without guidance. It is given the distilled model's times, since those
that it ships with, whose last step is nearly nothing, suit few steps less, as the last rows show. None of that noise
was distilled with. Writes ``few_steps.md``, ``few_steps.json`` and ``few_steps_sheet.png``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from bench.compare.emoji import Emoji
from bench.compare.few import FewSteps
from bench.compare.quality import interval, psnr, ssim
from bench.compare.subject import Case
from bench.sheets import sheet
from dithooks.environment.machine import machine
from dithooks.storage.replacement import replacing, write_text

from . import STEPS

CAPTIONS = (
    "cat",
    "raccoon",
    "pineapple",
    "hot dog",
    "ice cream",
    "umbrella with rain drops",
    "motorcycle",
    "hibiscus",
    "smiling face with halo",
    "teapot",
    "sheep",
    "palm tree",
)


class EqualSteps(FlowMatchEulerDiscreteScheduler):
    """The distilled model's times, for the undistilled one."""

    def set_timesteps(self, num_inference_steps: int, device: torch.device | None = None) -> None:
        grid = np.linspace(1, 1 / num_inference_steps, num_inference_steps)
        super().set_timesteps(sigmas=grid, device=device)


def measure(teacher: Emoji, student: FewSteps, cases: Sequence[Case]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Pictures by label, the teacher's first, and a row of figures for each of the others."""
    equal, alone = Emoji(), Emoji()
    equal.pipe.scheduler = alone.pipe.scheduler = EqualSteps.from_config(equal.pipe.scheduler.config)
    alone.guidance, alone.calls = 1.0, 1
    pictures, calls = {f"teacher, {teacher.steps} steps": teacher.pictures(teacher.draw(cases))}, [0]
    for label, drawer, counts in (
        ("distilled", student, STEPS),
        ("undistilled", equal, (*STEPS, *(count // 2 for count in STEPS if count // 2 not in STEPS))),
        ("undistilled, no guidance", alone, STEPS),
        ("undistilled, as it ships", teacher, STEPS),
    ):
        for steps in counts:
            pictures[f"{label}, {steps} steps"] = drawer.pictures(drawer.draw(cases, steps))
            calls.append(steps * drawer.calls)
    wanted, *_ = pictures.values()
    rows: list[dict[str, Any]] = []
    for (label, made), count in zip(pictures.items(), calls, strict=True):
        if made is not wanted:
            rows.append({"drawn by": label, "calls": count, "psnr": psnr(made, wanted), "ssim": ssim(made, wanted)})
    return pictures, rows


def table(rows: Sequence[dict[str, Any]], cases: int) -> str:
    """In Markdown."""
    lines = [
        f"PSNR and SSIM to the picture that the teacher draws from the same noise, of {cases} cases: means, for PSNR",
        "with an interval of 95 %. A call is one of the transformer.",
        "",
        "| drawn by | calls | PSNR | SSIM |",
        "|---|---:|---:|---:|",
    ]
    for row in rows:
        mean, low, high = interval(np.asarray(row["psnr"]))
        quality = f"{mean:.1f} dB ({low:.1f} to {high:.1f}) | {fmean(row['ssim']):.3f}"
        lines.append(f"| {row['drawn by']} | {row['calls']} | {quality} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the sheet's cases alone")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    teacher, student = Emoji(), FewSteps()
    cases = [case for case in teacher.test if not options.quick or case.prompt in CAPTIONS]
    pictures, rows = measure(teacher, student, cases)
    options.out.mkdir(parents=True, exist_ok=True)
    text = table(rows, len(cases))
    write_text(options.out / "few_steps.md", f"# Few steps\n\n{text}\nOn {machine()}.\n")
    kept = [row | {name: [round(x, 4) for x in row[name]] for name in ("psnr", "ssim")} for row in rows]
    write_text(
        options.out / "few_steps.json",
        json.dumps({"cases": cases, "rows": kept}).replace('{"drawn', '\n{"drawn') + "\n",
    )
    shown = [number for number, case in enumerate(cases) if case.prompt in CAPTIONS]
    labels = [label for label in pictures if label.startswith(("teacher", "distilled"))] + ["undistilled, 4 steps"]
    page = sheet(
        [pictures[label][shown] for label in labels],
        [label.replace(", ", "\n") for label in labels],
        [str(cases[number].prompt) for number in shown],
    )
    with replacing(options.out / "few_steps_sheet.png") as draft:
        page.save(draft)
    print(text)


if __name__ == "__main__":
    main()
