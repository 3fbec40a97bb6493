"""Two diffusion transformers that are not diffusers' own, small and random: of videos, and of classes of images.

They have the shapes of Open-Sora-Plan 1.2 (OpenSoraT2V) and of the original DiT, written anew for the tests.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """The model with every parameter drawn anew, gates included, so that each block does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def flux(seed: int = 0) -> nn.Module:
    """diffusers' own, of two blocks and three."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    )
    return drawn(model, seed)


def sinusoids(t: torch.Tensor, width: int) -> torch.Tensor:
    """(B,) → (B, width)."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))
    angles = t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], -1)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor | None = None):
    """Attention over (B, N, C); an additive mask of (B, 1, N) holds for all heads and queries."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    mask = None if mask is None else mask[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


# -- a video model, as in Open-Sora-Plan 1.2 ----------------------------------------------------------------------


@dataclass
class VideoOutput:
    sample: torch.Tensor


def rotate(x: torch.Tensor, heads: int, frame: int, height: int, width: int) -> torch.Tensor:
    """Rotary position in three dimensions: a third of each head for each of frame, row and column."""
    places = torch.cartesian_prod(torch.arange(frame), torch.arange(height), torch.arange(width)).float()
    third = x.shape[-1] // heads // 3
    rates = 100.0 ** (-torch.arange(third // 2) * 2 / third)
    angles = (places[:, :, None] * rates).flatten(1).repeat(1, heads)  # (N, C / 2)
    even, odd = x[..., ::2], x[..., 1::2]
    turned = [even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()]
    return torch.stack(turned, -1).flatten(-2)


class VideoAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, sizes=None):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k = self.to_q(hidden_states), self.to_k(context)
        if sizes is not None:
            q, k = rotate(q, self.heads, *sizes), rotate(k, self.heads, *sizes)
        return self.to_out(attend(q, k, self.to_v(context), self.heads, attention_mask))


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.proj, self.out = nn.Linear(width, 2 * inner), nn.Linear(inner, width)

    def forward(self, x):
        value, gate = self.proj(x).chunk(2, -1)
        return self.out(value * F.gelu(gate))


class VideoBlock(nn.Module):
    """AdaLN-single: every block adds a table of its own to the one modulation computed from the timestep."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(6, width))
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.attn1, self.attn2 = VideoAttention(width, heads), VideoAttention(width, heads)
        self.ff = GEGLU(width, 2 * width)

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        encoder_hidden_states=None,
        encoder_attention_mask=None,
        timestep=None,
        cross_attention_kwargs=None,
        class_labels=None,
        frame=None,
        height=None,
        width=None,
    ):
        modulation = self.scale_shift_table + timestep.unflatten(-1, (6, -1))
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, 1)
        normed = self.norm1(hidden_states) * (1 + scale1) + shift1
        attended = self.attn1(normed, attention_mask=attention_mask, sizes=(frame, height, width))
        hidden_states = hidden_states + gate1 * attended
        hidden_states = hidden_states + self.attn2(hidden_states, encoder_hidden_states, encoder_attention_mask)
        return hidden_states + gate2 * self.ff(self.norm2(hidden_states) * (1 + scale2) + shift2)


class VideoTransformer(nn.Module):
    """Noise in a video latent (B, C, F, H, W), told a timestep and a text of (B, L, caption)."""

    def __init__(self, depth: int = 6, channels: int = 4, heads: int = 2, caption: int = 16, seed: int = 0) -> None:
        super().__init__()
        self.heads, self.patch, width = heads, 2, 12 * heads
        self.proj_in = nn.Conv2d(channels, width, self.patch, self.patch)
        self.caption_projection = nn.Sequential(nn.Linear(caption, width), nn.GELU("tanh"), nn.Linear(width, width))
        self.time_embed = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.time_modulation = nn.Linear(width, 6 * width)
        self.transformer_blocks = nn.ModuleList(VideoBlock(width, heads) for _ in range(depth))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.norm_out = nn.LayerNorm(width, elementwise_affine=False)
        self.proj_out = nn.Linear(width, self.patch**2 * channels)
        drawn(self, seed)

    def forward(
        self,
        hidden_states,
        timestep,
        encoder_hidden_states,
        attention_mask=None,
        encoder_attention_mask=None,
        return_dict=True,
    ):
        batch, channels, frame, height, width = hidden_states.shape
        height, width = height // self.patch, width // self.patch
        if attention_mask is not None:  # 1 where the video is, 0 where it was padded: (B, F, H, W)
            kept = F.max_pool2d(attention_mask, self.patch).reshape(batch, 1, -1)
            attention_mask = (1 - kept) * -10000.0
        if encoder_attention_mask is not None:
            encoder_attention_mask = (1 - encoder_attention_mask[:, None]) * -10000.0
        tokens = self.proj_in(hidden_states.transpose(1, 2).flatten(0, 1))
        hidden_states = tokens.flatten(2).transpose(1, 2).reshape(batch, frame * height * width, -1)
        encoder_hidden_states = self.caption_projection(encoder_hidden_states)
        embedded = self.time_embed(sinusoids(timestep, 32))
        modulation = self.time_modulation(F.silu(embedded))
        for block in self.transformer_blocks:
            hidden_states = block(
                hidden_states,
                attention_mask=attention_mask,
                encoder_hidden_states=encoder_hidden_states,
                encoder_attention_mask=encoder_attention_mask,
                timestep=modulation,
                cross_attention_kwargs=None,
                class_labels=None,
                frame=frame,
                height=height,
                width=width,
            )
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, 1)
        out = self.proj_out(self.norm_out(hidden_states) * (1 + scale) + shift)
        out = out.reshape(batch, frame, height, width, self.patch, self.patch, channels)
        sample = out.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frame, 2 * height, 2 * width)
        return VideoOutput(sample) if return_dict else (sample,)


# -- a model conditioned on classes, as the original DiT ----------------------------------------------------------


class ClassBlock(nn.Module):
    """AdaLN-zero, its modulation computed in every block; attention and MLP as in timm."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        q, k, v = self.qkv(self.norm1(x) * (1 + scale1) + shift1).chunk(3, -1)
        x = x + gate1 * self.proj(attend(q, k, v, self.heads))
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class ClassTransformer(nn.Module):
    """Noise and its variance in an image latent (B, C, H, W), told a timestep and a class; the last class is none."""

    def __init__(self, depth: int = 5, channels: int = 4, size: int = 8, classes: int = 10, seed: int = 0) -> None:
        super().__init__()
        width, self.patch, self.channels, self.none = 24, 2, channels, classes
        self.x_embedder = nn.Conv2d(channels, width, self.patch, self.patch)
        self.t_embedder = nn.Sequential(nn.Linear(32, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(classes + 1, width)
        places = torch.cartesian_prod(*[torch.arange(size // self.patch)] * 2)
        self.register_buffer("pos_embed", torch.cat([sinusoids(p, width // 2) for p in places.unbind(1)], -1)[None])
        self.blocks = nn.ModuleList(ClassBlock(width, heads=2) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.final_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))
        self.final_linear = nn.Linear(width, self.patch**2 * 2 * channels)
        drawn(self, seed)

    def forward(self, x, t, y):
        c = self.t_embedder(sinusoids(t, 32)) + self.y_embedder(y)
        side = x.shape[-1] // self.patch
        x = self.x_embedder(x).flatten(2).transpose(1, 2) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        shift, scale = self.final_modulation(c)[:, None].chunk(2, -1)
        x = self.final_linear(self.final_norm(x) * (1 + scale) + shift)
        x = x.reshape(-1, side, side, self.patch, self.patch, 2 * self.channels)
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def forward_with_cfg(self, x, t, y, cfg_scale):
        """Guidance in one batch, its second half without class. It calls ``forward``, so no hook of the model fires."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, y)
        noise, variance = out[:, : self.channels], out[:, self.channels :]
        given, none = noise.chunk(2)
        guided = none + cfg_scale * (given - none)
        return torch.cat([torch.cat([guided, guided]), variance], 1)
