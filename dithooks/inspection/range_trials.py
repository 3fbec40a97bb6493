"""Which ranges of blocks to try, where there are too many to try them all."""

from __future__ import annotations

from collections.abc import Callable

BlockPair = tuple[int, int]  # first and last block of a range


def try_out(
    allowed: set[BlockPair], number: int, test: int, attempt: Callable[[BlockPair], str | None]
) -> dict[BlockPair, str | None]:
    """Ranges that were tried, with the reason of those that failed, ``None`` for the others.

    All, if ``test`` allows it. Else the whole; if that fails, neighbours, as most faults lie between two of them, else
    its halves, their halves and so on; then the longest that hold none that failed, so that what is found to be the
    longest was tried if any way possible.

    Args:
        allowed: ranges to choose from.
        number: of blocks.
        test: the most that are tried.
        attempt: returns why a range failed.
    """
    longest = sorted(allowed, key=lambda pair: (pair[0] - pair[1], pair))
    if len(longest) <= test:
        return {pair: attempt(pair) for pair in longest}
    done = {pair: attempt(pair) for pair in longest[:1] if test}
    parts, order = [(0, number - 1)], [(block, block + 1) for block in range(number - 1)]
    if None in done.values():
        order = []
        while parts:
            cut = [(a, (a + b) // 2, b) for a, b in parts if a < b]
            parts = [part for a, middle, b in cut for part in ((a, middle), (middle + 1, b))]
            order += parts
    for pair in [*[pair for pair in order if pair in allowed][: test * 3 // 4], *longest]:
        doubtful = any(why is not None and within(inside, pair) for inside, why in done.items())
        if len(done) < test and pair not in done and not doubtful:
            done[pair] = attempt(pair)
    return done


def within(inner: BlockPair, outer: BlockPair) -> bool:
    """Whether a range is a part of another."""
    return outer[0] <= inner[0] and inner[1] <= outer[1]
