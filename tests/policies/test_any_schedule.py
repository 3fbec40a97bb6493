"""Whatever the schedule of a run, no policy raises in the middle of it, and none reuses what was never computed."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks import Budget, EasyCache, Interval, MagnitudeRatio, Mask, Threshold, Uncached
from dithooks.policies.history import BranchHistory, Decision, RunHistory, Schedule
from dithooks.stats.log import fold

VALUES = st.sampled_from([0.0, 1e-300, 1e300, math.nan, math.inf]) | st.floats(0, 0.5)
POLICIES = {
    "Interval": st.builds(Interval, st.integers(0, 5), st.integers(1, 5)),
    "Mask": st.sampled_from(["slow", "medium", "fast", "ultra"]).map(Mask)
    | st.lists(st.integers(0, 1), max_size=12).map(lambda bits: Mask((1, *bits)))
    | st.integers(1, 12).map(lambda n: Mask((1, *[0] * (n - 1)), [1 - k / n for k in range(n)])),
    "Mask and Threshold": st.integers(1, 9).map(lambda n: Mask((1, *[0] * n), dynamic=Threshold(0.2, n // 2))),
    "Mask and Budget": st.floats(1.1, 9).map(lambda target: Mask("fast", dynamic=Budget(target))),
    "Threshold": st.builds(Threshold, st.just(0.2), st.integers(0, 9), last_steps_computed=st.integers(0, 40)),
    "EasyCache": st.builds(EasyCache, st.just(0.2), st.integers(2, 9), last_steps_computed=st.integers(0, 40)),
    "Budget": st.builds(Budget, st.floats(1.001, 1e6), st.none() | st.integers(1, 40)),
    "MagnitudeRatio": st.lists(st.sampled_from([1e-300, 1e-30, 0.9, 1.1, 1e300]), max_size=12).map(
        lambda ratios: MagnitudeRatio((1.0, *ratios), retention_ratio=0.0)
    ),
    "Uncached": st.just(Uncached()),
}


@st.composite
def schedules(draw):
    """Of 0 … 30 steps or of an unknown number; it may begin beyond its end, and leave out no block, one, or all."""
    steps = draw(st.none() | st.integers(0, 30))
    first = draw(st.integers(0, 3 if steps is None else steps + 2))
    blocks = draw(st.sampled_from([0, 1, 2, 57]))
    skipped = draw(st.sampled_from([0, min(1, blocks), blocks]))
    level = draw(st.sampled_from([None, lambda n: 1 / (n + 1), lambda n: 1.0, lambda n: math.inf, lambda n: -n]))
    sigmas = None if steps is None or level is None else tuple(level(n) for n in range(steps))
    return Schedule(steps, first, sigmas, blocks, skipped)


@pytest.mark.parametrize("kind", POLICIES)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_run_is_walked_to_beyond_its_end(kind, data):
    """As the engine does, which has nothing to reuse before the first computed call of a branch."""
    policy, schedule = data.draw(POLICIES[kind]), data.draw(schedules())
    branches, values = data.draw(st.integers(1, 3)), data.draw(st.lists(VALUES, min_size=1, max_size=9))
    adapted, drawn, run = policy.for_run(schedule), itertools.cycle(values), RunHistory(branches=branches)
    told, tracks = [adapted.warning_at_start(schedule)], [BranchHistory(n, run=run) for n in range(branches)]
    last = max(schedule.steps or 0, schedule.first) + 3
    for step in range(schedule.first, last):
        for track in tracks:
            decision = adapted.before(step, track, schedule)
            if track.refreshed is None and (decision is None or decision.reuse):
                decision = Decision(False, "no anchor")
            if decision is None:
                decision = adapted.judge(step, track, schedule, next(drawn))
            assert isinstance(decision.reuse, bool)
            assert not decision.reuse or track.computed
            fold(track, step, decision)
            if not decision.reuse:
                track.refreshed = step if adapted.keeps(step, 1) else None
            adapted.outdated(step + 2, track, 2, 1)
            assert not (adapted.never_reuses and decision.reuse)
    told.append(adapted.warning_at_end(1.0))
    assert all(each is None or each for each in told)


@settings(max_examples=200, deadline=None)
@given(policy=POLICIES["Budget"] | POLICIES["EasyCache"], schedule=schedules())
def test_what_counts_from_a_run_s_first_step_computes_it_by_itself(policy, schedule):
    """Even if there seems to be something to reuse."""
    decision = policy.for_run(schedule).before(schedule.first, BranchHistory(refreshed=schedule.first), schedule)
    assert decision is not None
    assert not decision.reuse
