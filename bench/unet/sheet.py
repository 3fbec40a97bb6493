"""What the UNet draws, without a cache: ``python -m bench.unet.sheet`` writes ``unet_sheet.png``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from bench.sheets import sheet
from bench.video.clips import NAMES
from dithooks.storage.replacement import replacing

from . import GUIDANCE, STEPS, WEIGHTS, load

COLUMNS = 12  # of the names, a row of pictures from each of ``SEEDS`` each
SEEDS = (0, 1, 2, 3)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.unet.sheet", description=__doc__)
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="a pipeline folder (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=STEPS, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=GUIDANCE, help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="8 steps, one seed")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipe, names = load(options.weights), NAMES[:: len(NAMES) // COLUMNS]
    rows, seeds = [], SEEDS[:1] if options.quick else SEEDS
    for seed in seeds:
        made = pipe(
            names,
            num_inference_steps=8 if options.quick else options.steps,
            guidance_scale=options.guidance,
            generator=[torch.Generator().manual_seed(100 * seed + number) for number in range(len(names))],
            output_type="pt",
        ).images
        rows.append(made)
    options.out.mkdir(parents=True, exist_ok=True)
    with replacing(options.out / "unet_sheet.png") as draft:
        sheet(rows, [f"noise {seed}" for seed in seeds], names).save(draft)
    print(options.out / "unet_sheet.png")


if __name__ == "__main__":
    main()
