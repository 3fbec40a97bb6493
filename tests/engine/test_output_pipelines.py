"""Whole outputs that are forecast in diffusers' own pipelines: the same pictures as a cache written by hand draws."""

import copy

import diffusers
import pipelines
import pytest
import torch
from outputs_by_hand import OutputsByHand, counted, line
from torch import nn

from dithooks import DitCacheConfig, Interval, Linear, Threshold, dit_cache
from dithooks.errors import InvalidSetting, WiringError

STEPS = 8
COMPUTED = (0, 1, 2, 4, 6)
EVERY_SECOND = DitCacheConfig(policy=Interval(2, 2), predictor=Linear(), payload="output")


def unet():
    """A U-Net as SDXL's: no part of it is a trunk."""
    model = pipelines.part(
        "UNet2DConditionModel",
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        transformer_layers_per_block=1,
        projection_class_embeddings_input_dim=6 * 8 + 32,
        cross_attention_dim=32,
        norm_num_groups=4,
    )
    pipe = diffusers.StableDiffusionXLPipeline(
        unet=model,
        vae=pipelines.image_vae(),
        scheduler=diffusers.EulerDiscreteScheduler(**pipelines.NOISE),
        **pipelines.TEXT_2,
        add_watermarker=False,
        force_zeros_for_empty_prompt=False,
    )
    call = pipelines.prompts("prompt_embeds", 5, 32) | pipelines.prompts("pooled_prompt_embeds", 32)
    return pipe, call | {"guidance_scale": 2.0, "height": 8, "width": 8, "output_type": "latent"}


def draw(pipe, call):
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        output = pipe(**call, num_inference_steps=STEPS, generator=torch.Generator().manual_seed(0))
    return torch.as_tensor(next(iter(output.values())))


def by_hand(pipe, call, name):
    model = getattr(pipe, name)
    vars(pipe)[name] = OutputsByHand(model, counted(pipe.scheduler), COMPUTED, line)
    try:
        return draw(pipe, call)
    finally:
        vars(pipe)[name] = model


@pytest.mark.parametrize("family", ["flux", "sd3", "wan", "unet"])
def test_the_picture_is_the_one_that_is_made_by_hand(family):
    pipe, call = unet() if family == "unet" else getattr(pipelines, family)()
    name = "unet" if family == "unet" else "transformer"
    model, before = getattr(pipe, name), dict(vars(pipe))
    plain, wanted = draw(pipe, call), by_hand(pipe, call, name)
    with dit_cache(pipe, EVERY_SECOND) as cache:
        found = draw(pipe, call)
        again = draw(pipe, call)
        calls = cache.stats
        assert 2 * calls.reused_calls == calls.calls * 2 * 3 / STEPS
        pickled = copy.deepcopy(pipe)
    assert type(getattr(pickled, name)) is type(model)
    assert all(value is before[key] for key, value in vars(pipe).items() if key in ("scheduler", name))
    assert torch.equal(found, again)
    scale = float((wanted - plain).abs().max())
    assert scale > 0
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3 * scale)


def test_a_unet_has_no_trunk_for_residuals_and_counts_one_block_a_call():
    pipe, call = unet()
    with pytest.raises(InvalidSetting, match="is a U-Net"):
        dit_cache(pipe, DitCacheConfig(2, 2))
    with pytest.raises(InvalidSetting, match="is a U-Net"):
        dit_cache(pipe, DitCacheConfig(2, 2, overrides={"unet": {"cache_block_start": 1}}))
    with pytest.raises(InvalidSetting, match="give the pipeline"):
        dit_cache(pipe.unet, EVERY_SECOND)
    with dit_cache(pipe, EVERY_SECOND) as cache:
        draw(pipe, call)
        assert (cache.stats.blocks_total, cache.stats.blocks_run) == (STEPS, 5)
        assert cache.config.fingerprint is not None
        own = cache.config
    with dit_cache(pipe, own) as cache:  # the fingerprint is the model's
        draw(pipe, call)
    other, _ = pipelines.flux()
    with pytest.raises(InvalidSetting, match="made for another model"):
        dit_cache(other, own)


def test_a_module_around_a_unet():
    model = unet()[0].unet
    around = nn.Sequential(nn.Identity(), model)
    around.forward = lambda x, t, **given: around[1](x, t, **given).sample
    x, given = torch.randn(1, 4, 8, 8), {"encoder_hidden_states": torch.randn(1, 5, 32)}
    given["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 32), "time_ids": torch.randn(1, 6)}
    with dit_cache(around, DitCacheConfig(policy=Interval(0, 2), payload="output")) as cache:
        assert cache.ranges[0].range == "1"
        outs = [around(x, torch.tensor(t), **given) for t in (999, 998, 997)]
        assert [record.reuse for record in cache.decisions] == [False, True, False]
    assert around[1] is model
    assert torch.equal(outs[1], outs[0])
    assert torch.equal(outs[2], model(x, torch.tensor(997), **given).sample)


def test_blocks_that_hand_outputs_past_others():
    """HunyuanDiT: no range of its blocks can be left out, but the whole of it."""
    from dithooks.tiny import build

    model, inputs = build("HunyuanDiT2DModel")
    plain = [model(**inputs(0) | {"timestep": torch.tensor([t])}).sample for t in (999.0, 998.0, 997.0)]

    class Holder:
        transformer = None

    holder = Holder()
    holder.transformer = model
    config = DitCacheConfig(policy=Interval(0, 2), payload="output")
    inner = DitCacheConfig(policy=Interval(0, 2), cache_block_start=1, cache_num_blocks=2)
    with pytest.raises(WiringError), dit_cache(holder, inner):
        holder.transformer(**inputs(0) | {"timestep": torch.tensor([999.0])})
    with dit_cache(holder, config) as cache:
        outs = [holder.transformer(**inputs(0) | {"timestep": torch.tensor([t])}) for t in (999.0, 998.0, 997.0)]
        assert [record.reuse for record in cache.decisions] == [False, True, False]
    assert all(type(out) is type(outs[0]) for out in outs)
    assert torch.equal(outs[1].sample, plain[0])
    assert torch.equal(outs[2].sample, plain[2])


def test_two_experts_have_each_their_own():
    pipe, call = pipelines.wan(experts=2)
    config = DitCacheConfig(
        policy=Interval(0, 2), payload="output", overrides={"transformer_2": {"payload": "residual"}}
    )
    models = pipe.transformer, pipe.transformer_2
    with dit_cache(pipe, config) as cache:
        draw(pipe, call)
        reused = {record.range.split(".")[0] for record in cache.decisions if record.reuse}
        assert reused == {"transformer", "transformer_2"}
        assert pipe.transformer is not models[0]
        assert pipe.transformer_2 is models[1]
    assert pipe.transformer is models[0]


def test_a_controlnet_runs_and_the_transformer_is_left_out():
    pipe, call = pipelines.controlled(pipelines.flux)
    wanted, calls = by_hand(pipe, call, "transformer"), []
    pipe.controlnet.register_forward_hook(lambda *_: calls.append(1))
    with dit_cache(pipe, EVERY_SECOND) as cache:
        found = draw(pipe, call)
        assert cache.stats.reused_calls * STEPS == cache.stats.calls * 3
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_policy_that_looks():
    pipe, call = pipelines.flux()
    with dit_cache(pipe, DitCacheConfig(policy=Threshold(0.5, max_warmup_steps=1), payload="output")) as cache:
        draw(pipe, call)
        assert cache.stats.reused_calls
        assert all(record.value is not None for record in cache.decisions if record.reuse)


def groups(model):
    cpu = torch.device("cpu")
    model.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")


def moved_whole(model):
    pytest.importorskip("accelerate").cpu_offload_with_hook(model, torch.device("cpu"))


@pytest.mark.parametrize("offload", [groups, moved_whole])
@pytest.mark.parametrize("early", [True, False], ids=["offloaded first", "cached first"])
def test_offloading_is_the_transformers_own(offload, early):
    pipe, call = pipelines.sd3()
    wanted, model = by_hand(pipe, call, "transformer"), pipe.transformer
    if early:
        offload(model)
    with dit_cache(pipe, EVERY_SECOND) as cache:
        if not early:
            offload(pipe.transformer)
        torch.testing.assert_close(draw(pipe, call), wanted, rtol=1e-4, atol=1e-4)
        assert cache.stats.reused_calls == 3
    assert pipe.transformer is model
    registry = vars(model).get("_diffusers_hook")
    assert registry is None or registry._module_ref is model  # it holds nothing of the cache
    draw(pipe, call)
