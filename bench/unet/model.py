"""The UNet: diffusers' own, with SDXL's kinds of blocks and conditioning, small enough for one core of a CPU."""

from __future__ import annotations

import torch
from diffusers import EulerDiscreteScheduler, UNet2DConditionModel
from torch import Tensor, nn

from dithooks.demo.emoji import SIZE
from dithooks.demo.text import CaptionEncoder

CHANNELS, HEAD, TEXT = (32, 64, 96), 32, 64
WORDS = 4  # tokens of a caption
MARGIN = 2  # white pixels around an emoji, of which a picture shows a part
PLACE = 8  # numbers that each of the six sizes and places is embedded in


def build_unet(channels: tuple[int, ...] = CHANNELS, head: int = HEAD, text: int = TEXT) -> UNet2DConditionModel:
    """A fresh model: attention on the two lower levels of three, and two transformer blocks at the lowest."""
    model = UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=3,
        out_channels=3,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=channels,
        layers_per_block=1,
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=tuple(max(1, width // head) for width in channels),  # diffusers' name for how many heads
        cross_attention_dim=text,
        norm_num_groups=channels[0] // 2,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=PLACE,
        projection_class_embeddings_input_dim=text + 6 * PLACE,
    )
    nn.init.zeros_(model.conv_out.weight)
    nn.init.zeros_(model.conv_out.bias)
    return model


def build_text(words: list[str], width: int = TEXT) -> CaptionEncoder:
    """Captions to embeddings."""
    made: CaptionEncoder = CaptionEncoder(vocabulary=words, dim=width, max_length=WORDS)
    return made


def build_scheduler() -> EulerDiscreteScheduler:
    """SDXL's noise levels and solver, but starting from pure noise, which takes a model that predicts v."""
    return EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )


def places(corners: Tensor) -> Tensor:
    """SDXL's ``time_ids`` (n, 6): the size of what was cropped, the crop's corner, (n, 2), and the picture's size."""
    whole, part = torch.full((len(corners), 2), SIZE + 2 * MARGIN), torch.full((len(corners), 2), SIZE)
    return torch.cat([whole.to(corners), corners, part.to(corners)], dim=1)


def to_pictures(latents: Tensor) -> Tensor:
    """The model's −1…1 to pictures in 0…1."""
    return (latents.float() / 2 + 0.5).clamp(0, 1)
