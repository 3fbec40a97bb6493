"""Pipelines as DiffSynth-Studio has them: a ``model_fn`` runs the blocks of a transformer that is never called."""

from __future__ import annotations

import torch
from torch import nn

BLOCKS, STEPS = 5, 10


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x, context, t_mod):
        return x + 0.2 * torch.tanh(self.mix(x) + context + t_mod)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))

    def forward(self, *_):
        raise AssertionError("model_fn passes it by")


def model_fn(dit, latents, timestep, context, sliding_window_size=None, tea_cache=None, **kwargs):
    """Runs the blocks, over all frames or window by window."""
    if sliding_window_size is not None:
        parts = latents.split(sliding_window_size, dim=1)
        return torch.cat([model_fn(dit, part, timestep, context) for part in parts], dim=1)
    x = latents
    for block in dit.blocks:
        x = block(x, context, (timestep / 1000).float())
    return x


class Scheduler:
    def set_timesteps(self, count):
        self.sigmas = torch.linspace(1, 0.2, count)
        self.timesteps = 1000 * self.sigmas

    def step(self, velocity, timestep, latents):
        return latents - 0.1 * velocity


class Pipeline(nn.Module):
    """Its loop is written as theirs are: one with the number of the step among the arguments, one without."""

    def __init__(self, experts=1, counts=False, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.dit, self.dit2 = Transformer(), Transformer() if experts == 2 else None
        self.scheduler, self.model_fn, self.counts, self.dtype = Scheduler(), model_fn, counts, dtype
        self.prompts = torch.randn(2, 4)
        self.latents = torch.randn(1, 6, 4)

    @torch.no_grad()
    def __call__(self, steps=STEPS, cfg_scale=3.0, boundary=600, calls=None, guided=lambda step: True, **given):
        calls = calls or {"dit": self.model_fn, "dit2": self.model_fn}
        self.scheduler.set_timesteps(steps)
        x, name = self.latents.clone(), "dit"
        for progress_id, timestep in enumerate(self.scheduler.timesteps):
            if timestep.item() < boundary and self.dit2 is not None:
                name = "dit2"
            timestep = timestep.unsqueeze(0).to(self.dtype)
            shared = {"dit": getattr(self, name), "latents": x, "timestep": timestep, **given}
            shared |= {"progress_id": progress_id} if self.counts else {}
            velocity = calls[name](**shared, prompt="a", context=self.prompts[0])
            if cfg_scale != 1 and guided(progress_id):
                away = calls[name](**shared, negative_prompt="", context=self.prompts[1])
                velocity = away + cfg_scale * (velocity - away)
            x = self.scheduler.step(velocity, timestep, x)
        return x
