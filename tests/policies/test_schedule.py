"""The recurrence of the configuration, by hand and by formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Ladder, Net, Pipe, latents, prompt

from dithooks import DitCacheConfig, dit_cache


def run_ladder(model, times):
    return [model(torch.zeros(1), torch.tensor(t)).item() for t in times]


def test_golden_numbers_of_five_blocks_and_eight_steps():
    """Blocks add 1t, 2t, 3t, 4t, 5t to h = 0; the range is blocks 1…3, whose residual is 9t.

    start 2, interval 3: computed at steps 0, 1, 2, 5 (t = 8, 7, 6, 3), where the output is 15t. Reused at 3, 4 with the
    residual of t = 6 (54) and at 6, 7 with that of t = 3 (27), the outer blocks adding 6t.
    """
    model, times = Ladder(5), [8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]
    with dit_cache(model, DitCacheConfig(2, 3, cache_block_start=1, cache_num_blocks=3)) as cache:
        got = run_ladder(model, times)
        assert cache.stats.reasons == {"warm-up": 2, "refresh": 2, "reuse": 4}
        assert (cache.stats.blocks_run, cache.stats.blocks_total) == (4 * 5 + 4 * 2, 40)
    assert got == [120.0, 105.0, 90.0, 84.0, 78.0, 45.0, 39.0, 33.0]
    assert run_ladder(model, times) == [15 * t for t in times]


def test_golden_numbers_with_an_input_that_moves():
    """The residual is added to this step's input: h = 100·step, whole list as range, start 0, interval 2."""
    model, times = Ladder(3), [4.0, 3.0, 2.0, 1.0]
    with dit_cache(model, DitCacheConfig(0, 2, 0, 3)):
        got = [model(torch.tensor([100.0 * s]), torch.tensor(t)).item() for s, t in enumerate(times)]
    assert got == [24.0, 100 + 24.0, 200 + 12.0, 300 + 12.0]


@pytest.mark.parametrize(
    ("start", "interval", "computed"), [(0, 2, "10101010"), (3, 2, "11110101"), (1, 4, "11000100")]
)
def test_which_steps_compute(start, interval, computed):
    net, seen = Net("single"), []
    pipe = Pipe(net)
    with dit_cache(pipe, DitCacheConfig(start, interval, 0, 5)):
        pipe(latents(), at=lambda step: seen.append(net.executions))
        seen.append(net.executions)
    assert "".join("1" if more else "0" for more in np.diff(seen)) == computed


@settings(deadline=None, max_examples=40)
@given(
    depth=st.integers(1, 6),
    steps=st.integers(1, 12),
    start=st.integers(0, 13),
    interval=st.integers(2, 6),
    data=st.data(),
)
@pytest.mark.filterwarnings("ignore:.*reuse.*")
def test_block_executions_and_values_follow_the_formula(depth, steps, start, interval, data):
    first = data.draw(st.integers(0, depth - 1))
    count = data.draw(st.integers(1, depth - first))
    rates, times = np.arange(1.0, depth + 1), np.arange(steps, 0, -1.0)
    inside = rates[first : first + count].sum()
    computed = [t < start or (t - start) % interval == 0 for t in range(steps)]
    expected, residual = [], None
    for t in range(steps):
        residual = inside * times[t] if computed[t] else residual
        expected.append((rates.sum() - inside) * times[t] + residual)
    model = Ladder(depth)
    with dit_cache(model, DitCacheConfig(start, interval, first, count)) as cache:
        got = run_ladder(model, [float(t) for t in times])
        reused = steps - sum(computed)
        assert cache.stats.blocks_run == steps * depth - reused * count
        assert (cache.stats.computed_calls, cache.stats.reused_calls) == (sum(computed), reused)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("kind", ["single", "in_place", "swapped", "straight", "positional", "two_lists"])
def test_computing_every_step_changes_no_bit(kind):
    pipe, x, e = Pipe(Net(kind)), latents(), prompt()
    prompts = [None] if kind in ("single", "in_place") else [e]
    plain = pipe(x, prompts=prompts)
    handle = dit_cache(pipe, DitCacheConfig(8, 2, 0, 5))
    with pytest.warns(UserWarning, match="nothing will be reused in a run of 8 steps: warm-up: 8"):
        attached = pipe(x, prompts=prompts)
    assert torch.equal(attached, plain)
    assert handle.stats.computed_calls == 8
    handle.remove()


def test_interval_one_attaches_nothing_and_says_so():
    pipe, x = Pipe(Net()), latents()
    blocks = list(pipe.transformer.blocks)
    plain = pipe(x)
    with pytest.warns(UserWarning, match="cache_step_interval=1"):
        handle = dit_cache(pipe, DitCacheConfig(0, 1, 0, 5))
    assert all(a is b for a, b in zip(blocks, pipe.transformer.blocks, strict=True))
    assert torch.equal(pipe(x), plain)
    handle.remove()


def test_stats_count_what_the_blocks_did():
    net = Net("swapped")
    pipe = Pipe(net)
    with dit_cache(pipe, DitCacheConfig(2, 2, 1, 3)) as cache:
        pipe(latents(), prompts=[prompt(), prompt()])
        stats = cache.stats
        assert stats.blocks_run == 16 * 5 - stats.reused_calls * 3
        assert net.executions == stats.blocks_run + 5 - 3  # the first residual was tested on the call it came from
        assert stats.calls == 16
        # per branch: image (2, 6, 8) and text (2, 3, 8) in float32
        assert (stats.bytes_peak, stats.bytes_held) == (2 * (2 * 6 * 8 + 2 * 3 * 8) * 4, 0)
    assert cache.stats.blocks_run == stats.blocks_run
    assert cache.stats.bytes_peak == stats.bytes_peak
