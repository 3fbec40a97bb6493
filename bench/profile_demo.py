"""Profile the demo: ``python bench/profile_demo.py > bench/results/profile.txt``."""

import torch

from dithooks import profile
from dithooks.demo import load_pipeline


def main() -> None:
    """Draw two pictures without a cache, and print how much changes from step to step."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    seed = torch.Generator().manual_seed(0)
    print(profile(pipe, lambda: pipe(["penguin", "rocket"], generator=seed), thresholds=(0.05, 0.08, 0.12, 0.2, 0.3)))


if __name__ == "__main__":
    main()
