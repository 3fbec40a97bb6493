"""A residual with NaN or infinity is never added: the step is computed instead, counted, and that is said once."""

import math
import warnings

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, Linear, Mask, Threshold, dit_cache, timestep_scope
from dithooks.engine.finite_check import FiniteCheck

SAID = "a residual is not finite"
STEPS = 8


class Block(nn.Module):
    def __init__(self, model):
        super().__init__()
        object.__setattr__(self, "model", model)

    def forward(self, hidden_states):
        return hidden_states + self.model.effect


class Model(nn.Module):
    """Its blocks add ``effect``, and its output is finite whatever that is."""

    def __init__(self):
        super().__init__()
        self.effect = torch.ones(1, 3, 4)
        self.blocks, self.left = nn.ModuleList(Block(self) for _ in range(3)), None

    def forward(self, hidden_states, timestep):
        h = hidden_states
        for block in self.blocks:
            h = block(h)
        self.left = h.clone()
        return h.nan_to_num(0, 1, -1)


def run(model, config, effects, dtype=torch.float32, x=0.0, **options):
    """A run whose blocks add these numbers, one a step; returns what left them, the decisions and what was said."""
    left = []
    with warnings.catch_warnings(record=True) as caught, dit_cache(model, config, **options) as cache, torch.no_grad():
        warnings.simplefilter("always")
        for step, effect in enumerate(effects):
            model.effect = torch.ones(1, 3, 4, dtype=dtype)
            model.effect[0, 1, 2] = effect
            with timestep_scope(step, steps=len(effects)):
                model(torch.full((1, 3, 4), x + step, dtype=dtype), torch.tensor(1 - step / STEPS))
            left.append(model.left[0, 1, 2].item())
        decisions = [(each.reuse, str(each.reason)) for each in cache.decisions]
        reasons = cache.stats.reasons
    return left, decisions, reasons, [str(each.message) for each in caught if "finite" in str(each.message)]


INTERVAL = DitCacheConfig(0, 2, 0, 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("options", [{}, {"verify": False}], ids=str)
def test_it_is_computed_instead(bad, options):
    """Step 2 is computed and not finite, so that step 3 is computed, too; step 4 is, as planned, and step 5 reuses."""
    effects = [1.0, 9.0, bad, 2.0, 3.0, 9.0, 4.0, 9.0]
    left, decisions, reasons, said = run(Model(), INTERVAL, effects, **options)
    assert [reuse for reuse, _ in decisions] == [False, True, False, False, False, True, False, True]
    assert decisions[3][1] == "residual not finite"
    assert reasons["residual not finite"] == 1
    assert not math.isfinite(left[2])
    by_hand = [0 + 3 * 1, 1 + 3 * 1, None, 3 + 3 * 2, 4 + 3 * 3, 5 + 3 * 3, 6 + 3 * 4, 7 + 3 * 4]
    assert [value for number, value in enumerate(left) if number != 2] == [v for v in by_hand if v is not None]
    assert len(said) == 1
    assert SAID in said[0]
    assert len(said[0]) < 400


def test_it_is_said_once_of_a_handle():
    effects = [1.0, 9.0, math.nan, 9.0, math.nan, 9.0, math.nan, 9.0]
    _, decisions, reasons, said = run(Model(), INTERVAL, effects)
    assert [number for number, (reuse, _) in enumerate(decisions) if reuse] == [1]
    assert reasons["residual not finite"] == 3  # at 3, 5 and 7, as 2, 4 and 6 are computed as planned
    assert len(said) == 1


def test_an_older_one_has_no_part_in_a_forecast():
    """Of two residuals that a line needs, the older one is infinite: the newest one is taken as it is."""
    config = DitCacheConfig(
        cache_block_start=0, cache_num_blocks=3, policy=Mask((1, 1, 1, 0, 1, 0, 0, 0)), predictor=Linear()
    )
    effects = [1.0, math.inf, 2.0, 9.0, 3.0, 9.0, 9.0, 9.0]
    left, decisions, _, said = run(Model(), config, effects)
    assert [reuse for reuse, _ in decisions] == [False, False, False, True, False, True, True, True]
    assert left[3] == pytest.approx(3 + 3 * 2)  # not through step 1
    assert left[5] == pytest.approx(5 + 3 * 3.5)  # through the steps 2 and 4
    assert len(said) == 1


def test_half_precision_overflows_in_the_difference():
    """−40,000 in, 40,000 out: both are numbers of float16, their difference is not."""
    model = Model()
    left, decisions, _, said = run(
        model, INTERVAL, [1.0, 1.0, 26_000.0, 1.0, 1.0, 1.0], dtype=torch.float16, x=-40_000.0
    )
    assert math.isfinite(left[2])
    assert [reuse for reuse, _ in decisions] == [False, True, False, False, False, True]
    assert all(map(math.isfinite, left))
    assert len(said) == 1


def test_half_precision_overflows_in_a_forecast():
    """Two residuals of float16 whose line leaves its numbers: computed instead, though each of them is finite."""
    config = DitCacheConfig(
        cache_block_start=0, cache_num_blocks=3, policy=Mask((1, 1, 0, 0, 0, 0)), predictor=Linear()
    )
    left, decisions, _, said = run(Model(), config, [100.0, 12_000.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    assert (left[2], decisions[2]) == (2 + 3 * 1, (False, "residual not finite"))
    assert all(map(math.isfinite, left))
    assert len(said) == 1
    same, decisions, _, said = run(Model(), config, [100.0, 200.0, 1.0, 2.0, 3.0, 4.0], dtype=torch.float16)
    assert (same[2], decisions[2][0], said) == (2 + 3 * 300, True, [])


def test_a_policy_that_looks():
    config = DitCacheConfig(cache_block_start=0, cache_num_blocks=3, policy=Threshold(1e9, max_warmup_steps=2))
    left, decisions, _, said = run(Model(), config, [1.0, math.inf, 2.0, 9.0, 9.0])
    assert [reuse for reuse, _ in decisions] == [False, False, False, True, True]
    assert left[2:] == [2 + 3 * 2, 3 + 3 * 2, 4 + 3 * 2]
    assert len(said) == 1


def test_reading_waits_once_for_each_computed_step(monkeypatch):
    """Nothing is read at a computed step, nor again at the second reuse of a residual."""
    read = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: read.append(self) or original(self))
    model, counts = Model(), []
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 4, 0, 3)):
        for step in range(8):
            with timestep_scope(step, steps=8):
                model(torch.zeros(1, 3, 4), torch.tensor(1.0))
            counts.append(len(read))
    assert [after - before for before, after in zip([0, *counts], counts, strict=False)] == [0, 1, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2])
def test_the_check(dtype):
    assert FiniteCheck([torch.tensor([1.0, -2.0]).to(dtype), torch.tensor([[4.0]]).to(dtype)]).peak == 4
    for bad in (math.nan, math.inf):
        check = FiniteCheck([torch.tensor([1.0]).to(dtype), torch.tensor([0.0, bad, 1.0]).to(dtype)])
        assert not math.isfinite(check.peak)
    assert FiniteCheck([torch.empty(0, 3).to(dtype)]).peak == 0
    assert FiniteCheck([torch.empty(2, 3, device="meta").to(dtype)]).peak == 0
