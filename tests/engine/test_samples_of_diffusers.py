"""Samples of a batch that are decided each by itself, in tiny models of diffusers."""

import pytest
import torch

from dithooks import DitCacheConfig, Threshold, dit_cache, timestep_scope
from dithooks.tiny import build

STEPS = 10


def decided(cache):
    """Whether each sample reused, step by step."""
    found = {}
    for each in cache.decisions:
        found.setdefault((each.run, each.branch), []).append(each.reuse)
    return [found[key] for key in sorted(found)]


@pytest.mark.parametrize("kind", ["FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"])
def test_real_models(kind):
    """Tiny, with the shapes of the real ones: each sample is what it is alone, and they differ."""
    model, inputs = build(kind)
    speeds, begins, draw = (0.01, 0.1, 0.2), [inputs(seed) for seed in range(3)], torch.Generator().manual_seed(0)
    moves = [[torch.randn(begins[0]["hidden_states"][:1].shape, generator=draw) for _ in speeds] for _ in range(STEPS)]

    def run(numbers, reduce):
        xs = [begins[number]["hidden_states"][:1] for number in numbers]
        given = {name: value for name, value in begins[0].items() if name.endswith("_ids")}
        for name in begins[0].keys() - given.keys() - {"hidden_states"}:
            values = [begins[number][name] for number in numbers]
            is_rows = isinstance(values[0], torch.Tensor) and values[0].dim()
            given[name] = torch.cat([each[:1] for each in values]) if is_rows else values[0]
        outputs, policy = [], Threshold(0.08, max_warmup_steps=2, reduce=reduce)
        with torch.no_grad(), dit_cache(model, DitCacheConfig(cache_block_start=1, policy=policy)) as cache:
            for step in range(STEPS):
                with timestep_scope(step, sigma=1 - step / STEPS, steps=STEPS):
                    outputs.append(model(hidden_states=torch.cat(xs), **given, return_dict=False)[0])
                now = [0.01 if step % 4 == 2 else speed for speed in speeds]
                xs = [x + now[number] * moves[step][number] for x, number in zip(xs, numbers, strict=True)]
            return outputs, decided(cache)

    together, told = run([0, 1, 2], "each")
    assert len({tuple(each) for each in told}) == 3
    for number in range(3):
        alone, (own,) = run([number], "mean")
        assert told[number] == own
        for found, wanted in zip(together, alone, strict=True):
            assert float((found[number] - wanted[0]).norm() / wanted[0].norm()) < 1e-6
