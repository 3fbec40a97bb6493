"""Every policy by plain loops that follow its formula, in float64, and what drives one without a model."""

import math

import numpy as np
import pytest

from dithooks.policies.history import BranchHistory, Decision, RunHistory
from dithooks.stats.log import fold

# --- what drives a policy ------------------------------------------------------------------------------------------


def drive(policy, schedule, measured=None, absent=(), number=0):
    """(reuse, reason, value) by step, of one branch; ``measured(step, refreshed)`` is what is seen."""
    policy, track, told = policy.for_run(schedule), BranchHistory(number), {}
    for step in range(schedule.first, schedule.steps):
        if step in absent:
            continue
        decision = policy.before(step, track, schedule)
        if track.refreshed is None and (decision is None or decision.reuse):
            decision = Decision(False, "no anchor")
        if decision is None:
            decision = policy.judge(step, track, schedule, measured(step, track.refreshed))
        fold(track, step, decision)
        if not decision.reuse:
            track.refreshed = step
        told[step] = tuple(decision)
    return told


def drive_all(policy, schedule, see, branches):
    """The same of all branches of a run; ``see(branch, step, refreshed)``."""
    policy, account = policy.for_run(schedule), RunHistory()
    tracks, told = [BranchHistory(n, run=account) for n in range(branches)], [{} for _ in range(branches)]
    for step in range(schedule.first, schedule.steps):
        for n, track in enumerate(tracks):
            account.branches = n + 1 if step == schedule.first else branches
            decision = policy.before(step, track, schedule)
            if track.refreshed is None and (decision is None or decision.reuse):
                decision = Decision(False, "no anchor")
            if decision is None:
                decision = policy.judge(step, track, schedule, see(n, step, track.refreshed))
            fold(track, step, decision)
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
        if t - first < warm and (t - first) % every == 0:
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
        if t - first < warm:
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
            if t - first < warm:
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


def is_tie(place):
    return abs(place - math.floor(place) - 0.5) < 1e-4


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
