"""When: the decisions of every policy against plain loops that follow the formulas."""

import json
import math
import pickle

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from policies_by_hand import (
    assert_alike,
    budget_by_hand,
    computed,
    drive,
    drive_all,
    easy_by_hand,
    is_tie,
    magnitude_by_hand,
    matrix,
    nearest_by_hand,
    ratios_of,
    speedup_by_hand,
    threshold_by_hand,
)

from dithooks import Budget, EasyCache, Interval, MagnitudeRatio, Mask, Threshold, Uncached
from dithooks.policies.history import BranchHistory, Decision, Schedule
from dithooks.policies.mask import resample
from dithooks.policies.reason import Reason
from dithooks.stats.log import fold

pytestmark = pytest.mark.core


class TestReason:
    @pytest.mark.parametrize("reason", Reason)
    def test_it_is_its_word(self, reason):
        """As a key, in a text and in JSON, with or without a policy's own word beside it."""
        word = reason.value
        assert type(word) is type(str(reason)) is str
        assert (str(reason), f"{reason:>3}", repr(reason), json.loads(json.dumps(reason))) == (
            word, f"{word:>3}", repr(word), word)  # fmt: skip
        assert {word: 1}[reason] == {reason: 1}[word] == 1
        assert pickle.loads(pickle.dumps(Decision(False, reason))).reason is reason

    def test_what_is_a_branch_s_or_a_rank_s_own(self):
        assert {reason.value for reason in Reason if reason.is_own} == {
            "no anchor", "unmeasured", "non-finite", "weights", "shape", "switch", "not reached", "residual not finite",
            "shared scheduler", "another rank", "conditional only", "no conditional output", "no difference",
        }  # fmt: skip


class TestUncached:
    @pytest.mark.parametrize(
        ("policy", "never"),
        [
            (Uncached(), True),
            (Interval(0, 1), True),
            (Interval(3, 1), True),
            (Interval(0, 2), False),
            (Mask((1,)), False),
        ],
    )
    def test_what_never_reuses(self, policy, never):
        assert policy.never_reuses == never

    def test_every_step_is_computed(self):
        assert drive(Uncached(), Schedule(4)) == dict.fromkeys(range(4), (False, "off", None))
        assert not any(Uncached().keeps(step, 2) for step in range(4))


class TestInterval:
    @given(start=st.integers(0, 9), interval=st.integers(1, 6), steps=st.integers(1, 20), first=st.integers(0, 9))
    def test_every_step(self, start, interval, steps, first):
        assume(first < steps)
        wanted, seen = {}, False
        for t in range(first, steps):
            refresh = t < start or (t - start) % interval == 0
            why = "warm-up" if t < start else "refresh" if refresh else "reuse" if seen else "no anchor"
            wanted[t], seen = (why == "reuse", why, None), True
        assert drive(Interval(start, interval), Schedule(steps, first)) == wanted

    def test_a_branch_that_was_not_called_at_a_refresh_has_its_own_when_it_is_back(self):
        told = drive(Interval(1, 3), Schedule(12), absent=(4, 5, 10))
        assert {t: each[1] for t, each in told.items()} == {
            0: "warm-up",
            1: "refresh",
            2: "reuse",
            3: "reuse",
            6: "missed refresh",
            7: "refresh",
            8: "reuse",
            9: "reuse",
            11: "missed refresh",
        }


def masks(least=1, most=24):
    return st.lists(st.integers(0, 1), min_size=least - 1, max_size=most - 1).map(lambda bits: (1, *bits))


def placed(wanted, steps):
    """Rounded to the next free step; those to come need one each."""
    taken = []
    for k, place in enumerate(wanted):
        step = max(math.floor(place + 0.5), taken[-1] + 1 if taken else 0)
        taken.append(min(step, steps - len(wanted) + k))
    return tuple(int(t in taken) for t in range(steps))


class TestMask:
    @given(masks(), st.integers(0, 23))
    def test_bits_are_followed(self, mask, first):
        assume(first < len(mask))
        told = drive(Mask(mask), Schedule(len(mask), first))
        for t, (reuse, why, value) in told.items():
            wanted = "mask" if mask[t] else "no anchor" if t == first else "reuse"
            assert (reuse, why, value) == (not mask[t] and t > first, wanted, None)

    @pytest.mark.parametrize(("name", "speed"), [("slow", 1.5), ("medium", 2), ("fast", 3), ("ultra", 4)])
    def test_presets(self, name, speed):
        """K = T/speed, half up; the first w = K // 6 are computed, the others at equal distances up to the end."""
        for steps in range(1, 101):
            mask = Mask(name).for_run(Schedule(steps)).steps
            count = max(1, math.floor(steps / speed + 0.5))
            warm = max(1, count // 6)
            gap = (steps - warm + 1) / (count - warm + 1)  # from the last of the first to the end, K − w + 1 of them
            places = [*range(warm), *(warm - 1 + k * gap for k in range(1, count - warm + 1))]
            assert (len(mask), sum(mask), mask[:warm]) == (steps, count, (1,) * warm)
            if not any(map(is_tie, places)):
                assert mask == placed(places, steps), steps
            gaps = np.diff([*np.flatnonzero(mask), steps])[warm - 1 :]
            assert gaps.max() - gaps.min() <= 1

    @given(masks(least=2), st.integers(1, 60))
    def test_resampled_by_share_of_the_steps(self, mask, steps):
        """k(q) is the line through (q_k, k) and (T, K); the new refreshes are where it is j·K/K', T'/T as far."""
        refreshes, old = [q for q, bit in enumerate(mask) if bit], len(mask)
        count = len(refreshes)
        share = count * steps / old
        assume(not is_tie(share))
        new = min(steps, max(1, round(share)))
        places = []
        for j in range(new):
            k, part = divmod(j * count / new + 1e-12, 1)
            ends = [*refreshes, old]
            place = (ends[int(k)] + part * (ends[int(k) + 1] - ends[int(k)])) * steps / old
            places.append(min(place, steps - 1))
        assume(not any(map(is_tie, places)))
        assert Mask(mask).for_run(Schedule(steps)).steps == placed(places, steps)

    @pytest.mark.parametrize(
        ("mask", "steps", "wanted"),
        [
            ("1010", 8, "10101010"),  # k(q) = 0, ½, 1, 1½ where q = 0, 1, 2, 3
            ("1100", 8, "11100100"),  # where q = 0, ½, 1, 2½
            ("1000", 8, "10001000"),
            ("10001000", 4, "1000"),
            ("10001000", 12, "100010001000"),  # q = 0, 2⅔, 5⅓
            ("11111111", 3, "111"),
            ("10000000", 3, "100"),
            ("1", 5, "11111"),
            ("1000000000", 1, "1"),
        ],
    )
    def test_resampled_by_hand(self, mask, steps, wanted):
        got = Mask([int(bit) for bit in mask]).for_run(Schedule(steps)).steps
        assert "".join(map(str, got)) == wanted

    @given(masks(least=2), st.data())
    def test_resampled_by_noise_level(self, mask, data):
        """A new step's place among the old is where its σ is; σ = 0 is the last step's end."""
        old = len(mask)
        steps = data.draw(st.integers(1, 40))

        def levels(number):
            gaps = data.draw(st.lists(st.floats(0.05, 1), min_size=number, max_size=number))
            return (np.cumsum(gaps)[::-1] / np.sum(gaps)).astype(np.float32).tolist()

        sigmas, new_sigmas = levels(old), levels(steps)
        count = sum(mask)
        assume(not is_tie(count * steps / old))
        new = min(steps, max(1, round(count * steps / old)))
        places = [np.interp(-s, [*(-np.asarray(sigmas)), 0.0], np.arange(old + 1.0)) for s in new_sigmas]
        ends = [*np.flatnonzero(mask), old]
        wanted = [np.interp(j * count / new, np.arange(count + 1.0), ends) for j in range(new)]
        nearest = []
        for q in wanted:
            off = np.abs(np.asarray(places) - q)
            order = np.argsort(off)
            assume(len(order) < 2 or off[order[1]] - off[order[0]] > 1e-4)
            nearest.append(int(order[0]))
        got = Mask(mask, sigmas).for_run(Schedule(steps, sigmas=tuple(new_sigmas))).steps
        assert got == placed(nearest, steps)

    @given(masks(least=2), st.data())
    def test_the_same_schedule_gives_the_same_mask(self, mask, data):
        gaps = data.draw(st.lists(st.floats(0.01, 1), min_size=len(mask), max_size=len(mask)))
        sigmas = tuple(np.cumsum(gaps)[::-1].tolist())
        schedule = Schedule(len(mask), sigmas=sigmas)
        assert Mask(mask, sigmas).for_run(schedule).steps == mask
        assert Mask(mask).for_run(schedule).steps == mask

    def test_the_same_number_of_steps_at_other_noise_levels_moves_the_mask(self):
        """Half of the new steps are above σ = 0.9, where the mask has two refreshes of four."""
        even = [1 - t / 10 for t in range(10)]
        slow = (1.0, 0.98, 0.96, 0.94, 0.92, 0.9, 0.7, 0.5, 0.3, 0.1)
        mask = (1, 1, 0, 1, 0, 0, 0, 1, 0, 0)  # σ = 1, 0.9, 0.7, 0.3
        assert Mask(mask, even).for_run(Schedule(10, sigmas=slow)).steps == (1, 0, 0, 0, 0, 1, 1, 0, 1, 0)
        assert Mask(mask).for_run(Schedule(10, sigmas=slow)).steps == mask

    @pytest.mark.parametrize("new_sigmas", [None, (0.2, 0.5, 1.0), (1.0, 0.5)])
    def test_without_falling_levels_the_share_counts(self, new_sigmas):
        assert resample((1, 0, 1, 0, 1, 0), 3, (1, 0.9, 0.8, 0.7, 0.6, 0.5), new_sigmas) == (1, 0, 1)

    def test_a_longer_run_than_the_mask_if_nothing_tells(self):
        policy = Mask((1, 0, 0)).for_run(Schedule())
        assert [tuple(policy.before(t, BranchHistory(refreshed=0), Schedule()))[:2] for t in range(5)] == [
            (False, "mask"),
            (True, "reuse"),
            (True, "reuse"),
            (False, "end"),
            (False, "end"),
        ]
        assert "the number of steps is not known" in policy.warning_at_start(Schedule())
        assert policy.warning_at_start(Schedule(3)) is None

    def test_missed_refresh(self):
        told = drive(Mask((1, 0, 1, 0, 0, 1, 0, 0)), Schedule(8), absent=(2, 5, 6))
        assert {t: each[1] for t, each in told.items()} == {
            0: "mask",
            1: "reuse",
            3: "missed refresh",
            4: "reuse",
            7: "missed refresh",
        }

    @settings(max_examples=50)
    @given(masks(least=4), st.integers(0, 999), st.integers(0, 6), st.none() | st.integers(1, 3))
    def test_dynamic_decides_where_the_mask_has_0(self, mask, seed, warm, row):
        see, steps = matrix(seed, len(mask)), len(mask)
        inner = Threshold(0.15, max_warmup_steps=warm, max_continuous_cached_steps=row)
        wanted, refreshed, streak = {}, None, 0
        for t in range(steps):
            value = None
            if mask[t]:
                why = "mask"
            elif t < warm:
                why = "warm-up"
            elif row is not None and streak >= row:
                why = "cap"
            else:
                value = see(t, refreshed)
                why = "reuse" if value < 0.15 else "threshold"
            streak = streak + 1 if why == "reuse" else 0
            refreshed = refreshed if why == "reuse" else t
            wanted[t] = (why == "reuse", why, value)
        assert_alike(drive(Mask(mask, dynamic=inner), Schedule(steps), see), wanted)

    def test_dynamic_is_made_out_for_the_run(self):
        policy = Mask("medium", dynamic=Threshold(0.1, max_warmup_steps=0)).for_run(Schedule(10))
        assert policy.metric == "change"
        assert policy.judge(2, BranchHistory(refreshed=1), Schedule(10), 0.05).reuse
        shared = Mask((1, 0), dynamic=EasyCache(0.1, separate_branches=False, reduce="max"))
        assert (shared.metric, shared.separate_branches, shared.reduce) == ("rate", False, "max")
        told = Mask("ultra", dynamic=Budget(50.0)).for_run(Schedule(10)).warning_at_start(Schedule(10))
        assert "cannot be reached" in told

    def test_where_the_other_policy_computes_all_so_does_the_mask(self):
        """Of one step, none is left to a budget."""
        policy = Mask((1, 0, 0), dynamic=Budget(2.0)).for_run(Schedule(1))
        assert policy.never_reuses
        assert "the run's steps are 1, and max_warmup_steps is 1" in policy.warning_at_start(Schedule(1))

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            (("quick",), ValueError, "presets slow, medium, fast, ultra"),
            (((0, 1),), ValueError, "the first of them 1"),
            (((),), ValueError, "0 or 1 for each step"),
            (((1, 2),), ValueError, "0 or 1 for each step"),
            (((1, 0.5),), ValueError, "0 or 1 for each step"),
            (((1, None),), ValueError, "0 or 1 for each step"),
            (((1, 0), (0.5,)), ValueError, "2 falling noise levels"),
            (((1, 0), True), TypeError, "sigmas must be a noise level for each step, or None, not True"),
            (((1, 0), "ab"), TypeError, "sigmas must be a noise level for each step, or None, not 'ab'"),
            (((1, 0), (0.5, 0.5)), ValueError, "2 falling noise levels"),
            (((1, 0), (0.5, 0.6)), ValueError, "2 falling noise levels"),
            (((1, 0), (0.5, float("nan"))), ValueError, "a sigma=nan is out of range"),
            (("slow", (0.5, 0.4)), ValueError, "sigmas belong to a mask of 0 and 1"),
            (((1, 0), None, Interval(0, 2)), TypeError, "a policy that decides by looking"),
            (((1, 0), None, Mask((1, 0))), TypeError, "a policy that decides by looking"),
            (((1, 0), None, 0.1), TypeError, "a policy that decides by looking"),
        ],
    )
    def test_what_is_no_mask(self, given, error, match):
        with pytest.raises(error, match=match):
            Mask(*given)

    def test_numpy_masks(self):
        made = Mask(np.array([True, False, True]), np.array([1.0, 0.5, 0.25], dtype=np.float32))
        assert made == Mask((1, 0, 1), (1.0, 0.5, 0.25))
        assert all(type(bit) is int for bit in made.steps)

    def test_a_preset_has_to_know_the_number_of_steps(self):
        policy = Mask("fast").for_run(Schedule())
        assert policy.never_reuses
        assert not any(policy.before(step, BranchHistory(refreshed=0), Schedule()).reuse for step in range(30))
        told = policy.warning_at_start(Schedule())
        assert told.startswith("Mask('fast') needs the number of steps, which is not known, so every call is computed")


class TestThreshold:
    @settings(max_examples=150)
    @given(
        steps=st.integers(1, 30),
        first=st.sampled_from([0, 0, 1, 5]),
        seed=st.integers(0, 9999),
        warm=st.integers(0, 9),
        every=st.integers(1, 4),
        most=st.none() | st.integers(1, 8),
        row=st.none() | st.integers(1, 4),
        total=st.none() | st.floats(0.05, 0.5),
        last=st.integers(0, 4),
        forced=st.none() | st.integers(1, 9),
        repeat=st.booleans(),
        limit=st.floats(0.05, 0.3),
    )
    def test_all_parameters(self, steps, first, seed, warm, every, most, row, total, last, forced, repeat, limit):
        assume(first < steps)
        policy = Threshold(
            limit,
            max_warmup_steps=warm,
            warmup_interval=every,
            max_cached_steps=most,
            max_continuous_cached_steps=row,
            max_accumulated_diff=total,
            last_steps_computed=last,
            force_refresh_step=forced,
            force_refresh="repeat" if repeat else "once",
        )
        see = matrix(seed, steps)
        wanted = threshold_by_hand(
            limit,
            steps,
            see,
            warm=warm,
            every=every,
            most=most,
            row=row,
            total=total,
            last=last,
            forced=forced,
            repeat=repeat,
            first=first,
        )
        assert_alike(drive(policy, Schedule(steps, first), see), wanted)

    @pytest.mark.parametrize(
        ("parameters", "wanted"),
        [
            ({}, "111111110000"),
            ({"max_warmup_steps": 0}, "100000000000"),
            ({"max_warmup_steps": 3}, "111000000000"),
            ({"max_warmup_steps": 6, "warmup_interval": 2}, "101010000000"),
            ({"max_warmup_steps": 7, "warmup_interval": 3}, "100100100000"),
            ({"max_warmup_steps": 2, "max_cached_steps": 3}, "110001111111"),
            ({"max_warmup_steps": 2, "max_continuous_cached_steps": 3}, "110001000100"),
            ({"max_warmup_steps": 2, "max_accumulated_diff": 0.25}, "110010010010"),
            ({"max_warmup_steps": 2, "last_steps_computed": 4}, "110000001111"),
            ({"max_warmup_steps": 2, "force_refresh_step": 5}, "110001000000"),
            ({"max_warmup_steps": 2, "force_refresh_step": 5, "force_refresh": "repeat"}, "110001000010"),
            ({"max_warmup_steps": 1, "force_refresh_step": 1, "force_refresh": "repeat"}, "111111111111"),
        ],
    )
    def test_golden(self, parameters, wanted):
        """A change of 0.1 at every step; the threshold is 0.2."""
        assert computed(drive(Threshold(0.2, **parameters), Schedule(12), lambda *_: 0.1)) == wanted

    def test_the_threshold_itself_is_computed_and_the_sum_may_be_reached(self):
        policy, track = Threshold(0.25, max_accumulated_diff=0.5), BranchHistory(refreshed=8, drift=0.375)
        assert policy.judge(9, track, Schedule(), 0.25).reason == "threshold"
        assert policy.judge(9, track, Schedule(), 0.125) == (True, "reuse", 0.125)
        assert policy.judge(9, track, Schedule(), 0.126).reason == "accumulated"

    def test_the_end_is_known_only_with_the_number_of_steps(self):
        policy = Threshold(0.2, 0, last_steps_computed=3)
        assert policy.before(9, BranchHistory(refreshed=8), Schedule(12)).reason == "end"
        assert policy.before(9, BranchHistory(refreshed=8), Schedule()) is None
        assert "last_steps_computed=3 does nothing" in policy.warning_at_start(Schedule())
        assert policy.warning_at_start(Schedule(12)) is None

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"residual_diff_threshold": 0}, ValueError, "residual_diff_threshold=0 is out of range"),
            ({"residual_diff_threshold": -1.0}, ValueError, "residual_diff_threshold=-1"),
            ({"residual_diff_threshold": math.nan}, ValueError, "residual_diff_threshold=nan"),
            ({"residual_diff_threshold": math.inf}, ValueError, "residual_diff_threshold=inf"),
            ({"residual_diff_threshold": "0.1"}, TypeError, "residual_diff_threshold must be a number"),
            ({"residual_diff_threshold": True}, TypeError, "residual_diff_threshold must be a number"),
            ({"residual_diff_threshold": None}, TypeError, "residual_diff_threshold must be a number"),
            ({"max_accumulated_diff": 0}, ValueError, "max_accumulated_diff"),
            ({"max_warmup_steps": -1}, ValueError, "max_warmup_steps=-1"),
            ({"max_warmup_steps": None}, TypeError, "max_warmup_steps must be an int"),
            ({"warmup_interval": 0}, ValueError, "warmup_interval=0"),
            ({"max_cached_steps": 0}, ValueError, "max_cached_steps=0"),
            ({"max_continuous_cached_steps": 1.0}, TypeError, "max_continuous_cached_steps must be an int"),
            ({"last_steps_computed": -1}, ValueError, "last_steps_computed=-1"),
            ({"force_refresh_step": 0}, ValueError, "force_refresh_step=0"),
            ({"force_refresh": "twice"}, ValueError, "force_refresh='twice': there are 'once', 'repeat'"),
            ({"separate_branches": 1}, TypeError, "separate_branches must be True or False"),
            ({"reduce": "sum"}, ValueError, "reduce='sum': there are 'mean', 'max', 'each'"),
        ],
    )
    def test_wrong_values(self, given, error, match):
        with pytest.raises(error, match=match):
            Threshold(**{"residual_diff_threshold": 0.1, **given})


class TestEasyCache:
    @settings(max_examples=100)
    @given(
        steps=st.integers(1, 30),
        first=st.sampled_from([0, 0, 1, 6]),
        seed=st.integers(0, 9999),
        warm=st.integers(2, 8),
        row=st.none() | st.integers(1, 4),
        last=st.integers(0, 4),
        limit=st.floats(0.05, 0.6),
    )
    def test_all_parameters(self, steps, first, seed, warm, row, last, limit):
        assume(first < steps)
        see = matrix(seed, steps)
        policy = EasyCache(
            limit, max_warmup_steps=warm, max_continuous_cached_steps=row, last_steps_computed=last, reduce="max"
        )
        wanted = easy_by_hand(
            limit, steps, lambda t, done: see(t, done[-1]), warm=warm, row=row, last=last, first=first
        )
        assert_alike(drive(policy, Schedule(steps, first), see), wanted)

    @pytest.mark.parametrize(
        ("parameters", "wanted"),
        [
            ({}, "111110001000"),
            ({"max_warmup_steps": 2}, "110001000100"),
            ({"max_warmup_steps": 2, "max_continuous_cached_steps": 2}, "110010010010"),
            ({"last_steps_computed": 3}, "111110001111"),
        ],
    )
    def test_golden(self, parameters, wanted):
        """0.1 a step adds up to less than 0.35 for three of them."""
        assert computed(drive(EasyCache(0.35, **parameters), Schedule(12), lambda *_: 0.1)) == wanted

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"threshold": 0.0}, ValueError, "threshold=0"),
            ({"threshold": None}, TypeError, "threshold must be a number"),
            ({"max_warmup_steps": 1}, ValueError, "max_warmup_steps=1 is out of range: it must be at least 2"),
            ({"max_continuous_cached_steps": 0}, ValueError, "max_continuous_cached_steps=0"),
            ({"last_steps_computed": 0.0}, TypeError, "last_steps_computed"),
            ({"reduce": None}, ValueError, "reduce=None"),
        ],
    )
    def test_wrong_values(self, given, error, match):
        with pytest.raises(error, match=match):
            EasyCache(**{"threshold": 0.1, **given})


class TestMagnitudeRatio:
    @settings(max_examples=100)
    @given(
        seed=st.integers(0, 9999),
        steps=st.integers(2, 40),
        first=st.sampled_from([0, 0, 1]),
        limit=st.floats(0.05, 0.5),
        row=st.integers(1, 6),
        share=st.sampled_from([0.0, 0.2, 0.25, 0.5, 1 / 3, 1.0]),
    )
    def test_all_parameters(self, seed, steps, first, limit, row, share):
        ratios = ratios_of(seed, steps)
        policy = MagnitudeRatio(ratios, limit, row, share)
        wanted = magnitude_by_hand(ratios, limit, row, share, first=first)
        assert_alike(drive(policy, Schedule(steps, first)), wanted)

    @pytest.mark.parametrize(
        ("share", "steps", "warm"),
        [
            (0.0, 10, 0),
            (0.2, 10, 2),
            (0.2, 11, 3),
            (0.2, 50, 10),
            (0.3, 10, 3),
            (0.7, 10, 7),
            (1.0, 10, 10),
            (0.07, 100, 7),  # 0.07·100 is 7.000000000000001
            (0.28, 25, 7),
            (0.14, 50, 7),
            (0.55, 100, 55),
        ],
    )
    def test_retention_is_a_share_of_the_steps(self, share, steps, warm):
        told = drive(MagnitudeRatio((1.0,) * steps, 0.1, steps, share), Schedule(steps))
        assert computed(told) == ("1" * warm).ljust(1, "1").ljust(steps, "0")

    @settings(max_examples=60)
    @given(seed=st.integers(0, 9999), old=st.integers(2, 40), steps=st.integers(1, 60))
    def test_another_number_of_steps_has_the_same_magnitudes_at_the_same_shares(self, seed, old, steps):
        ratios = ratios_of(seed, old)
        got = np.ravel(MagnitudeRatio(ratios).for_run(Schedule(steps)).ratios)
        logs = np.cumsum(np.log(ratios))
        wanted = []
        for t in range(steps):
            place = t * (old - 1) / max(steps - 1, 1)
            k = min(int(place), old - 2)
            wanted.append(np.exp(logs[k] + (place - k) * (logs[k + 1] - logs[k])))
        assert len(got) == steps
        assert got[0] == 1
        np.testing.assert_allclose(np.cumprod(got), np.asarray(wanted) / wanted[0], rtol=2e-5)

    def test_one_recorded_step_tells_nothing(self):
        assert np.ravel(MagnitudeRatio((1.0,)).for_run(Schedule(4)).ratios).tolist() == [1.0] * 4

    def test_decisions_at_another_number_of_steps(self):
        ratios = ratios_of(5, 10)
        sizes = np.exp(np.interp(np.linspace(0, 9, 28), np.arange(10), np.log(np.cumprod(ratios))))
        stretched = (1.0, *(sizes[1:] / sizes[:-1]))
        wanted = magnitude_by_hand(stretched, 0.12, 4, 0.2)
        assert {"reuse", "threshold", "cap", "warm-up"} == {each[1] for each in wanted.values()}
        assert_alike(drive(MagnitudeRatio(ratios), Schedule(28)), wanted, rel=1e-3)

    def test_each_branch_has_its_own_and_further_ones_that_of_the_last(self):
        lists = (ratios_of(1, 12), ratios_of(2, 12))
        policy = MagnitudeRatio(lists, 0.15)
        for number in range(4):
            wanted = magnitude_by_hand(lists[min(number, 1)], 0.15, 4, 0.2)
            assert_alike(drive(policy, Schedule(12), number=number), wanted)
        longer = policy.for_run(Schedule(30)).ratios
        assert [len(each) for each in longer] == [30, 30]
        assert np.prod(longer[1]) == pytest.approx(np.prod(lists[1]), rel=1e-5)

    def test_of_a_run_that_does_not_tell_its_steps(self):
        policy = MagnitudeRatio((1.0,) * 5, retention_ratio=0.0).for_run(Schedule())
        assert policy.before(4, BranchHistory(refreshed=3), Schedule()).reason == "reuse"
        assert policy.before(5, BranchHistory(refreshed=4), Schedule()).reason == "end"
        assert "the 5 ratios are taken as made for this run" in policy.warning_at_start(Schedule())

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"ratios": ()}, TypeError, "ratios must be a number for each step"),
            ({"ratios": ((),)}, ValueError, "one positive number for each step"),
            ({"ratios": ((1.0,), (1.0, 1.0))}, ValueError, "one positive number for each step"),
            ({"ratios": (1.0, 0.0)}, ValueError, "a ratio=0"),
            ({"ratios": (1.0, math.nan)}, ValueError, "a ratio=nan"),
            ({"ratios": (1.0, "1")}, TypeError, "a ratio must be a number"),
            ({"ratios": (1.0, (1.0,))}, TypeError, "a ratio must be a number"),
            ({"threshold": 0}, ValueError, "threshold=0"),
            ({"max_continuous_cached_steps": 0}, ValueError, "max_continuous_cached_steps=0"),
            ({"max_continuous_cached_steps": None}, TypeError, "max_continuous_cached_steps must be an int"),
            ({"retention_ratio": 1.5}, ValueError, "retention_ratio=1.5"),
            ({"retention_ratio": -0.5}, ValueError, "retention_ratio=-0.5"),
        ],
    )
    def test_wrong_values(self, given, error, match):
        with pytest.raises(error, match=match):
            MagnitudeRatio(**{"ratios": (1.0, 1.0), **given})


class TestBudget:
    @settings(max_examples=100)
    @given(
        steps=st.integers(2, 60),
        first=st.integers(0, 12),
        warm=st.none() | st.integers(1, 8),
        target=st.floats(1.05, 6.0),
        blocks=st.integers(1, 40),
        branches=st.integers(1, 3),
        kind=st.sampled_from(["even", "wild", "rising", "zero", "holes"]),
        seed=st.integers(0, 9999),
        data=st.data(),
    )
    def test_lands_on_its_target_or_as_near_as_it_can(
        self, steps, first, warm, target, blocks, branches, kind, seed, data
    ):
        assume(first < steps)
        skipped, random = data.draw(st.integers(1, blocks)), np.random.default_rng(seed)
        table = {
            "even": lambda: random.uniform(0.05, 0.1, (steps, steps)),
            "wild": lambda: np.exp(random.normal(0, 3, (steps, steps))),
            "rising": lambda: np.abs(np.arange(steps)[None, :] - np.arange(steps)[:, None]) * 0.1,
            "zero": lambda: np.zeros((steps, steps)),
            "holes": lambda: np.where(random.random((steps, steps)) < 0.3, np.nan, random.random((steps, steps))),
        }[kind]()
        total = steps - first
        exact = total * (1 - 1 / target) * blocks / skipped
        assume(not is_tie(exact) and not is_tie(exact + 0.5))
        wanted = nearest_by_hand(total, target, blocks, skipped)
        early = (total - wanted) // 6 if warm is None else warm
        most = max(0, total - max(1, early))  # the first step has nothing to reuse
        schedule, policy = Schedule(steps, first, None, blocks, skipped), Budget(target, warm)
        warm = max(1, early)
        adapted = policy.for_run(schedule)
        assert adapted.never_reuses == (most == 0)
        if most == 0:
            assert f"the run's steps are {total}, and max_warmup_steps is {warm}" in adapted.warning_at_start(schedule)
            return
        if exact > most + 0.5:
            reachable = speedup_by_hand(total, most, blocks, skipped)
            head = f"target_speedup={target:g} cannot be reached: with {skipped} of {blocks} blocks left out in at "
            told = adapted.warning_at_start(schedule)
            assert told.startswith(f"{head}most {most} of {total} steps it is {reachable:.3g}.")
            assert adapted.warning_at_end(reachable) is None
        else:
            assert adapted.warning_at_start(schedule) is None
        told = drive_all(policy, schedule, lambda n, t, s: float(table[s, t]), branches)
        here = {"warm": warm, "first": first, "blocks": blocks, "skipped": skipped, "branches": branches}
        by_hand = budget_by_hand(target, steps, lambda n, t, s: float(table[s, t]), **here)
        for mine, wanted_here in zip(told, by_hand, strict=True):
            assert_alike(mine, wanted_here)
        if kind != "holes":  # over all branches to the very call, as far as the warm-up leaves so many
            reused = sum(computed(each).count("0") for each in told)
            assert reused == min(nearest_by_hand(total * branches, target, blocks, skipped), most * branches)

    def test_reused_steps_are_those_that_change_least(self):
        """Every sixth step changes ten times as much as others: those are not among the half that is reused."""
        rates = np.where(np.arange(40) % 6 == 5, 1.0, 0.1)
        told = drive(Budget(2.0), Schedule(40), lambda t, s: float(rates[s + 1 : t + 1].sum()))
        assert computed(told).count("0") == 20
        assert not any(told[step][0] for step in range(5, 40, 6))

    @pytest.mark.parametrize(
        ("speedup", "said"), [(2.0, False), (1.905, False), (2.1, False), (1.89, True), (2.11, True), (1.0, True)]
    )
    def test_a_target_that_was_not_met_is_named(self, speedup, said):
        """By more than 5 % of 2."""
        message = Budget(2.0).warning_at_end(speedup)
        assert (message is not None) == said
        assert not said or message.startswith(f"target_speedup=2 was not met: {speedup:.3g} times fewer blocks ran")

    def test_has_to_know_the_number_of_steps(self):
        policy = Budget(2.0).for_run(Schedule())
        assert not any(policy.before(step, BranchHistory(refreshed=0), Schedule()).reuse for step in range(30))
        told = policy.warning_at_start(Schedule())
        assert told.startswith("Budget(2) needs the number of steps, which is not known, so every call is computed")
        assert "timestep_scope(step, steps=...)" in told

    @pytest.mark.parametrize("first", [12, 13, 40])
    def test_a_run_that_begins_beyond_its_end(self, first):
        schedule = Schedule(12, first, blocks=5, skipped=4)
        policy = Budget(2.0).for_run(schedule)
        assert not any(policy.before(step, BranchHistory(refreshed=0), schedule).reuse for step in range(first, 60))
        told = policy.warning_at_start(schedule)
        assert f"begins at step {first} of 12, at or beyond its end" in told
        assert "handle.request(scheduler=...)" in told

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"target_speedup": 1}, ValueError, "target_speedup=1 is out of range: it must be above 1"),
            ({"target_speedup": math.inf}, ValueError, "target_speedup=inf"),
            ({"target_speedup": "2x"}, TypeError, "target_speedup must be a number"),
            ({"max_warmup_steps": 0}, ValueError, "max_warmup_steps=0"),
            ({"reduce": "min"}, ValueError, "reduce='min'"),
            ({"separate_branches": None}, TypeError, "separate_branches"),
        ],
    )
    def test_wrong_values(self, given, error, match):
        with pytest.raises(error, match=match):
            Budget(**{"target_speedup": 2.0, **given})


LOOKING = [
    Threshold(0.2, max_warmup_steps=0),
    EasyCache(0.2, max_warmup_steps=2),
    Budget(2.0, 1),
    Mask((1, *[0] * 9), dynamic=Threshold(0.2, max_warmup_steps=0)),
]


@pytest.mark.parametrize("policy", LOOKING, ids=lambda policy: type(policy).__name__)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_computed(policy, value):
    schedule = Schedule(10)
    decision = policy.for_run(schedule).judge(4, BranchHistory(refreshed=2, computed=3, reused=1), schedule, value)
    assert (decision.reuse, decision.reason) == (False, "non-finite")
    assert decision.value == pytest.approx(value, nan_ok=True)
    track = BranchHistory(refreshed=2, drift=0.1, streak=1)
    fold(track, 4, decision)
    assert (track.rates, track.drift, track.streak) == ([], 0.0, 0)


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda **given: Threshold(0.1, **given), "max_warmup_steps"),
        (lambda **given: Threshold(0.1, **given), "warmup_interval"),
        (lambda **given: Threshold(0.1, **given), "last_steps_computed"),
        (lambda **given: EasyCache(0.1, **given), "max_warmup_steps"),
        (lambda **given: EasyCache(0.1, **given), "last_steps_computed"),
    ],
)
def test_a_count_that_is_none_is_refused_at_once_where_there_has_to_be_one(make, field):
    with pytest.raises(TypeError, match=f"{field} must be an int, not None"):
        make(**{field: None})
