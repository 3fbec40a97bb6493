"""The configuration: validation and JSON."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dithooks import DitCacheConfig

pytestmark = pytest.mark.core

GOOD = {"cache_step_start": 2, "cache_step_interval": 3, "cache_block_start": 1, "cache_num_blocks": 4}


@given(
    st.integers(0, 999),
    st.integers(1, 99),
    st.integers(0, 99),
    st.integers(1, 99),
    st.none() | st.text(max_size=20),
)
def test_json_round_trip(start, interval, first, count, fingerprint):
    config = DitCacheConfig(start, interval, first, count, fingerprint)
    assert DitCacheConfig.from_json(config.to_json()) == config


def test_files(tmp_path):
    config = DitCacheConfig(**GOOD, fingerprint="abc")
    config.save(tmp_path / "c.json")
    assert DitCacheConfig.load(tmp_path / "c.json") == config
    assert json.loads((tmp_path / "c.json").read_text()) == {
        "schema": 2,
        "kind": "DitCacheConfig",
        **GOOD,
        "fingerprint": "abc",
        "compute_last": 0,
        "policy": None,
        "predictor": {"kind": "Reuse"},
        "cache_dtype": None,
        "cache_device": None,
        "free_at_end": True,
        "overrides": {},
    }
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ValueError, match=r"bad\.json: not a DitCacheConfig"):
        DitCacheConfig.load(tmp_path / "bad.json")


@pytest.mark.parametrize(("field", "value"), [(name, -1) for name in GOOD] + [("cache_step_interval", 0)])
def test_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"{field}={value} is out of range"):
        DitCacheConfig(**{**GOOD, field: value})


def test_a_file_of_the_first_schema_is_read():
    old = {"schema": 1, "kind": "DitCacheConfig", **GOOD, "fingerprint": None}
    assert DitCacheConfig.from_json(json.dumps(old)) == DitCacheConfig(**GOOD)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (field, value)
        for field in GOOD
        for value in (True, 1.0, "2", None)
        if (field, value) not in (("cache_num_blocks", None), ("cache_step_start", None))  # to the end; from the first
    ],
)
def test_wrong_type(field, value):
    with pytest.raises(TypeError, match=field):
        DitCacheConfig(**{**GOOD, field: value})


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"schema": 3}, "schema 3"),
        ({"kind": "Plan"}, "kind"),
        ({"speed": 3}, "no field speed"),
        ({"cache_step_interval": 0}, "out of range"),
    ],
)
def test_bad_json(change, match):
    data = {**json.loads(DitCacheConfig(**GOOD).to_json()), **change}
    with pytest.raises((ValueError, TypeError), match=match):
        DitCacheConfig.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "null", '{"schema": 1, "kind": "DitCacheConfig"}'])
def test_not_a_config(text):
    with pytest.raises(ValueError, match="DitCacheConfig"):
        DitCacheConfig.from_json(text)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        DitCacheConfig(**GOOD).cache_step_start = 3
