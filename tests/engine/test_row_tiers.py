"""Requests that choose among tiers: each is drawn as its tier says, and what cannot be is refused by name."""

from dataclasses import replace

import pytest
import torch
from test_rows import STEPS, WIDTH, Loop, Small, by_hand, latents, time, warm_up
from toys import Pipe

from dithooks import CachePlan, DitCacheConfig, Mask, PlanTiers, TargetMissed, dit_cache
from dithooks.blocks.block_lists import fingerprint
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.errors import InvalidSetting, WrongType
from dithooks.recording.record import recordable

pytestmark = pytest.mark.core

FOUND = Provenance("2026-11-30", {}, "CPU", 1, 2.0, "by hand", 1.9, 0.01)
HIGH, FAST = (1, 1, 0, 1, 1, 0), (1, 0, 0, 1, 0, 0)


def piece(steps, path="", first=0, blocks=4, payload="residual"):
    weights = tuple(None if computed else (1.0,) for computed in steps)
    return TransformerPlan(path, first, blocks, 4, steps, weights, None, payload=payload)


def plan(target, speed, psnr, *pieces):
    chains = recordable(target, None)
    made = PlanTarget("Small", fingerprint(chains), 4 * len(chains), "float32", STEPS, None, (5, WIDTH))
    return CachePlan(pieces, made, replace(FOUND, measured_speedup=speed, psnr=psnr))


def tiers(model):
    return PlanTiers({"high": plan(model, 1.5, 50.0, piece(HIGH)), "fast": plan(model, 3.0, 34.0, piece(FAST))})


def test_each_request_is_drawn_by_its_own_tier():
    """Three ask by name, by promise, and for nothing; the blocks run for the rows whose tier computes the step."""
    model = Small()
    asked = {"a": {"tier": "fast"}, "b": {"tier": "fastest at ≥ 35 dB"}, "c": {}}
    masks = {"a": FAST, "b": HIGH, "c": HIGH}
    with dit_cache(model, tiers(model), tier="high") as cache:
        loop = Loop(model, cache)
        for number, (name, settings) in enumerate(asked.items()):
            loop.add(name, number, steps=STEPS, **settings)
        warm_up(model, cache)
        assert cache.forecast("a") == tuple(map(float, FAST))
        assert cache.forecast("b") == cache.forecast("c") == tuple(map(float, HIGH))
        for step in range(STEPS):
            model.passed()
            loop.tick("a", "b", "c")
            wanted = sum(mask[step] for mask in masks.values())
            assert model.passed() == ([wanted] if wanted else [])
        for number, (name, mask) in enumerate(masks.items()):
            assert torch.equal(loop.x[name], by_hand(model, latents(number), mask)[-1])


def test_tiers_of_the_requests_own():
    """The cache is attached with one plan, or with other tiers, of the same blocks."""
    model = Small()
    plans = tiers(model)
    other = PlanTiers({"fast": plan(model, 2.0, 40.0, piece((1, 1, 0, 0, 1, 0)))})
    for config, tier in ((plans.select("high"), None), (DitCacheConfig(policy=Mask(HIGH)), None), (other, "fast")):
        with dit_cache(model, config, tier=tier) as cache:
            cache.request("x", plan=plans, tier="fast", steps=STEPS)
            assert cache.forecast("x") == tuple(map(float, FAST))


def test_tiers_change_with_what_is_attached():
    model = Small()
    plans = tiers(model)
    with dit_cache(model, plans.select("high")) as cache:
        with pytest.raises(InvalidSetting, match="names one of several plans, and the cache was attached with one"):
            cache.request("x", tier="fast", steps=STEPS)
        cache.update(plans, "high")
        cache.request("x", tier="fast", steps=STEPS)
        assert cache.forecast("x") == tuple(map(float, FAST))
        with pytest.raises(InvalidSetting, match="there is no tier"):
            cache.update(plans, "low")
        cache.request("y", tier="fast", steps=STEPS)  # as before
        cache.update(plans.select("fast"))
        with pytest.raises(InvalidSetting, match="attached with one") as caught:
            cache.request("z", tier="fast", steps=STEPS)
        assert len(str(caught.value)) <= 300


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"tier": "low"}, InvalidSetting, "there is no tier 'low': give one of 'high', 'fast', or ask for 'fastest at"),
        ({"tier": "fastest at ≥ 60 dB"}, TargetMissed, "no tier promises ≥ 60 dB .* the best is 'high'"),
        ({"tier": 3}, WrongType, "tier must be a str"),
        ({"plan": "tiers"}, InvalidSetting, "the plans are tiers, 'high', 'fast': give tier="),
        ({"plan": "high", "tier": "fast"}, InvalidSetting, "goes with PlanTiers, not with CachePlan"),
        ({"plan": 3.0, "tier": "fast"}, WrongType, "must be a DitCacheConfig, a CachePlan, a policy"),
    ],
)
def test_what_is_no_tier(given, error, said):
    model = Small()
    plans = tiers(model)
    if isinstance(given.get("plan"), str):
        given = {**given, "plan": plans if given["plan"] == "tiers" else plans.select("high")}
    with dit_cache(model, plans, tier="high") as cache:
        with pytest.raises(error, match=said) as caught:
            cache.request("x", steps=STEPS, **given)
        assert len(str(caught.value)) <= 300
        cache.request("x", tier="fast", steps=STEPS)  # nothing of the request that was refused is left


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (piece(FAST, first=1, blocks=3), r"tier 'fast' caches other blocks of .* than .*blocks.0 … .*blocks.3"),
        (
            piece(FAST, payload="output"),
            r"tier 'fast' caches the output of .*, and the cache is attached to its resid",
        ),
    ],
)
def test_tiers_that_mix_blocks_or_payloads(other, said):
    """They are attached one at a time, as ever; only requests of one cache cannot have both."""
    pipe = Pipe(Small())
    plans = PlanTiers({"high": plan(pipe, 1.5, 50.0, piece(HIGH)), "fast": plan(pipe, 3.0, 34.0, other)})
    with dit_cache(pipe, plans, tier="high") as cache:
        for asked in ("fast", "fastest at ≥ 30 dB"):
            with pytest.raises(InvalidSetting, match=said) as caught:
                cache.request("x", tier=asked, steps=STEPS)
            assert "plans of one batch share blocks and payload, as those of one search" in str(caught.value)
            assert len(str(caught.value)) <= 300
        cache.update(plans, "fast")
        cache.request("x", tier="fast", steps=STEPS)
        assert cache.forecast("x")[1] < 1.0


class TestTwoTransformers:
    """One for the first half of a run, one for the second."""

    @pytest.fixture
    def pipe(self):
        class Experts:
            def __init__(self):
                self.transformer, self.transformer_2 = Small(), Small()
                self.scheduler = None

        return Experts()

    def piece(self, number, steps, **changes):
        return piece(steps, path=("transformer", "transformer_2")[number], **changes)

    def plans(self, pipe, fast):
        high = self.piece(0, (1, 0, 1, 1, 1, 1)), self.piece(1, (1, 1, 1, 1, 0, 1))
        return PlanTiers({"high": plan(pipe, 1.2, 50.0, *high), "fast": plan(pipe, 2.0, 34.0, *fast)})

    def test_each_has_its_part_of_the_tier(self, pipe):
        fast = self.piece(0, (1, 0, 0, 1, 1, 1)), self.piece(1, (1, 1, 1, 1, 0, 0))
        with dit_cache(pipe, self.plans(pipe, fast), tier="high") as cache:
            cache.request("x", tier="fast", steps=STEPS)
            cache.request("y", steps=STEPS)
            x, ran = {"x": latents(1), "y": latents(2)}, []
            for step in range(STEPS):
                model = pipe.transformer if step < 3 else pipe.transformer_2
                model.passed()
                with torch.no_grad(), cache.rows([("x", step), ("y", step)]):
                    output = model(torch.cat([x["x"], x["y"]]), time(step, 2))
                ran.append(model.passed()[-1:])
                for name, own in zip(x, output.split(1), strict=True):
                    x[name] = x[name] - own / STEPS
            assert ran == [[2], [], [1], [2], [], [1]]

    def test_a_tier_that_leaves_one_uncached(self, pipe):
        """Its requests run all blocks of that one."""
        with dit_cache(pipe, self.plans(pipe, (self.piece(0, (1, 0, 0, 1, 1, 1)),)), tier="high") as cache:
            cache.request("x", tier="fast", steps=STEPS)
            assert cache.forecast("x") == (1.0, 0.5, 0.5, 1.0, 1.0, 1.0)
            x = alone = latents(1)
            for step in range(3, STEPS):
                with torch.no_grad(), cache.rows([("x", step)]):
                    x = x - pipe.transformer_2(x, time(step)) / STEPS
                assert not cache.decisions[-1].reuse
                with torch.no_grad():
                    alone = alone - Small()(alone, time(step)) / STEPS  # of the same weights, without a cache
                assert torch.equal(x, alone)

    def test_a_tier_that_caches_one_more(self, pipe):
        """The cache is not attached to that one, so it would not be as fast as it promises."""
        plans = self.plans(pipe, (self.piece(0, (1, 0, 0, 1, 1, 1)),))
        with dit_cache(pipe, plans, tier="fast") as cache:
            with pytest.raises(InvalidSetting, match=r"tier 'high' caches transformer_2 .Small., too, which") as caught:
                cache.request("x", tier="high", steps=STEPS)
            assert len(str(caught.value)) <= 300
