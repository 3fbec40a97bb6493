"""The demo's transformer: FLUX, both kinds of blocks, small enough for two CPU cores."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel

PATCH = 4
WIDTH = 128


def build_transformer() -> FluxTransformer2DModel:
    """A fresh model: 4 double-stream and 8 single-stream blocks, identity at the start (AdaLN-zero)."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=3 * PATCH * PATCH,
        num_layers=4,
        num_single_layers=8,
        attention_head_dim=64,
        num_attention_heads=WIDTH // 64,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(16, 24, 24),
    )
    gates = [block.norm for block in model.single_transformer_blocks]
    gates += [norm for block in model.transformer_blocks for norm in (block.norm1, block.norm1_context)]
    for last in [norm.linear for norm in gates] + [model.norm_out.linear, model.proj_out]:
        torch.nn.init.zeros_(last.weight)
        torch.nn.init.zeros_(last.bias)
    return model


def patchify(pictures: torch.Tensor) -> torch.Tensor:
    """(batch, 3, height, width) → (batch, tokens, 3·patch²)."""
    batch, channels, height, width = pictures.shape
    grid = pictures.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return grid.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpatchify(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The inverse of :func:`patchify`."""
    batch = tokens.shape[0]
    grid = tokens.reshape(batch, height // PATCH, width // PATCH, 3, PATCH, PATCH)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(batch, 3, height, width)


def position_ids(height: int, width: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """FLUX's ``img_ids`` (tokens, 3) and ``txt_ids`` (length, 3): the picture has places, the text has none."""
    rows, columns = torch.arange(height // PATCH), torch.arange(width // PATCH)
    places = torch.cartesian_prod(torch.zeros(1), rows.float(), columns.float())
    return places, torch.zeros(length, 3)
