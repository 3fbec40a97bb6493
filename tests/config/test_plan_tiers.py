"""Tiers: which plan a name or a promise gives, what a file of them may hold, and what is said where nothing fits."""

import json
import math
from dataclasses import replace

import pytest
import torch
from toys import Net, Pipe, latents

from dithooks import CachePlan, PlanTiers, TargetMissed, dit_cache, handle_of
from dithooks.blocks.block_lists import fingerprint
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.errors import InvalidSetting
from dithooks.recording.record import recordable

MADE = PlanTarget("Net", "0123456789abcdef", 4, "float32", 4, None, (6, 4))
LEAST = Provenance("2026-11-30", {}, "CPU", 1, 2.0, "by hand", 1.9, 0.01)


def tier(steps, speed, psnr=None, worst=None, made=MADE):
    weights = tuple((1.0,) if reused else None for reused in (not each for each in steps))
    piece = TransformerPlan("", 0, 4, 4, steps, weights, None)
    return CachePlan((piece,), made, replace(LEAST, measured_speedup=speed, psnr=psnr, worst=worst))


SLOW = tier((1, 1, 1, 0), 1.3, 60.0, 20.0)
MEDIUM = tier((1, 0, 1, 0), 1.9, 45.0, 35.0)
FAST = tier((1, 0, 0, 0), 3.5, 34.99, 30.0)
PLANS = PlanTiers({"fast": FAST, "high": SLOW, "medium": MEDIUM})


class TestSelection:
    @pytest.mark.parametrize(
        ("asked", "plan"),
        [
            ("high", SLOW),
            ("fast", FAST),
            ("fastest at ≥ 35 dB", MEDIUM),
            ("fastest at >= 34.99 dB", FAST),
            ("Fastest at ≥35", MEDIUM),
            (" fastest at >= 45.0dB ", MEDIUM),
            ("fastest at ≥ 45.1 dB", SLOW),
            ("fastest at mean ≥ 30 dB", FAST),
            ("fastest at worst ≥ 30 dB", FAST),
            ("fastest at worst ≥ 31 dB", MEDIUM),
        ],
    )
    def test_what_is_asked_for(self, asked, plan):
        assert PLANS.select(asked) == plan

    @pytest.mark.parametrize(
        ("asked", "said"),
        [
            (
                "fastest at ≥ 61 dB",
                r"no tier promises ≥ 61 dB \(mean\): the best is 'high', 1.30× as fast, with 60.0 dB",
            ),
            ("fastest at worst ≥ 36 dB", r"≥ 36 dB \(worst\): the best is 'medium', 1.90× as fast, with 35.0 dB"),
        ],
    )
    def test_where_nothing_fits(self, asked, said):
        """The error names the best there is, and can be told from others."""
        with pytest.raises(TargetMissed, match=said) as raised:
            PLANS.select(asked)
        assert len(str(raised.value)) <= 300

    @pytest.mark.parametrize(
        "asked", ["best", "", "fastest", "fastest at ≥ x dB", "fastest at ≥ -3 dB", "HIGH", 2, None]
    )
    def test_what_is_no_tier(self, asked):
        with pytest.raises((ValueError, TypeError), match="tier"):
            PLANS.select(asked)

    def test_plans_of_which_nothing_was_measured(self):
        """They are known by name, and by their predicted speed, but promise no PSNR."""
        plans = PlanTiers({"a": replace(SLOW, provenance=LEAST), "b": FAST})
        assert plans.select("fastest at ≥ 1 dB") == FAST
        assert list(plans.plans) == ["a", "b"]  # 1.9 predicted, 3.5 measured
        unknown = PlanTiers({"a": plans.plans["a"]})
        with pytest.raises(TargetMissed, match="no tier has a measured PSNR"):
            unknown.select("fastest at ≥ 1 dB")
        assert "mean –" in str(unknown)

    def test_a_mean_is_promised_less_its_standard_error(self):
        """38 ± 3.5 promises 34.5; so it is chosen, ranked and told of."""
        rough = tier((1, 0, 0, 1), 3.0, 38.0)
        rough = replace(rough, provenance=replace(rough.provenance, psnr_error=3.5))
        plans = PlanTiers({"rough": rough, "medium": MEDIUM})
        assert rough.provenance.promised == 34.5
        assert plans.select("fastest at ≥ 34.5 dB") == rough
        assert plans.select("fastest at ≥ 34.6 dB") == MEDIUM
        with pytest.raises(TargetMissed, match=r"the best is 'rough', 3.00× as fast, with 34.5 dB"):
            PlanTiers({"rough": rough}).select("fastest at ≥ 36 dB")
        assert PlanTiers({"rough": rough, "fast": FAST}).front == ("fast",)  # 34.99 dB at 3.5×
        assert "3.00× as fast  mean 38.0 ± 3.5 dB" in str(plans)
        assert PlanTiers.from_json(plans.to_json()) == plans
        with pytest.raises(InvalidSetting, match="psnr_error"):
            replace(rough.provenance, psnr_error=-1.0)

    def test_pictures_that_are_the_same(self):
        """Infinite PSNR is more than any."""
        same = tier((1, 1, 0, 1), 1.2, math.inf, math.inf)
        plans = PlanTiers({"same": same, "fast": FAST})
        assert plans.select("fastest at ≥ 999 dB") == same
        assert PlanTiers.from_json(plans.to_json()) == plans

    def test_of_equally_fast_ones_the_better(self):
        better = tier((1, 0, 1, 0), 3.5, 50.0)
        assert PlanTiers({"a": FAST, "b": better}).select("fastest at ≥ 20 dB") == better
        assert PlanTiers({"a": better, "b": FAST}).select("fastest at ≥ 20 dB") == better


class TestFront:
    def test_what_another_beats(self):
        """Slower and worse than another, as fast and worse, or slower and as good; it is said in the table."""
        both, worse, slower = (
            tier((1, 1, 0, 0), speed, psnr) for speed, psnr in ((1.8, 44.0), (1.9, 1.0), (1.5, 45.0))
        )
        plans = PlanTiers({"a": SLOW, "b": MEDIUM, "c": both, "d": worse, "e": slower})
        assert plans.front == ("a", "b")
        lines = {line.split()[0]: line for line in str(plans).splitlines()[1:]}
        assert [name for name, line in lines.items() if "beaten by another" in line] == ["e", "c", "d"]
        assert "1.90× as fast  mean 45.0 dB  worst 35.0 dB" in lines["b"]


class TestFiles:
    def test_saved_and_loaded(self, tmp_path):
        PLANS.save(tmp_path / "plans.json")
        assert PlanTiers.load(tmp_path / "plans.json") == PLANS
        assert list(json.loads((tmp_path / "plans.json").read_text())["plans"]) == ["high", "medium", "fast"]

    def test_one_plan_is_one_tier(self, tmp_path):
        """Named by its target; and it is read as before by itself."""
        SLOW.save(tmp_path / "plan.json")
        assert PlanTiers.load(tmp_path / "plan.json") == PlanTiers({"2x": SLOW})
        assert CachePlan.load(tmp_path / "plan.json") == SLOW

    def test_tiers_are_no_plan(self, tmp_path):
        PLANS.save(tmp_path / "plans.json")
        with pytest.raises(InvalidSetting, match=r"plans.json: not a CachePlan: .* expected, not 'PlanTiers'"):
            CachePlan.load(tmp_path / "plans.json")

    @pytest.mark.parametrize(
        ("change", "said"),
        [
            (lambda data: data["plans"].clear(), "0 tiers"),
            (lambda data: data.update(plans=[1]), "plans must be a mapping"),
            (lambda data: data["plans"].update(more=3), r"plans\['more'\]: not a CachePlan"),
            (lambda data: data["plans"]["high"].update(schema=99), r"plans\['high'\]: .*schema 99"),
            (lambda data: data["plans"]["high"].update(kind="DitCacheConfig"), "not 'DitCacheConfig'"),
            (lambda data: data["plans"]["high"]["provenance"].update(psnr="nan"), "psnr"),
            (lambda data: data["plans"]["high"]["made"].update(fingerprint="f"), "different models or runs"),
            (lambda data: data["plans"].update({"<img src=x>": data["plans"]["high"]}), "cannot name a tier"),
            (lambda data: data["plans"].update({"a|b": data["plans"]["high"]}), "cannot name a tier"),
            (lambda data: data["plans"].update({"x" * 41: data["plans"]["high"]}), "cannot name a tier"),
            (lambda data: data["plans"].update({"a\nb": data["plans"]["high"]}), "cannot name a tier"),
            (lambda data: data["plans"].update({str(n): data["plans"]["high"] for n in range(33)}), "36 tiers"),
            (lambda data: data.update(code="x"), "no field code"),
        ],
    )
    def test_what_is_refused(self, change, said):
        data = json.loads(PLANS.to_json())
        change(data)
        with pytest.raises((ValueError, TypeError), match=said):
            PlanTiers.from_json(json.dumps(data))

    def test_more_than_would_be_read_is_not_written(self, tmp_path):
        """Plans of so many steps that no reader would take their file."""
        steps = (1, *(0,) * 1999)
        piece = TransformerPlan("", 0, 4, 4, steps, (None, *((1.0,),) * 1999), None)
        plan = CachePlan((piece,), replace(MADE, steps=2000), LEAST)
        plans = PlanTiers({f"{n}": replace(plan, provenance=replace(LEAST, psnr=float(n))) for n in range(32)})
        with pytest.raises(InvalidSetting, match="more than 100,000 values"):
            plans.save(tmp_path / "plans.json")
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("given", [None, {}, [], {"a": 1}, {"fastest at ≥ 3 dB": SLOW}, {"": SLOW}, {3: SLOW}])
    def test_what_are_no_tiers(self, given):
        with pytest.raises((ValueError, TypeError), match=r"tier|plans"):
            PlanTiers(given)


class TestAttaching:
    @pytest.fixture
    def pipe(self):
        return Pipe(Net("single", 4))

    @pytest.fixture
    def plans(self, pipe):
        """Tiers for the net at hand, of one, two and three reused steps of four."""
        made = replace(MADE, fingerprint=fingerprint(recordable(pipe, None)))
        given = {"high": SLOW, "medium": MEDIUM, "fast": FAST}
        return PlanTiers({name: replace(plan, made=made) for name, plan in given.items()})

    @pytest.mark.parametrize(("asked", "reused"), [("high", 1), ("fastest at ≥ 35 dB", 2), ("fast", 3)])
    def test_the_tier_that_is_asked_for(self, pipe, plans, asked, reused):
        with dit_cache(pipe, plans, tier=asked) as cache:
            pipe(latents(), 4)
            assert cache.stats.reused_calls == reused

    def test_another_tier_meanwhile(self, pipe, plans):
        with dit_cache(pipe, plans, tier="high") as cache:
            pipe(latents(), 4)
            cache.update(plans, "fast")
            pipe(latents(), 4)
            assert cache.stats.reused_calls == 3
            with pytest.raises(TargetMissed):
                cache.update(plans, "fastest at ≥ 100 dB")
            cache.reset()
            pipe(latents(), 4)
            assert cache.stats.reused_calls == 3

    @pytest.mark.parametrize(
        ("tier", "error", "said"),
        [
            (None, ValueError, r"the plans are tiers, 'high', 'medium', 'fast': give tier="),
            ("slow", ValueError, "there is no tier 'slow'"),
            ("fastest at ≥ 99 dB", TargetMissed, "the best is 'high'"),
        ],
    )
    def test_nothing_is_attached(self, pipe, plans, tier, error, said):
        with pytest.raises(error, match=said):
            dit_cache(pipe, plans, tier=tier)
        assert handle_of(pipe) is None
        assert not any(type(block).__name__ == "SkipBlock" for block in pipe.transformer.blocks)

    def test_a_tier_of_what_are_none(self, pipe, plans):
        with pytest.raises(ValueError, match="tier='high' goes with PlanTiers, not with CachePlan"):
            dit_cache(pipe, plans.select("high"), tier="high")

    def test_pictures(self, pipe, plans):
        """They are those of the plan by itself."""
        x = latents()
        with dit_cache(pipe, plans, tier="medium"):
            ours = pipe(x, 4)
        with dit_cache(pipe, plans.plans["medium"]):
            assert torch.equal(ours, pipe(x, 4))
