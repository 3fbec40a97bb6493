"""Layerwise casting, which keeps weights in eight bits and casts them for each layer's call, switched on before the
cache or after it.
"""

import pytest
import torch
from models import flux
from offloading import NEVER, STATIC, kept, offloaded, run

from dithooks import DitCacheConfig, Threshold, dit_cache
from dithooks.engine.hooks import caches_of

pytestmark = [pytest.mark.line("Offload"), pytest.mark.on("tiny FLUX, float8 weights")]
EARLY = pytest.mark.parametrize("early", [True, False], ids=["cast first", "cached first"])
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
FLOAT8 = torch.float8_e4m3fn
CONFIGS = {"static": STATIC, "looking": DitCacheConfig(cache_block_start=1, policy=Threshold(0.8, max_warmup_steps=2))}


def casting(dtype):
    return lambda model: model.enable_layerwise_casting(storage_dtype=FLOAT8, compute_dtype=dtype)


def made(dtype):
    return flux().to(dtype)


def weights(model):
    return {name: tensor.dtype for name, tensor in model.named_parameters()}


@EARLY
@DTYPES
@pytest.mark.parametrize("how", CONFIGS)
def test_cached_as_in_either_order(dtype, how, early):
    """Reused steps are there, computed ones bit for bit those of the cast model without a cache, before and after."""
    reference = made(dtype)
    casting(dtype)(reference)
    plain = run(reference, dtype)
    assert not torch.equal(plain, run(made(dtype), dtype))  # eight bits do show
    with dit_cache(reference, CONFIGS[how]) as cache:
        expected, reused = run(reference, dtype), {each.step for each in cache.decisions if each.reuse}
    model = made(dtype)
    with offloaded(model, casting(dtype), CONFIGS[how], early) as cache:
        outputs = run(model, dtype)
        assert {each.step for each in cache.decisions if each.reuse} == reused
        assert cache.stats.reused_calls == len(reused) > 0
    assert torch.equal(outputs, expected)
    assert all(torch.equal(outputs[k], plain[k]) == (k not in reused) for k in range(8))
    assert torch.equal(run(model, dtype), plain)


@EARLY
@DTYPES
@pytest.mark.filterwarnings("ignore:.*a run of 8 steps reused nothing")
def test_all_computed_is_the_plain_run(dtype, early):
    """With a cache that computes every step, all outputs are bit for bit those of the cast model without it."""
    model = made(dtype)
    with offloaded(model, casting(dtype), NEVER, early) as cache:
        computed = run(model, dtype)
        assert cache.stats.reused_calls == 0
        assert cache.stats.blocks_run == cache.stats.blocks_total > 0
    assert torch.equal(computed, run(model, dtype))


@EARLY
@DTYPES
def test_residuals_are_in_the_dtype_of_the_activations(dtype, early):
    """What is kept has the dtype that is computed in, not that of the weights."""
    model, seen = made(dtype), set()
    with offloaded(model, casting(dtype), STATIC, early) as cache:
        (flow,) = caches_of(model.modules())
        flow.decider.on_anchor = lambda call, deltas: seen.update(delta.dtype for delta in deltas)
        run(model, dtype)
        assert cache.stats.bytes_peak == (16 + 5) * 32 * dtype.itemsize  # one residual: of all tokens, image and text
    assert seen == {dtype}


@EARLY
@DTYPES
def test_weights_stay_cast(dtype, early):
    """While the cache is attached and after remove(), weights are kept in eight bits, skipped blocks' too."""
    model, reference = made(dtype), made(dtype)
    casting(dtype)(reference)
    assert FLOAT8 in weights(reference).values()
    with offloaded(model, casting(dtype), STATIC, early) as cache:
        assert weights(model) == weights(reference)
        run(model, dtype)
        assert cache.stats.reused_calls == 3
        assert weights(model) == weights(reference)
    assert weights(model) == weights(reference)


def test_its_hooks_are_as_before():
    """After runs and remove(), every hook and every replaced forward is the very object that it was before."""
    model = made(torch.float32)
    casting(torch.float32)(model)
    before = kept(model)
    with dit_cache(model, STATIC) as cache:
        run(model)
        assert cache.stats.reused_calls == 3
    assert kept(model) == before
    assert model.transformer_blocks[1].attn.to_q._diffusers_hook.get_hook("layerwise_casting")
