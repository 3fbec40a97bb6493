"""What an attached cache costs where it never reuses: ``pytest bench/test_overhead.py -s``.

Two transformers with the same weights, one with the cache attached, are called in turns, so that both meet the same
weather on the machine. The ratio of each pair counts; the figure is the median of these.
"""

import copy
import statistics
import time
from itertools import pairwise

import pytest
import torch

from dithooks import DitCacheConfig, dit_cache
from dithooks.demo import load_pipeline
from dithooks.demo.model import position_ids

PAIRS = 400
NEVER = DitCacheConfig(cache_step_start=10**6, cache_step_interval=2, cache_block_start=0, cache_num_blocks=12)


@pytest.fixture(scope="module")
def transformer():
    return load_pipeline().transformer


def inputs(batch):
    draw = torch.Generator().manual_seed(0)
    img_ids, txt_ids = position_ids(32, 32, 8)
    return {
        "hidden_states": torch.randn(batch, 64, 48, generator=draw),
        "encoder_hidden_states": torch.randn(batch, 8, 128, generator=draw),
        "pooled_projections": torch.randn(batch, 128, generator=draw),
        "img_ids": img_ids,
        "txt_ids": txt_ids,
        "return_dict": False,
    }


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
@torch.inference_mode()
def test_attached_but_never_reusing(transformer, batch, benchmark):
    given, twin = inputs(batch), copy.deepcopy(transformer)
    times = {"plain": [], "attached": [], "plain again": []}

    def turn():
        timestep = torch.full((batch,), 1 - len(times["plain"]) / (2 * PAIRS))
        models = {"plain": transformer, "attached": twin, "plain again": transformer}
        for name in sorted(models, reverse=len(times["plain"]) % 2 == 1):
            begin = time.perf_counter()
            models[name](timestep=timestep, **given)
            times[name].append(time.perf_counter() - begin)

    with dit_cache(twin, NEVER) as cache:
        benchmark.pedantic(turn, rounds=PAIRS, warmup_rounds=0)
        assert cache.stats.computed_calls == PAIRS
        assert cache.stats.reused_calls == 0

    def median_ratio(name):
        return statistics.median(b / a for a, b in zip(times["plain"], times[name], strict=True))

    cost, noise = median_ratio("attached") - 1, median_ratio("plain again") - 1
    spread = statistics.quantiles([b / a for a, b in pairwise(times["plain"])], n=4)
    benchmark.extra_info.update(cost=cost, noise=noise, plain_ms=1e3 * statistics.median(times["plain"]))
    print(
        f"\nbatch {batch}: plain {1e3 * statistics.median(times['plain']):.2f} ms, attached {cost:+.2%}, "
        f"plain against itself {noise:+.2%} (quartiles of one call to the next: {spread[0]:.3f} … {spread[2]:.3f})"
    )
