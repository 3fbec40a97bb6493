"""What a reused step is given: weights against the polynomial through the anchors, sums in float64, and whole runs."""

import json

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from toys import Counter

from dithooks import DitCacheConfig, Fitted, Interval, Linear, Mask, Reuse, Taylor, Threshold, dit_cache, timestep_scope
from dithooks.engine.anchor import Anchor, weighted_sum
from dithooks.policies.history import Schedule
from dithooks.predictors.predictor import Moment

U = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float32, torch.bfloat16, torch.float16)}
SIGMAS = [1.0, 0.93, 0.81, 0.74, 0.58, 0.5, 0.37, 0.29, 0.17, 0.12, 0.05, 0.02]  # no two distances alike


def moments(times, axis="sigma"):
    """The newest first, at steps that count down to 0."""
    return [Moment(len(times) - 1 - k, float(time), axis) for k, time in enumerate(times)]


def by_solving(times, here):
    """Weights w with Σ w_k p(t_k) = p(here) for every polynomial of a degree below their number."""
    powers = np.arange(len(times))[:, None]
    centred = np.asarray(times, float) - here  # else the system is ill-conditioned
    return np.linalg.solve(centred[None, :] ** powers, (powers[:, 0] == 0).astype(float))


def spaced(least, most):
    """Rising times, at unequal distances of at least 0.05."""
    return st.lists(st.floats(0.05, 1.0), min_size=least, max_size=most).map(lambda gaps: np.cumsum(gaps).tolist())


class TestWeights:
    @given(times=spaced(1, 5), ahead=st.floats(0.05, 1.0))
    def test_reuse_takes_the_last(self, times, ahead):
        assert Reuse().anchors == 1
        assert Reuse().weights(moments(times), Moment(9, times[0] - ahead)) == (1.0,)

    @given(times=spaced(2, 4), ahead=st.floats(0.05, 1.0))
    def test_linear_is_the_line_of_the_formula(self, times, ahead):
        """(1 + r)·Δ_b − r·Δ_a with r = (σ_t − σ_b)/(σ_b − σ_a); older ones count for nothing."""
        b, a = times[0], times[1]
        now = b - ahead
        r = (now - b) / (b - a)
        assert Linear().anchors == 2
        np.testing.assert_allclose(Linear().weights(moments(times), Moment(9, now)), [1 + r, -r], rtol=1e-12)

    @given(times=spaced(1, 7), ahead=st.floats(0.05, 1.0), order=st.integers(0, 4), axis=st.sampled_from("st"))
    def test_taylor_is_the_polynomial_through_as_many_as_there_are(self, times, ahead, order, axis):
        number = min(order + 1, len(times))
        if axis == "s":
            anchors, now, policy = moments(times), Moment(9, times[0] - ahead), Taylor(order)
            wanted = by_solving(times[:number], now.time)
        else:  # of the step: whatever the noise level does
            steps = np.unique(np.ceil(np.asarray(times) * 7).astype(int)).tolist()[::-1]
            number = min(order + 1, len(steps))
            anchors = [Moment(step, 0.5, "timestep") for step in steps]
            now, policy = Moment(steps[0] + 3, 0.1), Taylor(order, "step")
            wanted = by_solving(steps[:number], now.step)
        got = policy.weights(anchors, now)
        assert policy.anchors == order + 1
        assert len(got) == number
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-9 * np.abs(wanted).max())
        assert sum(got) == pytest.approx(1, abs=1e-9 * np.abs(wanted).max())

    @given(
        times=spaced(5, 5),
        ahead=st.floats(0.05, 1.0),
        coefficients=st.lists(st.floats(-3, 3), min_size=1, max_size=5),
        order=st.integers(0, 4),
    )
    def test_exact_on_polynomials_up_to_the_order(self, times, ahead, coefficients, order):
        now = times[0] - ahead
        values = np.polyval(coefficients[: order + 1], times[: order + 1])
        got = np.asarray(Taylor(order).weights(moments(times), Moment(9, now)))
        scale = 1 + np.abs(got * values).sum()
        assert got @ values == pytest.approx(np.polyval(coefficients[: order + 1], now), abs=1e-10 * scale)

    def test_and_not_above(self):
        times, now = [0.5, 0.6, 0.9], 0.3
        for order in (0, 1, 2):
            values = np.asarray(times) ** (order + 1)
            got = Taylor(order).weights(moments(times), Moment(9, now)) @ values[: order + 1]
            # the error of the polynomial of a degree d through the first of x^(d+1) is Π (here − x_k)
            wanted = now ** (order + 1) - np.prod(now - np.asarray(times[: order + 1]))
            assert got == pytest.approx(wanted)
            assert abs(got - now ** (order + 1)) > 0.01

    def test_polyfit_agrees(self):
        times, now = [0.31, 0.4, 0.62, 0.66], 0.2
        values = np.asarray([3.0, -1.0, 2.0, 0.5])
        for order in (0, 1, 2, 3):
            wanted = np.polyval(np.polyfit(times[: order + 1], values[: order + 1], order), now)
            got = np.dot(Taylor(order).weights(moments(times), Moment(9, now)), values[: order + 1])
            assert got == pytest.approx(wanted, rel=1e-9)

    def test_taylor_0_and_1_are_reuse_and_linear(self):
        anchors, now = moments([0.4, 0.7, 0.8]), Moment(4, 0.3)
        assert Taylor(0).weights(anchors, now) == Reuse().weights(anchors, now)
        assert Taylor(1).weights(anchors, now) == Linear().weights(anchors, now)

    @pytest.mark.parametrize(
        ("times", "wanted"),
        [
            ([0.5, 0.5], [1, 0]),
            ([0.5, 0.5, 0.75], [1.5, 0, -0.5]),
            ([0.5, 0.75, 0.75], [1.5, -0.5, 0]),
            ([0.5, 0.5, 0.5], [1, 0, 0]),
        ],
    )
    def test_of_two_at_one_time_the_newer_counts(self, times, wanted):
        got = Taylor(2).weights(moments(times), Moment(9, 0.375))
        np.testing.assert_allclose(got, wanted, rtol=1e-12)

    @pytest.mark.parametrize(
        ("axes", "wanted"),
        [
            ("sss", [3.0, -3.0, 1.0]),
            ("sst", [2.0, -1.0, 0.0]),
            ("sts", [1.5, 0.0, -0.5]),
            ("tss", [0.0, 3.0, -2.0]),
            ("stt", [1.0, 0.0, 0.0]),
            ("tts", [0.0, 0.0, 1.0]),
            ("ttt", [1.0, 0.0, 0.0]),  # nothing to go by: the newest as it is
        ],
    )
    def test_anchors_told_by_another_axis_have_no_place_on_this(self, axes, wanted):
        names = {"s": "sigma", "t": "timestep"}
        anchors = [Moment(4 - k, 0.5 + 0.125 * k, names[axis]) for k, axis in enumerate(axes)]
        np.testing.assert_allclose(Taylor(2).weights(anchors, Moment(5, 0.375)), wanted, rtol=1e-12)
        by_step = Taylor(2, "step").weights(anchors, Moment(5, 0.375))
        np.testing.assert_allclose(by_step, [3.0, -3.0, 1.0], rtol=1e-12)

    def test_one_of_another_axis_does_not_hide_one_with_the_same_number(self):
        anchors = [Moment(4, 0.5, "timestep"), Moment(3, 0.5), Moment(2, 0.75)]
        np.testing.assert_allclose(Taylor(2).weights(anchors, Moment(5, 0.375)), [0, 1.5, -0.5], rtol=1e-12)


class TestFitted:
    PLAN = (None, None, (1.25, -0.5), None, (2.0,), (3.0, 4.0, 5.0), None, (0.5, 0.25, 0.125, 7.0))

    @staticmethod
    def computed(*steps):
        return [Moment(step, 1 - step / 10) for step in steps]

    @pytest.mark.parametrize(("step", "before"), [(2, (1, 0)), (4, (3, 1, 0)), (5, (3, 1, 0)), (7, (6, 3, 1, 0))])
    def test_the_numbers_are_those_of_the_step(self, step, before):
        assert Fitted(self.PLAN).anchors == 4
        got = Fitted(self.PLAN).weights(self.computed(*before), Moment(step, 0.1))
        assert got == self.PLAN[step]

    @pytest.mark.parametrize(
        ("step", "before"),
        [
            (2, (1,)),  # one too few
            (2, (0,)),
            (2, ()),
            (4, (2, 1)),  # another schedule
            (5, (3, 1)),
            (5, (4, 3, 1)),
            (5, (3, 2, 1)),
            (3, (2, 1)),  # a step that the plan computes
            (8, (6, 3)),  # beyond its end
            (99, (6, 3)),
        ],
    )
    def test_none_for_other_anchors(self, step, before):
        assert Fitted(self.PLAN).weights(self.computed(*before), Moment(step, 0.1)) is None

    def test_older_anchors_than_asked_for_do_not_matter(self):
        assert Fitted(self.PLAN).weights(self.computed(3, 2), Moment(4, 0.1)) == (2.0,)

    @pytest.mark.parametrize(
        ("plan", "error", "match"),
        [
            ((), ValueError, "must begin with None"),
            (((1.0,), None), ValueError, "must begin with None"),
            ((None, ()), ValueError, "step 1 has 0 coefficients"),
            ((None, (1.0, 2.0)), ValueError, "step 1 has 2 coefficients, but 1 computed steps"),
            ((None, None, (1.0, 2.0, 3.0)), ValueError, "step 2 has 3 coefficients, but 2"),
            ((None, (1.0,), (1.0, 2.0)), ValueError, "step 2 has 2 coefficients, but 1"),
            ((None, (float("nan"),)), ValueError, "a coefficient"),
            ((None, (float("inf"),)), ValueError, "a coefficient"),
            ((None, ("1",)), TypeError, "a coefficient must be a number"),
            ((None, (True,)), TypeError, "a coefficient must be a number"),
        ],
    )
    def test_what_is_no_plan(self, plan, error, match):
        with pytest.raises(error, match=match):
            Fitted(plan)

    AT = tuple(1 - step / 10 for step in range(8))

    def test_at_the_noise_levels_it_was_fitted_for(self):
        """0.004 of the larger of two is allowed: of the step, and of the residuals that are used."""
        plan = Fitted(self.PLAN, self.AT)
        assert plan.weights(self.computed(3, 1, 0), Moment(4, 0.6)) == (2.0,)
        for off, fits in ((1.0039, True), (1 / 1.0039, True), (1.0042, False), (1 / 1.0042, False)):
            wanted = (2.0,) if fits else None
            assert plan.weights(self.computed(3, 1, 0), Moment(4, 0.6 * off)) == wanted
            assert plan.weights([Moment(3, 0.7 * off), *self.computed(1, 0)], Moment(4, 0.6)) == wanted
        assert plan.weights([*self.computed(3), Moment(1, 7.0)], Moment(4, 0.6)) == (2.0,)  # is not used
        assert plan.weights([*self.computed(3, 1), Moment(0, 7.0)], Moment(5, 0.5)) is None
        assert plan.weights(self.computed(3, 1, 0), Moment(5, 0.5)) == (3.0, 4.0, 5.0)
        assert plan.weights(self.computed(6, 3), Moment(8, 0.2)) is None

    def test_times_below_zero(self):
        plan = Fitted((None, (1.0,)), (-1000.0, 10.0))
        assert plan.weights([Moment(0, -1003.9)], Moment(1, 10.039)) == (1.0,)
        assert plan.weights([Moment(0, -1000.0)], Moment(1, 10.05)) is None
        assert plan.weights([Moment(0, 1000.0)], Moment(1, 10.0)) is None

    def test_what_stands_for_zero_is_small_beside_the_largest(self):
        plan = Fitted((None, (1.0,)), (1000.0, 0.0))
        assert plan.weights([Moment(0, 1000.0)], Moment(1, 0.0009)) == (1.0,)
        assert plan.weights([Moment(0, 1000.0)], Moment(1, 0.002)) is None
        assert Fitted((None, (1.0,)), (0.0, 0.0)).weights([Moment(0, 0.0)], Moment(1, 0.0)) == (1.0,)

    @pytest.mark.parametrize("steps", [10, 28, 50])
    def test_the_last_steps_of_a_schedule_that_falls_by_a_factor_are_told_apart(self, steps):
        """Karras's and EDM's, from 80 to 0.002: the last ten lie within 0.001 of the largest."""
        ramp = np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), steps)
        sigmas = [float(sigma) for sigma in ramp**7]
        plan = Fitted((None, *[(float(step),) for step in range(1, steps)]), sigmas)
        first = Moment(0, sigmas[0])
        for step in range(1, steps):
            assert plan.weights([first], Moment(step, sigmas[step])) == (step,)
            assert plan.weights([first], Moment(step, sigmas[step - 1])) is None
            if step + 1 < steps:
                assert plan.weights([first], Moment(step, sigmas[step + 1])) is None

    @given(st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=9))
    def test_rounding_to_half_precision_is_no_other_time(self, times):
        for dtype in (torch.bfloat16, torch.float16):
            rounded = torch.tensor(times).to(dtype).tolist()
            for made, run in ((times, rounded), (rounded, times)):
                plan = Fitted((None, *[(1.0,)] * (len(times) - 1)), made)
                assert plan.warning_at_start(Schedule(len(times), sigmas=tuple(run))) is None
                assert plan.weights([Moment(0, run[0])], Moment(1, run[1])) == (1.0,)

    def test_noise_levels_that_do_not_fall(self):
        plan = Fitted((None, (1.0,), (2.0,)), (0.5, 0.5, 0.7))
        assert plan.weights([Moment(0, 0.5)], Moment(2, 0.7)) == (2.0,)

    @pytest.mark.parametrize(
        ("sigmas", "error", "match"),
        [
            ((1.0,), ValueError, "sigmas has 1 entries, but coefficients has 2"),
            ((), ValueError, "sigmas has 0 entries"),
            (0.5, TypeError, "sigmas must be a number for each step, or None, not 0.5"),
            ("10", TypeError, "sigmas must be a number for each step, or None, not '10'"),
            ((1.0, None), TypeError, "a sigma must be a number"),
            ((1.0, float("nan")), ValueError, "a sigma=nan"),
            ((float("inf"), 1.0), ValueError, "a sigma=inf"),
        ],
    )
    def test_what_are_no_noise_levels(self, sigmas, error, match):
        with pytest.raises(error, match=match):
            Fitted((None, (1.0,)), sigmas)

    @pytest.mark.parametrize("given", [torch.tensor, np.array, list])
    def test_noise_levels_as_they_come(self, given):
        plan = Fitted((None, (1.0,)), given([1.0, 0.5]))
        assert plan == Fitted((None, (1.0,)), (1.0, 0.5))
        assert [type(sigma) for sigma in plan.sigmas] == [float, float]

    @given(st.lists(st.floats(-1e30, 1e30), min_size=2, max_size=9))
    def test_written_and_read(self, sigmas):
        plan = Fitted((None, *[(0.1,)] * (len(sigmas) - 1)), sigmas)
        read = DitCacheConfig.from_json(DitCacheConfig(0, 2, predictor=plan).to_json()).predictor
        assert read == plan
        assert [sigma.hex() for sigma in read.sigmas] == [float(sigma).hex() for sigma in sigmas]

    def test_read_as_it_was_written_before_it_had_noise_levels(self):
        text = DitCacheConfig(0, 2, predictor=Fitted((None, (1.5,)))).to_json()
        assert json.loads(text)["predictor"] == {"kind": "Fitted", "coefficients": [None, [1.5]]}
        assert DitCacheConfig.from_json(text).predictor == Fitted((None, (1.5,)))

    @pytest.mark.parametrize(
        ("plan", "schedule", "said"),
        [
            (Fitted(PLAN, AT), Schedule(8, sigmas=AT), None),
            (Fitted(PLAN, AT), Schedule(8), None),
            (Fitted(PLAN, AT), Schedule(), None),
            (Fitted(PLAN), Schedule(8, sigmas=AT[::-1]), None),
            (Fitted(PLAN, AT), Schedule(8, sigmas=tuple(sigma * 1.0039 for sigma in AT)), None),
            (
                Fitted(PLAN, AT),
                Schedule(50),
                "coefficients were fitted for 8 steps, and this run has 50: "
                "the line through the last two residuals, in σ, is taken in their place",
            ),
            (Fitted((None, (1.0,))), Schedule(1), "where they follow other computed steps, the last residual is taken"),
            (Fitted((None,), (1.0,)), Schedule(2), "fitted for 1 step, and this run has 2: the last residual"),
            (
                Fitted(PLAN, AT),
                Schedule(8, sigmas=(*AT[:6], 0.35, 0.3)),
                "fitted at other noise levels (step 6 at 0.4, and in this run at 0.35): the line through",
            ),
        ],
    )
    def test_remarks(self, plan, schedule, said):
        told = plan.warning_at_start(schedule)
        assert told is None if said is None else said in told
        assert all(other.warning_at_start(schedule) is None for other in (Reuse(), Linear(), Taylor(3)))

    def test_who_asks_for_noise_levels(self):
        asking = (Reuse(), Taylor(0), Fitted((None, (1.0,))), Fitted((None, (1.0,)), (1.0, 0.5)), Linear(), Taylor(2))
        assert [each.needs_sigmas for each in asking] == [False, False, False, True, True, True]

    def test_numpy_and_lists(self):
        plan = Fitted([None, [np.float32(1.5)], np.asarray([0.25])])
        assert plan == Fitted((None, (1.5,), (0.25,)))
        assert hash(plan) == hash(Fitted((None, (1.5,), (0.25,))))


@pytest.mark.parametrize(
    ("order", "error"), [(-1, ValueError), (1.5, TypeError), (True, TypeError), ("2", TypeError), (None, TypeError)]
)
def test_what_is_no_order(order, error):
    with pytest.raises(error, match="order"):
        Taylor(order)


def test_what_is_no_axis():
    with pytest.raises(ValueError, match="axis='time': there are 'sigma', 'step'"):
        Taylor(1, "time")


class TestCombined:
    """Σ w_k Δ_k against float64.

    u is the unit roundoff, half of finfo.eps. A result is rounded once to the stream's dtype: u·|Σ|, and what is kept
    in another dtype is rounded to that before: u_kept·Σ|w_k Δ_k|. In between, a sum of two in the dtype they are kept
    in (line: difference, product, sum and the weight itself; else two products and a sum) errs by at most 4 roundings
    of no more than (1 + |w|)·(|Δ_b| + |Δ_a|); three and more by a few of float32, of Σ|w_k Δ_k|.
    """

    DTYPES = (torch.float32, torch.bfloat16, torch.float16)
    TINY = 2.0**-24  # float16's smallest number: what is below 6e-5 has fewer bits

    @staticmethod
    def drawn(number, dtype, shapes=((2, 5, 4), (2, 3, 4))):
        return [[(torch.randn(shape, dtype=torch.float64) * 3).to(dtype) for shape in shapes] for _ in range(number)]

    @staticmethod
    def anchors(deltas, dtype=None):
        return [Anchor.keep(Moment(9 - k, 0.1 * k), (), each, dtype, None) for k, each in enumerate(deltas)]

    def off(self, deltas, weights, kept=None):
        """The largest error in units of what is allowed; ≤ 1 is right."""
        dtype = deltas[0][0].dtype
        results = weighted_sum(self.anchors(deltas, kept), weights)
        assert len(results) == len(deltas[0])
        worst, w = 0.0, np.asarray(weights, float)
        for stream, got in enumerate(results):
            assert (got.dtype, got.shape) == (dtype, deltas[0][stream].shape)
            parts = np.stack([each[stream].double().numpy() for each in deltas])
            wanted, sizes = np.tensordot(w, parts, 1), np.tensordot(np.abs(w), np.abs(parts), 1)
            used = np.flatnonzero(w)
            allowed = U[dtype] * np.abs(wanted) + self.TINY
            if kept is not None and kept != dtype:
                allowed = allowed + U[kept] * sizes
            if len(used) == 2:
                mixed = (1 + np.abs(w).max()) * np.abs(parts[used]).sum(0)
                allowed = allowed + 4 * U[kept or dtype] * mixed
            elif len(used) > 2:
                allowed = allowed + 8 * U[torch.float32] * sizes
            elif kept is None and w[used[0]] == 1:
                allowed = np.zeros_like(wanted)
            else:  # one product in the dtype it is kept in
                allowed = allowed + U[kept or dtype] * np.abs(wanted)
            excess = np.abs(got.double().numpy() - wanted) / np.where(allowed > 0, allowed, 1)
            assert not ((allowed == 0) & (excess > 0)).any()
            worst = max(worst, excess.max())
        return worst

    @pytest.mark.parametrize("kept", [None, *DTYPES])
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(
        "weights",
        [
            (1.0,),
            (0.75,),
            (1.6, -0.6),
            (0.3, 0.7),
            (4.75, -3.75),
            (1.3, -0.5),  # no line
            (1.0, 0.5),
            (3.0, -3.0, 1.0),
            (40.25, -72.5, 33.25),  # far beyond anchors that lie close
            (0.9, 0.4, 0.2, -0.1),
            (0.0, 1.0),
            (0.0, 2.5, -1.5),
            (1.5, 0.0, -0.5),
        ],
    )
    def test_sums(self, weights, dtype, kept):
        assert self.off(self.drawn(len(weights), dtype), weights, kept) <= 1

    @settings(deadline=None, max_examples=60)
    @given(
        weights=st.lists(st.floats(-8, 8).map(lambda w: round(w, 3)), min_size=1, max_size=5),
        dtype=st.sampled_from(DTYPES),
        kept=st.sampled_from((None, *DTYPES)),
        seed=st.integers(0, 99),
    )
    def test_any_sums(self, weights, dtype, kept, seed):
        assume(any(weights))
        torch.manual_seed(seed)
        assert self.off(self.drawn(len(weights), dtype, [(7,), (2, 3)]), weights, kept) <= 1

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_large_weights_of_opposite_signs_lose_nothing_of_half_precision(self, dtype):
        """Three equal residuals, weights of 100 that add up to 1: each is given back to the last bit."""
        ((delta,),) = self.drawn(1, dtype, [(50,)])
        (got,) = weighted_sum(self.anchors([[delta]] * 3), (100.0, -150.0, 51.0))
        assert torch.equal(got, delta)
        by_halves = delta * 100 - delta * 150 + delta * 51
        assert not torch.equal(by_halves, delta)

    def test_a_line_through_two_alike_is_that(self):
        ((delta,),) = self.drawn(1, torch.bfloat16, [(50,)])
        (got,) = weighted_sum(self.anchors([[delta], [delta.clone()]]), (17.25, -16.25))
        assert torch.equal(got, delta)

    def test_one_anchor_is_given_as_it_is(self):
        ((delta,),) = self.drawn(1, torch.float32, [(3,)])
        (got,) = weighted_sum(self.anchors([[delta]]), (1.0,))
        assert got is delta

    @pytest.mark.parametrize("weights", [(1.0,), (0.5,), (1.5, -0.5), (1.5, 0.5), (3.0, -3.0, 1.0)])
    def test_the_kept_ones_are_left_alone(self, weights):
        deltas = self.drawn(len(weights), torch.float32)
        anchors = self.anchors([[each.clone() for each in one] for one in deltas])
        weighted_sum(anchors, weights)
        for anchor, one in zip(anchors, deltas, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(anchor.kept, one, strict=True))

    def test_those_with_no_weight_are_not_read(self):
        deltas = [[torch.full((3,), float("nan"))], [torch.arange(3.0)], [torch.full((3,), float("inf"))]]
        (got,) = weighted_sum(self.anchors(deltas), (0.0, 1.0, 0.0))
        assert torch.equal(got, torch.arange(3.0))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_weight_at_all_is_nothing(self, dtype):
        (got,) = weighted_sum(self.anchors([[torch.ones(3, dtype=dtype)]], torch.float32), (0.0,))
        assert torch.equal(got, torch.zeros(3, dtype=dtype))

    def test_streams_of_several_dtypes(self):
        one = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, 5.0], dtype=torch.bfloat16)]
        two = [torch.tensor([0.0, 1.0]), torch.tensor([2.0, 2.0], dtype=torch.bfloat16)]
        wide, half = weighted_sum(self.anchors([one, two], torch.float16), (2.0, -1.0))
        assert (wide.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        assert (wide.tolist(), half.tolist()) == ([2.0, 3.0], [4.0, 8.0])

    def test_bytes_are_those_of_the_dtype_it_is_kept_in(self):
        (anchor,) = self.anchors(self.drawn(1, torch.float32), torch.bfloat16)
        assert anchor.nbytes == (2 * 5 * 4 + 2 * 3 * 4) * 2


class Power(nn.Module):
    """h → h + rate · e · t^degree."""

    def __init__(self, rate, degree):
        super().__init__()
        self.rate, self.degree = nn.Parameter(torch.tensor(rate)), degree

    def forward(self, h, t, e):
        return h + self.rate * e * t**self.degree


class Curve(nn.Module):
    """Blocks of rates 1, 2, 3, 4; what a range does is a polynomial in σ, of its own for each prompt."""

    def __init__(self, degree, depth=4):
        super().__init__()
        self.blocks = nn.ModuleList(Power(k + 1.0, degree) for k in range(depth))

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        h = hidden_states
        for block in self.blocks:
            h = block(h, timestep, encoder_hidden_states)
        return h


class Uneven(Counter):
    """A scheduler whose noise levels fall by unequal steps."""

    def set_timesteps(self, steps, sigmas=SIGMAS):
        super().set_timesteps(steps)
        self.sigmas = torch.tensor([*sigmas[:steps], 0.0])
        self.timesteps = self.sigmas[:-1] * 1000


class Sampler:
    """A pipeline that calls its transformer once for each prompt; ``absent`` are (step, prompt)."""

    def __init__(self, model):
        self.transformer, self.scheduler, self.vae = model, Uneven(), None
        self.prompts = [torch.tensor([[1.0, -2.0, 0.5]]), torch.tensor([[3.0, 1.0, -1.0]])]

    def __call__(self, steps=12, prompts=1, absent=()):
        """Outputs by step and prompt; the latents move as they like."""
        self.scheduler.set_timesteps(steps)
        outs = {}
        for step, t in enumerate(self.scheduler.timesteps):
            x = torch.tensor([[0.1, 0.2, 0.3]]) * (step + 1)
            for number in range(prompts):
                if (step, number) not in absent:
                    outs[step, number] = self.transformer(x, t / 1000, encoder_hidden_states=self.prompts[number])
            self.scheduler.step()
        return outs

    def scoped(self, steps=12, prompts=1, absent=(), named=True, sigmas=SIGMAS):
        """The same, told by scopes."""
        outs = {}
        for step in range(steps):
            x, t = torch.tensor([[0.1, 0.2, 0.3]]) * (step + 1), torch.tensor(sigmas[step])
            for number in range(prompts):
                if (step, number) in absent:
                    continue
                with timestep_scope(step, branch=number if named else None, sigma=sigmas[step], steps=steps):
                    outs[step, number] = self.transformer(x, t, encoder_hidden_states=self.prompts[number])
        return outs


def errors(degree, policy, predictor, way="scheduler", **call):
    """For each reused call: its error, and how many calls of its branch were computed before it.

    The error is the difference from the uncached output in units of what float32 allows: a residual is the difference
    of two numbers no larger than the output, rounded, so Σ|w_k| of them err by that much times some u = 2⁻²⁴.
    """
    pipe = Sampler(Curve(degree))
    run = pipe if way == "scheduler" else pipe.scoped
    plain = run(**call)
    config = DitCacheConfig(cache_block_start=1, cache_num_blocks=2, policy=policy, predictor=predictor)
    with dit_cache(pipe, config) as cache:
        got, settled = run(**call), cache.decisions
    assert [(each.step, each.branch) for each in settled] == list(plain)
    order = predictor.order if isinstance(predictor, Taylor) else int(not isinstance(predictor, Reuse))
    by_step, sigmas = isinstance(predictor, Taylor) and predictor.axis == "step", call.get("sigmas", SIGMAS)
    far, computed = {}, {}
    for each in settled:
        key, before = (each.step, each.branch), computed.setdefault(each.branch, [])
        off = float((got[key] - plain[key]).abs().max())
        if each.reuse:
            last = before[: -order - 2 : -1]
            weights = by_solving(
                [step if by_step else sigmas[step] for step in last], each.step if by_step else sigmas[each.step]
            )
            size = max(float(plain[step, each.branch].abs().max()) for step in (*last, each.step))
            far[key] = off / (8 * U[torch.float32] * np.abs(weights).sum() * size), len(before)
        else:
            before.append(each.step)
            assert off == 0
    return far


def worst(far):
    return max(off for off, _ in far.values())


INTERVAL, MASK = Interval(2, 3), Mask((1, 1, 1, 0, 0, 1, 0, 0, 1, 0, 0, 1))  # the same steps


class TestRuns:
    @pytest.mark.parametrize("way", ["scheduler", "scope"])
    @pytest.mark.parametrize("degree", [0, 1, 2, 3])
    @pytest.mark.parametrize(
        "predictor", [Reuse(), Linear(), Taylor(0), Taylor(1), Taylor(2), Taylor(3), Taylor(1, "step")], ids=repr
    )
    def test_exact_up_to_the_degree_and_not_beyond(self, predictor, degree, way):
        order = {Reuse: 0, Linear: 1}.get(type(predictor), getattr(predictor, "order", None))
        if predictor == Taylor(1, "step"):  # nothing here is a line in the step
            order = 0
        far = errors(degree, Interval(3, 3), predictor, way)
        assert len(far) == 6
        if degree <= order:
            assert worst(far) <= 1
        else:
            assert min(off for off, _ in far.values()) > 100

    def test_in_the_step_where_the_effect_is_a_polynomial_of_that(self):
        far = errors(2, Interval(3, 3), Taylor(2, "step"), "scope", sigmas=[1 - step / 16 for step in range(12)])
        assert worst(far) <= 1

    @settings(deadline=None, max_examples=25)
    @given(
        bits=st.lists(st.sampled_from([0, 0, 1]), min_size=3, max_size=11),
        order=st.integers(1, 3),
        policy=st.sampled_from(["mask", "interval"]),
        interval=st.integers(2, 5),
        start=st.integers(0, 8),
    )
    @pytest.mark.filterwarnings("ignore:.*reuse.*")
    def test_exact_wherever_enough_was_computed_before(self, bits, order, policy, interval, start):
        """Whatever warm-up is not kept: the last order + 1 computed steps before a reused one are."""
        when = Mask((1, *bits)) if policy == "mask" else Interval(start, interval)
        far = errors(order, when, Taylor(order), steps=len(bits) + 1)
        for off, computed in far.values():
            if computed > order:
                assert off <= 1

    @pytest.mark.parametrize("way", ["scheduler", "scope", "unnamed"])
    @pytest.mark.parametrize(
        "absent",
        [
            *((), (3,), (6,), (6, 9), (9, 11)),  # at reused steps,
            *((4,), (3, 4), (6, 7)),  # the last of them before a refresh,
            *((5,), (4, 5), (8,), (5, 8), (3, 4, 5, 6)),  # and at a refresh
        ],
        ids=str,
    )
    @pytest.mark.parametrize("policy", [INTERVAL, MASK], ids=["interval", "mask"])
    def test_two_branches_of_which_one_is_missing_at_some_steps(self, policy, way, absent):
        gone = [(step, 1) for step in absent]
        naming = {"named": False} if way == "unnamed" else {}
        far = errors(1, policy, Linear(), way, prompts=2, absent=gone, **naming)
        assert len(far) >= 8
        assert worst(far) <= 1

    def test_a_branch_missing_at_a_refresh_is_computed_when_it_is_back(self):
        pipe = Sampler(Curve(1))
        with dit_cache(pipe, DitCacheConfig(2, 3, predictor=Linear())) as cache:
            pipe(prompts=2, absent=[(5, 1)])
            told = {each.step: each.reason for each in cache.decisions if each.branch == 1}
        assert (told[4], told[6], told[7], told[8]) == ("reuse", "missed refresh", "reuse", "refresh")

    def test_a_policy_that_looks(self):
        """Anchors at whatever steps a threshold chooses."""
        pipe = Sampler(Curve(2))
        plain = pipe(prompts=2)
        policy = Threshold(0.6, max_warmup_steps=3)
        with dit_cache(pipe, DitCacheConfig(cache_block_start=1, policy=policy, predictor=Taylor(2))) as cache:
            got, stats = pipe(prompts=2), cache.stats
        assert stats.reused_calls >= 6
        assert stats.computed_calls >= 8
        assert (
            max(float((got[key] - plain[key]).abs().max()) for key in plain) < 1e-4
        )  # of up to 30, by weights up to 10

    def test_fitted_by_hand(self):
        """Δ = c·t: 2·Δ_b adds as much again, and the plan says so only where its steps were followed."""
        pipe = Sampler(Curve(1))
        plan = Fitted((None, None, (2.0,), None, (0.5, 0.25)))
        config = DitCacheConfig(cache_num_blocks=4, policy=Mask((1, 1, 0, 1, 0)), predictor=plan)
        with dit_cache(pipe, config):
            got = pipe(steps=5)
        e, t = pipe.prompts[0], [torch.tensor(sigma) for sigma in SIGMAS]
        x = torch.tensor([[0.1, 0.2, 0.3]])
        torch.testing.assert_close(got[2, 0], 3 * x + 10 * e * 2 * t[1])
        torch.testing.assert_close(got[4, 0], 5 * x + 10 * e * (0.5 * t[3] + 0.25 * t[1]))

    def test_fitted_with_one_residual_takes_it_as_it_is_and_says_so_once(self):
        plan = Fitted((None, None, (2.0,), (2.0,), None, *[(2.0,)] * 7))
        match = r"computed steps \[2\], for which Fitted has no coefficients: the last residual is taken as it is"
        with pytest.warns(UserWarning, match=match) as said:
            far = errors(0, Interval(2, 3), plan)
        assert len([each for each in said if "no coefficients" in str(each.message)]) == 1
        assert worst(far) <= 1

    def test_fitted_to_other_steps_takes_the_line_and_says_so_once(self):
        plan = Fitted((None, None, (2.0,), (2.0,), None, (0.5, 0.25), (0.5, 0.25), *[None] * 5))
        with pytest.warns(UserWarning, match=r"Fitted has no coefficients: the line through the last two is") as said:
            far = errors(1, Interval(2, 3), plan)
        assert len([each for each in said if "no coefficients" in str(each.message)]) == 1
        assert worst(far) <= 1

    @pytest.mark.parametrize(("kept", "near"), [("float32", 3e-6), ("bfloat16", 8e-3)])
    def test_kept_in_another_dtype(self, kept, near):
        """What is kept errs by u = 2⁻²⁴, 2⁻⁸ of its size, which is up to 15·0.25 here, by weights 1.x, −0.x."""
        pipe = Sampler(Curve(1))
        plain = pipe()
        config = DitCacheConfig(cache_block_start=1, policy=Interval(5, 2), predictor=Linear(), cache_dtype=kept)
        with dit_cache(pipe, config) as cache:
            got, stats = pipe(), cache.stats
        assert stats.bytes_peak == 2 * 3 * torch.finfo(config.dtype).bits // 8
        off = [float((got[key] - plain[key]).abs().max() / plain[key].abs().max()) for key in plain]
        assert max(off) < near
        assert kept == "float32" or max(off) > 1e-6
