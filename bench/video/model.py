"""The video model: diffusers' Wan transformer, small enough for one core of a CPU, on pixels instead of latents."""

from __future__ import annotations

import torch
from diffusers import UniPCMultistepScheduler, WanTransformer3DModel
from torch import nn

from dithooks.demo.text import CaptionEncoder

from .clips import vocabulary

WIDTH, HEAD, LAYERS = 96, 32, 10
PATCH = (2, 4, 4)  # frames, rows, columns
WORDS = 6  # tokens of a caption
SHIFT = 3.0  # of σ towards noise, in training and in sampling


def build_transformer(width: int = WIDTH, layers: int = LAYERS, head: int = HEAD) -> WanTransformer3DModel:
    """A fresh model whose blocks are identities at the start, which trains faster than Wan's own random gates."""
    model = WanTransformer3DModel(
        patch_size=PATCH,
        num_attention_heads=width // head,
        attention_head_dim=head,
        in_channels=3,
        out_channels=3,
        text_dim=width,
        freq_dim=width,
        ffn_dim=4 * width,
        num_layers=layers,
        cross_attn_norm=True,
        rope_max_seq_len=16,
    )
    closed = [model.condition_embedder.time_proj, model.proj_out, *(block.attn2.to_out[0] for block in model.blocks)]
    for layer in closed:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for block in model.blocks:
        nn.init.zeros_(block.scale_shift_table)
    return model


def build_text(width: int = WIDTH) -> CaptionEncoder:
    """Captions to embeddings, with a word list of the clips' captions."""
    made: CaptionEncoder = CaptionEncoder(vocabulary=vocabulary(), dim=width, max_length=WORDS)
    return made


def build_scheduler() -> UniPCMultistepScheduler:
    """Wan's, but told that the model predicts x: guidance and solver come to the same as with the velocity."""
    return UniPCMultistepScheduler(prediction_type="sample", use_flow_sigmas=True, flow_shift=SHIFT)


def to_clips(latents: torch.Tensor) -> torch.Tensor:
    """The model's (n, 3, frames, height, width) in -1…1 to clips (n, frames, 3, height, width) in 0…1."""
    return (latents.float() / 2 + 0.5).clamp(0, 1).transpose(1, 2)


def to_latents(clips: torch.Tensor) -> torch.Tensor:
    """The inverse of :func:`to_clips` for values that need no clamping."""
    return (clips * 2 - 1).transpose(1, 2).contiguous()
