"""What a cache did, as docs/using.md shows it: ``python -m bench.stats_demo`` writes ``stats.txt``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from dithooks import Budget, DitCacheConfig, Linear, dit_cache
from dithooks.demo import load_pipeline
from dithooks.storage.replacement import write_text


def main(arguments: list[str] | None = None) -> None:
    """Draw two emoji with a policy that looks; print the handle, and write that."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="eight steps")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = DitCacheConfig(cache_block_start=1, policy=Budget(2.0), predictor=Linear())
    with dit_cache(pipe, config) as cache:
        noise = torch.Generator().manual_seed(0)
        pipe(["penguin", "rocket"], num_inference_steps=8 if options.quick else 28, generator=noise)
        print(cache)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "stats.txt", f"{cache.summary()}\n")


if __name__ == "__main__":
    main()
