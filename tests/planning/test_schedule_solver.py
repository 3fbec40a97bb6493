"""Schedules: the dynamic programme against every schedule there is, priced from the residuals themselves."""

import itertools
import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks.planning.schedule_solver import Schedules, forecast_weights
from dithooks.planning.weight_fit import fit
from dithooks.predictors.predictor import Moment

pytestmark = pytest.mark.filterwarnings("error")


def drawn(seed, ranges, steps, width=7):
    """Residuals (R, T, n) that drift from step to step, times that fall unevenly, and what an error counts."""
    rng = np.random.default_rng(seed)
    residuals = np.cumsum(rng.normal(size=(ranges, steps, width)), axis=1) + rng.normal(size=(ranges, 1, width))
    times = np.sort(rng.uniform(0.01, 1, steps))[::-1].copy()
    return residuals, times, rng.uniform(0.2, 2, (ranges, steps)) * rng.choice([-1, 1], size=(ranges, 1))


def grams_of(residuals):
    return residuals @ residuals.transpose(0, 2, 1)


def schedules(steps):
    return [(1, *rest) for rest in itertools.product((0, 1), repeat=steps - 1)]


def price(residuals, times, worth, bits, anchors, ridge, gamma):
    """Of one schedule of one range: each stretch of reused steps by the norm of its errors' sum, as vectors."""
    moments = [Moment(step, float(t)) for step, t in enumerate(times)]
    weights = fit(residuals @ residuals.T, moments, bits, anchors, ridge).coefficients
    total, error, computed = 0.0, np.zeros(residuals.shape[1]), []
    for step, bit in enumerate(bits):
        if bit:
            total, error = total + np.linalg.norm(error) ** gamma, 0 * error
            computed.insert(0, step)
        else:
            forecast = sum(w * residuals[b] for w, b in zip(weights[step], computed, strict=False))
            error = error + worth[step] * (forecast - residuals[step])
    return total + np.linalg.norm(error) ** gamma


def check_all(seed, ranges, steps, anchors, ridge, gamma, width=7):
    residuals, times, worth = drawn(seed, ranges, steps, width)
    grams = grams_of(residuals)
    every = schedules(steps)
    given = {"anchors": anchors, "ridge": ridge, "gamma": gamma}
    solved = Schedules(grams, times, worth, **given)
    costs = solved.costs()
    assert costs.shape == (ranges, steps + 1)
    assert np.isinf(costs[:, 0]).all()
    small = 1e-9 * float(np.abs(worth).sum() * np.abs(residuals).max() * width) ** gamma
    by_hand = np.array([[price(*one, bits, anchors, ridge, gamma) for bits in every]
                        for one in zip(residuals, [times] * ranges, worth, strict=True)])  # fmt: skip
    np.testing.assert_allclose(np.stack([solved.cost(bits) for bits in every], 1), by_hand, rtol=1e-7, atol=small)
    for k in range(1, steps + 1):
        those = [number for number, bits in enumerate(every) if sum(bits) == k]
        np.testing.assert_allclose(costs[:, k], by_hand[:, those].min(1), rtol=1e-7, atol=small)
        for number in range(ranges):
            one = Schedules(grams[[number]], times, worth[[number]], **given)
            best = one.best(k)
            assert (len(best), sum(best), best[0]) == (steps, k, 1)
            np.testing.assert_allclose(one.cost(best)[0], costs[number, k], rtol=1e-9, atol=small)
    np.testing.assert_array_equal(solved.costs(most=2), costs[:, :3])


class TestAgainstAllSchedules:
    @settings(deadline=None, max_examples=40)
    @given(
        seed=st.integers(0, 2**20),
        ranges=st.integers(1, 3),
        steps=st.integers(1, 6),
        anchors=st.integers(1, 3),
        ridge=st.sampled_from([0.0, 1e-3, 0.5]),
        gamma=st.sampled_from([1.0, 2.0, 4.0, 6.0]),
    )
    def test_small_ones(self, seed, ranges, steps, anchors, ridge, gamma):
        check_all(seed, ranges, steps, anchors, ridge, gamma)

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_nine_steps(self, anchors):
        check_all(anchors, 2, 9, anchors, 1e-3, 4.0)

    @pytest.mark.parametrize("width", [1, 2, 3])
    def test_fewer_directions_than_anchors(self, width):
        """Forecasts may be exact then, and with a ridge they are not quite."""
        for seed in range(5):
            check_all(seed, 2, 6, 3, 1e-3, 2.0, width)

    def test_ranges_are_told_apart(self):
        residuals, times, worth = drawn(3, 5, 12)
        together = Schedules(grams_of(residuals), times, worth).costs()
        for number, one in enumerate(residuals):
            alone = Schedules(grams_of(one[None]), times, worth[[number]]).costs()
            np.testing.assert_allclose(together[[number]], alone, rtol=1e-9, atol=1e-12)


class TestForecasts:
    @pytest.mark.parametrize("ridge", [0.0, 1e-3, 1.0])
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_those_of_fit(self, anchors, ridge):
        residuals, times, _ = drawn(anchors, 3, 10)
        grams, moments = grams_of(residuals), [Moment(step, float(t)) for step, t in enumerate(times)]
        ways = list(itertools.combinations(range(5, -1, -1), anchors))
        got = forecast_weights(grams, times, np.array(ways), 6, ridge)
        for (number, gram), (place, way) in itertools.product(enumerate(grams), enumerate(ways)):
            bits = [int(step in (0, *way)) for step in range(10)]
            wanted = fit(gram, moments, bits, anchors, ridge).coefficients[6:]
            np.testing.assert_allclose(got[number, place].T, wanted, rtol=1e-9, atol=1e-9)

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_parallel_residuals_without_ridge(self, anchors):
        """Of all weights that are as good, the smallest, as least squares has it. Whole numbers: exactly parallel."""
        sizes = np.array([3.0, 1.0, 2.0, 5.0, 4.0, 7.0])
        gram, times = 13.0 * np.outer(sizes, sizes), np.linspace(1, 0.1, 6)
        got = forecast_weights(gram[None], times, np.array([range(anchors - 1, -1, -1)]), anchors, 0.0)[0, 0]
        own = sizes[anchors - 1 :: -1] if anchors > 1 else sizes[:1]
        np.testing.assert_allclose(got, np.outer(own, sizes[anchors:]) / (own @ own), rtol=1e-9)
        moments = [Moment(step, float(t)) for step, t in enumerate(times)]
        bits = [int(step < anchors) for step in range(6)]
        np.testing.assert_allclose(got.T, fit(gram, moments, bits, anchors, 0.0).coefficients[anchors:], rtol=1e-9)

    def test_two_parallel_of_three(self):
        """Δ₂ = 2·Δ₁, and Δ₀ apart: what they span is reached."""
        residuals = np.array([[1.0, 0, 2], [0, 3, 1], [0, 6, 2], [2, 9, 7], [5, 5, 5]])
        gram = residuals @ residuals.T
        (weights,) = forecast_weights(gram[None], np.linspace(1, 0.2, 5), np.array([[2, 1, 0]]), 3, 0.0)[0].transpose(
            0, 2, 1
        )
        np.testing.assert_allclose(weights[0] @ residuals[[2, 1, 0]], residuals[3], rtol=1e-9)
        reached = np.linalg.lstsq(residuals[[1, 0]].T, residuals[4], rcond=None)[0] @ residuals[[1, 0]]
        np.testing.assert_allclose(weights[1] @ residuals[[2, 1, 0]], reached, rtol=1e-9)

    @pytest.mark.parametrize("ridge", [0.0, 1e-3])
    @pytest.mark.parametrize(
        ("anchors", "wanted"), [(1, [[1, 1]]), (2, [[1.5, 2], [-0.5, -1]]), (3, [[1.5, 2], [-0.5, -1], [0, 0]])]
    )
    def test_where_nothing_happens_it_is_the_line(self, anchors, wanted, ridge):
        times = np.array([1.0, 0.8, 0.6, 0.5, 0.4])
        got = forecast_weights(np.zeros((1, 5, 5)), times, np.array([[2, 1, 0][:anchors]]), 3, ridge)
        np.testing.assert_allclose(got[0, 0], wanted, atol=1e-12)

    def test_a_strong_ridge_is_the_line(self):
        residuals, times, _ = drawn(0, 1, 5)
        got = forecast_weights(grams_of(residuals), times, np.array([[2, 0]]), 3, 1e9)[0, 0]
        r = (times[3:] - times[2]) / (times[2] - times[0])
        np.testing.assert_allclose(got, [1 + r, -r], rtol=1e-6)


class TestDegenerate:
    @pytest.mark.parametrize("ridge", [0.0, 1e-3])
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    @pytest.mark.parametrize("kind", ["zero", "parallel", "partly zero", "equal", "one step not zero", "tiny"])
    @pytest.mark.parametrize("steps", [1, 2, 3, 6])
    def test_finite_and_silent(self, steps, kind, anchors, ridge):
        sizes = np.arange(1.0, steps + 1)
        sizes = {"zero": 0 * sizes, "partly zero": sizes * (np.arange(steps) % 2), "equal": 0 * sizes + 3}.get(
            kind, sizes
        )
        if kind == "one step not zero":
            sizes = (np.arange(steps) == steps - 1) * 1.0
        residuals = np.outer(sizes, [1.0, 2.0]) * (1e-20 if kind == "tiny" else 1)
        solved = Schedules(grams_of(residuals[None]), np.linspace(1, 0.1, steps), np.ones((1, steps)), anchors, ridge)
        costs = solved.costs()
        assert np.isfinite(costs[:, 1:]).all()
        assert costs[0, steps] == 0
        for k in range(1, steps + 1):
            best = solved.best(k)
            assert sum(best) == k
            np.testing.assert_allclose(solved.cost(best), costs[:, k], rtol=1e-9, atol=1e-12)
            if kind in ("zero", "equal"):
                assert costs[0, k] < 1e-12

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    @pytest.mark.parametrize("ridge", [0.0, 1e-3])
    def test_steps_at_one_time(self, anchors, ridge):
        """As a second-order method has them: no line goes through two such, and the newer counts."""
        residuals, _, worth = drawn(1, 2, 6)
        times = np.array([1.0, 0.7, 0.7, 0.4, 0.4, 0.1])
        solved = Schedules(grams_of(residuals), times, worth, anchors, ridge, 4.0)
        assert np.isfinite(solved.costs()[:, 1:]).all()
        for bits in schedules(6):
            wanted = [price(*one, bits, anchors, ridge, 4.0) for one in zip(residuals, [times] * 2, worth, strict=True)]
            np.testing.assert_allclose(solved.cost(bits), wanted, rtol=1e-7)

    def test_sums_that_are_zero_do_not_go_below(self):
        """Residuals that stay as they are: their differences are rounding, of either sign."""
        residuals = np.repeat(np.random.default_rng(0).normal(size=(1, 1, 50)), 9, axis=1)
        for gamma in (1.0, 4.0):
            costs = Schedules(grams_of(residuals), np.linspace(1, 0.1, 9), np.ones((1, 9)), gamma=gamma).costs()
            assert (costs[0, 1:] < 1e-5).all()

    @pytest.mark.parametrize(
        "change",
        [{"grams": np.zeros((1, 4, 3))}, {"grams": np.zeros((2, 4, 4))}, {"times": np.zeros(3)}, {"anchors": 0},
         {"anchors": 4}],
    )  # fmt: skip
    def test_what_does_not_fit(self, change):
        with pytest.raises(ValueError, match=r"need Gram matrices|anchors=\d"):
            Schedules(
                **{"grams": np.zeros((1, 4, 4)), "times": np.zeros(4), "error_weights": np.ones((1, 4)), **change}
            )

    @pytest.mark.parametrize("bits", [(0, 1, 1, 1), (1, 0, 1), (), (1, 0, 1, 0, 1)])
    def test_what_is_no_schedule(self, bits):
        with pytest.raises(ValueError, match="not a 0 or 1 for each of 4 steps"):
            Schedules(np.zeros((1, 4, 4)), np.zeros(4), np.ones((1, 4))).cost(bits)

    @pytest.mark.parametrize(("ranges", "refreshes"), [(2, 2), (1, 0), (1, 5)])
    def test_what_has_no_best(self, ranges, refreshes):
        with pytest.raises(ValueError, match=f"best\\({refreshes}\\): one range, and 1 to 4"):
            Schedules(np.zeros((ranges, 4, 4)), np.zeros(4), np.ones((ranges, 4))).best(refreshes)


class TestByHand:
    def test_one_number(self):
        """Residuals 1, 2, 4 of one number, without a ridge: any is a multiple of another, nothing is lost."""
        gram = np.outer([1.0, 2.0, 4.0], [1.0, 2.0, 4.0])[None]
        np.testing.assert_allclose(
            Schedules(gram, np.arange(3.0), np.ones((1, 3)), 1, 0.0).costs()[0, 1:], 0, atol=1e-12
        )

    def test_the_line(self):
        """Residuals 0, 1, 4, 9 at σ = 3, 2, 1, 0, forecast by the line: 2 and 3 after 0 and 1, 7 after 1 and 4."""
        residuals = np.array([[[0.0], [1.0], [4.0], [9.0]]])
        worth = np.array([[1.0, 1.0, 10.0, 1.0]])
        solved = Schedules(grams_of(residuals), np.array([3.0, 2, 1, 0]), worth, ridge=1e9, gamma=2.0)
        wanted = {
            (1, 1, 0, 0): (10 * (4 - 2) + (9 - 3)) ** 2,
            (1, 1, 1, 0): (9 - 7) ** 2,
            (1, 1, 0, 1): (10 * (4 - 2)) ** 2,
            (1, 1, 1, 1): 0,
            (1, 0, 1, 0): 1**2 + (9 - 6) ** 2,  # after Δ₀ alone, that is the forecast
        }
        for bits, cost in wanted.items():
            np.testing.assert_allclose(solved.cost(bits), cost, rtol=1e-5, atol=1e-9)
        assert solved.best(3) == (1, 0, 1, 1)  # costs 1: step 1 is worth less than step 2, and the curve is flat there
        np.testing.assert_allclose(solved.costs()[0, 3:], [1, 0], rtol=1e-5, atol=1e-9)

    def test_more_refreshes_may_cost_more(self):
        """Errors are summed with their signs: +e and −e cancel, and to compute either step leaves the other.

        What holds: to compute all costs nothing; and of schedules with as many refreshes none is cheaper.
        """
        residuals = np.array([[[1.0, 0], [1, 1], [1, -1]]])
        for gamma in (1.0, 4.0):
            costs = Schedules(grams_of(residuals), np.arange(3.0), np.ones((1, 3)), 1, 0.0, gamma).costs()[0]
            np.testing.assert_allclose(costs, [math.inf, 0, 1, 0], atol=1e-12)

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_on_a_smooth_curve_they_cost_less(self, anchors):
        times = np.linspace(1, 0.02, 20) ** 1.3
        residuals = np.stack([np.exp(-k * times) + np.cos((k + 1) * times) for k in range(6)], axis=1)[None]
        costs = Schedules(grams_of(residuals), times, np.ones((1, 20)), anchors).costs()[0, 1:]
        assert (np.diff(costs) <= 1e-12).all()

    def test_the_worst_segment_decides_where_gamma_is_large(self):
        """Two reused steps, apart or side by side: each error is 1, and no step tells anything of another."""
        residuals = np.eye(4)[None]
        for gamma, wanted in ((2.0, 2.0), (4.0, 2.0)):
            solved = Schedules(grams_of(residuals), np.arange(4.0), np.ones((1, 4)), 1, 0.0, gamma)
            np.testing.assert_allclose(solved.cost((1, 0, 1, 0)), wanted)
            np.testing.assert_allclose(solved.cost((1, 1, 0, 0)), 2 ** (gamma / 2))


def test_a_model_of_64_ranges_and_50_steps_is_solved_in_a_second_or_so():
    residuals, times, worth = drawn(0, 64, 50, 60)
    begun = time.perf_counter()
    costs = Schedules(grams_of(residuals), times, worth).costs()
    assert time.perf_counter() - begun < 10  # 0.5 s on a machine that has nothing else to do
    assert np.isfinite(costs[:, 1:]).all()
