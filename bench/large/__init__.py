"""What caching saves on transformers of full size, with random weights: ``python bench/accelerator.py``."""

NAMES = ("flux", "wan", "flux_blocks", "flux_whole", "wan_14b")  # of the parts, by importance
