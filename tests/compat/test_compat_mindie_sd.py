"""MindIE-SD's names for a cache of blocks, compared with its own where that is installed, and with NumPy."""

import importlib.util
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.checks import mindie_sd as check
from bench.checks.stand_ins import bare_package
from dithooks import dit_cache
from dithooks.compat.mindie_sd import CacheAgent, CacheConfig
from dithooks.engine.sessions import current_context
from dithooks.errors import InvalidSetting, WrongType

BLOCKS, STEPS = 6, 8
CONFIG = CacheConfig("dit_block_cache", BLOCKS, STEPS, step_start=2, step_interval=3, block_start=1, block_end=5)


class Tanh(torch.nn.Module):
    """h + tanh(h·w + t), and counts its calls."""

    def __init__(self, number):
        super().__init__()
        self.weight, self.calls = 0.1 + 0.05 * number, 0

    def forward(self, hidden_states, temb):
        self.calls += 1
        return hidden_states + torch.tanh(hidden_states * self.weight + temb)


def blocks():
    return [Tanh(number) for number in range(BLOCKS)]


@torch.no_grad()
def draw(cache, layers, start=1.0):
    x = torch.full((1, 3), start, dtype=torch.float64)
    for step in range(STEPS):
        h = x
        for layer in layers:
            h = cache.apply(layer, hidden_states=h, temb=0.1 * step)
        x = x - 0.1 * h
    return x.numpy()


def by_numpy(start=1.0, computed=(0, 1, 2, 5)):
    """Blocks 1 to 4 are left out at all other steps."""
    x, residual = np.full((1, 3), start), None
    for step in range(STEPS):
        h = x
        for number in range(BLOCKS):
            if number == 1 and step not in computed:
                h = h + residual
            if 1 <= number < 5 and step not in computed:
                continue
            if number == 1:
                before = h
            h = h + np.tanh(h * (0.1 + 0.05 * number) + 0.1 * step)
            if number == 4:
                residual = h - before
        x = x - 0.1 * h
    return x


def test_blocks_are_left_out_as_numbers_say():
    cache, layers = CacheAgent(CONFIG), blocks()
    for start in (1.0, -0.5):  # the second run begins anew
        assert np.allclose(draw(cache, layers, start), by_numpy(start), rtol=0, atol=1e-12)
    assert not np.allclose(by_numpy(), by_numpy(computed=range(STEPS)), rtol=0, atol=1e-3)
    assert [layer.calls for layer in layers] == [16, 8, 8, 8, 8, 16]
    assert (cache.handle.stats.calls, cache.handle.stats.reused_calls, cache.handle.stats.bytes_held) == (16, 8, 0)


@pytest.mark.skipif(importlib.util.find_spec("mindiesd") is None, reason="MindIE-SD is not installed")
def test_mindie_sd_itself_draws_the_same():
    bare_package("mindiesd")
    from mindiesd import cache_agent

    for kind in (check.OneStream, check.TwoStreams):
        assert check.compared(kind, cache_agent.CacheConfig, cache_agent.CacheAgent)["ok"]


def test_two_streams_are_given_by_position_and_returned_as_two():
    torch.manual_seed(0)
    layers = [check.TwoStreams() for _ in range(BLOCKS)]
    cache = CacheAgent(replace(CONFIG, step_start=0, step_interval=2))
    residual = None
    image, text = torch.randn(1, 4, 8), torch.randn(1, 2, 8)
    with torch.no_grad():
        for step in range(STEPS):
            h, e = image, text
            for layer in layers:
                h, e = cache.apply(layer, hidden_states=h, encoder_hidden_states=e, temb=torch.tensor(0.1 * step))
            x, y = image, text
            for number, layer in enumerate(layers):
                if number == 1 and step % 2:
                    x, y = x + residual[0], y + residual[1]
                if not (1 <= number < 5 and step % 2):
                    if number == 1:
                        before = x, y
                    x, y = layer(x, y, torch.tensor(0.1 * step))
                    if number == 4:
                        residual = x - before[0], y - before[1]
            assert torch.equal(h, x)
            assert torch.equal(e, y)
            image, text = image - 0.1 * h, text - 0.1 * e


@pytest.mark.parametrize(
    "setting",
    [{"step_interval": 1}, {"step_start": STEPS}, {"step_start": 3, "step_end": 3}, {"block_start": 5}],
)
def test_settings_that_leave_out_nothing_call_the_block_as_it_is_given(setting):
    cache, given = CacheAgent(replace(CONFIG, **setting)), []
    cache.apply(lambda *args, **kwargs: given.append((args, kwargs)), 1, hidden_states=None, temb=2)
    assert given == [((1,), {"hidden_states": None, "temb": 2})]
    assert cache.handle is None
    with pytest.raises(InvalidSetting, match="these settings leave out no block"):
        cache.config.dit_cache_config()


def test_an_exception_ends_the_run_and_the_next_one_begins_at_its_first_block():
    cache, layers = CacheAgent(CONFIG), blocks()

    def failing(hidden_states, temb):
        raise RuntimeError("out of memory, say")

    with pytest.raises(RuntimeError, match="out of memory, say"):
        draw(cache, [*layers[:3], failing])
    assert current_context()[1] is None
    assert np.allclose(draw(cache, layers), by_numpy(), rtol=0, atol=1e-12)


def test_a_run_that_was_broken_off_between_two_blocks_is_reset():
    cache, layers = CacheAgent(CONFIG), blocks()
    with torch.no_grad():
        cache.apply(layers[0], hidden_states=torch.ones(1, 3, dtype=torch.float64), temb=0.0)
    cache.reset()
    assert np.allclose(draw(cache, layers), by_numpy(), rtol=0, atol=1e-12)


def test_threads_count_for_themselves():
    cache, turns, drawn = CacheAgent(CONFIG), threading.Barrier(2, timeout=20), {}

    class Meeting(Tanh):
        def forward(self, hidden_states, temb):
            turns.wait()
            return super().forward(hidden_states, temb)

    def run(start):
        drawn[start] = draw(cache, [Meeting(0), *blocks()[1:]], start)

    threads = [threading.Thread(target=run, args=(start,)) for start in (1.0, -0.5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for start in (1.0, -0.5):
        assert np.allclose(drawn[start], by_numpy(start), rtol=0, atol=1e-12)


def test_one_block_is_left_out_by_its_residual():
    """MindIE-SD 3.1.0 adds the block's input instead, as it keeps that and never takes it off what comes out."""
    cache, layers = CacheAgent(replace(CONFIG, step_start=0, step_interval=2, block_start=2, block_end=3)), blocks()
    h = torch.ones(1, 3, dtype=torch.float64)
    with torch.no_grad():
        for layer in layers:
            before, h = h, cache.apply(layer, hidden_states=h, temb=0.0)
            if layer is layers[2]:
                residual = h - before
        h = torch.zeros(1, 3, dtype=torch.float64)
        for layer in layers[:2]:
            h = cache.apply(layer, hidden_states=h, temb=0.1)
        assert torch.equal(cache.apply(layers[2], hidden_states=h, temb=0.1), h + residual)
    assert layers[2].calls == 1


def test_the_same_settings_hold_for_a_model_that_applies_nothing():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(blocks())

        def forward(self, x, timestep):
            for block in self.blocks:
                x = block(x, timestep)
            return x

    model, x = Model(), torch.full((1, 3), 1.0, dtype=torch.float64)
    with torch.no_grad(), dit_cache(model, CONFIG.dit_cache_config()):
        for step in range(STEPS):
            x = x - 0.1 * model(x, 0.1 * step)
    assert np.allclose(x.numpy(), by_numpy(), rtol=0, atol=1e-12)


def test_a_step_end_that_has_no_effect_is_said():
    with pytest.warns(UserWarning, match="step_end=4 has no effect on 'dit_block_cache', as in MindIE-SD 3.1.0"):
        CacheAgent(replace(CONFIG, step_end=4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"method": "attention_cache"}, "method='attention_cache': attention by itself is not cached here; 'dit_block"),
        ({"method": "block_cache"}, "method='block_cache': there is 'dit_block_cache'"),
        ({"method": None}, "method=None: there is 'dit_block_cache'"),
        ({"blocks_count": 0}, "blocks_count=0 is out of range: it must be at least 1"),
        ({"steps_count": 2.5}, "steps_count"),
        ({"step_start": -1}, "step_start=-1 is out of range"),
        ({"step_interval": 0}, "step_interval=0 is out of range"),
        ({"step_end": 1}, "step_end=1 is out of range: it must be at least 2"),
        ({"block_end": 0}, "block_end=0 is out of range: it must be at least 1"),
        ({"block_end": 7}, "block_end=7 goes past blocks_count=6"),
    ],
)
def test_what_is_wrong_is_named(setting, message):
    with pytest.raises(ValueError, match=message):
        CacheAgent(replace(CONFIG, **setting))


def test_what_apply_cannot_use_is_named():
    cache = CacheAgent(CONFIG)
    with pytest.raises(WrongType, match="apply: 3 \\(int\\) cannot be called: give the block"):
        cache.apply(3, hidden_states=torch.ones(1))
    with pytest.raises(InvalidSetting, match="apply: hidden_states must be a tensor, given by name"):
        cache.apply(print, torch.ones(1))
    with pytest.raises(WrongType, match="give a CacheConfig"):
        CacheAgent({"method": "dit_block_cache"})
