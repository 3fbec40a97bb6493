"""Tiny models with every kind of wiring the engine has to read, and a scheduler that only counts."""

from __future__ import annotations

import torch
from torch import nn

from dithooks import timestep_scope


class Adder(nn.Module):
    """h → h + rate · t: the effect of a range is a number one can work out by hand."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate))

    def forward(self, h: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return h + self.rate * t


class Ladder(nn.Module):
    """Adders with rates 1, 2, 3, …, one after another."""

    def __init__(self, depth: int = 5) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Adder(float(k + 1)) for k in range(depth))

    def forward(self, h: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            h = block(h, timestep)
        return h


class Single(nn.Module):
    """h → h, not linear in anything."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(2 * width, width)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        wide = torch.cat([hidden_states, temb.unsqueeze(1).expand_as(hidden_states)], -1)
        return hidden_states + torch.tanh(self.proj(wide))


class InPlace(Single):
    """The same, written into its input."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        return hidden_states.add_(super().forward(hidden_states, temb) - hidden_states)


class Double(nn.Module):
    """(h, e) → (e, h) or (h, e): both streams see each other."""

    def __init__(self, width: int = 8, swap: bool = True) -> None:
        super().__init__()
        self.swap = swap
        self.image, self.text = nn.Linear(3 * width, width), nn.Linear(2 * width, width)

    def forward(self, hidden_states, encoder_hidden_states, temb):
        mean = encoder_hidden_states.mean(1, keepdim=True).expand_as(hidden_states)
        time = temb.unsqueeze(1).expand_as(hidden_states)
        h = hidden_states + torch.tanh(self.image(torch.cat([hidden_states, mean, time], -1)))
        back = h.mean(1, keepdim=True).expand_as(encoder_hidden_states)
        e = encoder_hidden_states + torch.tanh(self.text(torch.cat([encoder_hidden_states, back], -1)))
        return (e, h) if self.swap else (h, e)


class Net(nn.Module):
    """A transformer-like parent: embeds, runs its blocks in one of several manners, projects.

    ``kind`` is one of single, in_place, swapped, straight, positional, last_drops_text, two_lists.
    ``control`` is added to the image stream after every block, ``in_place_control`` says how.
    """

    def __init__(self, kind: str = "single", depth: int = 5, width: int = 8) -> None:
        super().__init__()
        self.kind, self.in_place_control = kind, False
        self.embed, self.proj = nn.Linear(4, width), nn.Linear(width, 4)
        self.time = nn.Linear(1, width)
        if kind in ("single", "in_place"):
            blocks = [Single(width) if kind == "single" else InPlace(width) for _ in range(depth)]
        else:
            blocks = [Double(width, swap=kind != "straight") for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        if kind == "two_lists":
            self.singles = nn.ModuleList(Double(width, swap=False) for _ in range(depth))
        self.executions = 0
        for block in [*self.blocks, *getattr(self, "singles", [])]:
            block.register_forward_hook(self._count)

    def _count(self, *_: object) -> None:
        self.executions += 1

    def _controlled(self, h: torch.Tensor, control: torch.Tensor | None) -> torch.Tensor:
        if control is None:
            return h
        return h.add_(control) if self.in_place_control else h + control

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, control=None):
        h = self.embed(hidden_states)
        temb = self.time(timestep.reshape(-1, 1).to(h.dtype)).expand(h.shape[0], -1)
        e = encoder_hidden_states
        for index, block in enumerate(self.blocks):
            if self.kind in ("single", "in_place"):
                h = block(h, temb=temb)
            elif self.kind == "positional":
                e, h = block(h, e, temb)
            elif self.kind == "straight":
                h, e = block(encoder_hidden_states=e, hidden_states=h, temb=temb)
            else:
                e, h = block(h, encoder_hidden_states=e, temb=temb)
                if self.kind == "last_drops_text" and index == len(self.blocks) - 1:
                    e = None
            h = self._controlled(h, control)
        for block in getattr(self, "singles", []):
            h, e = block(h, temb=temb, encoder_hidden_states=e)
        if self.kind == "two_lists":
            h = h + e.mean(1, keepdim=True)
        return self.proj(h)


class Counter:
    """A scheduler as diffusers has them, as far as the clock reads it."""

    def __init__(self) -> None:
        self.timesteps, self.sigmas, self.step_index, self.begin_index = None, None, None, None

    def set_timesteps(self, steps: int) -> None:
        self.sigmas = torch.linspace(1, 0, steps + 1)
        self.timesteps = self.sigmas[:-1] * 1000
        self.step_index = None

    def step(self) -> None:
        self.step_index = (self.step_index or self.begin_index or 0) + 1


class Pipe:
    """A pipeline, as far as the engine looks: a transformer, a scheduler, a loop with one call or two per step."""

    def __init__(self, transformer: nn.Module) -> None:
        self.transformer, self.scheduler, self.vae = transformer, Counter(), None

    def __call__(self, x, steps=8, prompts=(None,), at=None, **extra):
        """One latent per prompt, stepped together; ``at(step)`` may raise or look."""
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            if at is not None:
                at(step)
            given = [{} if e is None else {"encoder_hidden_states": e} for e in prompts]
            outs = [self.transformer(x, timestep=t / 1000, **one, **extra) for one in given]
            x = x - sum(outs) / len(outs) / steps
            self.scheduler.step()
        return x


def latents(batch: int = 2, tokens: int = 6) -> torch.Tensor:
    return torch.randn(batch, tokens, 4)


def prompt(batch: int = 2, tokens: int = 3, width: int = 8) -> torch.Tensor:
    return torch.randn(batch, tokens, width)


def loop(net, x, steps=4, scoped=False, begin=0, **given):
    """A sampling loop by hand; the timestep tells the step, or a scope does."""
    for k in range(begin, steps):
        t = torch.tensor(1 - k / steps)
        if scoped:
            with timestep_scope(k):
                x = x - net(x, t, **given) / steps
        else:
            x = x - net(x, t, **given) / steps
    return x
