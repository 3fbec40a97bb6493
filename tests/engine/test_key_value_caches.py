"""A call that fills a cache of keys and values in its blocks is computed, and neither tested nor reused."""

import warnings

import pytest
import torch
from torch import nn

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Interval,
    Mask,
    Threshold,
    WiringError,
    dit_cache,
    timestep_scope,
)

RATES = (1.0, 2.0, 4.0, 8.0, 16.0)


class Keys:
    """The cache: a key of each block, or all in one tensor."""

    def __init__(self, whole=False):
        self.keys = torch.zeros(5) if whole else [None] * 5


class Adding(nn.Module):
    """h → h + rate · t · key, where the key is that of a reference picture."""

    def __init__(self, number):
        super().__init__()
        self.number, self.rate = number, nn.Parameter(torch.tensor(RATES[number]))

    def forward(self, h, t, ref, cache):
        if ref is not None:
            cache.keys[self.number] = ref.mean() * (self.number + 1)
        return h + self.rate * t * cache.keys[self.number]


class Model(nn.Module):
    """The first call is given a reference and returns its cache; later ones are given the cache."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adding(number) for number in range(5))

    def forward(self, x, timestep, ref=None, cache=None):
        made = cache is None
        cache = Keys() if made else cache
        for block in self.blocks:
            x = block(x, timestep, ref, cache)
        return (x, cache) if made else (x,)


def effect(blocks, t):
    """What these blocks add, by hand, for a reference of twos."""
    return sum(RATES[number] * t * 2 * (number + 1) for number in blocks)


def draw(model, steps=6, given=None):
    """The outputs of a run; ``given``: the cache, which the first call is then to fill."""
    torch.manual_seed(0)
    x, ref, cache, outs = torch.randn(1, 7, 300), torch.full((1, 4), 2.0), given, []
    for step in range(steps):
        with torch.no_grad(), timestep_scope(step, steps=steps):
            out = model(x, torch.tensor(1 - step / steps), ref if step == 0 else None, cache)
        cache = out[1] if len(out) > 1 else cache
        outs.append((x, out[0]))
        x = x - out[0] / 1000
    return outs


@pytest.mark.parametrize("given", [None, "empty", "whole"])
def test_step_0_is_computed_and_the_next_computed_step_is_tested(given):
    model = Model()
    with warnings.catch_warnings(), dit_cache(model, DitCacheConfig(0, 2, 1, 3)) as cache:
        warnings.simplefilter("error")  # the cache can be copied, so that all of it is tested
        outs = draw(model, 4, given and Keys(given == "whole"))
        decisions = [(each.reuse, str(each.reason)) for each in cache.decisions]
    # Nothing of step 0 is kept, so that step 1 is computed, too.
    assert decisions == [(False, "refresh"), (False, "no anchor"), (False, "refresh"), (True, "reuse")]
    x, out = outs[3]
    torch.testing.assert_close(out, x + effect((0, 4), 1 / 4) + effect((1, 2, 3), 2 / 4))
    for step in range(3):
        torch.testing.assert_close(outs[step][1], outs[step][0] + effect(range(5), 1 - step / 4))


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "policy", [Interval(0, 2), Interval(1, 2), Mask("medium"), Threshold(0.5), EasyCache(0.5), Budget(1.5)], ids=repr
)
def test_every_policy_comes_near_the_plain_run(policy, verify):
    model = Model()
    plain = sum(out for _, out in draw(model, 12))
    with dit_cache(model, DitCacheConfig(cache_block_start=1, policy=policy), verify=verify) as cache:
        found = sum(out for _, out in draw(model, 12))
        assert cache.stats.reused_calls > 0
        assert not cache.decisions[0].reuse
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.2


def test_a_second_filling_in_a_run_is_computed():
    model = Model()
    with dit_cache(model, DitCacheConfig(0, 9, 1, 3)) as cache, torch.no_grad():
        kept, x, ref = None, torch.ones(1, 7, 300), torch.full((1, 4), 2.0)
        for step, fills in enumerate((True, False, False, True, False)):
            with timestep_scope(step):
                given = {"ref": ref, "cache": None} if fills else {"cache": kept}
                out = model(x, torch.tensor(0.5), **given)
            kept = out[1] if fills else kept
            torch.testing.assert_close(out[0], x + effect(range(5), 0.5))
            assert [float(key) for key in kept.keys] == [2.0, 4.0, 6.0, 8.0, 10.0]
        assert [each.reuse for each in cache.decisions] == [False, False, True, False, True]


@pytest.mark.parametrize("where", ["output", "cache"])
def test_blocks_that_write_at_every_step_are_refused_in_words(where):
    class Always(Model):
        def forward(self, x, timestep, cache=None):
            given, cache = cache, Keys() if cache is None else cache
            for block in self.blocks:
                x = block(x, timestep, torch.full((1, 4), 2.0), cache)
            return (x, cache) if given is None else x

    model, refused = Always(), r"output\[1\]\.keys\[1\]" if where == "output" else r"cache\.keys\[1\]"
    with dit_cache(model, DitCacheConfig(0, 2, 1, 3)) as handle, torch.no_grad():
        for step in range(2):
            with timestep_scope(step):
                model(torch.ones(1, 7, 300), torch.tensor(0.5), cache=Keys() if where == "cache" else None)
        with timestep_scope(2), pytest.raises(WiringError, match=refused) as caught:
            model(torch.ones(1, 7, 300), torch.tensor(0.5), cache=Keys() if where == "cache" else None)
        assert handle.stats.reused_calls == 0
    assert len(str(caught.value)) <= 300
