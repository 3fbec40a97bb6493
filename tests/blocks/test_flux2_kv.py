"""FLUX.2-klein's loop: the first step takes the reference's tokens and returns a cache that later steps are given."""

import pytest
import torch

from dithooks import Budget, DitCacheConfig, EasyCache, Interval, Mask, Threshold, dit_cache

pytest.importorskip("diffusers")
flux2 = pytest.importorskip("diffusers.models.transformers.transformer_flux2")
if not hasattr(flux2, "Flux2KVAttnProcessor"):
    pytest.skip("this diffusers has no Flux2KVAttnProcessor", allow_module_level=True)

import pipelines as parts  # noqa: E402

STEPS = 12


@pytest.fixture(scope="module")
def transformer():
    made = parts.part(
        "Flux2Transformer2DModel", in_channels=16, num_layers=2, num_single_layers=3, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )  # fmt: skip
    for block in made.transformer_blocks:
        block.attn.set_processor(flux2.Flux2KVAttnProcessor())
    for block in made.single_transformer_blocks:
        block.attn.set_processor(flux2.Flux2KVParallelSelfAttnProcessor())
    return made


def ids(count, time):
    places = torch.arange(count)
    return torch.stack([torch.full((count,), time), places // 4, places % 4, torch.zeros(count)], -1)[None].float()


@torch.no_grad()
def draw(transformer, scheduler):
    reference, prompt, x, cache = (
        parts.noise(1, 16, 16, seed=5),
        parts.noise(1, 5, 32, seed=1),
        parts.noise(1, 16, 16),
        None,
    )
    scheduler.set_timesteps(STEPS)
    scheduler.set_begin_index(0)
    for step, time in enumerate(scheduler.timesteps):
        same = {"timestep": time.expand(1) / 1000, "guidance": None, "encoder_hidden_states": prompt}
        same |= {"txt_ids": ids(5, 0) * 0, "return_dict": False}
        if step == 0:
            tokens, places = torch.cat([reference, x], 1), torch.cat([ids(16, 1), ids(16, 0)], 1)
            given = {"hidden_states": tokens, "img_ids": places, "kv_cache_mode": "extract", "num_ref_tokens": 16}
            velocity, cache = transformer(**given, **same)
        else:
            given = {"hidden_states": x, "img_ids": ids(16, 0), "kv_cache": cache, "kv_cache_mode": "cached"}
            velocity = transformer(**given, **same)[0]
        x = scheduler.step(velocity, time, x, return_dict=False)[0]
    return x


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    "policy",
    [Interval(0, 2), Interval(1, 2), Mask("medium"), Threshold(0.1), EasyCache(0.1), Budget(2.0)],
    ids=lambda policy: f"{type(policy).__name__} {getattr(policy, 'start', '')}",
)
def test_the_first_step_is_computed_and_later_ones_are_reused(transformer, policy, verify):
    scheduler = parts.flow()
    plain = draw(transformer, scheduler)
    with dit_cache(transformer, DitCacheConfig(policy=policy), scheduler=scheduler, verify=verify) as handle:
        found = draw(transformer, scheduler)
        assert not handle.decisions[0].reuse
        assert handle.stats.reused_calls > 0
    assert 0 < float((found - plain).norm() / plain.norm()) < 0.02
