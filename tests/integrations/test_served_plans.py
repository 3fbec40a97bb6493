"""Which plan a request of a server is drawn with."""

import pytest

from dithooks import CachePlan, DitCacheConfig, PlanTiers
from dithooks.demo import load_plan
from dithooks.errors import InvalidSetting
from dithooks.integrations.serving.served_plans import ServedPlans

TIERS = PlanTiers({"high": load_plan("1.5x"), "fast": load_plan("3x")})


@pytest.mark.parametrize(
    ("own", "asked", "tier"),
    [
        (None, None, None),
        ("fast", None, "fast"),
        ("fast", True, "fast"),
        ("fast", "high", "high"),
        ("fast", "fastest at >= 20 dB", "fast"),
        ("fast", False, None),
        ("fast", "off", None),
        ("off", None, None),
        ("off", "high", "high"),
    ],
)
def test_a_request_has_the_tier_it_names_else_the_servers_own(own, asked, tier):
    assert ServedPlans(TIERS, own).choose(asked) is (None if tier is None else TIERS.plans[tier])


@pytest.mark.parametrize(
    ("asked", "why"), [("slow", "no tier 'slow'"), (True, "several tiers"), (7, "dithooks=7"), ({}, "dithooks=")]
)
def test_what_cannot_be_asked_for_is_refused_by_name(asked, why):
    with pytest.raises(InvalidSetting, match=why):
        ServedPlans(TIERS).choose(asked)


def test_the_servers_own_tier_is_checked_when_it_starts():
    with pytest.raises(InvalidSetting, match="no tier 'slow'"):
        ServedPlans(TIERS, "slow")


@pytest.mark.parametrize(
    ("asked", "tier"), [((None, "fast"), "fast"), (("high", "fast"), "high"), (("fast", False), None), ((), None)]
)
def test_nobody_in_a_batch_is_drawn_worse_than_asked_for(asked, tier):
    assert ServedPlans(TIERS, "fast").choose_for_batch(asked) is (None if tier is None else TIERS.plans[tier])


def test_files_of_tiers_plans_and_configurations_are_read(tmp_path, monkeypatch):
    file = tmp_path / "plans.json"
    monkeypatch.setenv("DITHOOKS_PLAN", str(file))
    TIERS.save(file)
    assert ServedPlans.from_environment().choose(None) is None
    monkeypatch.setenv("DITHOOKS_TIER", "high")
    assert ServedPlans.from_environment().choose(None) == load_plan("1.5x")
    monkeypatch.delenv("DITHOOKS_TIER")
    load_plan("3x").save(file)
    assert isinstance(ServedPlans.from_environment().choose(None), CachePlan)
    DitCacheConfig(1, 2).save(file)
    assert ServedPlans.from_environment().choose(None) == DitCacheConfig(1, 2)
    monkeypatch.delenv("DITHOOKS_PLAN")
    assert ServedPlans.from_environment() is None
