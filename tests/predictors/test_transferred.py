"""Weights at other numbers of steps: exact where they are polynomials, none far from what was fitted."""

from __future__ import annotations

import numpy as np
import pytest

from dithooks import DitCacheConfig, Mask
from dithooks.errors import InvalidSetting, WrongType
from dithooks.policies.history import Schedule
from dithooks.predictors import transferred
from dithooks.predictors.fitted import Fitted
from dithooks.predictors.predictor import Moment
from dithooks.predictors.transferred import Transferred, Use

MASK = (1, 1, 0)  # over and over


def sigmas_of(steps: int) -> tuple[float, ...]:
    return tuple(1 - step / steps for step in range(steps))


def line(now: float, newest: float, before: float) -> np.ndarray:
    """Worked out by hand: (1 + r, −r)."""
    share = (now - newest) / (newest - before)
    return np.array([1 + share, -share])


def scale(now: float, fall: float) -> float:
    return 0.02 + 0.03 * now - 0.05 * now**2 + 0.4 * fall


def slope(now: float, fall: float) -> float:
    return -0.5 + 0.2 * now + 6 * fall


def weights_of(steps: int, step: int) -> tuple[float, ...]:
    """The line, plus a scale and a slope that are polynomials in σ and its fall."""
    now, newest, before = (1 - each / steps for each in (step, step - 1, step - 2))
    share, fall = (now - newest) / (newest - before), 1 / steps
    along = np.array([share, -share])
    return tuple(line(now, newest, before) + scale(now, fall) * np.array([1, 0]) + slope(now, fall) * along)


def correction_of(steps: int, step: int) -> tuple[float, ...]:
    """Of the step behind a reused one: its own output, plus its excess over the last computed one's."""
    now, fall = 1 - step / steps, 1 / steps
    excess = 3 * fall + now * fall
    return 1 + excess, -excess


def made(steps: int, others: tuple[Fitted, ...] = ()) -> Fitted:
    mask = [MASK[step % 3] for step in range(steps)]
    weights = tuple(None if bit else weights_of(steps, step) for step, bit in enumerate(mask))
    behind = [step > 0 and mask[step] and not mask[step - 1] for step in range(steps)]
    corrections = tuple(correction_of(steps, step) if each else None for step, each in enumerate(behind))
    return Fitted(weights, sigmas_of(steps), corrections, others=others)


def moments(steps: int, *which: int) -> list[Moment]:
    return [Moment(step, 1 - step / steps) for step in which]


@pytest.fixture
def almost_no_ridge(monkeypatch):
    monkeypatch.setattr(transferred, "RIDGE", 1e-13)


@pytest.mark.usefixtures("almost_no_ridge")
class TestPolynomials:
    """Between numbers of steps whose weights are polynomials, the weights are those of the polynomials."""

    plan = property(lambda self: made(21, (made(30), made(48))))

    @pytest.mark.parametrize("steps", [24, 36, 42])
    def test_forecasts(self, steps):
        now, newest, before = moments(steps, 5, 4, 3)
        np.testing.assert_allclose(self.plan.weights([newest, before], now), weights_of(steps, 5), rtol=1e-5)

    @pytest.mark.parametrize("steps", [24, 36])
    def test_corrections(self, steps):
        now, newest = moments(steps, 6, 4)
        np.testing.assert_allclose(self.plan.output_weights([newest], now), correction_of(steps, 6), rtol=1e-5)

    def test_a_step_behind_a_computed_one_is_not_corrected(self):
        now, newest = moments(24, 7, 6)
        assert self.plan.output_weights([newest], now) is None

    def test_only_what_some_plan_corrects(self):
        now, newest = moments(24, 5, 4)
        assert self.plan.output_weights([newest], now, is_forecast=True) is None


class TestOneOfSeveralRuns:
    @pytest.mark.parametrize("steps", [21, 30, 48])
    def test_each_has_its_own_weights(self, steps):
        plan = made(21, (made(30), made(48)))
        now, newest, before = moments(steps, 5, 4, 3)
        assert plan.weights([newest, before], now) == weights_of(steps, 5)
        now, newest = moments(steps, 6, 4)
        assert plan.output_weights([newest], now) == correction_of(steps, 6)
        assert plan.output_weights(moments(steps, 3), moments(steps, 4)[0]) is None

    def test_without_others_nothing_is_carried_over(self):
        now, newest, before = moments(24, 5, 4, 3)
        assert made(21).weights([newest, before], now) is None
        assert made(21).output_weights([newest], moments(24, 6)[0]) == ()
        assert made(21).output_weights([newest], moments(24, 5)[0]) is None


def test_a_step_that_each_run_has_once_counts_too():
    """As the first forecast of all, which takes fewer outputs than those behind it."""

    def of(steps, others=()):
        return Fitted((None, (1.1,), *[None] * (steps - 2)), sigmas_of(steps), others=others)

    now, newest = moments(24, 1, 0)
    assert of(21, (of(30),)).weights([newest], now) == pytest.approx((1.1,), abs=1e-3)


class TestOutOfReach:
    plan = made(21, (made(30),))

    def test_steps_that_are_far_wider_or_finer(self):
        for steps in (12, 50):
            now, newest, before = moments(steps, 5, 4, 3)
            assert self.plan.weights([newest, before], now) is None

    def test_longer_stretches_than_any(self):
        now, newest, before = moments(24, 6, 4, 3)
        assert self.plan.weights([newest, before], now) is None

    def test_another_axis(self):
        anchors = [Moment(4, 20 / 24, "timestep"), Moment(3, 21 / 24, "timestep")]
        assert self.plan.weights(anchors, Moment(5, 19 / 24)) is None

    def test_steps_by_number_only(self):
        assert (
            Transferred([made(21), made(30)], "step").weights(Use.FORECAST, moments(24, 4, 3), Moment(5, 0.8)) is None
        )

    def test_two_steps_at_one_time(self):
        assert self.plan.weights([Moment(4, 0.8), Moment(3, 0.8)], Moment(5, 0.76)) is None

    def test_the_warning(self):
        near, far = (Schedule(steps, sigmas=sigmas_of(steps)) for steps in (24, 60))
        assert self.plan.warning_at_start(near) is None
        assert self.plan.warning_at_start(Schedule(30, sigmas=sigmas_of(30))) is None
        assert self.plan.warning_at_start(far) == (
            "coefficients were fitted for 21 and 30 steps, and this run has 60: where its noise levels fall faster or "
            "slower than theirs, the line through the last two residuals, in σ, is taken in their place"
        )


class TestSettings:
    def test_others_are_runs_with_sigmas(self):
        with pytest.raises(WrongType, match="others must be a tuple of Fitted"):
            Fitted((None,), (1.0,), others=(1,))
        with pytest.raises(InvalidSetting, match="sigmas is missing"):
            Fitted((None,), (1.0,), others=(Fitted((None,)),))
        with pytest.raises(InvalidSetting, match="others of its own"):
            Fitted((None,), (1.0,), others=(made(21, (made(30),)),))
        with pytest.raises(InvalidSetting, match="at most 16"):
            Fitted((None,), (1.0,), others=(made(21),) * 17)

    def test_a_mask_of_the_nearest_number(self):
        mask = Mask((1, 0, 1, 0), others=(Mask((1, 1, 1, 1, 1, 1, 0, 0)),))
        assert mask.for_run(Schedule(8)).steps == (1, 1, 1, 1, 1, 1, 0, 0)
        assert mask.for_run(Schedule(5)).steps == Mask((1, 0, 1, 0)).for_run(Schedule(5)).steps
        assert mask.for_run(Schedule(7)).steps == Mask((1, 1, 1, 1, 1, 1, 0, 0)).for_run(Schedule(7)).steps

    def test_masks_that_cannot_be_others(self):
        with pytest.raises(WrongType, match="others must be a tuple of masks"):
            Mask((1, 0), others=((1, 0, 0),))
        with pytest.raises(InvalidSetting, match="others are masks of 0 and 1"):
            Mask((1, 0), others=(Mask("medium"),))

    def test_in_a_file(self):
        config = DitCacheConfig(
            policy=Mask((1, 0), (1.0, 0.5), others=(Mask((1, 0, 0), (1.0, 0.6, 0.3)),)), predictor=made(21, (made(30),))
        )
        assert DitCacheConfig.from_json(config.to_json()) == config
        assert '"others"' not in DitCacheConfig(policy=Mask((1, 0)), predictor=made(21)).to_json()
