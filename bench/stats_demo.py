"""The table that the README shows of what a cache did: ``python -m bench.stats_demo``, in ``bench/results/stats.txt``."""

from __future__ import annotations

import torch

from dithooks import Budget, DitCacheConfig, Linear, dit_cache
from dithooks.demo import load_pipeline


def main() -> None:
    """Draw two emoji with a policy that looks, and print the handle."""
    torch.set_num_threads(1)
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    config = DitCacheConfig(cache_block_start=1, policy=Budget(2.0), predictor=Linear())
    with dit_cache(pipe, config) as cache:
        pipe(["penguin", "rocket"], num_inference_steps=28, generator=torch.Generator().manual_seed(0))
        print(cache)


if __name__ == "__main__":
    main()
