"""How much the demo changes from step to step: ``python -m bench.profile_demo`` writes ``profile.txt``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dithooks import DitCacheConfig, Threshold, profile
from dithooks.demo import load_pipeline
from dithooks.storage.replacement import write_text


def main(arguments: list[str] | None = None) -> None:
    """Draw two pictures without a cache; print what thresholds would reuse, and write that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="eight steps")
    options = parser.parse_args(arguments)
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1, max_warmup_steps=3))
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    noise, steps = torch.Generator().manual_seed(0), 8 if options.quick else 28
    found = profile(
        pipe,
        lambda: pipe(["penguin", "rocket"], num_inference_steps=steps, generator=noise),
        config,
        thresholds=(0.05, 0.08, 0.12, 0.2, 0.3),
    )
    print(found)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "profile.txt", f"{found}\n")


if __name__ == "__main__":
    main()
