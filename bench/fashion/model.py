"""The transformer and the scheduler: diffusers' own DiT, small enough for one CPU core."""

from __future__ import annotations

from diffusers import DDIMScheduler, DiTTransformer2DModel
from torch import nn

from .data import NAMES, SIZE

CLASSES = len(NAMES)
NO_CLASS = CLASSES  # the row behind the last class, which diffusers' label embedding keeps for guidance


def build_transformer(*, layers: int = 12, heads: int = 3, head_dim: int = 32) -> DiTTransformer2DModel:
    """A fresh model, identity at the start (AdaLN-zero), which diffusers leaves to those who train.

    It is put into eval mode, for training too: in train mode diffusers drops labels in every block by itself, so that
    half of the blocks may know the class and half not. Nothing else in it differs between the modes.
    """
    model = DiTTransformer2DModel(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        in_channels=1,
        out_channels=1,
        num_layers=layers,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=CLASSES,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.02)
    for last in [*(block.norm1.linear for block in model.transformer_blocks), model.proj_out_1, model.proj_out_2]:
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    return model.eval()


def build_scheduler() -> DDIMScheduler:
    """Cosine noise levels and v-prediction; the steps begin at pure noise.

    Cosine, since pictures this small are gone at the levels on which the linear betas spend half of their steps; v,
    since at pure noise ε says nothing. Nothing is clipped: what the model says is what is drawn.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
