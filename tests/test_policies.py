"""When: the decisions of every policy against plain loops that follow the formulas, alone and in whole runs."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from toys import Net, Pipe, latents, prompt

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Interval,
    MagnitudeRatio,
    Mask,
    Threshold,
    dit_cache,
    timestep_scope,
)
from dithooks.gauge import Change, Rate
from dithooks.policy.base import Account, Decision, Schedule, Track
from dithooks.policy.mask import resample

# --- what drives a policy ------------------------------------------------------------------------------------------


def drive(policy, schedule, measured=None, absent=(), number=0):
    """(reuse, reason, value) by step, of one branch; ``measured(step, refreshed)`` is what is seen."""
    policy, track, told = policy.for_run(schedule), Track(number), {}
    for step in range(schedule.first, schedule.steps):
        if step in absent:
            continue
        decision = policy.before(step, track, schedule)
        if track.refreshed is None and (decision is None or decision.reuse):
            decision = Decision(False, "no anchor")
        if decision is None:
            decision = policy.judge(step, track, schedule, measured(step, track.refreshed))
        track.note(step, decision)
        if not decision.reuse:
            track.refreshed = step
        told[step] = tuple(decision)
    return told


def drive_all(policy, schedule, see, branches):
    """The same of all branches of a run; ``see(branch, step, refreshed)``."""
    policy, account = policy.for_run(schedule), Account()
    tracks, told = [Track(n, account=account) for n in range(branches)], [{} for _ in range(branches)]
    for step in range(schedule.first, schedule.steps):
        for n, track in enumerate(tracks):
            account.branches = n + 1 if step == schedule.first else branches
            decision = policy.before(step, track, schedule)
            if track.refreshed is None and (decision is None or decision.reuse):
                decision = Decision(False, "no anchor")
            if decision is None:
                decision = policy.judge(step, track, schedule, see(n, step, track.refreshed))
            track.note(step, decision)
            if not decision.reuse:
                track.refreshed = None if decision.reason == "non-finite" else step
            told[n][step] = tuple(decision)
    return told


def computed(told):
    return "".join("0" if reuse else "1" for reuse, _, _ in told.values())


def matrix(seed, steps, low=0.0, high=0.3):
    """What would be seen at step t after a refresh at s: a number for each pair."""
    table = np.random.default_rng(seed).uniform(low, high, (steps, steps))
    return lambda step, refreshed: float(table[refreshed, step])


# --- the formulas, as plain loops ----------------------------------------------------------------------------------


def threshold_by_hand(
    limit,
    steps,
    see,
    *,
    warm=8,
    every=1,
    most=None,
    row=None,
    total=None,
    last=0,
    forced=None,
    repeat=False,
    first=0,
):
    told, refreshed, reused, streak, drift = {}, None, 0, 0, 0.0
    for t in range(first, steps):
        value = None
        if t < warm and t % every == 0:
            why = "warm-up"
        elif forced is not None and (t == forced or (repeat and t > 0 and t % forced == 0)):
            why = "forced"
        elif t >= steps - last:
            why = "end"
        elif (most is not None and reused >= most) or (row is not None and streak >= row):
            why = "cap"
        elif refreshed is None:
            why = "no anchor"
        else:
            value = see(t, refreshed)
            if not math.isfinite(value):
                why = "non-finite"
            elif value >= limit:
                why = "threshold"
            elif total is not None and drift + value > total:
                why = "accumulated"
            else:
                why = "reuse"
        if why == "reuse":
            reused, streak, drift = reused + 1, streak + 1, drift + value
        else:
            refreshed, streak, drift = t, 0, 0.0
        told[t] = (why == "reuse", why, value)
    return told


def easy_by_hand(limit, steps, see, *, warm=5, row=None, last=0, first=0):
    """``see(step, computed steps)``: a rate takes two of these."""
    told, done, streak, drift = {}, [], 0, 0.0
    for t in range(first, steps):
        value = None
        if t < warm:
            why = "warm-up"
        elif t >= steps - last:
            why = "end"
        elif row is not None and streak >= row:
            why = "cap"
        elif not done:
            why = "no anchor"
        else:
            value = see(t, done)
            why = "reuse" if drift + value < limit else "threshold"
        if why == "reuse":
            streak, drift = streak + 1, drift + value
        else:
            streak, drift = 0, 0.0
            done.append(t)
        told[t] = (why == "reuse", why, value)
    return told


def speedup_by_hand(calls, reused, blocks, skipped):
    return calls * blocks / max(calls * blocks - reused * skipped, 1)


def nearest_by_hand(calls, target, blocks, skipped):
    """Of the whole numbers beside C·(1 − 1/target)·N/n, the one that makes the nearer speed-up."""
    exact = min(calls * (1 - 1 / target) * blocks / skipped, calls)
    down, up = math.floor(exact), math.ceil(exact)
    far = [abs(math.log(speedup_by_hand(calls, r, blocks, skipped) / target)) for r in (down, up)]
    return down if far[0] <= far[1] else up


def budget_by_hand(target, steps, see, *, warm, first=0, blocks=1, skipped=1, branches=1):
    """What is told of each branch; ``see(branch, step, refreshed)`` is what is seen."""
    told = [{} for _ in range(branches)]
    refreshed, streak, rates = [None] * branches, [0] * branches, [[] for _ in range(branches)]
    calls = reused = 0
    for t in range(first, steps):
        for n in range(branches):
            known = n + 1 if t == first else branches
            left = (steps - t) * known - n
            lacking = nearest_by_hand(calls + left, target, blocks, skipped) - reused
            value = None
            if t < warm:
                why = "warm-up"
            elif lacking <= 0:
                why = "budget"
            elif refreshed[n] is None:
                why = "no anchor"
            elif lacking >= left:
                why = "reuse"
            elif not math.isfinite(value := see(n, t, refreshed[n])):
                why = "non-finite"
            else:
                rates[n].append(value / (t - refreshed[n]))
                gap = (lacking / known + streak[n]) / ((left - lacking) / known + 1)
                why = "reuse" if value < np.mean(rates[n][-3:]) * (gap + 1) else "threshold"
            calls += 1
            if why == "reuse":
                reused, streak[n] = reused + 1, streak[n] + 1
            else:
                refreshed[n], streak[n] = (None if why == "non-finite" else t), 0
            told[n][t] = (why == "reuse", why, value)
    return told


def assert_alike(got, wanted, rel=1e-9):
    """The same reasons at the same steps, and the same values as far as they are numbers."""
    assert {t: each[:2] for t, each in got.items()} == {t: each[:2] for t, each in wanted.items()}
    for t, (_, _, value) in wanted.items():
        if value is None:
            assert got[t][2] is None
        else:
            assert got[t][2] == pytest.approx(value, rel=rel, nan_ok=True)


# --- each policy by itself -----------------------------------------------------------------------------------------


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


def is_tie(place):
    return abs(place - math.floor(place) - 0.5) < 1e-4


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
        assert [tuple(policy.before(t, Track(refreshed=0), Schedule()))[:2] for t in range(5)] == [
            (False, "mask"),
            (True, "reuse"),
            (True, "reuse"),
            (False, "end"),
            (False, "end"),
        ]
        assert "nothing tells the number of steps" in policy.remark(Schedule())
        assert policy.remark(Schedule(3)) is None

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
        assert policy.gauge == "change"
        assert policy.judge(2, Track(refreshed=1), Schedule(10), 0.05).reuse
        shared = Mask((1, 0), dynamic=EasyCache(0.1, separate_branches=False, reduce="max"))
        assert (shared.gauge, shared.separate_branches, shared.reduce) == ("rate", False, "max")
        with pytest.raises(ValueError, match="cannot be reached"):
            Mask("ultra", dynamic=Budget(50.0)).for_run(Schedule(10))

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
        with pytest.raises(ValueError, match=r"Mask\('fast'\) is made for the number of steps, which nothing tells"):
            Mask("fast").for_run(Schedule())


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
        policy, track = Threshold(0.25, max_accumulated_diff=0.5), Track(refreshed=8, drift=0.375)
        assert policy.judge(9, track, Schedule(), 0.25).reason == "threshold"
        assert policy.judge(9, track, Schedule(), 0.125) == (True, "reuse", 0.125)
        assert policy.judge(9, track, Schedule(), 0.126).reason == "accumulated"

    def test_the_end_is_known_only_with_the_number_of_steps(self):
        policy = Threshold(0.2, 0, last_steps_computed=3)
        assert policy.before(9, Track(refreshed=8), Schedule(12)).reason == "end"
        assert policy.before(9, Track(refreshed=8), Schedule()) is None
        assert "last_steps_computed=3 does nothing" in policy.remark(Schedule())
        assert policy.remark(Schedule(12)) is None

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"residual_diff_threshold": 0}, ValueError, "residual_diff_threshold=0 is out of range"),
            ({"residual_diff_threshold": -1.0}, ValueError, "residual_diff_threshold=-1"),
            ({"residual_diff_threshold": math.nan}, ValueError, "residual_diff_threshold=nan"),
            ({"residual_diff_threshold": math.inf}, ValueError, "residual_diff_threshold=inf"),
            ({"residual_diff_threshold": "0.1"}, TypeError, "residual_diff_threshold must be a number"),
            ({"residual_diff_threshold": True}, TypeError, "residual_diff_threshold must be a number"),
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
            ({"reduce": "sum"}, ValueError, "reduce='sum': there are 'mean', 'max'"),
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


def ratios_of(seed, steps):
    return (1.0, *np.random.default_rng(seed).uniform(0.85, 1.1, steps - 1).tolist())


def magnitude_by_hand(ratios, limit, row, share, number=0, first=0):
    """By ‖Δ_t‖ itself: Πγ since s is ‖Δ_t‖/‖Δ_s‖."""
    steps = len(ratios)
    sizes = np.cumprod(ratios)
    told, refreshed, streak = {}, None, 0
    for t in range(first, steps):
        value = None
        if t < share * steps - 1e-9:
            why = "warm-up"
        elif streak >= row:
            why = "cap"
        elif refreshed is None:
            why = "no anchor"
        else:
            value = float(np.abs(1 - sizes[refreshed + 1 : t + 1] / sizes[refreshed]).sum())
            why = "reuse" if value < limit else "threshold"
        streak = streak + 1 if why == "reuse" else 0
        refreshed = refreshed if why == "reuse" else t
        told[t] = (why == "reuse", why, value)
    return told


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
        assert policy.before(4, Track(refreshed=3), Schedule()).reason == "reuse"
        assert policy.before(5, Track(refreshed=4), Schedule()).reason == "end"
        assert "the 5 ratios are taken as made for this run" in policy.remark(Schedule())

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
    def test_lands_on_its_target_or_refuses_it(self, steps, first, warm, target, blocks, branches, kind, seed, data):
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
        early = (total - wanted) // 6 if warm is None else warm - first
        most = max(0, total - max(1, early))  # the first step has nothing to reuse
        schedule, policy = Schedule(steps, first, None, blocks, skipped), Budget(target, warm)
        if exact > most + 0.5:
            reachable = speedup_by_hand(total, most, blocks, skipped)
            head = rf"target_speedup={target:g} cannot be reached: with {skipped} of {blocks} blocks left out in at "
            with pytest.raises(ValueError, match=head + rf"most {most} of {total} steps it is {reachable:.3g}\."):
                policy.for_run(schedule)
            return
        warm = first + max(1, early) if warm is None else warm
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
        message = Budget(2.0).review(speedup)
        assert (message is not None) == said
        assert not said or message.startswith(f"target_speedup=2 was not met: {speedup:.3g} times fewer blocks ran")

    def test_has_to_know_the_number_of_steps(self):
        with pytest.raises(ValueError, match=r"Budget\(2\) has to know the number of steps, which nothing tells"):
            Budget(2.0).for_run(Schedule())

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
    decision = policy.for_run(schedule).judge(4, Track(refreshed=2, computed=3, reused=1), schedule, value)
    assert (decision.reuse, decision.reason) == (False, "non-finite")
    assert decision.value == pytest.approx(value, nan_ok=True)
    track = Track(refreshed=2, drift=0.1, streak=1)
    track.note(4, decision)
    assert (track.rates, track.drift, track.streak) == ([], 0.0, 0)


# --- gauges ---------------------------------------------------------------------------------------------------------


def look(gauge, seen):
    return gauge.look([seen])


def note(gauge, seen, output):
    gauge.note([seen], None if output is None else [output])


def ratio_by_hand(now, before, how):
    now, before = now.double().numpy(), before.double().numpy()
    if how == "mean":
        return np.abs(now - before).mean() / np.abs(before).mean()
    return max(np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(now, before, strict=True))


def rate_by_hand(x, x_before, x_s, y_s, x_r, y_r, how):
    arrays = [each.double().numpy() for each in (x, x_before, x_s, y_s, x_r, y_r)]

    def rate(x, x_before, x_s, y_s, x_r, y_r):
        k = np.abs(y_s - y_r).mean() / np.abs(x_s - x_r).mean()
        return k * np.abs(x - x_before).mean() / np.abs(y_s).mean()

    return rate(*arrays) if how == "mean" else max(rate(*each) for each in zip(*arrays, strict=True))


SHAPES = [(3, 7, 5), (1, 4, 6), (2, 3, 4, 5, 6), (4, 9)]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestGauges:
    """The sums are of up to 720 numbers in float32: well within 1e-5."""

    def test_change(self, shape, dtype, how):
        gauge = Change(how)
        scale = torch.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))  # samples that differ
        one, two, three = (torch.randn(shape) for _ in range(3))
        one, two, three = (one * scale).to(dtype), (one * scale + 0.3 * two).to(dtype), (three * 2).to(dtype)
        assert look(gauge, one) is None
        note(gauge, one, one)
        seen = look(gauge, two)
        assert (seen.shape, seen.dtype) == ((), torch.float32)
        assert float(seen) == pytest.approx(ratio_by_hand(two, one, how), rel=1e-5)
        note(gauge, two, None)  # reused: the reference stays
        assert float(look(gauge, three)) == pytest.approx(ratio_by_hand(three, one, how), rel=1e-5)
        note(gauge, three, three)
        assert float(look(gauge, two)) == pytest.approx(ratio_by_hand(two, three, how), rel=1e-5)
        assert gauge.nbytes == three.numel() * three.element_size()
        gauge.clear()
        assert (look(gauge, two), gauge.nbytes) == (None, 0)

    def test_rate(self, shape, dtype, how):
        gauge = Rate(how)
        wide = (*shape[:-1], shape[-1] + 2)  # the output may have another form
        scale = torch.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
        x = [(torch.randn(shape) * scale).to(dtype) for _ in range(6)]
        y = [(torch.randn(wide) / scale).to(dtype) for _ in range(6)]
        note(gauge, x[0], y[0])
        assert look(gauge, x[1]) is None  # a rate takes two
        note(gauge, x[1], y[1])
        seen = look(gauge, x[2])
        assert (seen.shape, seen.dtype) == ((), torch.float32)
        assert float(seen) == pytest.approx(rate_by_hand(x[2], x[1], x[1], y[1], x[0], y[0], how), rel=1e-5)
        note(gauge, x[2], None)  # reused: from here the next change of the input is counted
        assert float(look(gauge, x[3])) == pytest.approx(
            rate_by_hand(x[3], x[2], x[1], y[1], x[0], y[0], how), rel=1e-5
        )
        note(gauge, x[3], None)
        note(gauge, x[4], y[4])
        assert float(look(gauge, x[5])) == pytest.approx(
            rate_by_hand(x[5], x[4], x[4], y[4], x[1], y[1], how), rel=1e-5
        )
        gauge.clear()
        assert (look(gauge, x[2]), gauge.nbytes) == (None, 0)
        note(gauge, x[2], y[2])
        assert look(gauge, x[3]) is None


class TestGaugesAtTheEdge:
    @pytest.mark.parametrize("how", ["mean", "max"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["now", "before"])
    def test_what_is_no_number_gives_none(self, how, bad, where):
        now, before = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        (now if where == "now" else before)[1, 2, 3] = bad
        gauge = Change(how)
        note(gauge, before, before)
        assert not math.isfinite(float(look(gauge, now)))

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_a_reference_of_zeros(self, how):
        gauge = Change(how)
        note(gauge, torch.zeros(2, 3), torch.zeros(2, 3))
        assert math.isnan(float(look(gauge, torch.zeros(2, 3))))
        assert math.isinf(float(look(gauge, torch.ones(2, 3))))
        note(gauge, torch.tensor([[0.0], [1.0]]), torch.ones(2, 1))
        assert math.isfinite(float(look(gauge, torch.ones(2, 1)))) == (how == "mean")

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_another_shape_is_not_compared(self, how):
        gauge, rate = Change(how), Rate(how)
        note(gauge, torch.ones(2, 3), torch.ones(2, 3))
        assert look(gauge, torch.ones(2, 4)) is None
        note(rate, torch.ones(2, 3), torch.ones(2, 3))
        note(rate, torch.rand(2, 3), torch.rand(2, 3))
        assert look(rate, torch.ones(2, 4)) is None
        assert look(rate, torch.ones(2, 3)) is not None

    def test_halves_are_summed_in_float32(self):
        """60 000 ones: in float16 or bfloat16 they would add up to 2048 or 256, or to infinity."""
        for dtype in (torch.float16, torch.bfloat16):
            gauge = Change("mean")
            before = torch.full((1, 60000), 8.0, dtype=dtype)
            note(gauge, before, before)
            assert float(look(gauge, before + 1)) == pytest.approx(1 / 8, rel=1e-6)

    def test_differences_are_taken_in_float32(self):
        """60000 − (−60000) is beyond float16."""
        gauge = Change("max")
        before = torch.tensor([[60000.0]], dtype=torch.float16)
        note(gauge, before, before)
        assert float(look(gauge, -before)) == 2

    def test_by_pieces(self, monkeypatch):
        monkeypatch.setattr("dithooks.gauge.PIECE", 10)
        now, before = torch.randn(3, 17), torch.randn(3, 17)
        for how in ("mean", "max"):
            gauge = Change(how)
            note(gauge, before, before)
            assert float(look(gauge, now)) == pytest.approx(ratio_by_hand(now, before, how), rel=1e-5)

    def test_an_input_that_stands_still_gives_no_rate(self):
        gauge, x = Rate("mean"), torch.randn(2, 3)
        note(gauge, x, torch.randn(2, 3))
        note(gauge, x, torch.randn(2, 3))
        assert not math.isfinite(float(look(gauge, x + 1)))


# --- in whole runs --------------------------------------------------------------------------------------------------


class Watched:
    """Runs a model by a walk of its inputs and sees what its blocks see, with hooks of its own.

    ``first`` is the first block of the range, which goes on to the end: a policy looks at ``effect``, what the blocks
    before it did (or ``input``, what enters block 0); ``output`` is the range's.
    """

    def __init__(self, kind="single", first=1, steps=16, batch=2, seed=0, pace=0.08):
        torch.manual_seed(seed)
        self.net, self.first, self.steps = Net(kind, depth=4), first, steps
        self.pipe, self.seen, self.key = Pipe(self.net), {}, None
        self.prompts = [prompt(batch), prompt(batch)] if kind == "swapped" else [None]
        walk = torch.cumsum(torch.randn(steps, batch, 6, 4) * pace * (1 + 3 * torch.rand(steps, 1, 1, 1)), 0)
        self.inputs = latents(batch) + walk
        self.net.embed.register_forward_hook(lambda _, args, out: self.note("input", out))
        if first:
            self.net.blocks[0].register_forward_pre_hook(self._before, with_kwargs=True)
            self.net.blocks[first - 1].register_forward_hook(self._after, with_kwargs=True)
        self.net.proj.register_forward_pre_hook(lambda _, args: self.note("output", args[0]))

    def note(self, what, value):
        self.seen[(what, *self.key)] = value.double().numpy().copy()

    def _before(self, _, args, kwargs):
        self.entered = (args[0] if args else kwargs["hidden_states"]).double()

    def _after(self, _, args, kwargs, output):
        picture = output[1] if isinstance(output, tuple) else output
        self.note("arrived", picture)
        self.note("effect", picture.double() - self.entered)

    def __call__(self, begin=0, absent=()):
        self.pipe.scheduler.set_timesteps(self.steps)
        self.pipe.scheduler.begin_index = begin
        self.seen.clear()
        for step in range(begin, self.steps):
            for number, e in enumerate(self.prompts):
                self.key = step, number
                if self.key not in absent:
                    given = {} if e is None else {"encoder_hidden_states": e}
                    self.net(self.inputs[step], timestep=self.pipe.scheduler.timesteps[step] / 1000, **given)
            self.pipe.scheduler.step()

    def told(self, policy, **call):
        """Decisions by branch, of the range from ``first`` on."""
        with dit_cache(self.pipe, DitCacheConfig(cache_block_start=self.first, policy=policy), verify=False) as cache:
            self(**call)
            told = {}
            for each in cache.decisions:
                told.setdefault(each.branch, {})[each.step] = (each.reuse, each.reason, each.value)
            assert cache.stats.reused_calls == sum(each.reuse for each in cache.decisions)
            assert cache.stats.reasons == {
                reason: sum(each.reason == reason for each in cache.decisions)
                for reason in {each.reason for each in cache.decisions}
            }
        return told

    def change(self, number=0, how="mean"):
        """What is to be seen at a step after a refresh at another."""
        what = "effect" if self.first else "input"

        def see(step, refreshed):
            now, before = self.seen[what, step, number], self.seen[what, refreshed, number]
            if how == "mean":
                return float(np.abs(now - before).mean() / np.abs(before).mean())
            return float(max(np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(now, before, strict=True)))

        return see

    def rate(self, number=0, how="mean"):
        """Expected change of a step, given the last two computed ones."""
        what = "arrived" if self.first else "input"

        def see(step, computed):
            s, r = computed[-1], computed[-2]
            x, y = (lambda t: self.seen[what, t, number]), (lambda t: self.seen["output", t, number])
            samples = [slice(None)] if how == "mean" else range(len(x(s)))
            return float(
                max(
                    np.abs(y(s)[n] - y(r)[n]).mean()
                    / np.abs(x(s)[n] - x(r)[n]).mean()
                    * np.abs(x(step)[n] - x(step - 1)[n]).mean()
                    / np.abs(y(s)[n]).mean()
                    for n in samples
                )
            )

        return see


def mixed(told, *reasons):
    """Nothing is shown by a run in which all went one way."""
    assert {"reuse", *reasons} <= {why for _, why, _ in told.values()}


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("how", ["mean", "max"])
class TestRunsThatLook:
    """Recomputed from what the model's blocks gave; in float32, a residual of 0.3 beside 1 has 1e-6 or so of noise."""

    LIMITS = {0: 0.25, 1: 0.16, 2: 0.16}  # noqa: RUF012

    def test_threshold(self, first, how):
        watched, limit = Watched(first=first), self.LIMITS[first]
        told = watched.told(Threshold(limit, 3, max_continuous_cached_steps=3, reduce=how))
        wanted = threshold_by_hand(limit, 16, watched.change(how=how), warm=3, row=3)
        mixed(wanted, "threshold", "warm-up")
        assert_alike(told[0], wanted, rel=1e-4)

    def test_threshold_with_branches_of_their_own(self, first, how):
        watched, limit = Watched("swapped", first), self.LIMITS[first]
        told = watched.told(Threshold(limit, 2, max_accumulated_diff=2.5 * limit, reduce=how))
        for number in (0, 1):
            wanted = threshold_by_hand(limit, 16, watched.change(number, how), warm=2, total=2.5 * limit)
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_budget(self, first, how):
        watched = Watched("swapped", first)
        told = watched.told(Budget(1.4, 2, reduce=how))
        see = [watched.change(number, how) for number in (0, 1)]
        here = {"blocks": 4, "skipped": 4 - first, "branches": 2}
        by_hand = budget_by_hand(1.4, 16, lambda n, t, s: see[n](t, s), warm=2, **here)
        for number, wanted in enumerate(by_hand):
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_easycache(self, first, how):
        watched = Watched("swapped", first)
        told = watched.told(EasyCache(0.5, 3, max_continuous_cached_steps=4, reduce=how))
        for number in (0, 1):
            wanted = easy_by_hand(0.5, 16, watched.rate(number, how), warm=3, row=4)
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_mask_with_a_threshold(self, first, how):
        watched, limit = Watched(first=first), self.LIMITS[first]
        bits = (1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)
        told = watched.told(Mask(bits, dynamic=Threshold(limit, 0, reduce=how)))[0]
        see, refreshed, wanted = watched.change(how=how), None, {}
        for t, bit in enumerate(bits):
            value = None if bit else see(t, refreshed)
            why = "mask" if bit else "reuse" if value < limit else "threshold"
            refreshed = refreshed if why == "reuse" else t
            wanted[t] = (why == "reuse", why, value)
        mixed(wanted, "threshold", "mask")
        assert_alike(told, wanted, rel=1e-4)


class TestSharedDecisions:
    @pytest.mark.parametrize(
        "policy",
        [
            Threshold(0.1, 2, max_continuous_cached_steps=3, separate_branches=False),
            Threshold(0.1, 2, max_accumulated_diff=0.15, last_steps_computed=2, separate_branches=False),
            Threshold(0.1, 2, max_cached_steps=4, separate_branches=False),
            Budget(1.5, 2, separate_branches=False),
            EasyCache(0.5, 3, separate_branches=False),
            Mask((1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0), dynamic=Threshold(0.1, 0, separate_branches=False)),
        ],
        ids=str,
    )
    def test_the_first_branch_decides_for_both(self, policy):
        watched = Watched("swapped")
        told = watched.told(policy)
        mixed(told[0])
        assert {t: each[:2] for t, each in told[0].items()} == {t: each[:2] for t, each in told[1].items()}
        assert {value for _, _, value in told[1].values()} == {None}

        def alone(policy):
            watched = Watched("swapped")
            watched.prompts = watched.prompts[:1]
            return watched.told(policy)[0]

        assert_alike(told[0], alone(policy), rel=1e-6)

    def test_branches_of_their_own_differ_here(self):
        """… so that the test above can fail."""
        told = Watched("swapped").told(Threshold(0.1, 2, max_continuous_cached_steps=3))
        assert computed(told[0]) != computed(told[1])

    def test_lands_on_the_budget_in_both(self):
        told = Watched("swapped", steps=20).told(Budget(1.5, 2, separate_branches=False))
        assert [computed(each).count("0") for each in told.values()] == [9, 9]  # 20·(1 − 1/1.5)·4/3 = 8.9


class TestSteppedRuns:
    def test_budget_of_a_run_that_begins_later(self):
        watched = Watched("swapped", steps=20)
        told = watched.told(Budget(1.5, 2), begin=6)
        see = [watched.change(number) for number in (0, 1)]
        here = {"warm": 2, "first": 6, "blocks": 4, "skipped": 3, "branches": 2}
        by_hand = budget_by_hand(1.5, 20, lambda n, t, s: see[n](t, s), **here)
        for number, wanted in enumerate(by_hand):
            assert list(wanted) == list(range(6, 20))
            mixed(wanted, "threshold", "no anchor")
            assert_alike(told[number], wanted, rel=1e-4)
        assert sum(computed(each).count("0") for each in told.values()) == 12  # 28·(1 − 1/1.5)·4/3 = 12.4

    @settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.integers(6, 20),
        begin=st.integers(0, 4),
        target=st.floats(1.1, 8.0),
        seed=st.integers(0, 99),
        kind=st.sampled_from(["single", "swapped"]),
    )
    @pytest.mark.filterwarnings("ignore:.*was not met.*", "ignore:.*reused nothing.*")
    @pytest.mark.filterwarnings("ignore:.*nothing will be reused.*")
    def test_budget_by_block_executions(self, steps, begin, target, seed, kind):
        watched = Watched(kind, first=0, steps=steps, seed=seed, pace=0.3)
        total, calls = steps - begin, len(watched.prompts)
        wanted = total * (1 - 1 / target)
        assume(not any(is_tie(wanted + n / 4) for n in range(4)))
        if wanted > total - max(1, (total - nearest_by_hand(total, target, 4, 4)) // 6) + 0.5:
            with pytest.raises(ValueError, match=f"target_speedup={target:g} cannot be reached"):
                watched.told(Budget(target), begin=begin)
            return
        with torch.no_grad():
            told = watched.told(Budget(target), begin=begin)
        assert len(told) == calls
        reused = sum(computed(each).count("0") for each in told.values())
        assert reused == min(nearest_by_hand(total * calls, target, 4, 4), (total - 1) * calls)

    def test_other_policies_of_a_run_that_begins_later(self):
        watched = Watched(steps=16)
        told = watched.told(Threshold(0.1, 6), begin=8)[0]
        wanted = threshold_by_hand(0.1, 16, watched.change(), warm=6, first=8)
        mixed(wanted, "no anchor", "threshold")
        assert_alike(told, wanted, rel=1e-4)
        ratios = ratios_of(3, 16)
        told = watched.told(MagnitudeRatio(ratios, 0.2), begin=8)[0]
        wanted = magnitude_by_hand(ratios, 0.2, 4, 0.2, first=8)
        mixed(wanted, "no anchor")
        assert_alike(told, wanted)

    def test_schedules_and_masks(self):
        watched = Watched("swapped", first=0, steps=12)
        for policy in (Interval(2, 3), Mask("medium"), Mask((1, 0, 0, 1, 0, 0)), MagnitudeRatio(ratios_of(4, 8), 0.2)):
            told = watched.told(policy)
            mixed(told[0])
            for number in (0, 1):
                assert_alike(told[number], drive(policy, Schedule(12), number=number))

    def test_a_mask_is_resampled_by_the_schedulers_noise_levels(self):
        """The toy's σ fall evenly from 1, a step 1/12; the mask was made for 4 steps at σ = 1, 0.9, 0.8, 0.4."""
        watched = Watched(first=0, steps=12)
        told = watched.told(Mask((1, 1, 1, 0), (1.0, 0.9, 0.8, 0.4)))[0]
        # K' = 9: j·3/9 → q = 0, ⅓, ⅔, 1, 1⅓, 1⅔, 2, 2⅔, 3⅓; the 12 steps' places: 0, .83, 1.67, 2.13, 2.33, 2.54, 2.75,
        # 2.96, 3.17, 3.38, 3.58, 3.79. Nearest: 0, 0→1, 1→2, 1→3, 2→4, 2→5, 3→6, 6→7, 9 (3.38)
        assert computed(told) == "111111110100"

    def test_two_runs_are_judged_alike(self):
        watched = Watched()
        policy = Threshold(0.1, 3, max_cached_steps=5)
        with dit_cache(watched.pipe, DitCacheConfig(cache_block_start=1, policy=policy)) as cache:
            watched(), watched()
            runs = [[each[2:] for each in cache.decisions if each.run == number] for number in (0, 1)]
        assert runs[0] == runs[1]
        assert any(each.reuse for each in cache.decisions)


class TestNoNumbers:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize(
        "policy",
        [Threshold(5.0, 2), EasyCache(50.0, 2), Budget(1.2, 2), Mask((1, 1, *[0] * 10), dynamic=Threshold(5.0, 0))],
        ids=lambda policy: type(policy).__name__,
    )
    def test_in_the_input_mean_compute(self, policy, first, bad):
        """At step 5 alone: it is computed, and nothing of it is kept, so that the next is computed, too."""
        watched = Watched(first=first, steps=12)
        if isinstance(policy, Threshold | Mask | EasyCache):
            assert watched.told(policy)[0][5][:2] == (True, "reuse")
        watched.inputs[5, 0, 2, 1] = bad
        told = watched.told(policy)[0]
        assert told[5][:2] == (False, "non-finite")
        assert not math.isfinite(told[5][2])
        assert told[6][:2] == (False, "no anchor")
        later = [told[t][1] for t in range(7, 12)]
        assert "non-finite" not in later
        assert "reuse" in later

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_sample_of_a_batch_is_enough(self, bad):
        for how in ("mean", "max"):
            watched = Watched(first=0, steps=12, batch=3)
            watched.inputs[6, 2] = bad
            assert watched.told(Threshold(5.0, 2, reduce=how))[0][6][:2] == (False, "non-finite")


class TestReduce:
    def test_one_sample_that_moves_counts_for_the_batch_only_by_max(self):
        watched = Watched(first=0, steps=10, batch=8, pace=0.01)
        watched.inputs[5:, 3] += 1.0
        by = {how: watched.told(Threshold(0.35, 2, reduce=how))[0] for how in ("mean", "max")}
        assert by["max"][5][:2] == (False, "threshold")
        assert by["mean"][5][:2] == (True, "reuse")
        assert by["max"][5][2] > 3 * by["mean"][5][2]


class TestWhatIsSaid:
    def test_a_threshold_never_reached_is_named_with_numbers(self):
        watched = Watched(steps=8)
        with pytest.warns(UserWarning, match="reused nothing") as said:
            told = watched.told(Threshold(1e-6, 2))[0]
        least = min(value for _, _, value in told.values() if value is not None)
        text = str(said[0].message)
        assert f"the smallest difference seen was {least:.3g}, residual_diff_threshold is 1e-06" in text
        assert "(calls computed for warm-up: 2, threshold: 6)" in text

    def test_warm_up_to_the_end(self):
        with pytest.warns(UserWarning, match="nothing will be reused in a run of 8 steps: warm-up: 8"):
            Watched(steps=8).told(Threshold(0.5, 8))

    def test_without_the_number_of_steps(self):
        net, x = Net(), latents()
        for policy in (Budget(2.0), Mask("fast")):
            with (
                dit_cache(net, DitCacheConfig(policy=policy)),
                pytest.raises(ValueError, match=r"or write timestep_scope\(step, steps=...\)"),
            ):
                net(x, torch.tensor(0.5))
        with (
            pytest.warns(UserWarning, match="nothing tells the number of steps"),
            dit_cache(net, DitCacheConfig(policy=Mask((1, 0, 1)))),
        ):
            net(x, torch.tensor(0.5))

    def test_scopes_tell_it(self):
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(policy=Budget(2.0, 1))) as cache:
            for step in range(10):
                with timestep_scope(step, steps=10):
                    x = x - 0.1 * net(x, torch.tensor(1 - step / 10))
            assert cache.stats.reused_calls == 5
