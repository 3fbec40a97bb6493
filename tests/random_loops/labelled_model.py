"""A tiny transformer whose output names the call that computed its residual, and the objects around it in a pipeline.

Every block adds the number of the call under way to channel 0, which is zero at the first block. A reused call adds
the sum that was captured, so channel 0 of the output names the call that the residual was captured in.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BLOCKS, WIDTH = 3, 8  # channel 0 is the label's, the other seven are the latents'


class Interrupted(Exception):
    """The exception that ends a run early."""


class Current(threading.local):
    """The call that this thread makes: its number, the blocks that ran in it, and whether it is to fail."""

    number, ran, fails = 0, 0, False


class LabelledBlock(nn.Module):
    """h → h + gate · tanh(h + c), with the number of the call added to channel 0."""

    def __init__(self, current: Current) -> None:
        super().__init__()
        gate = torch.full((WIDTH,), 0.1)
        gate[0] = 0.0
        self.current, self.gate = current, nn.Parameter(gate)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        current = self.current
        if current.fails and current.ran:
            raise Interrupted("out of memory in the second block")
        current.ran += 1
        out = h + self.gate * torch.tanh(h + c)
        out[..., 0] += current.number
        return out


def value_of(time: Any) -> float | Tensor:
    """Return the time as something that broadcasts over tokens and channels."""
    return time.reshape(-1)[0] if isinstance(time, Tensor) else 0.0 if time is None else float(time)


class Blocks(nn.Module):
    """The blocks, and what all models below do with them."""

    def __init__(self, current: Current) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(LabelledBlock(current) for _ in range(BLOCKS))

    def through(self, latents: Tensor, time: Any, prompt: Any, control: Any) -> Tensor:
        """Return the output of all blocks, channel 0 included."""
        h = functional.pad(latents, (1, 0))
        c = prompt.mean(1, keepdim=True) + 0.001 * value_of(time)
        if control is not None:
            c = c + control
        for block in self.blocks:
            h = block(h, c)
        return h


@functools.cache
def model_class(latents: str, time: str | None, prompt: str) -> type[Blocks]:
    """Return a class of models whose latents, time and prompt are arguments of these names."""
    source = f"""
def forward(self, {latents}, {f"{time}=None, " if time else ""}{prompt}=None, control=None, ids=None, scale=None,
            skip_layers=None, options=None, guidance=None):
    time = {time} if {time!r} else None
    if isinstance(options, dict) and "timestep" in options:
        time = options["timestep"]
    return self.through({latents}, time, {prompt}, control)
"""
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return type("Model", (Blocks,), {"forward": namespace["forward"]})


@dataclass(frozen=True)
class Modality:
    """Latents, time and prompt in one argument."""

    latent: Tensor
    sigma: Any
    context: Tensor


class ModalityModel(Blocks):
    """A model that is given a dataclass."""

    def forward(self, video, control=None, ids=None, scale=None, skip_layers=None, options=None, guidance=None):
        return self.through(video.latent, video.sigma, video.context, control)


class Inner(Blocks):
    """A transformer that is given no time, but what its outer module makes of it."""

    def forward(self, h, c, control=None, skip_layers=None):
        return self.through(h, None, c, control)


class Outer(nn.Module):
    """A module around the transformer; the time is an argument of this one only."""

    def __init__(self, current: Current) -> None:
        super().__init__()
        self.transformer = Inner(current)

    def forward(
        self, x, t, cond=None, control=None, ids=None, scale=None, skip_layers=None, options=None, guidance=None
    ):
        return self.transformer(x, cond + 0.001 * value_of(t), control, skip_layers)


class Scheduler:
    """A scheduler as diffusers has them, as far as timesteps and index go."""

    def __init__(self) -> None:
        self.timesteps, self.step_index, self.begin_index = torch.zeros(0), None, None

    def set_timesteps(self, values: list[float], begin: int = 0) -> None:
        """Begin a schedule, at some step of it."""
        self.timesteps, self.step_index = torch.tensor(values, dtype=torch.float64), None
        self.begin_index = begin or None

    def step(self) -> None:
        """Go on by one evaluation."""
        self.step_index = ((self.begin_index or 0) if self.step_index is None else self.step_index) + 1


class SchedulerWithoutIndex:
    """A scheduler that lists its timesteps and counts nothing, as DDIM's."""

    def __init__(self) -> None:
        self.timesteps = torch.zeros(0)

    def set_timesteps(self, values: list[float], begin: int = 0) -> None:
        """Begin a schedule."""
        self.timesteps = torch.tensor(values, dtype=torch.float64)

    def step(self) -> None:
        """Do nothing."""


def pipeline(transformer: nn.Module, scheduler: object) -> SimpleNamespace:
    """Return what looks like a pipeline: a transformer and a scheduler."""
    return SimpleNamespace(transformer=transformer, scheduler=scheduler)
