"""Policies and predictors in a configuration: as JSON, checked, and overridden for what is named."""

import copy
import dataclasses
import json
import types
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from toys import Net, Pipe, latents, prompt

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
    dit_cache,
)

# --- every part there may be ----------------------------------------------------------------------------------------

amounts = st.floats(1e-6, 1e6) | st.sampled_from([0.08, 0.1, 1 / 3, 1e-300, 5e-324])
counts, some = st.integers(1, 60), st.none() | st.integers(1, 60)
looking = {"separate_branches": st.booleans(), "reduce": st.sampled_from(["mean", "max"])}
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
            assert set(data) == {each.name for each in dataclasses.fields(kind)}

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
            ('{"kind": "DitCacheConfig", "schema": 2}', ValueError, "lacks cache_block_start, cache_num_blocks"),
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
            ({"policy": {"kind": "Threshold"}}, ValueError, "Threshold lacks a field: .*'residual_diff_threshold'"),
            ({"policy": {"kind": "Interval", "start": 1}}, ValueError, "Interval lacks a field"),
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
            ({"cache_step_start": 1}, TypeError, "cache_step_interval must be an int, not None"),
            ({"cache_step_interval": 2}, TypeError, "cache_step_start must be an int, not None"),
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
            ({"cache_dtype": torch.float16}, ValueError, "cache_dtype=torch.float16: there are float32"),
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
            ({"overrides": {"t": {"cache_step_start": 1}}}, TypeError, r"\['t'\]: cache_step_interval must be an int"),
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


# --- one entry of overrides -----------------------------------------------------------------------------------------


class TestOverridden:
    BASE = DitCacheConfig(
        cache_block_start=1,
        cache_num_blocks=3,
        policy=Threshold(0.1, 4, max_cached_steps=9),
        predictor=Taylor(2),
        cache_dtype="bfloat16",
    )

    @pytest.mark.parametrize(
        ("change", "fields"),
        [
            ({}, {}),
            ({"cache_block_start": 0}, {"cache_block_start": 0}),
            ({"cache_num_blocks": None}, {"cache_num_blocks": None}),
            ({"compute_last": 2}, {"compute_last": 2, "cache_num_blocks": None}),
            ({"compute_last": 0}, {}),
            ({"policy": Interval(1, 2)}, {"policy": Interval(1, 2)}),
            ({"policy": {}}, {}),
            ({"policy": {"max_warmup_steps": 2}}, {"policy": Threshold(0.1, 2, max_cached_steps=9)}),
            ({"policy": {"max_cached_steps": None}}, {"policy": Threshold(0.1, 4)}),
            (
                {"cache_step_start": 1, "cache_step_interval": 5},
                {"policy": None, "cache_step_start": 1, "cache_step_interval": 5},
            ),
            ({"predictor": {"axis": "step"}}, {"predictor": Taylor(2, "step")}),
            ({"predictor": Reuse()}, {"predictor": Reuse()}),
            ({"cache_dtype": None, "cache_device": "cpu"}, {"cache_dtype": None, "cache_device": "cpu"}),
            ({"free_at_end": False}, {"free_at_end": False}),
        ],
    )
    def test_changes_what_it_names_and_nothing_else(self, change, fields):
        config = dataclasses.replace(self.BASE, overrides={"a": change, "b": {"cache_block_start": 7}})
        assert config.overridden("a") == dataclasses.replace(self.BASE, **fields)

    def test_of_two_numbers(self):
        base = DitCacheConfig(2, 3, overrides={"a": {"policy": {"interval": 5}}, "b": {"cache_step_start": 4}})
        assert base.overridden("a") == DitCacheConfig(policy=Interval(2, 5))
        assert base.overridden("b") == DitCacheConfig(4, 3)

    def test_of_blocks_computed_last(self):
        base = DitCacheConfig(2, 3, compute_last=2, overrides={"a": {"cache_num_blocks": 1}})
        assert base.overridden("a") == DitCacheConfig(2, 3, cache_num_blocks=1)


# --- on models ------------------------------------------------------------------------------------------------------


class Seen:
    """Counts the executions of each block, by step, with hooks of its own."""

    def __init__(self, **nets):
        self.step, self.runs, self.nets = 0, Counter(), nets
        for name, net in nets.items():
            for listed in ("blocks", "singles"):
                for index, block in enumerate(getattr(net, listed, ())):
                    block.register_forward_hook(lambda *_, key=(name, listed, index): self.count(key))
        self.blocks = {name: self.all_of(net) for name, net in nets.items()}
        self.hooks = {name: self.hooks_of(net) for name, net in nets.items()}

    def count(self, key):
        self.runs[(*key, self.step)] += 1

    def ran(self, name, listed):
        """By step, which blocks of a list ran: "11011"."""
        depth, steps = len(getattr(self.nets[name], listed)), self.step + 1
        return ["".join("1" if self.runs[name, listed, k, t] else "0" for k in range(depth)) for t in range(steps)]

    @staticmethod
    def all_of(net):
        return [*net.blocks, *getattr(net, "singles", ())]

    @staticmethod
    def hooks_of(net):
        return [(len(m._forward_hooks), len(m._forward_pre_hooks), m.__dict__.get("forward")) for m in net.modules()]

    def untouched(self):
        return all(
            all(a is b for a, b in zip(self.all_of(net), self.blocks[name], strict=True))
            and self.hooks_of(net) == self.hooks[name]
            for name, net in self.nets.items()
        )


def sample(net, config, steps=6, **more):
    """A bare model: which blocks of each list ran, by step."""
    seen, x, e = Seen(net=net), latents(), prompt()
    with dit_cache(net, config, verify=False, **more) as cache:
        for step in range(steps):
            seen.step = step
            net(x, torch.tensor(1 - step / steps), encoder_hidden_states=e)
        told, stats = cache.decisions, cache.stats
    assert seen.untouched()
    return seen, told, stats


class Pair(Pipe):
    """Two transformers: the second after half of the steps, or both at each."""

    def __init__(self, kind="two_lists", both=False):
        super().__init__(Net(kind))
        self.transformer_2, self.both = Net(kind), both
        self.seen = Seen(transformer=self.transformer, transformer_2=self.transformer_2)

    def __call__(self, steps=8):
        x, e = latents(), prompt()
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            self.seen.step = step
            models = [self.transformer, self.transformer_2]
            for model in models if self.both else [models[2 * step >= steps]]:
                x = x - model(x, timestep=t / 1000, encoder_hidden_states=e) / steps
            self.scheduler.step()
        return x


ALL = "11111"


class TestLists:
    def test_without_overrides_both_lists_are_one_range(self):
        seen, told, _ = sample(Net("two_lists"), DitCacheConfig(0, 2, cache_block_start=3))
        assert {each.range for each in told} == {"Net"}
        assert seen.ran("net", "blocks") == [ALL, "11100"] * 3
        assert seen.ran("net", "singles") == [ALL, "00000"] * 3

    def test_a_list_that_is_named_is_a_range_of_its_own_and_so_is_the_other(self):
        config = DitCacheConfig(0, 2, cache_block_start=3, overrides={"singles": {"cache_block_start": 1}})
        seen, told, stats = sample(Net("two_lists"), config)
        assert {each.range for each in told} == {"blocks", "singles"}
        assert seen.ran("net", "blocks") == [ALL, "11100"] * 3
        assert seen.ran("net", "singles") == [ALL, "10000"] * 3
        assert stats.blocks_run == 6 * 10 - 3 * (2 + 4)

    def test_only_what_is_named_differs(self):
        config = DitCacheConfig(
            1, 2, 1, 2, overrides={"singles": {"policy": {"interval": 3}, "predictor": Linear(), "compute_last": 2}}
        )
        seen, told, _ = sample(Net("two_lists"), config, steps=7)
        assert seen.ran("net", "blocks") == [ALL, ALL, "10011", ALL, "10011", ALL, "10011"]
        assert seen.ran("net", "singles") == [ALL, ALL, "10011", "10011", ALL, "10011", "10011"]
        assert [each.reason for each in told if each.range == "blocks"][:3] == ["warm-up", "refresh", "reuse"]

    def test_both_may_be_named(self):
        config = DitCacheConfig(
            0,
            2,
            overrides={
                "blocks": {"cache_step_start": 2, "cache_num_blocks": 1},
                "singles": {"policy": Mask((1, 0, 0, 0, 1, 0)), "cache_block_start": 4},
            },
        )
        with pytest.warns(UserWarning, match="nothing tells the number of steps, so the mask is taken as made"):
            seen, _, _ = sample(Net("two_lists"), config)
        assert seen.ran("net", "blocks") == [ALL, ALL, ALL, "01111", ALL, "01111"]
        assert seen.ran("net", "singles") == [ALL, "11110", "11110", "11110", ALL, "11110"]

    def test_a_policy_that_looks_for_one_list(self):
        """What its own first block did counts: block 0 of the list, not of the model."""
        net, changes = Net("two_lists"), {}
        limit = 0.05

        def before(_, args, kwargs):
            net.before = args[0]

        net.singles[0].register_forward_pre_hook(before, with_kwargs=True)

        def after(_, args, output):
            changes[len(changes)] = (output[0] - net.before).double().numpy()

        net.singles[0].register_forward_hook(after)
        policy = Threshold(limit, max_warmup_steps=2)
        config = DitCacheConfig(2, 2, overrides={"singles": {"policy": policy, "cache_block_start": 1}})
        _, told, _ = sample(net, config, steps=12)
        refreshed = 1
        mine = {each.step: each for each in told if each.range == "singles"}
        for step in range(2, 12):
            value = np.abs(changes[step] - changes[refreshed]).mean() / np.abs(changes[refreshed]).mean()
            assert mine[step].value == pytest.approx(value, rel=1e-3)
            assert mine[step].reuse == (value < limit)
            refreshed = refreshed if value < limit else step
        assert {each.reuse for each in mine.values()} == {True, False}
        assert [each.reuse for each in told if each.range == "blocks"] == [False, False, *[False, True] * 5]

    @pytest.mark.parametrize(
        ("config", "match"),
        [
            (DitCacheConfig(0, 2, 7, overrides={"singles": {"cache_block_start": 0}}), "blocks"),
            (DitCacheConfig(0, 2, overrides={"singles": {"cache_block_start": 5}}), "singles"),
            (DitCacheConfig(0, 2, 3, overrides={"singles": {"cache_num_blocks": 3}}), "singles"),
            (DitCacheConfig(0, 2, overrides={"singles": {"compute_last": 5}}), "singles"),
        ],
    )
    def test_a_range_past_the_end_of_its_list(self, config, match):
        net = Net("two_lists")
        seen = Seen(net=net)
        with pytest.raises(ValueError, match=match):
            dit_cache(net, config)
        assert seen.untouched()


class TestTransformers:
    def test_one_of_two_is_overridden(self):
        pipe = Pair()
        config = DitCacheConfig(0, 2, cache_block_start=1, overrides={"transformer_2": {"cache_block_start": 8}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            ranges = Counter(each.range for each in cache.decisions)
        assert ranges == {"transformer": 4, "transformer_2": 4}
        assert pipe.seen.ran("transformer", "blocks")[:4] == [ALL, "10000"] * 2
        assert pipe.seen.ran("transformer", "singles")[:4] == [ALL, "00000"] * 2
        assert pipe.seen.ran("transformer_2", "blocks")[4:] == [ALL] * 4
        assert pipe.seen.ran("transformer_2", "singles")[4:] == [ALL, "11100"] * 2
        assert pipe.seen.untouched()

    @pytest.mark.parametrize("name", ["transformer", "transformer_2"])
    def test_both_at_every_step(self, name):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(1, 2, overrides={name: {"policy": {"interval": 4}}}), verify=False):
            pipe()
        other = {"transformer": "transformer_2", "transformer_2": "transformer"}[name]
        assert pipe.seen.ran(name, "blocks")[:7] == [ALL, ALL, *["00000"] * 3, ALL, "00000"]
        assert pipe.seen.ran(other, "blocks") == [ALL, ALL, "00000", ALL, "00000", ALL, "00000", ALL]

    def test_the_last_step_of_two_that_are_called_at_every_step(self):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(0, 2), verify=False) as cache:
            pipe()
            last = [(each.range, each.reuse, each.reason) for each in cache.decisions if each.step == 7]
        assert last == [("transformer", True, "reuse"), ("transformer_2", True, "reuse")]

    def test_the_last_step_of_two_lists(self):
        pipe = Pipe(Net("two_lists"))
        config = DitCacheConfig(0, 2, overrides={"singles": {"cache_block_start": 1}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe(latents(), prompts=[prompt()])
            assert [each.reuse for each in cache.decisions] == [False, True] * 8
            assert cache.stats.bytes_held == 0

    def test_a_list_of_one(self):
        """Both lists of that transformer are ranges of their own; the other transformer stays one."""
        pipe = Pair(both=True)
        config = DitCacheConfig(0, 2, 2, overrides={"transformer_2.singles": {"cache_block_start": 4}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            names = {each.range for each in cache.decisions}
        assert names == {"transformer", "transformer_2.blocks", "transformer_2.singles"}
        assert pipe.seen.ran("transformer", "singles")[1] == "00000"
        assert pipe.seen.ran("transformer_2", "blocks")[1] == "11000"
        assert pipe.seen.ran("transformer_2", "singles")[1] == "11110"

    def test_a_transformer_and_a_list_of_it(self):
        """What is said of the transformer holds for the list, but for what is said of that."""
        pipe = Pair(both=True)
        config = DitCacheConfig(
            0,
            2,
            overrides={
                "transformer_2": {"cache_block_start": 1, "policy": {"interval": 4}},
                "transformer_2.singles": {"cache_block_start": 3},
            },
        )
        with dit_cache(pipe, config, verify=False):
            pipe()
        assert pipe.seen.ran("transformer", "blocks") == [ALL, "00000"] * 4
        assert pipe.seen.ran("transformer_2", "blocks")[:7] == [ALL, *["10000"] * 3, ALL, *["10000"] * 2]
        assert pipe.seen.ran("transformer_2", "singles")[:7] == [ALL, *["11100"] * 3, ALL, *["11100"] * 2]

    def test_a_list_may_change_a_field_of_the_policy_its_transformer_was_given(self):
        overrides = {
            "transformer_2": {"policy": Threshold(0.1)},
            "transformer_2.singles": {"policy": {"residual_diff_threshold": 0.2}},
        }
        dit_cache(Pair(), DitCacheConfig(0, 2, overrides=overrides)).remove()

    @pytest.mark.parametrize(
        ("name", "match"),
        [
            ("singles", "'singles' could be transformer.singles or transformer_2.singles"),
            ("blocks", "'blocks' could be transformer.blocks or transformer_2.blocks"),
            ("transformer_3", "'transformer_3' is none of transformer, transformer_2, transformer.blocks"),
            ("transformer_", "'transformer_' is none of"),
            ("ormer.blocks", "'ormer.blocks' is none of"),
            ("transformer.blocks.0", "'transformer.blocks.0' is none of"),
            ("vae", "'vae' is none of"),
            ("", "'' is none of"),
        ],
    )
    def test_names_that_are_not_understood(self, name, match):
        pipe = Pair()
        config = DitCacheConfig(0, 2, overrides={"transformer": {"cache_block_start": 1}, name: {}})
        with pytest.raises(ValueError, match=f"overrides: {match}"):
            dit_cache(pipe, config)
        assert pipe.seen.untouched()
        with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
            former = cache.config
            with pytest.raises(ValueError, match=match):
                cache.update(config)
            assert cache.config is former
            pipe()
            assert cache.stats.reused_calls == 4

    def test_one_thing_by_two_names(self):
        pipe = Pipe(Net("two_lists"))
        overrides = {"blocks": {"cache_block_start": 1}, "transformer.blocks": {"cache_block_start": 3}}
        with pytest.raises(ValueError, match="blocks"):
            dit_cache(pipe, DitCacheConfig(0, 2, overrides=overrides))

    def test_the_end_of_a_path_will_do_where_it_is_clear(self):
        pipe = Pipe(Net("two_lists"))
        ranges = []
        for name in ("singles", "transformer.singles"):
            with dit_cache(pipe, DitCacheConfig(0, 2, overrides={name: {"cache_block_start": 2}})) as cache:
                ranges.append(repr(cache))
        assert ranges[0] == ranges[1]
        assert "transformer.singles.2 … transformer.singles.4 of 5 blocks" in ranges[0]

    def test_an_update_takes_overrides_over(self):
        pipe = Pair(both=True)
        with dit_cache(pipe, DitCacheConfig(0, 2), verify=False) as cache:
            pipe(4)
            cache.update(DitCacheConfig(0, 2, overrides={"transformer_2": {"policy": Interval(0, 4)}}))
            pipe.seen.runs.clear()
            pipe(8)
            assert cache.config.overrides == {"transformer_2": {"policy": Interval(0, 4)}}
            assert again(cache.config) == cache.config
        assert pipe.seen.ran("transformer", "blocks") == [ALL, "00000"] * 4
        assert pipe.seen.ran("transformer_2", "blocks")[:7] == [ALL, *["00000"] * 3, ALL, *["00000"] * 2]

    def test_an_interval_of_one_for_one_of_them(self):
        """Nothing is attached to it."""
        pipe = Pair(both=True)
        config = DitCacheConfig(0, 2, overrides={"transformer_2": {"cache_step_interval": 1}})
        with dit_cache(pipe, config, verify=False) as cache:
            pipe()
            assert {each.range for each in cache.decisions} == {"transformer"}
        assert pipe.seen.ran("transformer_2", "blocks") == [ALL] * 8


class TestRange:
    @pytest.mark.parametrize(
        ("fields", "reused"),
        [
            ({}, "00000 00000"),
            ({"cache_num_blocks": None}, "00000 00000"),
            ({"cache_block_start": 2}, "11000 00000"),
            ({"cache_block_start": 7}, "11111 11000"),
            ({"compute_last": 1}, "00000 00001"),
            ({"compute_last": 6}, "00001 11111"),
            ({"cache_block_start": 2, "compute_last": 3}, "11000 00111"),
            ({"cache_block_start": 4, "compute_last": 5}, "11110 11111"),
            ({"cache_block_start": 4, "cache_num_blocks": 1}, "11110 11111"),
            ({"cache_block_start": 3, "cache_num_blocks": 4}, "11100 00111"),
        ],
    )
    def test_which_blocks_are_left_out(self, fields, reused):
        seen, _, stats = sample(Net("two_lists"), DitCacheConfig(0, 2, **fields))
        first, second = reused.split()
        assert seen.ran("net", "blocks") == [ALL, first] * 3
        assert seen.ran("net", "singles") == [ALL, second] * 3
        assert stats.blocks_run == 3 * 10 + 3 * reused.count("1")

    @pytest.mark.parametrize("fields", [{"compute_last": 5}, {"compute_last": 9}, {"cache_block_start": 5}])
    def test_nothing_is_left_of_it(self, fields):
        net = Net()
        seen = Seen(net=net)
        with pytest.raises(ValueError, match="5 blocks"):
            dit_cache(net, DitCacheConfig(0, 2, **fields))
        assert seen.untouched()

    def test_to_the_end_is_not_bound_to_a_depth(self):
        config = DitCacheConfig(0, 2, cache_block_start=1, compute_last=1)
        for depth in (3, 5, 8):
            seen, _, _ = sample(Net(depth=depth), config)
            assert seen.ran("net", "blocks")[1] == "1" + "0" * (depth - 2) + "1"
