"""DiffSynth-Studio's own pipelines around tiny random transformers of its classes, and a cache of their blocks by hand.

The pipelines run as they are, loops, guidance and schedulers included; what their encoders would make is given.
Imported in an environment that has the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.checks.stand_ins import modelscope, torchvision_schemas

torchvision_schemas()
modelscope()

from diffsynth.configs.vram_management_module_maps import VRAM_MANAGEMENT_MODULE_MAPS  # noqa: E402
from diffsynth.core.vram.layers import enable_vram_management  # noqa: E402
from diffsynth.diffusion.base_pipeline import PipelineUnit  # noqa: E402
from diffsynth.models import flux_dit, qwen_image_dit, z_image_dit  # noqa: E402
from diffsynth.models.general_modules import AdaLayerNorm, RMSNorm, TimestepEmbeddings  # noqa: E402
from diffsynth.models.wan_video_dit import WanModel  # noqa: E402
from diffsynth.pipelines.flux_image import FluxImagePipeline  # noqa: E402
from diffsynth.pipelines.qwen_image import QwenImagePipeline  # noqa: E402
from diffsynth.pipelines.wan_video import WanVideoPipeline, WanVideoUnit_CfgMerger  # noqa: E402
from diffsynth.pipelines.z_image import ZImagePipeline  # noqa: E402

STEPS = 10
CPU = {"device": "cpu", "torch_dtype": torch.float32}
Streams = tuple[Tensor, ...]


class Given(PipelineUnit):
    """The one unit of a tiny pipeline: what encoders and the first noise would be."""

    def __init__(self, shared: dict[str, Any], positive: dict[str, Any], negative: dict[str, Any]) -> None:
        super().__init__(take_over=True)
        self.given = shared, positive, negative

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        """Add what is given to each kind of inputs."""
        kinds = zip((inputs_shared, inputs_posi, inputs_nega), self.given, strict=True)
        return tuple({**inputs, **{name: _copy(value) for name, value in given.items()}} for inputs, given in kinds)


class Decoder(nn.Module):
    """A decoder that returns the latents."""

    def decode(self, latents: Tensor, **_: Any) -> Tensor:
        """Return the latents."""
        return latents

    def forward(self, latents: Tensor, **_: Any) -> Tensor:
        """Return the latents."""
        return latents


@dataclass
class BlockForm:
    """How a class of blocks takes and returns its streams.

    Args:
        take: reads them from a call's arguments.
        split: reads them from an output.
        join: makes an output of them.
    """

    take: Callable[[tuple[Any, ...], dict[str, Any]], Streams]
    split: Callable[[Any], Streams]
    join: Callable[[Streams], Any]


ONE = BlockForm(lambda args, kwargs: (args[0],), lambda output: (output,), lambda streams: streams[0])
NAMED = BlockForm(lambda args, kwargs: (kwargs["x"],), lambda output: (output,), lambda streams: streams[0])
TWO = BlockForm(lambda args, kwargs: args[:2], lambda output: tuple(output), lambda streams: streams)
QWEN = BlockForm(
    lambda args, kwargs: (kwargs["text"], kwargs["image"]), lambda output: tuple(output), lambda streams: streams
)


class CacheByHand:
    """A cache of some blocks, written over their forwards: it counts the passes, and knows nothing of dithooks.

    Args:
        blocks: all of the model's in the order of their calls, each with its form.
        first: of the range.
        count: of its blocks.
        start: steps before this one are computed.
        interval: from there on, one of so many is computed.
        passes: of the blocks in each step.
        first_step: at which the model is called.
    """

    def __init__(
        self,
        blocks: Sequence[tuple[nn.Module, BlockForm]],
        first: int,
        count: int,
        start: int,
        interval: int,
        passes: int,
        first_step: int = 0,
    ) -> None:
        self.start, self.interval, self.passes, self.first_step = start, interval, passes, first_step
        self.number, self.reused = -1, 0
        self.given: dict[int, Streams] = {}
        self.residuals: dict[int, Streams] = {}
        self.blocks, self.last = blocks, first + count - 1
        for index, (block, form) in enumerate(blocks):
            block.forward = self.over(block.forward, index, form, first)

    def over(self, forward: Callable[..., Any], index: int, form: BlockForm, first: int) -> Callable[..., Any]:
        """Return what takes the place of a block's forward."""

        def run(*args: Any, **kwargs: Any) -> Any:
            self.number += index == 0
            step, branch = self.first_step + self.number // self.passes, self.number % self.passes
            inside = first <= index <= self.last
            computed = step < self.start or (step - self.start) % self.interval == 0 or branch not in self.residuals
            if inside and not computed:
                streams = form.take(args, kwargs)
                if index == first:
                    self.reused += 1
                    pairs = zip(streams, self.residuals[branch], strict=True)
                    streams = tuple(stream + residual for stream, residual in pairs)
                return form.join(streams)
            if index == first:
                self.given[branch] = tuple(stream.clone() for stream in form.take(args, kwargs))
            output = forward(*args, **kwargs)
            if index == self.last:
                pairs = zip(self.streams(form.split(output), self.given[branch]), self.given[branch], strict=True)
                self.residuals[branch] = tuple(after - before for after, before in pairs)
            return output

        return run

    @staticmethod
    def streams(after: Streams, before: Streams) -> Streams:
        """Return the streams that leave a range as they entered it: FLUX's, image and text, leave as one."""
        if len(before) == 2 and after[0].shape != before[0].shape:
            length = before[1].shape[1]
            return after[0][:, length:], after[0][:, :length]
        return after

    def remove(self) -> None:
        """Give the blocks their forwards back."""
        for block, _ in self.blocks:
            del block.forward


def wan(experts: int = 1, managed: bool = False, merged: bool = False) -> WanVideoPipeline:
    """Return Wan 2.1, or 2.2 with two experts, as small as can be."""
    torch.manual_seed(0)
    pipe = WanVideoPipeline(**CPU)
    sizes = {"dim": 48, "in_dim": 4, "ffn_dim": 64, "out_dim": 4, "text_dim": 16, "freq_dim": 32, "eps": 1e-6}
    for name in ("dit", "dit2")[:experts]:
        dit = WanModel(patch_size=(1, 2, 2), num_heads=2, num_layers=5, has_image_input=False, **sizes)
        setattr(pipe, name, manage(dit) if managed else dit)
    pipe.vae = Decoder()
    prompts = [{"context": torch.randn(1, 5, 16)} for _ in range(2)]
    pipe.units = [Given({"latents": torch.randn(1, 4, 6, 4, 4)}, *prompts)]
    if merged:
        pipe.units.append(WanVideoUnit_CfgMerger())
    pipe.post_units = []
    return pipe.eval()


def manage(dit: nn.Module) -> nn.Module:
    """Put a transformer's parts into the wrappers of DiffSynth's VRAM management."""
    names = VRAM_MANAGEMENT_MODULE_MAPS[f"{type(dit).__module__}.{type(dit).__qualname__}"]
    maps = {_imported(source): _imported(target) for source, target in names.items()}
    values = {"dtype": torch.float32, "device": "cpu"}
    states = ("offload", "onload", "preparing", "computation")
    config = {f"{state}_{what}": value for state in states for what, value in values.items()}
    return enable_vram_management(dit, maps, config)


def flux(tiled: bool = False) -> FluxImagePipeline:
    """Return FLUX.1 of three joint and three single blocks."""
    torch.manual_seed(0)
    pipe, width = FluxImagePipeline(**CPU), 32
    dit = flux_dit.FluxDiT.__new__(flux_dit.FluxDiT)
    nn.Module.__init__(dit)
    dit.pos_embedder = flux_dit.RoPEEmbedding(width, 10000, [4, 6, 6])
    dit.time_embedder, dit.guidance_embedder = (TimestepEmbeddings(16, width) for _ in range(2))
    dit.pooled_text_embedder = nn.Sequential(nn.Linear(8, width), nn.SiLU(), nn.Linear(width, width))
    dit.context_embedder, dit.x_embedder = nn.Linear(12, width), nn.Linear(16, width)
    dit.blocks = nn.ModuleList(flux_dit.FluxJointTransformerBlock(width, 2) for _ in range(3))
    dit.single_blocks = nn.ModuleList(flux_dit.FluxSingleTransformerBlock(width, 2) for _ in range(3))
    dit.final_norm_out, dit.final_proj_out = flux_dit.AdaLayerNormContinuous(width), nn.Linear(width, 16)
    pipe.dit, pipe.vae_decoder = dit, Decoder()
    latents = torch.randn(1, 4, 12, 12)
    shared = {"latents": latents, "guidance": torch.tensor([3.5]), "image_ids": dit.prepare_image_ids(latents)}
    pipe.units = [Given(shared, *(_flux_prompt() for _ in range(2)))]
    pipe.vae_output_to_image = _itself
    return pipe.eval()


def _flux_prompt() -> dict[str, Any]:
    return {
        "prompt_emb": torch.randn(1, 5, 12),
        "pooled_prompt_emb": torch.randn(1, 8),
        "text_ids": torch.zeros(1, 5, 3),
    }


def qwen_image() -> QwenImagePipeline:
    """Return Qwen-Image of four blocks."""
    torch.manual_seed(0)
    pipe, width = QwenImagePipeline(**CPU), 32
    dit = qwen_image_dit.QwenImageDiT.__new__(qwen_image_dit.QwenImageDiT)
    nn.Module.__init__(dit)
    dit.pos_embed = qwen_image_dit.QwenEmbedRope(theta=10000, axes_dim=[4, 6, 6], scale_rope=True)
    dit.time_text_embed = TimestepEmbeddings(
        256, width, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False
    )
    dit.txt_norm, dit.img_in, dit.txt_in = RMSNorm(12, eps=1e-6), nn.Linear(16, width), nn.Linear(12, width)
    block = qwen_image_dit.QwenImageTransformerBlock
    dit.transformer_blocks = nn.ModuleList(
        block(dim=width, num_attention_heads=2, attention_head_dim=16) for _ in range(4)
    )
    dit.norm_out, dit.proj_out = AdaLayerNorm(width, single=True), nn.Linear(width, 16)
    pipe.dit, pipe.vae = dit, Decoder()
    prompts = [
        {"prompt_emb": torch.randn(1, length, 12), "prompt_emb_mask": torch.ones(1, length, dtype=torch.long)}
        for length in (5, 4)
    ]
    pipe.units = [Given({"latents": torch.randn(1, 4, 8, 8), "height": 64, "width": 64}, *prompts)]
    pipe.vae_output_to_image = _itself
    return pipe.eval()


def z_image() -> ZImagePipeline:
    """Return Z-Image of four blocks, in bfloat16, as its code needs it."""
    torch.manual_seed(0)
    pipe = ZImagePipeline(device="cpu", torch_dtype=torch.bfloat16)
    dit = z_image_dit.ZImageDiT(
        in_channels=4,
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=12,
        axes_dims=[4, 6, 6],
    )
    for parameter in (dit.x_pad_token, dit.cap_pad_token):
        nn.init.normal_(parameter)
    pipe.dit, pipe.vae_decoder = dit.to(torch.bfloat16), Decoder()
    prompts = [{"prompt_embeds": torch.randn(5, 12).bfloat16()} for _ in range(2)]
    pipe.units = [Given({"latents": torch.randn(1, 4, 8, 8).bfloat16()}, *prompts)]
    pipe.vae_output_to_image = _itself
    return pipe.eval()


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _itself(latents: Tensor, **_: Any) -> Tensor:
    return latents


def _imported(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(__import__(module, fromlist=[name]), name)
