"""cache-dit's masks of steps: written out, and against what they are made of."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dithooks.compat.cache_dit.masks import named_mask, steps_mask

POLICIES = ("slow", "medium", "fast", "ultra")
GOLDEN = {  # as cache-dit 1.5.3 gives them: slow, medium, fast, ultra
    4: ("1101", "1101", "1101", "1101"),
    6: ("111001", "111001", "111001", "111001"),
    8: ("11111011", "11110101", "11101001", "11001001"),
    9: ("111110111", "111110101", "111101001", "111001001"),
    12: ("111101101111", "111101101001", "111010010011", "110100100011"),
    15: ("111101101101101", "111101101001001", "111010010010001", "110100100010001"),
    16: ("1111111101110011", "1111110110001001", "1111100000000001", "1100000000000001"),
    20: ("11111111011100111001", "11111101100011000101", "11111101000000000001", "11110000000000000001"),
    28: (
        "1111111101110011100110010001",
        "1111110110001100011000110001",
        "1111110100010000100000100001",
        "1111001000001000000100000001",
    ),
    50: (
        "11111111111111111111110011111000111110001110001101",
        "11111111111111110011100000111000001110000011100001",
        "11111111111001100000110000000110000000001100000001",
        "11111110001100000000011000000000001100000000000001",
    ),
}


def text(mask):
    return "".join(map(str, mask))


@pytest.mark.parametrize(("steps", "number"), [(steps, number) for steps in GOLDEN for number in range(4)])
def test_masks_written_out(steps, number):
    assert text(steps_mask(total_steps=steps, mask_policy=POLICIES[number])) == GOLDEN[steps][number]


def test_medium_is_the_policy_by_default():
    assert text(steps_mask(total_steps=28)) == GOLDEN[28][1]


@given(st.sampled_from([4, 6, *range(8, 201)]), st.sampled_from(POLICIES))
def test_a_mask_has_the_steps_asked_for_and_computes_the_first_and_the_last(steps, policy):
    mask = steps_mask(total_steps=steps, mask_policy=policy)
    assert len(mask) == steps
    assert set(mask) == {0, 1}
    assert mask[:2] == [1, 1]
    assert mask[-1] == 1


@given(st.integers(8, 200))
def test_each_policy_computes_no_more_than_the_one_before_it(steps):
    counts = [sum(steps_mask(total_steps=steps, mask_policy=policy)) for policy in POLICIES]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[3]


def by_hand(compute, cache, steps):
    mask = []
    for k in range(max(len(compute), len(cache))):
        if k < len(compute):
            mask += [1] * compute[k]
        if k < len(cache):
            mask += [0] * cache[k]
    return mask[:steps]


BINS = st.lists(st.integers(0, 6), max_size=7)


@given(BINS, BINS, st.integers(1, 40), st.sampled_from((*POLICIES, "none such")))
def test_bins_in_turn_whatever_the_policy(compute, cache, steps, policy):
    most = sum(compute) + sum(cache)
    if steps <= most:
        assert steps_mask(compute, cache, steps, policy) == by_hand(compute, cache, steps)
        assert steps_mask(compute, cache) == by_hand(compute, cache, most)
    else:
        with pytest.raises(ValueError, match=f"total_steps={steps}, but the bins have {most} steps: make them longer"):
            steps_mask(compute, cache, steps)


def test_bins_stay_as_they_are():
    compute, cache = [3, 1], [2, 2]
    steps_mask(compute, cache, total_steps=5)
    assert (compute, cache) == ([3, 1], [2, 2])


def test_bins_of_one_kind_leave_it_to_the_policy():
    assert steps_mask([3, 1], None, 28) == steps_mask(total_steps=28)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, "total_steps=None: give it, or both compute_bins and cache_bins"),
        ({"compute_bins": [1, 2]}, "total_steps=None: give it, or both compute_bins and cache_bins"),
        ({"total_steps": 5}, "total_steps=5: policies have masks of 4, 6, or 8 and more steps; give bins"),
        ({"total_steps": 7}, "total_steps=7: policies have"),
        ({"total_steps": 0}, "total_steps=0 is out of range: it must be at least 1"),
        ({"total_steps": 28, "mask_policy": "quick"}, "mask_policy='quick': there are 'slow', 'medium', 'fast'"),
        ({"compute_bins": [1, -2], "cache_bins": [3]}, "a compute bin=-2 is out of range"),
        ({"compute_bins": [1], "cache_bins": [-3]}, "a cache bin=-3 is out of range"),
        ({"compute_bins": [], "cache_bins": []}, "the bins have 0 steps: make them longer"),
    ],
)
def test_what_makes_no_mask_is_refused(arguments, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        steps_mask(**arguments)


def test_numbers_that_are_none():
    with pytest.raises(TypeError, match=r"total_steps must be an int, not 28\.0"):
        steps_mask(total_steps=28.0)
    with pytest.raises(TypeError, match="a compute bin must be an int, not '3'"):
        steps_mask(["3"], [1])


class TestNamed:
    def test_a_mask_is_itself(self):
        assert named_mask((1, 0, 1), None) == [1, 0, 1]

    def test_a_name_is_made_for_the_steps(self):
        assert named_mask("fast", 12) == steps_mask(total_steps=12, mask_policy="fast")

    def test_a_name_without_steps(self):
        with pytest.raises(ValueError, match=r"steps_computation_mask='fast' is made for .*: give num_inference_steps"):
            named_mask("fast", None)

    def test_nothing_in_it(self):
        with pytest.raises(ValueError, match="steps_computation_mask is empty"):
            named_mask([], None)

    def test_neither(self):
        with pytest.raises(TypeError, match="steps_computation_mask must have a 1 or 0 for each step"):
            named_mask(5, None)
