"""A model whose own numbers are NaN or infinite is called that, and no range is blamed for it."""

import math
import warnings

import pytest
import torch
from torch import nn
from toys import Net, latents

from dithooks import DitCacheConfig, Interval, Threshold, dit_cache, timestep_scope

SAID = "Net itself gives NaN or infinity"


def run(net, config, factors, **options):
    """A run whose inputs are multiplied by these factors; returns the decisions and what was warned of."""
    x = latents()
    with warnings.catch_warnings(record=True) as caught, dit_cache(net, config, **options) as cache, torch.no_grad():
        warnings.simplefilter("always")
        for step, factor in enumerate(factors):
            with timestep_scope(step, steps=len(factors)):
                net(x * factor + 0.01 * step, torch.tensor(1 - step / 8))
        decisions = [(each.reuse, str(each.reason)) for each in cache.decisions]
    return decisions, [str(each.message) for each in caught]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_output_that_is_never_finite(bad):
    """Nothing is reused, one warning names output and step, and none speaks of the policy or the range."""
    decisions, said = run(Net(), DitCacheConfig(0, 2, 1, 3), [bad] * 6)
    assert not any(reuse for reuse, _ in decisions)
    assert len(said) == 1
    assert said[0].startswith(f"{SAID}: output at step 1, and not there alone")


def test_one_output_that_is_not_finite_is_no_news():
    decisions, said = run(Net(), DitCacheConfig(0, 2, 1, 3), [math.nan, 1, 1, 1, 1, 1])
    # Nothing of step 0 is reused; step 1 is tested, and from then on all is as usual.
    assert [reuse for reuse, _ in decisions] == [False, False, False, True, False, True]
    assert said == []


@pytest.mark.parametrize("lead", [0, 1])
def test_a_policy_that_meets_it_at_one_step_after_another(lead):
    config = DitCacheConfig(cache_block_start=lead, policy=Threshold(0.5, 1))
    decisions, said = run(Net(), config, [1, 1, 1, math.nan, math.nan, math.nan, math.nan, math.nan], verify=False)
    assert not any(reuse for reuse, _ in decisions[3:])
    assert len(said) == 1
    assert "a residual is not finite (step 4)" in said[0]


def test_a_change_from_nothing_is_not_taken_for_it():
    """The measure is infinite where the former numbers were zeros; the model's own are finite."""

    net = Net()
    nn.init.zeros_(net.embed.weight)
    nn.init.zeros_(net.embed.bias)
    decisions, said = run(net, DitCacheConfig(policy=Threshold(0.5, 1)), [1] * 6)
    assert len([why for _, why in decisions if why == "non-finite"]) > 1
    assert [text for text in said if "NaN" in text] == []


class Cutting(nn.Module):
    """Cuts a token off between its blocks, into a new tensor: only numbers tell what became of the stream."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, timestep):
        for number, block in enumerate(self.blocks):
            x = block(x)[:, 1:].clone() if number == 1 else block(x)
        return x


@pytest.mark.parametrize("verify", [True, False])
def test_streams_that_nan_hides_are_looked_for_in_the_next_call(verify):
    model, x = Cutting(), torch.randn(2, 5, 4)
    with dit_cache(model, DitCacheConfig(0, 9, 0, 4), verify=verify) as cache, torch.no_grad():
        for step, factor in enumerate([math.nan, 1.0, 1.0]):
            with timestep_scope(step):
                out = model(x * factor, torch.tensor(0.5))
        assert [each.reuse for each in cache.decisions] == [False, False, True]
    with torch.no_grad():
        torch.testing.assert_close(out, model(x, torch.tensor(0.5)))


class Bounding(nn.Module):
    def forward(self, x):
        return torch.tanh(x) + 1


class Bounded(nn.Module):
    """Its blocks make finite numbers of infinite ones, as of padding: h out − h in is infinite, and no h out again."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Bounding() for _ in range(4))

    def forward(self, x, timestep):
        for block in self.blocks:
            x = block(x)
        return x


def test_a_residual_that_is_not_finite_though_the_output_is():
    model, x = Bounded(), torch.randn(2, 5, 4)
    x[0, 0] = math.inf
    plain = model(x, torch.tensor(0.5))
    with dit_cache(model, DitCacheConfig(policy=Interval(0, 2))) as cache, torch.no_grad():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for step in range(4):
                with timestep_scope(step, steps=4):
                    assert torch.equal(model(x, torch.tensor(0.5)), plain)
        assert cache.stats.reused_calls == 0
    assert [str(each.message).split(", ")[0] for each in caught] == [
        "Bounded itself gives NaN or infinity: the residual of blocks.0 … blocks.3 at step 1"
    ]
