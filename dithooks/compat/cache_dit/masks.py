"""Masks of steps, as cache-dit's ``steps_mask`` makes them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import cycle, zip_longest

from ...errors import InvalidSetting, WrongType
from ...validation import check_choice, check_count, shown

POLICIES = ("slow", "medium", "fast", "ultra")

# By number of steps, then by policy: lengths of the computed rows, and of the reused row after each.
Bins = tuple[tuple[int, ...], tuple[int, ...]]
BINS: dict[int, tuple[Bins, ...]] = {
    28: (
        ((8, 3, 3, 2, 1, 1), (1, 2, 2, 2, 3)),
        ((6, 2, 2, 2, 2, 1), (1, 3, 3, 3, 3)),
        ((6, 1, 1, 1, 1, 1), (1, 3, 4, 5, 4)),
        ((4, 1, 1, 1, 1), (2, 5, 6, 7)),
    ),
    15: (
        ((4, 2, 2, 2, 1), (1, 1, 1, 1)),
        ((4, 2, 1, 1, 1), (1, 1, 2, 2)),
        ((3, 1, 1, 1, 1), (1, 2, 2, 3)),
        ((2, 1, 1, 1, 1), (1, 2, 3, 3)),
    ),
    9: (((5, 2, 1), (1,)), ((5, 1, 1), (1, 1)), ((4, 1, 1), (1, 2)), ((3, 1, 1), (2, 2))),
    8: (((5, 1, 1), (1,)), ((4, 1, 1), (1, 1)), ((3, 1, 1), (1, 2)), ((2, 1, 1), (2, 2))),
    6: (((3, 1), (2,)),) * 4,
    4: (((2, 1), (1,)),) * 4,
}


def steps_mask(
    compute_bins: Sequence[int] | None = None,
    cache_bins: Sequence[int] | None = None,
    total_steps: int | None = None,
    mask_policy: str | None = "medium",
) -> list[int]:
    """Make a mask with a 1 for each computed step and a 0 for each reused step, by bins or by a policy.

    Policies have the bins of cache-dit 1.5.3, made for 4, 6, 8, 9, 15 and 28 steps; for other numbers from 8 on, they
    are cut or stretched.

    Args:
        compute_bins: lengths of the computed rows of steps.
        cache_bins: lengths of the reused rows, one after each computed row. Unless both bins are given, the policy
            holds.
        total_steps: length of the mask; left out, that of the bins. A policy needs it: 4, 6, or 8 and more.
        mask_policy: ``"slow"``, ``"medium"``, ``"fast"`` or ``"ultra"``; the last step of its mask is computed.

    Raises:
        TypeError: a number is not an integer.
        ValueError: a bin or the number of steps is out of range, the bins have too few steps, or there is no such
            policy.

    Example:
        >>> steps_mask([3, 1], [2, 2])
        [1, 1, 1, 0, 0, 1, 0, 0]
        >>> steps_mask(total_steps=9, mask_policy="ultra")
        [1, 1, 1, 0, 0, 1, 0, 0, 1]
    """
    if total_steps is not None:
        total_steps = check_count("total_steps", total_steps, 1)
    if compute_bins is not None and cache_bins is not None:
        compute = [check_count("a compute bin", count, 0) for count in compute_bins]
        cache = [check_count("a cache bin", count, 0) for count in cache_bins]
        most = sum(compute) + sum(cache)
        if not most or (total_steps or 0) > most:
            raise InvalidSetting(f"total_steps={total_steps}, but the bins have {most} steps: make them longer")
        return _written(compute, cache)[:total_steps]
    if total_steps is None:
        raise InvalidSetting("total_steps=None: give it, or both compute_bins and cache_bins")
    policy = POLICIES.index(check_choice("mask_policy", mask_policy, POLICIES))
    if total_steps < 8 and total_steps not in BINS:
        raise InvalidSetting(f"total_steps={total_steps}: policies have masks of 4, 6, or 8 and more steps; give bins")
    made_for = total_steps if total_steps in BINS else 15 if total_steps < 16 else 28
    compute, cache = (list(bins) for bins in BINS[made_for][policy])
    _stretch(compute, cache, total_steps)
    over = sum(compute) + sum(cache) - total_steps
    mask = _written(_cut(compute, over // 2), _cut(cache, over - over // 2))
    return [*mask[:-1], 1]


def named_mask(mask: object, steps: int | None) -> list[int]:
    """Return the mask of a policy given by name, or a given mask as a list.

    Raises:
        TypeError: ``mask`` is neither a name nor a mask.
        ValueError: the mask is empty, there is no such policy, or a policy is given without a number of steps.
    """
    if not isinstance(mask, str):
        if not isinstance(mask, Iterable):
            raise WrongType(f"steps_computation_mask must have a 1 or 0 for each step, or be a name, not {shown(mask)}")
        if not (bits := list(mask)):
            raise InvalidSetting("steps_computation_mask is empty: give a 1 or 0 for each step, or None")
        return bits
    if steps is None:
        raise InvalidSetting(
            f"steps_computation_mask={shown(mask)} is made for a number of steps: give num_inference_steps"
        )
    return steps_mask(total_steps=steps, mask_policy=mask)


def _written(compute: Sequence[int], cache: Sequence[int]) -> list[int]:
    """Write the bins out, alternating, as 1 and 0."""
    return [bit for pair in zip_longest(compute, cache, fillvalue=0) for bit in [1] * pair[0] + [0] * pair[1]]


def _stretch(compute: list[int], cache: list[int], steps: int) -> None:
    """Lengthen one bin after the other, each by its own share, until the bins have enough steps."""
    turns: list[tuple[list[int], int, int]] = []
    for k in range(min(len(compute), len(cache))):
        for bins in (compute, cache):
            turns.append((bins, k, max(int(bins[k] * ((steps / 28) * 0.5)), 1)))  # rounded as cache-dit does
    for bins, k, more in cycle([*turns, (compute, -1, 1)]):
        if sum(compute) + sum(cache) >= steps:
            break
        bins[k] += more


def _cut(bins: Sequence[int], over: int) -> list[int]:
    """Shorten bins by ``over`` steps, from the end."""
    left, kept = sum(bins) - over, []
    for count in bins:
        kept.append(min(count, left))
        left -= kept[-1]
    return kept
