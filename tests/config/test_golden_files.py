"""Files that version 0.1.0 wrote are read, mean the same, and are written byte by byte as they were."""

from math import inf
from pathlib import Path

import pytest

from dithooks import (
    Budget,
    CachePlan,
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
)
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan

FILES = Path(__file__).parent / "files_of_0_1_0"
PIECE = TransformerPlan(
    "transformer", 1, 2, 4, (1, 1, 0, 0), (None, None, (1.5, -0.5), (0.25,)), (1.0, 0.75, 0.5, 0.25)
)
SECOND = TransformerPlan("transformer_2", 0, 3, 4, (1, 1, 1, 0), (None, None, None, (1.0,)), None, "step", (2, 4))
FULL = Provenance("2025-01-31", {"torch": "2.6.0"}, "CPU", 4, 2.0, "by hand", 1.9, 0.01, 1.8, inf, 0.0, 1.0, False)
LEAST = Provenance("2025-01-31", {}, "CPU", 1, 2.0, "by hand", 1.9, 0.01)
WRITTEN = {
    "config_numbers": DitCacheConfig(2, 3, 1, 4, "0123456789abcdef"),
    "config_interval": DitCacheConfig(
        policy=Interval(2, 3), predictor=Taylor(3, "step"), cache_device="cpu", free_at_end=False
    ),
    "config_threshold": DitCacheConfig(
        cache_block_start=1,
        compute_last=2,
        policy=Threshold(0.1, 4, 2, 9, 3, 0.4, 1, 7, "repeat", False, "max"),
        predictor=Linear(),
        cache_dtype="bfloat16",
    ),
    "config_mask": DitCacheConfig(
        policy=Mask((1, 0, 1, 0), (1.0, 0.75, 0.5, 0.25), EasyCache(0.05, 3, 2, 1, False, "max")),
        predictor=Fitted((None, (1.5,), None, (1.5, -0.5))),
    ),
    "config_preset": DitCacheConfig(policy=Mask("fast"), predictor=Fitted((None, (0.9,)), (1.0, 0.5))),
    "config_budget": DitCacheConfig(policy=Budget(2.5, 3, False, "max")),
    "config_magnitude": DitCacheConfig(policy=MagnitudeRatio(((1.0, 0.9, 0.8), (1.0, 0.95, 0.9)), 0.2, 3, 0.1)),
    "config_overrides": DitCacheConfig(
        0,
        2,
        overrides={
            "transformer_2": {"cache_num_blocks": None, "policy": Interval(0, 1), "predictor": Reuse()},
            "kind": {"policy": {"start": 1}, "cache_block_start": 2},  # a list's name, not the name of a class
        },
    ),
    "plan_full": CachePlan(
        (PIECE, SECOND), PlanTarget("Net+Net", "0123456789abcdef", 8, "float32", 4, "Counter", (6, 4)), FULL
    ),
    "plan_least": CachePlan((PIECE,), PlanTarget("Net+Net", "0123456789abcdef", 8, "float32", 4, None, (6, 4)), LEAST),
}


def test_every_file_is_named():
    assert {path.stem for path in FILES.iterdir()} == set(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_file_of_the_first_version(name, tmp_path):
    wanted, path = WRITTEN[name], FILES / f"{name}.json"
    read = type(wanted).load(path)
    assert read == wanted
    read.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == path.read_bytes()


def test_a_transformer_left_uncached_by_the_first_version_is_still():
    config = DitCacheConfig.load(FILES / "config_overrides.json")
    assert config.overridden("transformer_2").when.never_reuses
    assert config.overridden("kind").when == Interval(1, 2)
