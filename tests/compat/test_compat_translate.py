"""cache-dit's configuration in our terms: field by field, and step by step against its rules."""

import math
import re
import warnings

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from policies_by_hand import computed, drive, matrix

from dithooks import DitCacheConfig, Mask, Reuse, Taylor, Threshold
from dithooks.compat.cache_dit.configs import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
)
from dithooks.compat.cache_dit.masks import steps_mask
from dithooks.compat.cache_dit.translate import Never, translate
from dithooks.policies.history import Schedule


def policy(**values):
    return translate(DBCacheConfig(**values)).when


def predictor(config):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return translate(DBCacheConfig(), config).predictor


class TestFields:
    def test_defaults(self):
        assert translate(DBCacheConfig()) == DitCacheConfig(cache_block_start=8, policy=Threshold(0.08))

    def test_none_is_the_default(self):
        assert translate(BasicCacheConfig().reset()) == translate(BasicCacheConfig())
        assert translate(DBCacheConfig(), TaylorSeerCalibratorConfig().reset()).predictor == Taylor(1, "step")

    def test_every_field(self):
        got = translate(
            DBCacheConfig(
                Fn_compute_blocks=2,
                Bn_compute_blocks=3,
                residual_diff_threshold=0.2,
                max_accumulated_residual_diff_threshold=0.5,
                max_warmup_steps=6,
                warmup_interval=2,
                max_cached_steps=9,
                max_continuous_cached_steps=4,
                cfg_diff_compute_separate=False,
                force_refresh_step_hint=5,
                force_refresh_step_policy="repeat",
            )
        )
        assert got == DitCacheConfig(
            cache_block_start=2,
            compute_last=3,
            policy=Threshold(
                0.2,
                max_warmup_steps=6,
                warmup_interval=2,
                max_cached_steps=9,
                max_continuous_cached_steps=4,
                max_accumulated_diff=0.5,
                force_refresh_step=5,
                force_refresh="repeat",
                separate_branches=False,
            ),
        )

    def test_what_is_seen_as_the_model_runs_changes_nothing(self):
        told = DBCacheConfig(num_inference_steps=28, enable_separate_cfg=True, cfg_compute_first=True)
        assert translate(told) == translate(DBCacheConfig())

    def test_the_configuration_stays_as_it_is(self):
        config = DBCacheConfig().reset(steps_computation_mask=[0, 1, 0])
        translate(config)
        assert config == DBCacheConfig().reset(steps_computation_mask=[0, 1, 0])

    def test_limits_below_zero_are_none(self):
        assert policy(max_cached_steps=-5, max_continuous_cached_steps=-1) == Threshold(0.08)

    @pytest.mark.parametrize("total", [0, -0.5, 0.0])
    def test_an_accumulated_limit_not_above_zero_is_none(self, total):
        assert policy(max_accumulated_residual_diff_threshold=total) == Threshold(0.08)

    def test_a_tensor_is_a_number(self):
        assert policy(residual_diff_threshold=torch.tensor([0.25])) == Threshold(0.25)

    @pytest.mark.parametrize("limit", [1, 1.5, torch.tensor(2.0)])
    def test_a_threshold_of_one_or_more_is_met_by_all_that_is_finite(self, limit):
        got = policy(residual_diff_threshold=limit, max_warmup_steps=1, max_accumulated_residual_diff_threshold=0.5)
        told = drive(got, Schedule(6), lambda step, refreshed: 1e20)
        assert [reuse for reuse, _, _ in told.values()] == [False, *[True] * 5]

    @pytest.mark.parametrize(
        "values",
        [
            {"residual_diff_threshold": 0.0},
            {"residual_diff_threshold": -1},
            {"max_cached_steps": 0},
            {"max_continuous_cached_steps": 0},
        ],
    )
    def test_a_limit_that_leaves_no_reuse(self, values):
        for got in (policy(**values), policy(**values, steps_computation_mask=[1, 0, 0])):
            assert got == Never("=".join(f"{name}={value:g}" for name, value in values.items()))
            assert computed(drive(got, Schedule(4), lambda step, refreshed: 0.0)) == "1111"
        static = policy(**values, steps_computation_mask=[1, 0, 0], steps_computation_policy="static")
        assert static == Mask((1, 0, 0))

    def test_nothing_to_cache(self):
        assert translate(DBCacheConfig(cache_type=CacheType.NONE)) is None
        assert translate(DBCacheConfig(cache_type="NONE")) is None

    def test_written_and_read(self):
        got = translate(DBCacheConfig(steps_computation_mask=[1, 0, 1]), TaylorSeerCalibratorConfig(taylorseer_order=2))
        assert DitCacheConfig.from_json(got.to_json()) == got


class TestMasks:
    def test_static(self):
        assert policy(steps_computation_mask=[1, 1, 0, 1], steps_computation_policy="static") == Mask((1, 1, 0, 1))

    def test_dynamic_is_its_own_warm_up(self):
        got = policy(
            steps_computation_mask=[1, 1, 0, 1],
            max_warmup_steps=9,
            warmup_interval=3,
            residual_diff_threshold=0.2,
            max_cached_steps=3,
        )
        assert got == Mask((1, 1, 0, 1), dynamic=Threshold(0.2, max_warmup_steps=0, max_cached_steps=3))

    def test_by_name(self):
        got = policy(steps_computation_mask="fast", num_inference_steps=20, steps_computation_policy="static")
        assert got == Mask(tuple(steps_mask(total_steps=20, mask_policy="fast")))
        with pytest.raises(ValueError, match=r"steps_computation_mask='fast' .*: give num_inference_steps"):
            policy(steps_computation_mask="fast")

    @pytest.mark.parametrize(("how", "bits"), [("once", (1, 0, 1, 0, 0, 0)), ("repeat", (1, 0, 1, 0, 1, 0))])
    def test_static_with_a_forced_step(self, how, bits):
        got = policy(
            steps_computation_mask=[1, 0, 0, 0, 0, 0],
            steps_computation_policy="static",
            force_refresh_step_hint=2,
            force_refresh_step_policy=how,
        )
        assert got == Mask(bits)

    def test_a_first_step_that_would_be_reused(self):
        assert policy(steps_computation_mask=[0, 0, 1]).steps == (1, 0, 1)
        for hint in (None, 1):
            with pytest.raises(ValueError, match=r"steps_computation_mask: .* the first of them 1"):
                policy(
                    steps_computation_mask=[0, 0, 1], steps_computation_policy="static", force_refresh_step_hint=hint
                )


class TestForecast:
    def test_none(self):
        assert predictor(None) == Reuse()
        assert predictor(CalibratorConfig()) == Reuse()
        assert predictor(TaylorSeerCalibratorConfig(taylorseer_order=0)) == Reuse()
        assert predictor(CalibratorConfig(calibrator_type="dmd")) == Reuse()  # not enabled

    @pytest.mark.parametrize("order", [1, 2, 3])
    def test_order(self, order):
        assert predictor(TaylorSeerCalibratorConfig(taylorseer_order=order)) == Taylor(order, axis="step")
        plain = CalibratorConfig(True, True, calibrator_kwargs={"n_derivatives": order})
        assert predictor(plain) == Taylor(order, axis="step")

    @pytest.mark.parametrize(("own", "wanted"), [(True, Taylor(1, axis="step")), (False, Reuse())])
    def test_of_some_streams_is_of_all_or_none(self, own, wanted):
        config = TaylorSeerCalibratorConfig(enable_calibrator=own, enable_encoder_calibrator=not own)
        with pytest.warns(UserWarning, match="the forecast holds for all streams here") as said:
            assert translate(DBCacheConfig(), config).predictor == wanted
        assert len(said) == 1
        assert said[0].filename == __file__

    def test_nothing_is_said_where_there_is_none(self):
        assert predictor(TaylorSeerCalibratorConfig(enable_encoder_calibrator=False, taylorseer_order=0)) == Reuse()


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"Fn_compute_blocks": 0}, "Fn_compute_blocks=0 is out of range: it must be at least 1"),
        ({"Bn_compute_blocks": -1}, "Bn_compute_blocks=-1 is out of range"),
        ({"residual_diff_threshold": math.nan}, "residual_diff_threshold=nan is out of range"),
        ({"residual_diff_threshold": torch.ones(2)}, "residual_diff_threshold has 2 elements: give one number"),
        ({"residual_diff_threshold": "0.1"}, "residual_diff_threshold must be a number, not '0.1'"),
        ({"max_accumulated_residual_diff_threshold": "1"}, "max_accumulated_residual_diff_threshold must be a number"),
        ({"max_warmup_steps": -1}, "max_warmup_steps=-1 is out of range"),
        ({"max_warmup_steps": 2.5}, "max_warmup_steps must be an int, not 2.5"),
        ({"warmup_interval": 0}, "warmup_interval=0 is out of range"),
        ({"max_cached_steps": "3"}, "max_cached_steps must be an int, not '3'"),
        ({"max_continuous_cached_steps": 1.0}, "max_continuous_cached_steps must be an int, not 1.0"),
        ({"force_refresh_step_hint": 0}, "force_refresh_step_hint=0 is out of range: it must be at least 1"),
        ({"force_refresh_step_policy": "twice"}, "force_refresh_step_policy='twice': there are 'once', 'repeat'"),
        ({"steps_computation_policy": "fixed"}, "steps_computation_policy='fixed': there are 'dynamic', 'static'"),
        ({"cfg_diff_compute_separate": "no"}, "cfg_diff_compute_separate must be True or False, not 'no'"),
        ({"steps_computation_mask": [1, 2]}, "steps_computation_mask: Mask((1, 2)): give a 0 or 1 for each step"),
        ({"steps_computation_mask": []}, "steps_computation_mask is empty"),
        ({"steps_computation_mask": 3}, "steps_computation_mask must have a 1 or 0 for each step"),
        ({"steps_computation_mask": "quick", "num_inference_steps": 28}, "'quick': there are 'slow', 'medium'"),
        ({"cache_type": "DBPrune"}, "cache_type=DBPrune is not available"),
        ({"cache_type": "Tea"}, "cache_type='Tea': there are 'DBCache' and 'NONE'"),
        ({"residual_diff_threshold": 0, "max_warmup_steps": -1}, "max_warmup_steps=-1"),
    ],
)
def test_what_is_wrong_is_told_by_its_name_there(values, told):
    with pytest.raises((TypeError, ValueError), match=re.escape(told)):
        translate(DBCacheConfig(**values))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (
            TaylorSeerCalibratorConfig(calibrator_type="dmd"),
            "calibrator_type='dmd' is not available: take 'taylorseer'",
        ),
        (TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states"), "take 'residual'"),
        (TaylorSeerCalibratorConfig(taylorseer_order=-1), "taylorseer_order=-1 is out of range"),
        (TaylorSeerCalibratorConfig(calibrator_kwargs={"rank": 2}), "calibrator_kwargs has rank: "),
        (DBCacheConfig(), "calibrator_config must be a TaylorSeerCalibratorConfig of dithooks.compat.cache_dit, not"),
    ],
)
def test_what_is_wrong_in_a_forecast(config, told):
    with pytest.raises((TypeError, ValueError), match=re.escape(told)):
        translate(DBCacheConfig(), config)


def test_another_object_is_refused():
    with pytest.raises(TypeError, match=r"cache_config must be a DBCacheConfig of dithooks\.compat\.cache_dit, not 8"):
        translate(8)


# --- step by step --------------------------------------------------------------------------------------------------


def reused_there(steps, see, *, limit, warm, every, most, row, mask, static):
    """The steps that cache-dit's rules reuse, for one branch; ``see(step, refreshed)`` is the change."""
    reused, refreshed = [], None
    if mask is not None:
        leading = next((k for k, bit in enumerate(mask) if bit != 1), len(mask))
        warm = min(warm, leading)
    for t in range(steps):
        row_so_far = 0
        while t - 1 - row_so_far in reused:
            row_so_far += 1
        if t in range(0, warm, every) or (mask is not None and mask[t] == 1):
            reuse = False
        elif mask is not None and static:
            reuse = True
        elif (0 <= most <= len(reused)) or (0 <= row <= row_so_far) or limit <= 0 or refreshed is None:
            reuse = False
        else:
            reuse = limit >= 1 or see(t, refreshed) < limit
        if reuse:
            reused.append(t)
        else:
            refreshed = t
    return reused


LIMITS = st.sampled_from([-1.0, 0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.99, 1.0, 3.0])


@given(
    seed=st.integers(0, 2**20),
    steps=st.integers(2, 30),
    limit=LIMITS,
    warm=st.integers(0, 12),
    every=st.integers(1, 4),
    most=st.integers(-1, 12),
    row=st.integers(-1, 4),
    masked=st.sampled_from(["no", "dynamic", "static"]),
    data=st.data(),
)
def test_the_same_steps_are_reused(seed, steps, limit, warm, every, most, row, masked, data):
    mask = None
    if masked != "no":
        mask = data.draw(st.lists(st.integers(0, 1), min_size=steps, max_size=steps))
        assume(mask[0] or masked == "dynamic")  # a static one has nothing to reuse at the first step
    see = matrix(seed, steps)
    ours = translate(
        DBCacheConfig(
            residual_diff_threshold=limit,
            max_warmup_steps=warm,
            warmup_interval=every,
            max_cached_steps=most,
            max_continuous_cached_steps=row,
            steps_computation_mask=mask,
            steps_computation_policy="static" if masked == "static" else "dynamic",
        )
    ).when
    told = drive(ours, Schedule(steps), see)
    wanted = reused_there(
        steps, see, limit=limit, warm=warm, every=every, most=most, row=row, mask=mask, static=masked == "static"
    )
    assert [t for t, (reuse, _, _) in told.items() if reuse] == wanted


def test_the_rules_reuse_something():
    """The comparison above is not of empty lists."""
    see = matrix(0, 20, 0.0, 0.2)
    none = {"most": -1, "row": -1, "mask": None, "static": False}
    got = reused_there(20, see, limit=0.15, warm=4, every=2, **none)
    assert 3 < len(got) < 19
    assert set(got) & {1, 3}
