"""The ranges of blocks to try, if there are too many to try them all."""

from __future__ import annotations

from collections.abc import Callable

BlockPair = tuple[int, int]  # first and last block of a range


def try_out(
    allowed: set[BlockPair], number: int, test: int, attempt: Callable[[BlockPair], str | None]
) -> dict[BlockPair, str | None]:
    """Try ranges, and return the reason of each that failed, None for each that did not.

    If ``test`` is large enough, all ranges are tried. If not, the whole is tried first. If the whole fails, pairs of
    neighbours are next, as most faults lie between two neighbours; if it does not, its halves, their halves and so on.
    Then come the longest ranges that hold none that failed, so that the longest range in the result has been tried if
    ``test`` allows it.

    Args:
        allowed: the ranges to choose from.
        number: the number of blocks.
        test: the most ranges that are tried.
        attempt: returns the reason why a range failed, None if it did not.
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
