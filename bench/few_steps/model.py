"""The student: the shipped transformer, which is told besides how long a step to take."""

from __future__ import annotations

import torch
from diffusers import FluxTransformer2DModel
from torch import nn


def build_student(teacher: FluxTransformer2DModel) -> FluxTransformer2DModel:
    """A copy of the teacher with an input for the length of a step, which makes no difference before training.

    The input is FLUX's ``guidance``, as in FLUX.1-dev: guidance itself is distilled into the weights, and its place
    is free.
    """
    made = FluxTransformer2DModel.from_config(teacher.config, guidance_embeds=True)
    last = made.time_text_embed.guidance_embedder.linear_2
    missing, unexpected = made.load_state_dict(teacher.state_dict(), strict=False)
    if strange := [*unexpected, *(name for name in missing if "guidance_embedder" not in name)]:
        raise ValueError(f"the teacher is another model: {strange[:3]}")
    with torch.no_grad():
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return made
