"""The transformers that are measured: their sizes, what a call of theirs is given, and how much work it is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Made = Callable[..., Tensor]  # a tensor of that shape, drawn


@dataclass(frozen=True)
class Geometry:
    """A transformer, and the size of what it draws.

    Args:
        name: as it is known.
        what: the same for a reader.
        kind: ``"flux"`` or ``"wan"``.
        config: of the transformer's class.
        latents: shape of what is drawn.
        text: tokens of the prompt.
        steps: of a run; ``None``: as many as the time allows.
        dtype: of the weights and activations.
        attends: the layer that each block calls exactly once, by which its executions are counted.
    """

    name: str
    what: str
    kind: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    text: int
    steps: int | None
    dtype: torch.dtype
    attends: str

    @property
    def calls(self) -> int:
        """Of the transformer, in a step: Wan is guided by two."""
        return 1 if self.kind == "flux" else 2

    @property
    def width(self) -> int:
        """Channels of the streams."""
        return int(self.config["num_attention_heads"] * self.config["attention_head_dim"])

    @property
    def tokens(self) -> int:
        """Of the picture or video."""
        if self.kind == "flux":
            return self.latents[1]
        return math.prod(self.latents[2:]) // math.prod(self.config["patch_size"])

    @property
    def blocks(self) -> int:
        """Of the transformer."""
        return int(self.config["num_layers"] + self.config.get("num_single_layers", 0))

    @property
    def flops(self) -> float:
        """Multiplications and additions in the blocks of one call: their linear layers and attention."""
        width, tokens, config = self.width, self.tokens, self.config
        if self.kind == "flux":  # each stream of a double block, and a single block: 12 width² a token
            joint = tokens + self.text
            linear = 2 * 12 * width**2 * joint * self.blocks
            return float(linear + 4 * joint**2 * width * self.blocks)
        linear = 2 * tokens * (6 * width**2 + 2 * width * config["ffn_dim"]) + 4 * self.text * width**2
        return float((linear + 4 * (tokens + self.text) * tokens * width) * config["num_layers"])

    def given(self, made: Made) -> dict[str, Any]:
        """What does not change from step to step."""
        config = self.config
        if self.kind == "wan":
            shape = (1, self.text, config["text_dim"])
            return {"prompts": [made(*shape), made(*shape)]}
        side = math.isqrt(self.tokens)
        places = torch.arange(self.tokens)
        ids = torch.stack([torch.zeros_like(places), places // side, places % side], dim=1)
        return {
            "encoder_hidden_states": made(1, self.text, config["joint_attention_dim"]),
            "pooled_projections": made(1, config["pooled_projection_dim"]),
            "img_ids": ids.to(self.dtype),
            "txt_ids": torch.zeros(self.text, 3, dtype=self.dtype),
            "guidance": torch.full((1,), 3.5) if config["guidance_embeds"] else None,
        }


def wan(name: str, heads: int, layers: int, ffn: int, frames: int) -> Geometry:
    """Wan 2.1 at 480 × 832."""
    config = {"num_attention_heads": heads, "attention_head_dim": 128, "num_layers": layers, "ffn_dim": ffn}
    config |= {"patch_size": (1, 2, 2), "text_dim": 4096, "freq_dim": 256}
    what = f"Wan 2.1 {name}, {frames} frames of 480 × 832, text of 512 tokens, guided by two calls a step"
    latents = (1, 16, (frames - 1) // 4 + 1, 60, 104)
    return Geometry(f"wan_{name.lower()}", what, "wan", config, latents, 512, None, torch.bfloat16, "attn1")


FLUX = Geometry(
    "flux",
    "FLUX.1-dev, 1024 × 1024, text of 512 tokens, distilled guidance",
    "flux",
    {
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    },
    (1, 4096, 64),
    512,
    28,
    torch.bfloat16,
    "attn",
)
# The smaller Wan is measured first: its whole video of 81 frames fits into minutes, tokens and all. Of the larger one,
# whose call is six times the work, so many runs would need a quarter of an hour: it is measured on fewer frames.
WAN_SMALL = wan("1.3B", 12, 30, 8960, 81)
WAN_LARGE = wan("14B", 40, 40, 13824, 17)

TINY_FLUX = Geometry(
    "flux",
    "two double and three single blocks of FLUX, to go through the motions",
    "flux",
    {
        **FLUX.config,
        **{"in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16},
        **{"num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 16},
        "axes_dims_rope": (4, 4, 8),
    },
    (1, 64, 16),
    8,
    8,
    torch.float32,
    "attn",
)
TINY_WAN = Geometry(
    "wan_1.3b",
    "four blocks of Wan, to go through the motions",
    "wan",
    {
        **WAN_SMALL.config,
        **{"num_attention_heads": 2, "attention_head_dim": 24, "num_layers": 4, "ffn_dim": 64, "text_dim": 32},
        "freq_dim": 32,
    },
    (1, 16, 3, 8, 8),
    8,
    None,
    torch.float32,
    "attn1",
)
