"""A pipeline whose scheduler makes the steps, as diffusers' do: Euler's, of which everything is known."""

from __future__ import annotations

import torch
from toys import Counter


class Euler(Counter):
    """x + (σ' − σ)·y."""

    def step(self, model_output, timestep, sample):
        at = self.step_index or 0
        self.step_index = at + 1
        return (sample + (self.sigmas[at + 1] - self.sigmas[at]).to(sample.dtype) * model_output,)


class Halving(Euler):
    """Not affine: what is beyond a threshold is cut off."""

    def step(self, model_output, timestep, sample):
        return super().step(model_output.clamp(-0.1, 0.1), timestep, sample)


class Solved:
    """A pipeline with guidance by two calls, by one on a batch of both, or without; with one transformer or two."""

    def __init__(self, transformer, guidance="none", second=None, boundary=0, scheduler=None):
        self.transformer, self.guidance, self.scheduler = transformer, guidance, scheduler or Euler()
        if second is not None:
            self.transformer_2, self.boundary = second, boundary

    def model(self, step):
        second = getattr(self, "transformer_2", None)
        return self.transformer if second is None or step < self.boundary else second

    @torch.no_grad()
    def __call__(self, x, steps=8, prompts=(), at=None):
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            if at is not None:
                at(step)
            x = self.scheduler.step(self.guided(self.model(step), x, t / 1000, prompts), t, x)[0]
        return x

    def guided(self, model, x, t, prompts):
        if self.guidance == "none":
            return model(x, t)
        first, second = prompts
        if self.guidance == "calls":
            one, two = model(x, t, encoder_hidden_states=first), model(x, t, encoder_hidden_states=second)
        else:
            both = model(torch.cat([x, x]), t, encoder_hidden_states=torch.cat([first, second]))
            one, two = both.chunk(2)
        return two + 3.0 * (one - two)
