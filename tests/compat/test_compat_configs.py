"""cache-dit's configurations: their fields, the slips in them, modifiers, and files."""

import copy
import dataclasses
import json
import pickle
import re
import sys
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toys import Net

from dithooks.compat import cache_dit
from dithooks.compat.cache_dit.configs import (
    BasicCacheConfig,
    CacheType,
    CalibratorConfig,
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
    caching_type,
    check_fields,
)
from dithooks.compat.cache_dit.loading import load_cache_config, load_configs
from dithooks.compat.cache_dit.masks import steps_mask
from dithooks.compat.cache_dit.modifiers import ParamsModifier, applied, from_keywords

DEFAULTS = {
    "cache_type": CacheType.DBCache,
    "Fn_compute_blocks": 8,
    "Bn_compute_blocks": 0,
    "residual_diff_threshold": 0.08,
    "max_accumulated_residual_diff_threshold": None,
    "max_warmup_steps": 8,
    "warmup_interval": 1,
    "max_cached_steps": -1,
    "max_continuous_cached_steps": -1,
    "enable_separate_cfg": None,
    "cfg_compute_first": False,
    "cfg_diff_compute_separate": True,
    "num_inference_steps": None,
    "steps_computation_mask": None,
    "steps_computation_policy": "dynamic",
    "force_refresh_step_hint": None,
    "force_refresh_step_policy": "once",
}
FORECAST = {
    "enable_calibrator": True,
    "enable_encoder_calibrator": True,
    "calibrator_type": "taylorseer",
    "calibrator_cache_type": "residual",
    "calibrator_kwargs": {},
    "taylorseer_order": 1,
}
NOTHING_BESIDE = {"parallelism_config": None, "attention_backend": None, "quantize_config": None}
CLASSES = [BasicCacheConfig, DBCacheConfig, CalibratorConfig, TaylorSeerCalibratorConfig]


class TestFields:
    def test_keywords_of_the_forecast(self):
        assert CalibratorConfig(calibrator_kwargs={"a": 1}).to_kwargs() == {"a": 1}
        assert CalibratorConfig().reset().to_kwargs() == {}
        given = {"a": 1}
        forecast = TaylorSeerCalibratorConfig(taylorseer_order=3, calibrator_kwargs=given)
        assert forecast.to_kwargs() == {"a": 1, "n_derivatives": 3}
        assert given == {"a": 1}

    @pytest.mark.parametrize("kind", [BasicCacheConfig, DBCacheConfig])
    def test_cache_fields_in_their_order_with_their_defaults(self, kind):
        assert list(kind().as_dict().items()) == list(DEFAULTS.items())
        assert kind(CacheType.NONE, 1, 2).Bn_compute_blocks == 2

    def test_forecast_fields_with_their_defaults(self):
        off = {**FORECAST, "enable_calibrator": False, "enable_encoder_calibrator": False}
        del off["taylorseer_order"]
        assert TaylorSeerCalibratorConfig().as_dict() == FORECAST
        assert CalibratorConfig().as_dict() == off

    def test_the_type_is_written_as_its_value(self):
        assert [str(each) for each in CacheType] == ["NONE", "DBCache", "DBPrune"]

    @given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), st.none() | st.integers(0, 9)))
    def test_update_leaves_out_none(self, values):
        config = DBCacheConfig()
        assert config.update(**values) is config
        assert config.as_dict() == {**DEFAULTS, **{name: v for name, v in values.items() if v is not None}}

    @given(st.dictionaries(st.sampled_from(sorted(DEFAULTS)), st.none() | st.integers(0, 9)), st.booleans())
    def test_reset_leaves_what_is_given(self, values, empty):
        config = DBCacheConfig(Fn_compute_blocks=3)
        assert (config.empty(**values) if empty else config.reset(**values)) is config
        assert config.as_dict() == {**dict.fromkeys(DEFAULTS), **values}

    def test_an_emptied_forecast_keeps_its_type(self):
        assert TaylorSeerCalibratorConfig().reset(taylorseer_order=2).as_dict() == {
            **dict.fromkeys(FORECAST),
            "calibrator_type": "taylorseer",
            "taylorseer_order": 2,
        }

    def test_a_dictionary_is_a_copy(self):
        config = DBCacheConfig(steps_computation_mask=[1, 0])
        config.as_dict()["steps_computation_mask"].append(1)
        assert config.steps_computation_mask == [1, 0]

    def test_two_forecasts_share_nothing(self):
        TaylorSeerCalibratorConfig().calibrator_kwargs["n"] = 1
        assert TaylorSeerCalibratorConfig().calibrator_kwargs == {}


@pytest.mark.parametrize(
    "config",
    [
        DBCacheConfig(Fn_compute_blocks=1, steps_computation_mask=[1, 0]),
        DBCacheConfig().reset(max_warmup_steps=2),
        TaylorSeerCalibratorConfig(taylorseer_order=2),
    ],
    ids=["cache", "emptied", "forecast"],
)
class TestCopies:
    @pytest.mark.parametrize(
        "copied", [copy.copy, copy.deepcopy, dataclasses.replace, lambda config: pickle.loads(pickle.dumps(config))]
    )
    def test_are_equal_and_apart(self, config, copied):
        other, before = copied(config), copy.deepcopy(config)
        assert other == config
        assert type(other) is type(config)
        other.reset()
        assert other != config
        assert config == before

    def test_replace_knows_the_fields(self, config):
        with pytest.raises(TypeError, match=f"{type(config).__name__} has no field 'fn_blocks'"):
            dataclasses.replace(config, fn_blocks=1)


class TestShort:
    @pytest.mark.parametrize(
        ("values", "short"),
        [
            ({}, "DBCache_F8B0_W8I1M0MC0_R0.08"),
            ({"max_cached_steps": 9, "max_continuous_cached_steps": 2}, "DBCache_F8B0_W8I1M9MC2_R0.08"),
            (
                {"steps_computation_mask": [1, 1, 0], "steps_computation_policy": "static"},
                "DBCache_F8B0_W8I1M0MC0_R0.08_SCM110_static",
            ),
            (
                {"num_inference_steps": 50, "force_refresh_step_hint": 25, "enable_separate_cfg": False},
                "DBCache_F8B0_W8I1M0MC0_R0.08_N50_FR25_once_CFG0",
            ),
        ],
    )
    def test_cache(self, values, short):
        assert DBCacheConfig(**values).strify() == short

    def test_emptied(self):
        assert DBCacheConfig().reset(residual_diff_threshold=0.2).strify() == "None_FNoneBNone_WNoneINoneM0MC0_R0.2"

    def test_forecast(self):
        assert CalibratorConfig().strify() == "CalibratorBase"
        assert TaylorSeerCalibratorConfig(taylorseer_order=2).strify() == "T1O2"
        assert TaylorSeerCalibratorConfig(taylorseer_order=2).strify(details=True) == "TaylorSeer_O(2)"
        assert TaylorSeerCalibratorConfig(taylorseer_order=0).strify(details=True) == "NONE"


class TestSlips:
    TOLD = "DBCacheConfig has no field 'Fn_compute_block': did you mean 'Fn_compute_blocks'?"

    @pytest.mark.parametrize(
        "slip",
        [
            lambda: DBCacheConfig(Fn_compute_block=1),
            lambda: DBCacheConfig().update(Fn_compute_block=1),
            lambda: DBCacheConfig().update(Fn_compute_block=None),
            lambda: DBCacheConfig().reset(Fn_compute_block=1),
            lambda: DBCacheConfig().empty(Fn_compute_block=1),
            lambda: check_fields(DBCacheConfig, ["max_warmup_steps", "Fn_compute_block"]),
            lambda: load_configs({"cache_config": {"Fn_compute_block": 1}}),
            lambda: load_configs({"Fn_compute_block": 1}),
            lambda: load_cache_config({"Fn_compute_block": 1}, reset=True),
        ],
    )
    def test_are_told_with_the_nearest_name(self, slip):
        with pytest.raises(TypeError, match=re.escape(self.TOLD)):
            slip()

    def test_in_an_assignment(self):
        config = DBCacheConfig()
        config.Fn_compute_blocks = 2
        with pytest.raises(TypeError, match=re.escape(self.TOLD)):
            config.Fn_compute_block = 3
        assert config == DBCacheConfig(Fn_compute_blocks=2)

    @pytest.mark.parametrize("kind", CLASSES)
    def test_every_class_has_them(self, kind):
        with pytest.raises(TypeError, match=f"{kind.__name__} has no field 'zzz': there are "):
            kind(zzz=1)

    def test_nothing_is_set_beside_one(self):
        config = DBCacheConfig()
        for set_to in (config.update, config.reset):
            with pytest.raises(TypeError, match="did you mean"):
                set_to(max_warmup_steps=3, max_warmup_step=3)
        assert config == DBCacheConfig()

    def test_subclasses_have_their_own_fields(self):
        @dataclasses.dataclass
        class Mine(DBCacheConfig):
            note: str = ""

        assert Mine(note="x", Fn_compute_blocks=1).update(note="y").note == "y"


class TestType:
    @pytest.mark.parametrize("value", [None, "DBCache", "dbcache", CacheType.DBCache])
    def test_cached(self, value):
        assert caching_type(value) is CacheType.DBCache

    @pytest.mark.parametrize("value", ["NONE", "none", CacheType.NONE])
    def test_not_cached(self, value):
        assert caching_type(value) is CacheType.NONE

    @pytest.mark.parametrize("value", ["DBPrune", CacheType.DBPrune])
    def test_pruned(self, value):
        with pytest.raises(ValueError, match=r"cache_type=DBPrune is not available: .* take DBCache"):
            caching_type(value)

    def test_unknown(self):
        with pytest.raises(ValueError, match="cache_type='TeaCache': there are 'DBCache' and 'NONE'"):
            caching_type("TeaCache")


class TestKeywords:
    def test_are_split(self):
        values, forecast = from_keywords(
            {"Fn_compute_blocks": 1, "enable_taylorseer": True, "taylorseer_order": 2, "max_cached_steps": None}, "f"
        )
        assert values == {"Fn_compute_blocks": 1}
        assert forecast == TaylorSeerCalibratorConfig(taylorseer_order=2)

    def test_the_forecast_is_switched_off(self):
        _, forecast = from_keywords({"enable_taylorseer": False, "taylorseer_order": 2}, "f")
        assert forecast is not None
        assert not forecast.enable_calibrator
        assert not forecast.enable_encoder_calibrator

    def test_the_prompts_forecast_is_as_the_other_unless_it_is_said(self):
        given = {"enable_taylorseer": True, "enable_encoder_taylorseer": False}
        assert from_keywords(given, "f")[1] == TaylorSeerCalibratorConfig(enable_encoder_calibrator=False)
        assert from_keywords({"enable_encoder_taylorseer": True}, "f")[1] == TaylorSeerCalibratorConfig(False)

    def test_all_of_the_forecast(self):
        given = {"enable_taylorseer": True, "enable_encoder_taylorseer": True, "taylorseer_cache_type": "hidden_states"}
        _, forecast = from_keywords(given, "f")
        assert forecast == TaylorSeerCalibratorConfig(calibrator_cache_type="hidden_states")

    def test_none_switches_nothing(self):
        assert from_keywords({"enable_taylorseer": None}, "f") == ({}, None)

    def test_an_order_of_nothing_is_said_to_be_one(self):
        with pytest.warns(UserWarning, match="f: taylorseer_order without enable_taylorseer does nothing"):
            assert from_keywords({"taylorseer_order": 2}, "f") == ({}, None)

    @pytest.mark.parametrize("name", ["enable_dmd", "enable_foca"])
    def test_other_forecasts_are_not_available(self, name):
        with pytest.raises(ValueError, match=f"{name}=True: this forecast is not available; take enable_taylorseer"):
            from_keywords({name: True, "dmd_history": 6}, "f")
        assert from_keywords({name: False}, "f") == ({}, None)

    def test_slips_name_who_takes_them(self):
        with pytest.raises(
            TypeError, match="enable_cache has no field 'taylor_order': did you mean 'taylorseer_order'"
        ):
            from_keywords({"taylor_order": 2}, "enable_cache")

    def test_pruning_is_told_before_its_fields(self):
        with pytest.raises(ValueError, match="DBPrune is not available"):
            from_keywords({"enable_dynamic_prune_threshold": True, "cache_type": "DBPrune"}, "f")


class TestModifiers:
    def test_fields_that_are_given_count(self):
        base, forecast = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4), TaylorSeerCalibratorConfig()
        before = copy.deepcopy((base, forecast))
        modifier = ParamsModifier(
            DBCacheConfig().reset(residual_diff_threshold=0.2), TaylorSeerCalibratorConfig().reset(taylorseer_order=2)
        )
        own = copy.deepcopy((modifier.cache_config, modifier.calibrator_config))
        got, got_forecast = applied(modifier, base, forecast)
        assert got == DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=4, residual_diff_threshold=0.2)
        assert got_forecast == TaylorSeerCalibratorConfig(taylorseer_order=2)
        assert (base, forecast) == before
        assert (modifier.cache_config, modifier.calibrator_config) == own

    def test_a_whole_configuration_counts_with_its_defaults(self):
        got, _ = applied(ParamsModifier(DBCacheConfig(Fn_compute_blocks=2)), DBCacheConfig(max_warmup_steps=4))
        assert got == DBCacheConfig(Fn_compute_blocks=2)

    def test_nothing_given_nothing_changed(self):
        base, forecast = DBCacheConfig(Fn_compute_blocks=1), CalibratorConfig()
        got = applied(ParamsModifier(), base, forecast)
        assert got == (base, forecast)
        assert got[0] is not base
        assert got[1] is not forecast

    def test_single_fields_leave_the_others(self):
        modifier = ParamsModifier(residual_diff_threshold=0.2, Bn_compute_blocks=None)
        got, forecast = applied(modifier, DBCacheConfig(max_warmup_steps=4, Bn_compute_blocks=3))
        assert got == DBCacheConfig(max_warmup_steps=4, Bn_compute_blocks=3, residual_diff_threshold=0.2)
        assert forecast is None

    def test_single_fields_go_before_the_configuration_which_stays_as_it_is(self):
        given = DBCacheConfig(residual_diff_threshold=0.2, max_warmup_steps=2)
        modifier = ParamsModifier(given, residual_diff_threshold=0.3)
        assert modifier.cache_config == DBCacheConfig(residual_diff_threshold=0.3, max_warmup_steps=2)
        assert given.residual_diff_threshold == 0.2

    def test_a_forecast_by_keywords(self):
        modifier = ParamsModifier(enable_taylorseer=True, enable_encoder_taylorseer=True, taylorseer_order=2)
        assert applied(modifier, DBCacheConfig())[1] == TaylorSeerCalibratorConfig(taylorseer_order=2)

    def test_a_forecast_over_the_plain_configuration_has_its_order(self):
        modifier = ParamsModifier(calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=2))
        got = applied(modifier, DBCacheConfig(), CalibratorConfig(calibrator_kwargs={"n_derivatives": 3}))[1]
        assert got == TaylorSeerCalibratorConfig(taylorseer_order=2)

    def test_later_changes_of_either_reach_nothing(self):
        given = DBCacheConfig().reset(steps_computation_mask=[1, 0])
        got, _ = applied(ParamsModifier(given), DBCacheConfig())
        given.steps_computation_mask.append(0)
        assert got.steps_computation_mask == [1, 0]

    def test_tensors(self):
        got, _ = applied(ParamsModifier(residual_diff_threshold=torch.tensor(0.25)), DBCacheConfig())
        assert got.residual_diff_threshold == 0.25

    def test_slips(self):
        with pytest.raises(
            TypeError, match="ParamsModifier has no field 'max_warmup': did you mean 'max_warmup_steps'"
        ):
            ParamsModifier(max_warmup=3)

    def test_something_else(self):
        with pytest.raises(TypeError, match="cache_config must be a BasicCacheConfig, not"):
            ParamsModifier({"max_warmup_steps": 3})
        with pytest.raises(TypeError, match="calibrator_config must be a CalibratorConfig, not"):
            ParamsModifier(None, DBCacheConfig())


NESTED = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 2
"""
FLAT = {
    "max_warmup_steps": 8,
    "warmup_interval": 2,
    "max_continuous_cached_steps": 2,
    "Fn_compute_blocks": 1,
    "residual_diff_threshold": 0.12,
    "enable_taylorseer": True,
    "taylorseer_order": 2,
}
READ = (
    DBCacheConfig(warmup_interval=2, max_continuous_cached_steps=2, Fn_compute_blocks=1, residual_diff_threshold=0.12),
    TaylorSeerCalibratorConfig(taylorseer_order=2),
)


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("c.yaml", NESTED),
            ("c.yml", json.dumps(FLAT)),
            ("c.json", json.dumps(FLAT)),
            ("c.json", json.dumps({"cache_config": FLAT})),
        ],
    )
    def test_every_form(self, tmp_path, name, text):
        if not name.endswith("json"):
            pytest.importorskip("yaml")
        path = written(tmp_path / name, text)
        assert load_cache_config(path) == READ
        assert load_configs(str(path)) == {"cache_config": READ[0], "calibrator_config": READ[1], **NOTHING_BESIDE}
        assert load_configs(path, return_dict=False) == (*READ, None, None, None)

    def test_mappings(self):
        given = {"cache_config": dict(FLAT)}
        assert load_cache_config(given) == load_cache_config(FLAT) == READ
        assert given == {"cache_config": FLAT}

    def test_no_forecast(self):
        assert load_configs({"max_warmup_steps": 4}) == {
            "cache_config": DBCacheConfig(max_warmup_steps=4),
            "calibrator_config": None,
            **NOTHING_BESIDE,
        }

    def test_what_is_not_in_it_is_none_with_reset(self):
        config, forecast = load_cache_config({"num_inference_steps": 50}, reset=True)
        assert config == DBCacheConfig().reset(num_inference_steps=50)
        assert forecast is None

    @pytest.mark.parametrize("nested", [True, False])
    def test_masks_by_name(self, nested):
        given = {"steps_computation_mask": "fast", "num_inference_steps": 20}
        config, _ = load_cache_config({"cache_config": given} if nested else given)
        assert config.steps_computation_mask == steps_mask(total_steps=20, mask_policy="fast")
        with pytest.raises(ValueError, match="give num_inference_steps"):
            load_cache_config({"steps_computation_mask": "fast"})

    def test_json_needs_no_yaml(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        assert load_cache_config(written(tmp_path / "c.json", json.dumps(FLAT))) == READ

    def test_yaml_without_pyyaml(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "yaml", None)
        with pytest.raises(ImportError, match=r"c\.yaml: .*pip install pyyaml"):
            load_configs(written(tmp_path / "c.yaml", NESTED))

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(repr(str(tmp_path / "none.yaml")))):
            load_configs(str(tmp_path / "none.yaml"))

    @pytest.mark.parametrize("name", NOTHING_BESIDE)
    @pytest.mark.parametrize("beside", [{}, {"cache_config": {"max_warmup_steps": 4}}])
    def test_what_is_not_caching_is_handed_on_and_refused_where_it_would_be_done(self, name, beside):
        given, told = {**beside, name: "native"}, f"{name}: caching is all this library does"
        found = load_configs(given)
        assert {each: found[each] for each in NOTHING_BESIDE} == {**NOTHING_BESIDE, name: "native"}
        assert found["cache_config"].max_warmup_steps == (4 if beside else 8)
        assert load_configs(given, return_dict=False) == tuple(found.values())
        with pytest.raises(ValueError, match=told):
            cache_dit.enable_cache(Net(), **found)
        with pytest.raises(ValueError, match=told):
            load_cache_config(given)
        assert load_configs({**beside, name: None})["cache_config"].cache_type is CacheType.DBCache

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ('{"cache_confg": {"max_warmup_steps": 4}}', "has no section 'cache_confg': did you mean 'cache_config'"),
            ('{"cache_config": {}, "max_warmup_steps": 4}', "max_warmup_steps beside cache_config: "),
            ('{"cache_config": {"max_warmup": 4}}', "has no field 'max_warmup': did you mean 'max_warmup_steps'"),
            ('{"cache_config": 4}', "cache_config must be a mapping of fields, not 4"),
            ("[1, 2]", "a mapping with the section cache_config is expected, not [1, 2]"),
            ("{", "this is not JSON"),
            ('{"enable_dmd": true}', "enable_dmd=True: this forecast is not available"),
            ('{"cache_type": "DBPrune"}', "cache_type=DBPrune is not available"),
        ],
    )
    def test_what_is_wrong_is_told_with_the_file(self, tmp_path, text, told):
        path = written(tmp_path / "c.json", text)
        with pytest.raises((TypeError, ValueError), match=re.escape(f"{path}: ") + ".*" + re.escape(told)):
            load_configs(path)

    def test_yaml_that_is_none(self, tmp_path):
        pytest.importorskip("yaml")
        with pytest.raises(ValueError, match=r"c\.yaml: this is not YAML"):
            load_configs(written(tmp_path / "c.yaml", "a: [1"))
        with pytest.raises(TypeError, match=r"e\.yaml: a mapping .* is expected, not None"):
            load_configs(written(tmp_path / "e.yaml", ""))

    def test_neither_file_nor_mapping(self):
        with pytest.raises(TypeError, match="path_or_dict must be the path of a file, or a mapping, not 4"):
            load_configs(4)

    def test_nothing_is_said_of_an_ordinary_file(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_configs({"cache_config": FLAT})
