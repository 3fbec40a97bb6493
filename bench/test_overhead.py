"""What an attached cache costs where it never reuses: ``pytest bench/test_overhead.py -s``.

Two copies of the transformer, one with the cache attached, are called in turns, so that both meet the same weather on
the machine; half-way they exchange roles. The ratio of each pair counts; the figure is the median of these.
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
from dithooks.environment.machine import machine

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
    given, twins = inputs(batch), [copy.deepcopy(transformer), copy.deepcopy(transformer)]
    times = {"plain": [], "attached": []}

    def turn():
        """One call of each, in an order that changes."""
        count = len(times["plain"])
        timestep = torch.full((batch,), 1 - (count % PAIRS) / (2 * PAIRS))
        for name, model in list(models.items())[:: 1 if count % 2 else -1]:
            begin = time.perf_counter()
            model(timestep=timestep, **given)
            times[name].append(time.perf_counter() - begin)

    def both():
        for _ in range(PAIRS):
            turn()

    def half(attached):
        """The other copy is the plain one, so that where their weights lie in memory cancels out."""
        models.update(attached=twins[attached], plain=twins[1 - attached])
        with dit_cache(twins[attached], NEVER) as cache:
            both()
            assert (cache.stats.computed_calls, cache.stats.reused_calls) == (PAIRS, 0)

    models: dict[str, torch.nn.Module] = {}
    benchmark.pedantic(lambda: [half(0), half(1)], rounds=1)
    ratios = [b / a for a, b in zip(times["plain"], times["attached"], strict=True)]
    halves = [statistics.median(ratios[:PAIRS]), statistics.median(ratios[PAIRS:])]
    cost = statistics.geometric_mean(halves) - 1
    spread = statistics.quantiles([b / a for a, b in pairwise(times["plain"])], n=4)
    benchmark.extra_info.update(cost=cost, halves=halves, plain_ms=1e3 * statistics.median(times["plain"]))
    print(
        f"\nbatch {batch}: plain {1e3 * statistics.median(times['plain']):.2f} ms, attached {cost:+.2%} "
        f"({halves[0] - 1:+.2%} and {halves[1] - 1:+.2%} with the copies exchanged; quartiles of one plain call to the "
        f"next: {spread[0]:.3f} … {spread[2]:.3f}); {machine()}"
    )
