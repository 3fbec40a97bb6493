"""A small pipeline as users of msmodelslim have them, and what they give its adaptor."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from dithooks.compat.msmodelslim import DitCacheAdaptor, DitCacheSearchConfig

STEPS, BLOCKS = 12, 6


class Block(nn.Module):
    """Called as Open-Sora-Plan's: everything by keyword but the stream, or the streams in a tuple."""

    def __init__(self, streams):
        super().__init__()
        self.image, self.text, self.streams = nn.Linear(4, 4), nn.Linear(4, 4), streams

    def forward(self, hidden_states, attention_mask=None, timestep=None, frame=1, height=2, width=2):
        shift = timestep / 500
        if self.streams == 1:
            return hidden_states + 0.3 * torch.tanh(self.image(hidden_states) + shift)
        image, text = hidden_states
        image = image + 0.3 * torch.tanh(self.image(image) + text.mean() + shift)
        return image, text + 0.1 * torch.tanh(self.text(text) + shift)


class Transformer(nn.Module):
    def __init__(self, streams):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(streams) for _ in range(BLOCKS))

    def forward(self, latents, timestep):
        states = latents if len(latents) == 1 else latents.clone()
        states = states if self.transformer_blocks[0].streams == 1 else (states, states[:, :1] * 0.5)
        for block in self.transformer_blocks:
            states = block.forward(states, attention_mask=None, timestep=timestep)
        return states if isinstance(states, torch.Tensor) else states[0] + states[1]


class Scheduler:
    timesteps, step_index = None, None

    def set_timesteps(self, steps):
        self.timesteps, self.step_index = torch.linspace(1000, 1000 / steps, steps), None


class OpenSoraPipeline:
    """A video of eight frames, 4×4, from a scheduler's loop; ``tells`` the adaptor each step."""

    def __init__(self, streams=1, tells=False):
        torch.manual_seed(0)
        self.transformer, self.scheduler, self.tells = Transformer(streams), Scheduler(), tells

    @torch.no_grad()
    def __call__(self, prompt, num_inference_steps=STEPS):
        latents = torch.randn(1, 96, 4, generator=torch.Generator().manual_seed(len(prompt)))
        self.scheduler.set_timesteps(num_inference_steps)
        for step_id, t in enumerate(self.scheduler.timesteps):
            if self.tells:
                DitCacheAdaptor.set_timestep_idx(step_id)
            latents = latents - 0.1 * self.transformer(latents, timestep=t)
            self.scheduler.step_index = step_id + 1
        frames = latents.reshape(8, 4, 4, 3).sub(latents.min()).mul(20).clamp(0, 255)
        return SimpleNamespace(images=[frames.byte().numpy()])


def run_pipeline_and_save_videos(pipeline):
    return pipeline("a dog running on the beach").images


def searching(**given):
    return DitCacheSearchConfig(**{"cache_ratio": 1.4, "num_sampling_steps": STEPS, **given})
