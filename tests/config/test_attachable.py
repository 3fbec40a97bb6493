"""What stands for a configuration is taken as one; what is nearly right is named in the error."""

import json
from types import SimpleNamespace

import pytest
import torch
from toys import Net

from dithooks import CachePlan, DitCacheConfig, Interval, Linear, Mask, PlanTiers, Threshold, dit_cache
from dithooks.config.attachable import attachable
from dithooks.demo import load_plan

PLAN = load_plan("2x")
TIERS = PlanTiers({"good": load_plan("1.5x"), "fast": PLAN})
CONFIG = DitCacheConfig(2, 3, cache_block_start=1, predictor=Linear())


@pytest.mark.parametrize("kept", [PLAN, TIERS, CONFIG], ids=["plan", "tiers", "configuration"])
def test_a_file_of_each_kind(kept, tmp_path):
    """By its path, as a string or not, and what was read from it by other means."""
    kept.save(path := tmp_path / "kept.json")
    assert attachable(str(path)) == attachable(path) == attachable(json.loads(path.read_text())) == kept


@pytest.mark.parametrize("policy", [Threshold(0.1), Mask("fast"), Interval(2, 3)], ids=str)
def test_a_policy_alone_is_for_all_blocks(policy):
    assert attachable(policy) == DitCacheConfig(policy=policy)


def test_the_fields_of_a_configuration():
    given = {"cache_step_interval": 3, "predictor": {"kind": "Linear"}, "cache_dtype": torch.bfloat16}
    assert attachable(given) == DitCacheConfig(0, 3, predictor=Linear(), cache_dtype="bfloat16")


def test_the_result_of_a_search():
    """Of one target its plan; of several its tiers, and then a tier has to be named."""
    assert attachable(SimpleNamespace(plans=PlanTiers({"2x": PLAN}))) == PLAN
    found = SimpleNamespace(plans=TIERS)
    assert attachable(found) == TIERS
    with pytest.raises(ValueError, match="the plans are tiers, 'good', 'fast': give tier="):
        dit_cache(Net(), found)


def test_attached_by_what_stands_for_it():
    """The blocks that run are those of the configuration itself."""
    given = torch.ones(1, 3, 4)
    drawn = []
    for config in (DitCacheConfig(policy=Interval(0, 2)), Interval(0, 2), {"cache_step_interval": 2}):
        torch.manual_seed(0)
        net = Net()
        with torch.no_grad(), dit_cache(net, config) as cache:
            drawn.append([net(given * (1 + step), timestep=torch.tensor([9.0 - step])) for step in range(4)])
        assert (cache.stats.reused_calls, cache.stats.calls) == (2, 4)
    assert all(torch.equal(a, b) for others in drawn[1:] for a, b in zip(drawn[0], others, strict=True))


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ("no such.json", FileNotFoundError, "config='no such.json' is the path of no file: give that of a plan"),
        (
            {"cache_step_intervall": 2},
            ValueError,
            "config has no field cache_step_intervall: did you mean cache_step_i",
        ),
        ({"policy": {"kind": "Threshhold"}}, ValueError, "there is no policy or predictor 'Threshhold'"),
        ({"kind": "CachePlan", "schema": 2}, ValueError, "CachePlan lacks pieces"),
        ({"kind": "DitCacheConfig", "cache_dtype": torch.bfloat16}, TypeError, "as in a file, and not JSON"),
        (SimpleNamespace(plans=[PLAN]), TypeError, "config must be a DitCacheConfig, a CachePlan, a policy such as"),
        (CachePlan, TypeError, "config must be a DitCacheConfig"),
    ],
)
def test_what_is_nothing_of_it(given, kind, words):
    with pytest.raises(kind, match=words) as caught:
        dit_cache(Net(), given)
    assert len(str(caught.value)) <= 300


def test_a_misspelt_override_names_the_nearest_field():
    with pytest.raises(ValueError, match=r"no such field: cache_blok_start: did you mean cache_block_start\?"):
        DitCacheConfig(0, 2, overrides={"transformer_2": {"cache_blok_start": 1}})


def test_one_of_several_ranges_is_a_mapping_of_its_fields():
    """Also in a mapping, and in a file, where each of its parts else says what it is."""
    steps = (1, 0, 1, 0)
    further = {"cache_block_start": 3, "policy": {"kind": "Mask", "steps": list(steps)}}
    given = {"cache_num_blocks": 3, "cache_step_interval": 2, "more_ranges": [further]}
    behind = DitCacheConfig(cache_block_start=3, policy=Mask(steps))
    wanted = DitCacheConfig(cache_step_interval=2, cache_num_blocks=3, more_ranges=(behind,))
    assert attachable(given) == wanted
    data = json.loads(wanted.to_json())
    assert DitCacheConfig.from_json(json.dumps({**data, "more_ranges": [further]})) == wanted


@pytest.mark.parametrize(
    ("further", "error", "match"),
    [
        ({"cache_block_start": "x", "cache_step_interval": 2}, TypeError, r"more_ranges\[1\]: cache_block_start must"),
        ({"cache_block_start": 4}, TypeError, r"more_ranges\[1\]: nothing says when to reuse"),
        ({"cache_block_begin": 4}, ValueError, r"more_ranges\[1\](: it)? has no field cache_block_begin: did you mean"),
    ],
)
def test_errors_name_the_range(further, error, match):
    good = {"cache_block_start": 2, "cache_num_blocks": 1, "cache_step_interval": 2}
    given = {"cache_num_blocks": 1, "cache_step_interval": 2, "more_ranges": [good, further]}
    for read in (attachable, lambda fields: DitCacheConfig(**fields)):
        with pytest.raises(error, match=match):
            read(given)
