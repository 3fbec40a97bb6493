"""Policies and predictors in a configuration: as JSON, checked, and overridden for what is named."""

import copy
import dataclasses
import json
import types

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Fitted,
    Interval,
    Linear,
    MagnitudeRatio,
    Mask,
    Reuse,
    Taylor,
    Threshold,
    Uncached,
)

pytestmark = pytest.mark.core

# --- every part there may be ----------------------------------------------------------------------------------------

amounts = st.floats(1e-6, 1e6) | st.sampled_from([0.08, 0.1, 1 / 3, 1e-300, 5e-324])
counts, some = st.integers(1, 60), st.none() | st.integers(1, 60)
looking = {"separate_branches": st.booleans(), "reduce": st.sampled_from(["mean", "max", "each"])}
bits = st.lists(st.integers(0, 1), max_size=30).map(lambda tail: (1, *tail))
ratios = st.lists(st.floats(0.01, 3), min_size=1, max_size=20).map(tuple)


@st.composite
def lists_of_ratios(draw):
    length = draw(st.integers(1, 8))
    one = st.lists(st.floats(0.01, 3), min_size=length, max_size=length).map(tuple)
    return tuple(draw(st.lists(one, min_size=1, max_size=3)))


@st.composite
def masks_with_levels(draw):
    mask = draw(bits)
    gaps = draw(st.lists(st.floats(0.01, 1), min_size=len(mask), max_size=len(mask)))
    return {"steps": mask, "sigmas": tuple(np.cumsum(gaps)[::-1].tolist())}


@st.composite
def plans(draw):
    """Of each step ``None``, or as many numbers as steps were computed before, at most."""
    plan, before = [None], 1
    for wanted in draw(st.lists(st.integers(0, 3), max_size=12)):
        number = min(wanted, before)
        plan.append(None if not number else tuple(draw(st.floats(-5, 5)) for _ in range(number)))
        before += not number
    return tuple(plan)


intervals = st.builds(Interval, st.integers(0, 99), counts)
thresholds = st.builds(
    Threshold,
    amounts,
    max_warmup_steps=st.integers(0, 60),
    warmup_interval=counts,
    max_cached_steps=some,
    max_continuous_cached_steps=some,
    max_accumulated_diff=st.none() | amounts,
    last_steps_computed=st.integers(0, 9),
    force_refresh_step=some,
    force_refresh=st.sampled_from(["once", "repeat"]),
    **looking,
)
budgets = st.builds(Budget, st.floats(1.001, 50), some, **looking)
easy = st.builds(EasyCache, amounts, st.integers(2, 60), some, st.integers(0, 9), **looking)
magnitudes = st.builds(MagnitudeRatio, ratios | lists_of_ratios(), amounts, counts, st.floats(0, 1))
presets = st.sampled_from(["slow", "medium", "fast", "ultra"])
shapes = bits.map(lambda mask: {"steps": mask}) | masks_with_levels() | presets.map(lambda name: {"steps": name})
masks = st.builds(
    lambda shape, dynamic: Mask(**shape, dynamic=dynamic), shapes, st.none() | thresholds | budgets | easy
)
POLICIES = {
    Interval: intervals,
    Mask: masks,
    Threshold: thresholds,
    Budget: budgets,
    EasyCache: easy,
    MagnitudeRatio: magnitudes,
    Uncached: st.just(Uncached()),
}
PREDICTORS = {
    Reuse: st.just(Reuse()),
    Linear: st.just(Linear()),
    Taylor: st.builds(Taylor, st.integers(0, 9), st.sampled_from(["sigma", "step"])),
    Fitted: st.builds(Fitted, plans()),
}
policies, predictors = st.one_of(*POLICIES.values()), st.one_of(*PREDICTORS.values())
changes = st.fixed_dictionaries(
    {},
    optional={
        "cache_block_start": st.integers(0, 9),
        "policy": policies,
        "predictor": predictors,
        "cache_dtype": st.sampled_from([None, "float32", "bfloat16"]),
        "free_at_end": st.booleans(),
        "compute_last": st.integers(0, 3),
    },
)


def again(config):
    """Written and read; what is written does not change by that."""
    text = config.to_json()
    read = DitCacheConfig.from_json(text)
    assert read.to_json() == text
    return read


def kinds(value):
    """The types of all that is in a part, down to the numbers."""
    if dataclasses.is_dataclass(value):
        return type(value), *(kinds(getattr(value, each.name)) for each in dataclasses.fields(value))
    return (type(value), *map(kinds, value)) if isinstance(value, tuple) else type(value)


class TestJson:
    @pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)
    def test_policies(self, kind):
        @settings(deadline=None, max_examples=40)
        @given(POLICIES[kind])
        def round_trip(policy):
            config = DitCacheConfig(policy=policy)
            read = again(config)
            assert read == config
            assert read.when == policy
            assert kinds(read.policy) == kinds(policy)
            assert hash(read) == hash(config)
            data = json.loads(config.to_json())["policy"]
            assert data.pop("kind") == kind.__name__
            later = {each.name for each in dataclasses.fields(kind) if each.metadata.get("written") == "where given"}
            assert set(data) == {each.name for each in dataclasses.fields(kind)} - later

        round_trip()

    @pytest.mark.parametrize("kind", PREDICTORS, ids=lambda kind: kind.__name__)
    def test_predictors(self, kind):
        @settings(deadline=None, max_examples=40)
        @given(PREDICTORS[kind])
        def round_trip(predictor):
            config = DitCacheConfig(2, 3, predictor=predictor)
            read = again(config)
            assert read == config
            assert kinds(read.predictor) == kinds(predictor)
            assert json.loads(config.to_json())["predictor"]["kind"] == kind.__name__

        round_trip()

    @settings(deadline=None, max_examples=40)
    @given(policies, predictors, st.dictionaries(st.text(max_size=8), changes, max_size=3), changes)
    def test_whole_configurations(self, policy, predictor, overrides, given):
        assume("kind" not in overrides)
        given = {"policy": policy, "predictor": predictor, "cache_device": "cpu", **given}
        config = DitCacheConfig(**given, overrides=overrides)
        assert again(config) == config

    def test_a_mask_with_levels_and_a_policy_inside(self):
        """Nothing is left out: each field here differs from its default."""
        inner = EasyCache(0.3, 4, 2, 1, False, "max")
        config = DitCacheConfig(
            cache_block_start=2,
            compute_last=1,
            fingerprint="f",
            policy=Mask((1, 0, 0), (1.0, 0.5, 0.25), inner),
            predictor=Taylor(3, "step"),
            cache_dtype="bfloat16",
            cache_device="cpu",
            free_at_end=False,
            overrides={"a.b": {"policy": {"dynamic": Threshold(0.5)}, "predictor": Fitted((None, (1.5,)))}},
        )
        assert json.loads(config.to_json()) == {
            "schema": 2,
            "kind": "DitCacheConfig",
            "cache_step_start": None,
            "cache_step_interval": None,
            "cache_block_start": 2,
            "cache_num_blocks": None,
            "fingerprint": "f",
            "compute_last": 1,
            "policy": {
                "kind": "Mask",
                "steps": [1, 0, 0],
                "sigmas": [1.0, 0.5, 0.25],
                "dynamic": {
                    "kind": "EasyCache",
                    "threshold": 0.3,
                    "max_warmup_steps": 4,
                    "max_continuous_cached_steps": 2,
                    "last_steps_computed": 1,
                    "separate_branches": False,
                    "reduce": "max",
                },
            },
            "predictor": {"kind": "Taylor", "order": 3, "axis": "step"},
            "cache_dtype": "bfloat16",
            "cache_device": "cpu",
            "free_at_end": False,
            "overrides": {
                "a.b": {
                    "policy": {"dynamic": json.loads(DitCacheConfig(policy=Threshold(0.5)).to_json())["policy"]},
                    "predictor": {"kind": "Fitted", "coefficients": [None, [1.5]]},
                }
            },
        }
        assert again(config) == config

    def test_a_file(self, tmp_path):
        config = DitCacheConfig(
            policy=Mask("fast", dynamic=Threshold(0.1)), predictor=Linear(), overrides={"Größe": {"compute_last": 2}}
        )
        config.save(tmp_path / "c.json")
        assert DitCacheConfig.load(tmp_path / "c.json") == config
        assert DitCacheConfig.load(str(tmp_path / "c.json")) == config

    @pytest.mark.parametrize(
        ("text", "error", "match"),
        [
            ("{", ValueError, "the text is not JSON"),
            ('{"kind": "DitCacheConfig", "schema": 9}', ValueError, "schema 9 is not known"),
            (
                '{"kind": "DitCacheConfig", "schema": 2}',
                ValueError,
                "lacks cache_step_start, cache_step_interval, cache_block_start, cache_num_blocks$",
            ),
        ],
    )
    def test_a_bad_file_is_named(self, tmp_path, text, error, match):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(error, match=r"bad\.json: .*" + match):
            DitCacheConfig.load(tmp_path / "bad.json")

    def test_a_wrong_type_in_a_file_is_named(self, tmp_path):
        text = DitCacheConfig(policy=Threshold(0.1)).to_json().replace("0.1", '"0.1"')
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(TypeError, match=r"bad\.json: residual_diff_threshold must be a number, not '0.1' \(str\)"):
            DitCacheConfig.load(tmp_path / "bad.json")

    @pytest.mark.parametrize(
        ("change", "error", "match"),
        [
            ({"policy": {"kind": "Never"}}, ValueError, "no policy or predictor 'Never': known are Interval, Mask"),
            ({"policy": {"kind": None}}, ValueError, "no policy or predictor None"),
            pytest.param(
                {"policy": {"kind": ["Interval"]}},
                ValueError,
                "no policy or predictor",
            ),
            ({"policy": {"kind": "Threshold"}}, ValueError, "Threshold lacks residual_diff_threshold$"),
            ({"policy": {"kind": "Interval", "start": 1}}, ValueError, "Interval lacks interval$"),
            ({"policy": {"kind": "Interval", "begin": 1}}, ValueError, "Interval has no field begin"),
            ({"policy": {"kind": "Interval", "start": 1, "interval": "2"}}, TypeError, "interval must be an int"),
            ({"policy": {"kind": "Interval", "start": 1, "interval": 0}}, ValueError, "interval=0"),
            ({"policy": {"kind": "Mask", "steps": [0, 1]}}, ValueError, "the first of them 1"),
            ({"policy": {"kind": "Mask", "steps": [1], "dynamic": {"kind": "No"}}}, ValueError, "predictor 'No'"),
            ({"policy": {"kind": "Mask", "steps": [1], "dynamic": {"start": 1}}}, TypeError, "dynamic="),
            ({"policy": {"start": 1, "interval": 2}}, TypeError, "policy must be a Policy such as Threshold"),
            ({"policy": {"kind": "Linear"}}, TypeError, "policy must be a Policy"),
            ({"policy": "fast"}, TypeError, "policy must be a Policy"),
            (
                {"predictor": {"kind": "Interval", "start": 0, "interval": 2}},
                TypeError,
                "predictor must be a Predictor",
            ),
            ({"predictor": None}, TypeError, r"predictor must be a Predictor such as Linear\(\), not None"),
            ({"predictor": {"kind": "Taylor", "order": -1}}, ValueError, "order=-1"),
            ({"predictor": {"kind": "Fitted", "coefficients": [[1.0]]}}, ValueError, "must begin with None"),
            ({"overrides": None}, TypeError, "overrides must be a mapping"),
            ({"overrides": [{}]}, TypeError, "overrides must be a mapping"),
            ({"overrides": {"a": 1}}, TypeError, "overrides must be a mapping"),
            ({"overrides": {"a": {"speed": 1}}}, ValueError, r"overrides\['a'\]: no such field: speed"),
            ({"overrides": {"a": {"policy": {"kind": "No"}}}}, ValueError, "no policy or predictor 'No'"),
            ({"free_at_end": 1}, TypeError, "free_at_end must be True or False"),
            ({"cache_dtype": "float64"}, ValueError, "cache_dtype='float64': there are float32, bfloat16"),
            ({"cache_device": "cuda"}, ValueError, "cache_device='cuda'"),
        ],
    )
    def test_bad_parts(self, change, error, match):
        data = {**json.loads(DitCacheConfig(policy=Interval(1, 2)).to_json()), **change}
        with pytest.raises(error, match=match):
            DitCacheConfig.from_json(json.dumps(data))

    def test_a_policy_of_ones_own_is_not_written(self):
        @dataclasses.dataclass(frozen=True)
        class Mine(Threshold):
            pass

        config = DitCacheConfig(policy=Mine(0.1))
        with pytest.raises(TypeError, match="Mine is not one of the library's own"):
            config.to_json()
        with pytest.raises(TypeError, match="Mine is not one of the library's own"):
            DitCacheConfig(policy=Mask((1, 0), dynamic=Mine(0.1))).to_json()


# --- what is refused ------------------------------------------------------------------------------------------------


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({"cache_step_start": 1, "policy": Interval(1, 2)}, ValueError, "give one of both"),
            ({"cache_step_interval": 2, "policy": Interval(1, 2)}, ValueError, "give one of both"),
            ({"cache_step_start": 1, "cache_step_interval": 2, "policy": Threshold(0.1)}, ValueError, "one of both"),
            ({"cache_step_start": 1}, TypeError, "cache_step_start=1 alone: give cache_step_interval as well"),
            ({}, TypeError, "nothing says when to reuse: give policy"),
            ({"policy": 0.1}, TypeError, r"policy must be a Policy such as Threshold\(0.08\), not 0.1"),
            ({"policy": Threshold}, TypeError, "policy must be a Policy"),
            ({"policy": Linear()}, TypeError, "policy must be a Policy"),
            ({"policy": {"residual_diff_threshold": 0.1}}, TypeError, "policy must be a Policy"),
        ],
    )
    def test_when(self, fields, error, match):
        with pytest.raises(error, match=match):
            DitCacheConfig(**fields)

    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({"cache_num_blocks": 3, "compute_last": 1}, ValueError, "cache_num_blocks and compute_last both say"),
            ({"compute_last": -1}, ValueError, "compute_last=-1 is out of range"),
            ({"compute_last": None}, TypeError, "compute_last must be an int"),
            ({"compute_last": 1.0}, TypeError, "compute_last must be an int"),
            ({"cache_num_blocks": 0}, ValueError, "cache_num_blocks=0"),
            ({"cache_block_start": None}, TypeError, "cache_block_start must be an int"),
            ({"predictor": None}, TypeError, "predictor must be a Predictor"),
            ({"predictor": Threshold(0.1)}, TypeError, "predictor must be a Predictor"),
            ({"predictor": Linear}, TypeError, "predictor must be a Predictor"),
            ({"cache_dtype": torch.float16}, ValueError, "cache_dtype='float16': there are float32"),
            ({"cache_device": "cuda:0"}, ValueError, "cache_device='cuda:0'"),
            ({"free_at_end": None}, TypeError, "free_at_end must be True or False"),
            ({"fingerprint": 3}, TypeError, "fingerprint must be a string or None"),
            ({"overrides": ["transformer"]}, TypeError, "overrides must be a mapping of names"),
            ({"overrides": {"t": Threshold(0.1)}}, TypeError, "overrides must be a mapping of names"),
            ({"overrides": {"t": {"overrides": {}}}}, ValueError, r"overrides\['t'\]: no such field: overrides"),
            ({"overrides": {"t": {"fingerprint": "a"}}}, ValueError, r"overrides\['t'\]: no such field: fingerprint"),
            ({"overrides": {"t": {"cache_blocks": 2}}}, ValueError, r"overrides\['t'\]: no such field: cache_blocks"),
            ({"overrides": {"t": {"cache_block_start": "2"}}}, TypeError, r"overrides\['t'\]: cache_block_start must"),
            ({"overrides": {"t": {"cache_block_start": -1}}}, ValueError, r"overrides\['t'\]: cache_block_start=-1"),
            ({"overrides": {"t": {"policy": {"max_warm": 2}}}}, ValueError, r"'t'\]: Threshold has no field max_warm"),
            ({"overrides": {"t": {"policy": {"residual_diff_threshold": 0}}}}, ValueError, r"\['t'\]: residual_diff"),
            ({"overrides": {"t": {"policy": 5}}}, TypeError, r"overrides\['t'\]: policy must be a Policy"),
            ({"overrides": {"t": {"policy": None}}}, TypeError, r"overrides\['t'\]: nothing says when"),
            ({"overrides": {"t": {"predictor": {"order": 2}}}}, ValueError, r"\['t'\]: Reuse has no field order"),
            ({"overrides": {"t": {"cache_step_start": 1}}}, TypeError, r"\['t'\]: cache_step_start=1 alone"),
            (
                {"overrides": {"t": {"cache_step_start": 1, "policy": Interval(0, 2)}}},
                ValueError,
                r"\['t'\]: cache_step_start and cache_step_interval say when, and so does policy",
            ),
            (
                {"overrides": {"t": {"cache_num_blocks": 2, "compute_last": 1}}},
                ValueError,
                r"\['t'\]: cache_num_blocks and compute_last both say",
            ),
        ],
    )
    def test_the_rest(self, fields, error, match):
        with pytest.raises(error, match=match):
            DitCacheConfig(**{"policy": Threshold(0.1), **fields})

    def test_two_numbers_are_an_interval(self):
        assert DitCacheConfig(2, 3).when == Interval(2, 3)
        assert DitCacheConfig(policy=Interval(2, 3)).when == Interval(2, 3)
        assert DitCacheConfig(policy=Interval(2, 3)) != DitCacheConfig(2, 3)

    def test_numpy_numbers(self):
        config = DitCacheConfig(
            np.int64(2), np.int32(3), np.uint8(1), np.int16(4), predictor=Fitted((None, (np.float32(0.5),)))
        )
        assert config == DitCacheConfig(2, 3, 1, 4, predictor=Fitted((None, (0.5,))))
        assert again(config) == config
        for part in (
            Threshold(np.float32(0.25), np.int64(4), max_accumulated_diff=np.float64(0.5)),
            Budget(np.float64(2.0), np.int32(2)),
            EasyCache(np.float16(0.25), np.int64(3), np.int8(2)),
            MagnitudeRatio([np.float32(1.0), np.float32(0.5)], np.float64(0.25), np.int64(2), np.float32(0.5)),
            Mask(np.array([1, 0, 1]), np.array([1.0, 0.5, 0.25], np.float32), Threshold(np.float64(0.5))),
            Interval(np.int64(2), np.int64(3)),
        ):
            config = DitCacheConfig(policy=part, compute_last=np.int64(1))
            assert again(config) == config
            assert not any("numpy" in str(kind) for kind in str(kinds(config.policy)).split())

    @pytest.mark.parametrize(
        ("make", "wanted"),
        [
            (lambda: MagnitudeRatio(np.array([1.0, 0.5])), MagnitudeRatio((1.0, 0.5))),
            (lambda: MagnitudeRatio(np.array([[1.0, 0.5], [1.0, 0.25]])), MagnitudeRatio(((1.0, 0.5), (1.0, 0.25)))),
            (lambda: Fitted(np.array([None, (1.5,)], dtype=object)), Fitted((None, (1.5,)))),
        ],
    )
    def test_numpy_arrays_as_masks_take_them(self, make, wanted):
        assert make() == wanted

    def test_numpy_numbers_in_overrides(self):
        config = DitCacheConfig(0, 2, overrides={"transformer": {"cache_block_start": np.int64(1)}})
        assert again(config) == DitCacheConfig(0, 2, overrides={"transformer": {"cache_block_start": 1}})

    def test_any_mapping_in_overrides(self):
        given = types.MappingProxyType({"policy": types.MappingProxyType({"start": 1})})
        assert again(DitCacheConfig(0, 2, overrides=types.MappingProxyType({"t": given}))).overrides == {
            "t": {"policy": {"start": 1}}
        }

    def test_lists_in_overrides(self):
        config = DitCacheConfig(policy=Mask((1, 0)), overrides={"t": {"policy": {"steps": [1, 1, 0]}}})
        assert again(config) == config

    def test_frozen_to_the_bottom(self):
        inner = {"start": 1}
        config = DitCacheConfig(0, 2, overrides={"t": {"policy": inner}})
        inner["start"] = 7
        assert config.overridden("t").when == Interval(1, 2)

    def test_what_was_given_stays_as_it_was(self):
        overrides = {"t": {"cache_block_start": 1, "policy": {"start": 2}}}
        before = copy.deepcopy(overrides)
        config = DitCacheConfig(0, 2, overrides=overrides)
        config.overridden("t")
        assert overrides == before
        overrides["t"]["cache_block_start"] = 9
        overrides["u"] = {}
        assert config.overrides == before

    @pytest.mark.parametrize("sigmas", [(float("nan"),), (float("inf"),), (-1.0,)])
    def test_levels_are_noise_levels(self, sigmas):
        with pytest.raises(ValueError, match=r"a sigma=|noise levels"):
            Mask((1,), sigmas)

    def test_str_names_what_is_not_as_usual(self):
        config = DitCacheConfig(policy=Mask("fast", dynamic=Threshold(0.1, 4)), predictor=Linear())
        assert str(config) == (
            "DitCacheConfig(policy=Mask(steps='fast', dynamic=Threshold(residual_diff_threshold=0.1, "
            "max_warmup_steps=4)), predictor=Linear())"
        )
