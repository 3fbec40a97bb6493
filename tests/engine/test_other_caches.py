"""Another library's cache on the same model: refused where it was there first, else nothing is reused beside it."""

import warnings
from contextlib import nullcontext

import diffusers
import pytest
import torch
from diffusers.hooks import apply_layerwise_casting, apply_pyramid_attention_broadcast
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.tiny import build

CONFIG = DitCacheConfig(0, 2, 0, 4)
STEPS = 6


def pyramid():
    return diffusers.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    )


CACHES = {
    "PyramidAttentionBroadcastConfig": pyramid,
    "FirstBlockCacheConfig": lambda: diffusers.FirstBlockCacheConfig(threshold=0.1),
    "TaylorSeerCacheConfig": lambda: diffusers.TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "MagCacheConfig": lambda: diffusers.MagCacheConfig(num_inference_steps=STEPS, mag_ratios=torch.ones(STEPS)),
    "FasterCacheConfig": lambda: diffusers.FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        current_timestep_callback=lambda: 500,
        tensor_format="BFCHW",
        is_guidance_distilled=True,
    ),
}


def tiny():
    return build("FluxTransformer2DModel")


def run(model, inputs):
    outputs = []
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in range(STEPS):
            given = inputs()
            given["timestep"] = given["timestep"] * 0 + 1 - step / STEPS
            context = model.cache_context("cond") if model.is_cache_enabled else nullcontext()
            with context, timestep_scope(step, steps=STEPS):
                outputs.append(model(**given).sample)
    return outputs, [str(each.message) for each in caught if "another cache" in str(each.message)]


def stateful(model):
    """Whether any of diffusers' hooks that keep something is left on the model."""
    registries = [vars(each).get("_diffusers_hook") for each in model.modules()]
    return any(hook._is_stateful for each in registries if each is not None for hook in each.hooks.values())


@pytest.mark.parametrize("name", CACHES)
def test_there_before(name):
    """Refused before anything is touched, and taken when it is gone again."""
    model, inputs = tiny()
    plain, _ = run(model, inputs)
    model.enable_cache(CACHES[name]())
    with pytest.raises(ValueError, match=r"another cache enabled: call its disable_cache\(\) first"):
        dit_cache(model, CONFIG)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    model.disable_cache()
    with dit_cache(model, CONFIG) as cache:
        found, said = run(model, inputs)
        assert cache.stats.reused_calls == STEPS // 2
    assert said == []
    torch.testing.assert_close(found[0], plain[0])


def test_hooks_that_were_applied_without_the_model():
    """``apply_…`` leaves no mark on the model itself, only hooks on layers within its blocks."""
    model, _ = tiny()
    apply_pyramid_attention_broadcast(model, pyramid())
    with pytest.raises(ValueError, match=r"another cache at work \(PyramidAttentionBroadcastHook\): take it off first"):
        dit_cache(model, CONFIG)


def test_cache_dit_s_mark():
    model, _ = tiny()
    model._is_cached = True
    with pytest.raises(ValueError, match=r"another cache at work \(cache-dit or one like it\)"):
        dit_cache(model, CONFIG)


def test_an_attribute_of_a_model_s_own():
    """A name as common as this one says nothing by itself."""

    class Block(nn.Module):
        def forward(self, hidden_states):
            return hidden_states + 1

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks, self._cache_config = nn.ModuleList(Block() for _ in range(2)), {"keys": 4}

        def forward(self, hidden_states, timestep):
            for block in self.blocks:
                hidden_states = block(hidden_states)
            return hidden_states

    model = Model()
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 2, 0, 2)) as cache:
        found = [model(torch.full((1, 2, 3), 10.0 * step), torch.tensor(1.0 - step)) for step in range(2)]
        assert cache.stats.reused_calls == 1
    assert [each.unique().item() for each in found] == [2, 12]


@pytest.mark.parametrize("name", ["PyramidAttentionBroadcastConfig", "TaylorSeerCacheConfig", "FirstBlockCacheConfig"])
def test_enabled_afterwards(name):
    """From the next run on nothing is reused, and the other one does what it does alone; gone, ours goes on."""
    model, inputs = tiny()
    alone = tiny().model
    alone.enable_cache(CACHES[name]())
    expected, _ = run(alone, inputs)
    with dit_cache(model, CONFIG) as cache:
        run(model, inputs)
        assert cache.stats.reused_calls == STEPS // 2
        model.enable_cache(CACHES[name]())
        found, said = run(model, inputs)
        assert cache.stats.reused_calls == STEPS // 2
        assert len(said) == 1
        assert f"({name}), enabled since this one was attached" in said[0]
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(found, expected, strict=True))
        _, again = run(model, inputs)
        assert again == []
        model.disable_cache()
        assert not stateful(model)
        run(model, inputs)
        assert cache.stats.reused_calls == 2 * (STEPS // 2)


@pytest.mark.parametrize("kind", ["group offloading", "casting"])
def test_hooks_that_keep_nothing(kind):
    """Group offloading and layerwise casting are no caches: reused beside them as without."""
    model, inputs = tiny()
    other = tiny().model
    for each in (model, other):
        if kind == "casting":
            apply_layerwise_casting(each, torch.float16, torch.float32)
        else:
            each.enable_group_offload(
                onload_device=torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1
            )
    plain, _ = run(other, inputs)
    with dit_cache(model, CONFIG) as cache:
        found, said = run(model, inputs)
        assert cache.stats.reused_calls == STEPS // 2
    assert said == []
    torch.testing.assert_close(found[0], plain[0])
