"""Diffusers' own pipelines with tiny random parts, built in memory: the families that the cache is proved on.

Every builder returns a pipeline and the arguments of a call with guidance on, the same at every call. Prompts are
embeddings, so that no text encoder is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import diffusers
import torch
from torch import nn

Built = tuple[Any, dict[str, Any]]
NOISE = {"beta_schedule": "linear"}  # for schedulers of models that predict the noise
TEXT = {"text_encoder": None, "tokenizer": None}
TEXT_2 = TEXT | {"text_encoder_2": None, "tokenizer_2": None}
TEXT_3 = TEXT_2 | {"text_encoder_3": None, "tokenizer_3": None}


class Family(NamedTuple):
    """One family of pipelines, and what a cache written by hand has to be told of it.

    ``lists`` are the trunk's, ``streams`` what its blocks return, in that order; ``calls`` of the transformer make one
    step with guidance, and ``off`` are the arguments that turn it off. ``interleaved`` lists are called in turn.
    """

    build: Callable[[], Built]
    lists: Sequence[str]
    streams: Sequence[str]
    calls: int
    off: dict[str, Any]
    interleaved: bool = False
    is_told_apart: bool = False  # one of guidance's calls has an argument that the other has not

    def blocks(self, transformer: nn.Module) -> list[nn.Module]:
        """The trunk, in the order it is called."""
        lists = [list(transformer.get_submodule(name)) for name in self.lists]
        return [block for turn in (zip(*lists, strict=True) if self.interleaved else lists) for block in turn]


def part(kind: str, seed: int = 0, **config: Any) -> Any:
    """A model in evaluation mode, from one seed, with small random values where a parameter is all zero.

    New transformers have gates and projections of zero, which make each block the identity: a cache that lost a block
    would change nothing, and no test would see it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = getattr(diffusers, kind)(**config)
        for parameter in module.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.1)
    return module.eval()


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompts(name: str, *shape: int) -> dict[str, torch.Tensor]:
    """What is asked for, and what is not."""
    return {name: noise(1, *shape, seed=1), f"negative_{name}": noise(1, *shape, seed=2)}


def masks(name: str) -> dict[str, torch.Tensor]:
    """Of five tokens; what is not asked for has one less."""
    return {name: torch.tensor([[1, 1, 1, 1, 1]]), f"negative_{name}": torch.tensor([[1, 1, 1, 1, 0]])}


def image_vae() -> nn.Module:
    """A latent has as many pixels as the picture."""
    return part("AutoencoderKL", block_out_channels=(4,), norm_num_groups=2, latent_channels=4, shift_factor=0.1)


def flow() -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)


FLUX = {
    "in_channels": 16,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "pooled_projection_dim": 32,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 4, 8),
}
SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "attention_head_dim": 8,
    "num_attention_heads": 4,
    "joint_attention_dim": 32,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 32,
    "pos_embed_max_size": 8,
}


def flux(kind: str = "FluxPipeline", **parts: Any) -> Built:
    transformer = part("FluxTransformer2DModel", num_layers=2, num_single_layers=3, **FLUX)
    pipe = getattr(diffusers, kind)(scheduler=flow(), vae=image_vae(), transformer=transformer, **TEXT_2, **parts)
    call = prompts("prompt_embeds", 5, 32) | prompts("pooled_prompt_embeds", 32)
    return pipe, call | {"true_cfg_scale": 2.0, "height": 8, "width": 8, "output_type": "pt"}


def sd3(kind: str = "StableDiffusion3Pipeline", **parts: Any) -> Built:
    transformer = part("SD3Transformer2DModel", num_layers=5, dual_attention_layers=(0, 1), qk_norm="rms_norm", **SD3)
    pipe = getattr(diffusers, kind)(scheduler=flow(), vae=image_vae(), transformer=transformer, **TEXT_3, **parts)
    call = prompts("prompt_embeds", 5, 32) | prompts("pooled_prompt_embeds", 32)
    return pipe, call | {"guidance_scale": 2.0, "height": 8, "width": 8, "output_type": "pt"}


def controlled(build: Callable[..., Built]) -> Built:
    """FLUX or SD3 under a ControlNet with fewer blocks than the transformer, as they have."""
    if build is flux:
        kind, net = "FluxControlNetPipeline", part("FluxControlNetModel", num_layers=1, num_single_layers=2, **FLUX)
    else:
        kind = "StableDiffusion3ControlNetPipeline"
        net = part("SD3ControlNetModel", num_layers=2, **SD3)
    pipe, call = build(kind, controlnet=net)
    return pipe, call | {"control_image": noise(1, 3, 8, 8).sigmoid()}


def wan(experts: int = 1) -> Built:
    """One transformer, or two: one for the noisy steps and one for the rest, as in Wan 2.2."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": 32,
        "freq_dim": 32,
        "ffn_dim": 32,
        "num_layers": 4,
        "rope_max_seq_len": 32,
    }
    names = ["transformer", "transformer_2"][:experts]
    parts = {name: part("WanTransformer3DModel", seed, **config) for seed, name in enumerate(names)}
    vae = part(
        "AutoencoderKLWan", base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=2.0
    )
    boundary = {"boundary_ratio": 0.5} if experts == 2 else {}
    pipe = diffusers.WanPipeline(vae=vae, scheduler=scheduler, **TEXT, **parts, **boundary)
    call = {"guidance_scale": 2.0, "height": 16, "width": 16, "num_frames": 5, "output_type": "pt"}
    return pipe, prompts("prompt_embeds", 5, 32) | call


def hunyuan_video() -> Built:
    transformer = part(
        "HunyuanVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=2,
        num_single_layers=3,
        num_refiner_layers=1,
        text_embed_dim=32,
        pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 8),
    )
    pipe = diffusers.HunyuanVideoPipeline(transformer=transformer, vae=None, scheduler=flow(), **TEXT_2)
    call = prompts("prompt_embeds", 5, 32) | prompts("pooled_prompt_embeds", 32) | masks("prompt_attention_mask")
    return pipe, call | {
        "true_cfg_scale": 2.0, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent",
    }  # fmt: skip


def cogvideox() -> Built:
    transformer = part(
        "CogVideoXTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=32,
        num_layers=4,
        sample_width=4,
        sample_height=4,
        sample_frames=5,
        max_text_seq_length=5,
    )
    scheduler = diffusers.CogVideoXDDIMScheduler(prediction_type="v_prediction")
    pipe = diffusers.CogVideoXPipeline(transformer=transformer, vae=None, scheduler=scheduler, **TEXT)
    call = {"guidance_scale": 2.0, "height": 32, "width": 32, "num_frames": 5, "output_type": "latent"}
    return pipe, prompts("prompt_embeds", 5, 32) | call | {"max_sequence_length": 5}


def ltx() -> Built:
    transformer = part(
        "LTXVideoTransformer3DModel",
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        num_layers=4,
        caption_channels=32,
    )
    pipe = diffusers.LTXPipeline(transformer=transformer, vae=None, scheduler=flow(), **TEXT)
    call = {"guidance_scale": 2.0, "height": 96, "width": 96, "num_frames": 9, "output_type": "latent"}
    return pipe, prompts("prompt_embeds", 5, 32) | masks("prompt_attention_mask") | call


def qwen_image() -> Built:
    transformer = part(
        "QwenImageTransformer2DModel",
        in_channels=16,
        out_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = diffusers.QwenImagePipeline(transformer=transformer, vae=None, scheduler=flow(), **TEXT)
    call = {"true_cfg_scale": 2.0, "height": 64, "width": 64, "output_type": "latent"}
    return pipe, prompts("prompt_embeds", 5, 32) | masks("prompt_embeds_mask") | call


def allegro() -> Built:
    transformer = part(
        "AllegroTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=24,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=48,
        sample_height=4,
        sample_width=4,
        sample_frames=2,
        caption_channels=32,
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**NOISE)
    pipe = diffusers.AllegroPipeline(transformer=transformer, vae=None, scheduler=scheduler, **TEXT)
    call = {"guidance_scale": 2.0, "height": 32, "width": 32, "num_frames": 8, "output_type": "latent"}
    return pipe, prompts("prompt_embeds", 5, 32) | masks("prompt_attention_mask") | call | {"negative_prompt": None}


def pixart() -> Built:
    transformer = part(
        "PixArtTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=5,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )
    pipe = diffusers.PixArtSigmaPipeline(
        transformer=transformer, vae=image_vae(), scheduler=diffusers.DPMSolverMultistepScheduler(**NOISE), **TEXT
    )
    call = {"guidance_scale": 2.0, "height": 8, "width": 8, "use_resolution_binning": False, "output_type": "pt"}
    return pipe, prompts("prompt_embeds", 5, 32) | masks("prompt_attention_mask") | call | {"negative_prompt": None}


def dit() -> Built:
    transformer = part(
        "DiTTransformer2DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        out_channels=8,
        num_layers=5,
        sample_size=8,
    )
    pipe = diffusers.DiTPipeline(transformer=transformer, vae=image_vae(), scheduler=diffusers.DDIMScheduler(**NOISE))
    return pipe, {"class_labels": [7], "guidance_scale": 2.0, "output_type": "np"}


def latte() -> Built:
    transformer = part(
        "LatteTransformer3DModel",
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=3,
        cross_attention_dim=32,
        caption_channels=32,
        attention_bias=True,
        sample_size=4,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        norm_eps=1e-6,
        video_length=3,
    )
    pipe = diffusers.LattePipeline(
        transformer=transformer, vae=None, scheduler=diffusers.DDIMScheduler(**NOISE), **TEXT
    )
    call = {"guidance_scale": 2.0, "height": 32, "width": 32, "video_length": 3, "output_type": "latent"}
    return pipe, prompts("prompt_embeds", 5, 32) | call | {"negative_prompt": None}


def z_image(kind: str = "ZImagePipeline") -> Built:
    transformer = part(
        "ZImageTransformer2DModel",
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=2,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 4, 8],
        axes_lens=[64, 16, 16],
    )
    pipe = getattr(diffusers, kind)(transformer=transformer, vae=image_vae(), scheduler=flow(), **TEXT)
    call = {"prompt_embeds": [noise(5, 32, seed=1)], "negative_prompt_embeds": [noise(3, 32, seed=2)]}
    return pipe, call | {"guidance_scale": 2.0, "height": 8, "width": 8, "output_type": "pt"}


TRUE_CFG_OFF, CFG_OFF = {"true_cfg_scale": 1.0}, {"guidance_scale": 1.0}
TEXT_FIRST, IMAGE_FIRST = ("encoder_hidden_states", "hidden_states"), ("hidden_states", "encoder_hidden_states")
DOUBLE_SINGLE, BLOCKS = ("transformer_blocks", "single_transformer_blocks"), ("transformer_blocks",)
FAMILIES = {
    "flux": Family(flux, DOUBLE_SINGLE, TEXT_FIRST, 2, TRUE_CFG_OFF),
    "sd3": Family(sd3, BLOCKS, TEXT_FIRST, 1, CFG_OFF),
    "wan": Family(wan, ("blocks",), ("hidden_states",), 2, CFG_OFF),
    "hunyuan_video": Family(hunyuan_video, DOUBLE_SINGLE, IMAGE_FIRST, 2, TRUE_CFG_OFF),
    "cogvideox": Family(cogvideox, BLOCKS, IMAGE_FIRST, 1, CFG_OFF),
    "ltx": Family(ltx, BLOCKS, ("hidden_states",), 1, CFG_OFF),
    "qwen_image": Family(qwen_image, BLOCKS, TEXT_FIRST, 2, TRUE_CFG_OFF, is_told_apart=True),
    "allegro": Family(allegro, BLOCKS, ("hidden_states",), 1, CFG_OFF),
    "pixart": Family(pixart, BLOCKS, ("hidden_states",), 1, CFG_OFF),
    "dit": Family(dit, BLOCKS, ("hidden_states",), 1, CFG_OFF),
    "latte": Family(latte, ("transformer_blocks", "temporal_transformer_blocks"), ("hidden_states",), 1, CFG_OFF, True),
    "z_image": Family(z_image, ("layers",), ("x",), 1, {"guidance_scale": 0.0}),
}
