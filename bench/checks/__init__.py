"""Checks of an accelerator: whether what holds on a CPU holds there. Run them with ``python -m bench.checks``."""
