"""Schedules with steps of one branch alone: the dynamic programme against every schedule there is, priced by hand."""

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks.errors import InvalidSetting
from dithooks.planning.conditional_schedules import ConditionalSchedules
from dithooks.planning.schedule_solver import Schedules
from dithooks.planning.weight_fit import fit
from dithooks.predictors.predictor import Moment

pytestmark = pytest.mark.filterwarnings("error")


def drawn(seed, steps, width=6):
    """Outputs (T, n) and what guidance adds to them, which drift; times that fall unevenly; what an error counts."""
    rng = np.random.default_rng(seed)
    outputs, apart = (np.cumsum(rng.normal(size=(steps, width)), axis=0) for _ in range(2))
    times = np.sort(rng.uniform(0.01, 1, steps))[::-1].copy()
    return outputs, times, rng.uniform(0.2, 2, steps), apart


def squares(apart):
    return ((apart[:, None] - apart[None]) ** 2).sum(2)


def every_schedule(steps):
    """0: reused, 1: computed, 2: one branch alone; the first step is computed."""
    return [(1, *rest) for rest in itertools.product((0, 1, 2), repeat=steps - 1)]


def price(outputs, times, worth, apart, kinds, anchors, ridge, gamma, carries=True):
    """Each stretch of reused steps by the norm of its errors' sum, and each step of one branch by what it holds, there
    and, if it carries on, at the reused steps after it."""
    bits = [int(kind > 0) for kind in kinds]
    moments = [Moment(step, float(t)) for step, t in enumerate(times)]
    weights = fit(outputs @ outputs.T, moments, bits, anchors, ridge).coefficients
    total, error, computed, whole = 0.0, np.zeros(outputs.shape[1]), [], 0
    for step, kind in enumerate(kinds):
        if kind:
            total, error = total + np.linalg.norm(error) ** gamma, 0 * error
            computed.insert(0, step)
            if kind == 1:
                whole = step
            else:
                following = next((each for each in range(step + 1, len(kinds)) if kinds[each]), len(kinds))
                reach = sum(worth[step:following]) if carries else worth[step]
                total += np.linalg.norm(reach * (apart[step] - apart[whole])) ** gamma
        else:
            forecast = sum(w * outputs[b] for w, b in zip(weights[step], computed, strict=False))
            error = error + worth[step] * (forecast - outputs[step])
    return total + np.linalg.norm(error) ** gamma


def cost_of(kinds, share):
    return kinds.count(1) + share * kinds.count(2)


def check_all(seed, steps, anchors, ridge, gamma, share, carries=True):
    outputs, times, worth, apart = drawn(seed, steps)
    every = every_schedule(steps)
    by_hand = [price(outputs, times, worth, apart, kinds, anchors, ridge, gamma, carries) for kinds in every]
    small = 1e-9 * max(by_hand)
    gram = outputs @ outputs.T
    solved = ConditionalSchedules(gram, times, worth, squares(apart), anchors, share, ridge, gamma, carries)
    costs = [cost_of(kinds, share) for kinds in every]
    found = solved.errors()
    for cost in sorted(set(costs)):
        key = min(found, key=lambda each: abs(each - cost))
        least = min(error for error, own in zip(by_hand, costs, strict=True) if abs(own - cost) < 1e-9)
        np.testing.assert_allclose(found[key], least, rtol=1e-7, atol=small)
        best = solved.best(cost)
        at_most = min(error for error, own in zip(by_hand, costs, strict=True) if own <= cost + 1e-9)
        np.testing.assert_allclose(best.error, at_most, rtol=1e-7, atol=small)
        kinds = [bit + half for bit, half in zip(best.computed, best.conditional, strict=True)]
        assert (len(kinds), kinds[0]) == (steps, 1)
        assert best.cost == pytest.approx(cost_of(kinds, share))
        assert best.cost <= cost + 1e-9
        own = price(outputs, times, worth, apart, kinds, anchors, ridge, gamma, carries)
        np.testing.assert_allclose(best.error, own, rtol=1e-7, atol=small)
    assert len(found) == len({round(cost, 6) for cost in costs})


class TestAgainstAllSchedules:
    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 2**20),
        steps=st.integers(1, 5),
        anchors=st.integers(1, 3),
        ridge=st.sampled_from([0.0, 1e-3, 0.5]),
        gamma=st.sampled_from([2.0, 4.0]),
        share=st.sampled_from([0.5, 1 / 3, 0.75]),
        carries=st.booleans(),
    )
    def test_small_ones(self, seed, steps, anchors, ridge, gamma, share, carries):
        check_all(seed, steps, anchors, ridge, gamma, share, carries)

    @pytest.mark.parametrize("carries", [True, False])
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_eight_steps(self, anchors, carries):
        check_all(anchors, 8, anchors, 1e-3, 2.0, 0.5, carries)

    def test_one_schedule(self):
        outputs, times, worth, apart = drawn(9, 6)
        solved = ConditionalSchedules(outputs @ outputs.T, times, worth, squares(apart))
        for kinds in every_schedule(6)[::7]:
            bits, halves = [int(kind > 0) for kind in kinds], [int(kind == 2) for kind in kinds]
            own = price(outputs, times, worth, apart, kinds, 2, 1e-3, 2.0)
            assert solved.error(bits, halves) == pytest.approx(own, rel=1e-7, abs=1e-9)


def test_where_holding_costs_too_much_schedules_are_those_without():
    outputs, times, worth, apart = drawn(5, 12)
    gram = outputs @ outputs.T
    far = ConditionalSchedules(gram, times, worth, squares(1e6 * apart))
    plain = Schedules(gram[None], times, worth[None], gamma=2.0)
    costs = plain.costs()[0]
    for count in range(1, 13):
        assert far.best(count).conditional == (0,) * 12
        assert far.best(count).error == pytest.approx(costs[1 : count + 1].min(), rel=1e-9)


@pytest.mark.parametrize(("steps", "anchors"), [(50, 2), (30, 3)])
def test_long_runs_take_seconds(steps, anchors):
    outputs, times, worth, apart = drawn(1, steps)
    begun = time.perf_counter()
    solved = ConditionalSchedules(outputs @ outputs.T, times, worth, squares(0.1 * apart), anchors)
    best = solved.best(steps / 3)
    assert time.perf_counter() - begun < 15
    assert sum(best.conditional) > 0
    assert best.error == pytest.approx(solved.error(best.computed, best.conditional), rel=1e-9)


class TestSettings:
    def test_what_is_refused(self):
        outputs, times, worth, apart = drawn(1, 48)
        gram, far = outputs @ outputs.T, squares(apart)
        for make, why in (
            (lambda: ConditionalSchedules(gram, times, worth, far, 3, share=1 / 8), "48 steps with anchors=3"),
            (lambda: ConditionalSchedules(gram, times, worth, far, share=0.3), "share=0.3 should be"),
            (lambda: ConditionalSchedules(gram, times, worth, far, share=1.0), "share=1.0 should be"),
            (lambda: ConditionalSchedules(gram, times, worth, far[:3]), "apart is of shape"),
            (lambda: ConditionalSchedules(gram, times, worth, far).best(0.5), "the least cost is 1"),
            (lambda: ConditionalSchedules(gram, times, worth, far).error([1] * 48, [1] * 48), "not at the first"),
            (lambda: ConditionalSchedules(gram, times, worth, far).error([1] + [0] * 47, [0, 1] + [0] * 46), "only"),
        ):
            with pytest.raises(InvalidSetting, match=why) as caught:
                make()
            assert len(str(caught.value)) <= 300
