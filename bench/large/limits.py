"""How fast a run could be at most, by the block executions that took place in it. Plain arithmetic."""

from __future__ import annotations

from collections.abc import Sequence

Counts = Sequence[int]  # executions of each block in a run
GOAL = 0.98  # of the limit


def limit_of_blocks(plain: Counts, cached: Counts) -> float:
    """All executions over those that took place: every block counts the same, and nothing else.

    Example:
        >>> limit_of_blocks([4, 4], [4, 2])
        1.3333333333333333
    """
    return sum(plain) / max(sum(cached), 1)


def limit_of_times(plain: Counts, cached: Counts, block_ms: Sequence[float]) -> float:
    """The same, each block by the time that it takes.

    Example:
        >>> limit_of_times([4, 4], [4, 2], [3.0, 1.0])
        1.1428571428571428
    """
    spent = [sum(n * ms for n, ms in zip(counts, block_ms, strict=True)) for counts in (plain, cached)]
    return spent[0] / max(spent[1], 1e-12)


def limit_with_rest(plain: Counts, cached: Counts, block_ms: Sequence[float], plain_s: float) -> float:
    """What is left of it where all that is outside of the blocks is done at every step (Amdahl).

    Example:
        >>> limit_with_rest([4, 4], [4, 2], [3.0, 1.0], 0.020)  # 20 ms, of which 2 are saved
        1.1111111111111112
    """
    saved = sum((n - m) * ms for n, m, ms in zip(plain, cached, block_ms, strict=True)) / 1e3
    return plain_s / max(plain_s - saved, 1e-12)


def limits(
    plain: Counts, cached: Counts, block_ms: Sequence[float], plain_s: float, speedup: float
) -> dict[str, float]:
    """All three, and the measured speed-up over each."""
    found = {
        "limit": limit_of_blocks(plain, cached),
        "limit_by_time": limit_of_times(plain, cached, block_ms),
        "limit_with_rest": limit_with_rest(plain, cached, block_ms, plain_s),
    }
    ratios = {name.replace("limit", "ratio_to_limit"): speedup / limit for name, limit in found.items()}
    return {**found, **ratios}
