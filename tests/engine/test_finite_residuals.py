"""A residual with NaN or infinity is never added: the step is computed instead, counted, and that is said once."""

import math
import warnings

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, Linear, Mask, Threshold, dit_cache, timestep_scope
from dithooks.engine import finite_check
from dithooks.engine.finite_check import FiniteCheck
from dithooks.engine.hooks import caches_of
from dithooks.engine.rank_consensus import RankVerdict

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


def test_half_precision_overflows_in_the_first_difference():
    """Nothing shows whether such a call could be made of its residual: the next computed one has to."""
    effects = [26_000.0, 26_000.0, 1.0, 9.0, 2.0, 9.0]
    left, decisions, _, _ = run(Model(), INTERVAL, effects, dtype=torch.float16, x=-40_000.0)
    assert [reuse for reuse, _ in decisions] == [False, False, False, True, False, True]
    assert left[2:] == pytest.approx([-39_998 + 3, -39_997 + 3, -39_996 + 6, -39_995 + 6], abs=32)  # as float16 rounds


class SteeredModel(Model):
    """A control is added between its blocks, as a ControlNet does."""

    control = -5_000.0

    def forward(self, hidden_states, timestep):
        h = hidden_states
        for number, block in enumerate(self.blocks):
            h = block(h) if number == 0 else block(h + self.control)
        self.left = h.clone()
        return h.nan_to_num(0, 1, -1)


def test_half_precision_overflows_without_what_the_model_adds():
    """3 · 23,300 of the blocks − 2 · 5,000 of the model are 59,900; 69,900 by themselves is no number of float16."""
    effects = [23_300.0, 23_300.0, 1.0, 9.0]
    left, decisions, _, _ = run(SteeredModel(), INTERVAL, effects, dtype=torch.float16, x=2_000.0)
    assert not decisions[1][0]
    assert left[1] == pytest.approx(2_001 + 59_900, rel=2e-3)
    assert decisions[3][0]
    assert left[3] == pytest.approx(2_003 + 3 * 1 - 2 * 5_000, rel=2e-3)


class TwoDtypes(nn.Module):
    """One stream of float32 with numbers that float16 has not, and one of float16 with small ones."""

    class Block(nn.Module):
        def forward(self, hidden_states, encoder_hidden_states):
            return hidden_states + 1e5 * hidden_states[..., :1], encoder_hidden_states + 1

    def __init__(self):
        super().__init__()
        self.blocks, self.left = nn.ModuleList(self.Block() for _ in range(2)), None

    def forward(self, hidden_states, timestep):
        h, e = hidden_states, hidden_states[:, :2].half()
        for block in self.blocks:
            h, e = block(h, e)
        self.left = h[0, 0, 1].item(), e[0, 0, 1].item()
        return h


def test_each_stream_has_the_numbers_of_its_own_dtype():
    """Δ of float32 is about 1e10, x₀ of it; that it would be too much for the other stream's float16 is no reason."""
    config = DitCacheConfig(cache_block_start=0, cache_num_blocks=2, policy=Mask((1, 1, 0, 0)), predictor=Linear())
    model, decisions = TwoDtypes(), []
    with torch.no_grad(), dit_cache(model, config) as cache:
        for step in range(4):
            with timestep_scope(step, steps=4):
                model(torch.full((1, 3, 4), 1.0 + step), torch.tensor(1 - step / 4))
        decisions = [each.reuse for each in cache.decisions]
    assert decisions == [False, False, True, True]
    by_hand = (1 + 1e5) ** 2 - 1  # Δ / x, which grows with x by the line: at step 3, x is 4
    assert model.left[0] == pytest.approx(4 + 4 * by_hand, rel=1e-4)
    assert model.left[1] == 4 + 2


class Ranks:
    """Two ranks that agree on whatever this one reports, which is noted."""

    def __init__(self):
        self.reported = []

    def report(self, place, step, run, branch, fit, sums):
        self.reported.append((step, fit))
        return fit

    def ask(self, name, report, gauge, sums, near):
        return RankVerdict(True, report, 0.0)


def with_ranks(config, effects, dtype=torch.float32):
    model, ranks = Model(), Ranks()
    with warnings.catch_warnings(), torch.no_grad(), dit_cache(model, config) as cache:
        warnings.simplefilter("ignore")
        (range_cache,) = caches_of([model])
        range_cache.decider.consensus = ranks
        for step, effect in enumerate(effects):
            model.effect = torch.full((1, 3, 4), effect, dtype=dtype)
            with timestep_scope(step, steps=len(effects)):
                model(torch.full((1, 3, 4), float(step), dtype=dtype), torch.tensor(1 - step / STEPS))
        return ranks.reported, [each.reuse for each in cache.decisions]


def test_ranks_are_told_of_an_overflow_before_they_agree():
    """Said afterwards, this rank would run the blocks that the others pass over, and wait for them."""
    config = DitCacheConfig(
        cache_block_start=0, cache_num_blocks=3, policy=Threshold(1e9, max_warmup_steps=2), predictor=Linear()
    )
    for large, is_fit in ((12_000.0, False), (200.0, True)):  # 3 · (2 · 12,000 − 100) > 65,504
        reported, reused = with_ranks(config, [100.0, large, 1.0], torch.float16)
        assert reported[-1] == (2, is_fit)
        assert reused == [False, False, is_fit]


def test_ranks_that_agree_on_nothing_look_at_nothing():
    """Without a measured change there is no exchange: what one rank alone finds must not decide."""
    _, reused = with_ranks(INTERVAL, [math.nan, 1.0, 1.0, 1.0])
    assert reused == [False, True, False, True]


def test_nothing_is_read_while_a_graph_is_captured(monkeypatch):
    """It is read at the next step that is not captured."""

    class Event:
        def synchronize(self):
            waited.append(is_captured)

    def sent(norms):
        return norms, Event()

    waited, is_captured = [], False
    monkeypatch.setattr(finite_check, "is_capturing", lambda device: is_captured)
    monkeypatch.setattr(finite_check, "_home", sent)
    monkeypatch.setattr(finite_check, "_HOST", "none")  # the host is another device here
    model = Model()
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 4, 0, 3)) as cache:
        for step in range(4):
            is_captured = step in (1, 2)
            with timestep_scope(step, steps=4):
                model(torch.zeros(1, 3, 4), torch.tensor(1.0))
        assert cache.stats.reused_calls == 3
    assert waited == [False]  # at step 3, once


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


def test_one_branch_does_not_speak_for_the_others():
    """Branches share their decisions, and what one is given is NaN from step 3 on: the other goes on reusing."""
    policy = Threshold(1e9, max_warmup_steps=2, separate_branches=False)
    model, left = Model(), []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with dit_cache(model, DitCacheConfig(cache_block_start=0, cache_num_blocks=3, policy=policy)) as cache:
            for step in range(6):
                for branch, x in enumerate((math.nan if step > 2 else 1.0, 10.0 + step)):
                    with timestep_scope(step, steps=6, branch=branch):
                        model(torch.full((1, 3, 4), x), torch.tensor(1 - step / 6))
                left.append(model.left[0, 0, 0].item())
            reused = [[each.reuse for each in cache.decisions if each.branch == number] for number in (0, 1)]
    assert reused == [[False, False, True, False, False, False], [False, False, True, True, True, True]]
    assert left == [10 + step + 3 for step in range(6)]


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
    assert FiniteCheck([torch.tensor([1.0, 2j]), torch.tensor([complex(1.0, -3.0)])]).peak == pytest.approx(10**0.5)
    assert math.isnan(FiniteCheck([torch.tensor([complex(0.0, math.nan)])]).peak)
    assert FiniteCheck([torch.empty(2, 3, device="meta").to(dtype)]).peak == 0
