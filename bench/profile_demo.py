"""Profile the demo: ``python bench/profile_demo.py > bench/results/profile.txt``."""

import torch

from dithooks import DitCacheConfig, Threshold, profile
from dithooks.demo import load_pipeline


def main() -> None:
    """Draw two pictures without a cache, and print how much changes from step to step."""
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1, max_warmup_steps=3))
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    found = profile(
        pipe, lambda: pipe(["penguin", "rocket"], generator=seed), config, thresholds=(0.05, 0.08, 0.12, 0.2, 0.3)
    )
    print(found)


if __name__ == "__main__":
    main()
