"""What a plan gives a UNet, whose blocks cannot be left out one by one: ``python -m bench.unet.plans``.

Its output is forecast as a whole. ``search`` is given the calibration cases, and its plans draw the test cases; beside
them stands the same pipeline with as few steps as a plan computes. PSNR is that to the run with all steps. Writes
``unet_plans.json`` and ``unet_plans.md``.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from bench.compare.alone import against_fewer_steps, rounded, table
from bench.compare.unet import UNet
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text

COMPUTED = (19, 14, 11, 9, 7)  # of 28 steps: 1.5, 2, 2.5, 3.1 and 4 times fewer
QUICK = 4  # test cases, to try it out


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="four test cases, one plan")
    options = parser.parse_args(arguments)
    count, computed = (QUICK, COMPUTED[1:2]) if options.quick else (None, COMPUTED)
    torch.set_num_threads(1)
    subject = UNet()
    rows = against_fewer_steps(subject, computed, count=count)
    options.out.mkdir(parents=True, exist_ok=True)
    kept = {"machine": machine(), "rows": [rounded(row) for row in rows]}
    write_text(options.out / "unet_plans.json", json.dumps(kept).replace('{"steps"', '\n{"steps"') + "\n")
    cases = len(subject.test[:count])
    lines = [
        "# Plans for a UNet",
        "",
        f"PSNR of {cases} test pictures, which nothing was fitted on, to the run with all steps: mean with a 95 %",
        f"interval, and worst. On {machine()}.",
        "",
        *table(rows),
    ]
    write_text(options.out / "unet_plans.md", "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
