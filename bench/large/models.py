"""Transformers with random weights, made where they are to run, and the sampling loops that call them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn

from .geometry import Geometry

CLASSES = {"flux": "FluxTransformer2DModel", "wan": "WanTransformer3DModel"}
GUIDANCE = 5.0  # of Wan
SMALL = 0.02  # biases


class Loop(DiffusionPipeline):  # type: ignore[misc]
    """As much of a pipeline as samples: no text encoder, no decoder. Its scheduler tells the steps."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, scheduler=scheduler)
        self.set_progress_bar_config(disable=True)
        self.runs = 0  # begun

    @torch.no_grad()
    def __call__(self, latents: Tensor, given: dict[str, Any], steps: int, until: int | None = None) -> Tensor:
        """Latents after a run of so many steps, or after the first of them, ``until``."""
        self.begin(latents, steps)
        self.runs += 1
        for time in self.scheduler.timesteps[:until]:
            velocity = self.velocity(latents, time, given)
            latents = self.scheduler.step(velocity, time, latents, return_dict=False)[0]
        return latents

    def begin(self, latents: Tensor, steps: int) -> None:
        """Set the noise levels. To be told the first step spares the scheduler to look for it, which would wait."""
        self.scheduler.set_timesteps(steps, device=latents.device)
        self.scheduler.set_begin_index(0)


class FluxLoop(Loop):
    """As FLUX's pipeline calls its transformer: once a step, with the guidance as an input."""

    def begin(self, latents: Tensor, steps: int) -> None:
        """With noise levels that are shifted by the number of tokens, as for FLUX.1."""
        config = self.scheduler.config
        slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
        shift = config.base_shift + slope * (latents.shape[1] - config.base_image_seq_len)
        sigmas = np.linspace(1.0, 1 / steps, steps)
        self.scheduler.set_timesteps(sigmas=sigmas, device=latents.device, mu=shift)
        self.scheduler.set_begin_index(0)

    def velocity(self, latents: Tensor, time: Tensor, given: dict[str, Any]) -> Tensor:
        """What the transformer gives."""
        with self.transformer.cache_context("cond"):
            times = time.expand(len(latents)).to(latents.dtype) / 1000
            output: Tensor = self.transformer(hidden_states=latents, timestep=times, return_dict=False, **given)[0]
        return output


class WanLoop(Loop):
    """As Wan's pipeline calls its transformer: twice a step, with the prompt and without; latents are in float32."""

    def velocity(self, latents: Tensor, time: Tensor, given: dict[str, Any]) -> Tensor:
        """What the transformer gives, guided."""
        outputs = []
        for name, prompt in zip(("cond", "uncond"), given["prompts"], strict=True):
            with self.transformer.cache_context(name):
                output = self.transformer(
                    hidden_states=latents.to(prompt.dtype),
                    timestep=time.expand(len(latents)),
                    encoder_hidden_states=prompt,
                    return_dict=False,
                )
            outputs.append(output[0])
        with_prompt, without = outputs
        guided: Tensor = without + GUIDANCE * (with_prompt - without)
        return guided


def build(geometry: Geometry, device: torch.device, seed: int = 0) -> tuple[Loop, Callable[..., Tensor]]:
    """The pipeline, and what makes a run of it: ``run(steps, until=None)``, always from the same noise."""
    transformer = random_transformer(geometry, device, seed)
    draw = torch.Generator().manual_seed(seed + 1)  # on the host: the same on every device

    def made(*shape: int) -> Tensor:
        return torch.randn(shape, generator=draw).to(device, geometry.dtype)

    given = {name: placed(value, device) for name, value in geometry.given(made).items()}
    if geometry.kind == "flux":
        shifting = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True, **shifting)
        pipe: Loop = FluxLoop(transformer, scheduler)
        noise = made(*geometry.latents)
    else:
        pipe = WanLoop(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0))
        noise = made(*geometry.latents).float()

    def run(steps: int, until: int | None = None) -> Tensor:
        latents: Tensor = pipe(noise, given, steps, until)
        return latents

    return pipe, run


def placed(value: Any, device: torch.device) -> Any:
    """A tensor on the device."""
    return value.to(device) if isinstance(value, Tensor) else value


def random_transformer(geometry: Geometry, device: torch.device, seed: int) -> nn.Module:
    """Made on the device, weight by weight, in its own dtype: there is never a copy on the host.

    What diffusers keeps in float32, when it loads such a model, is in float32 here, too. Tables that are computed, not
    learned (Wan's rotary ones), would be lost by a model without memory, and are computed again.
    """
    kind = getattr(diffusers, CLASSES[geometry.kind])
    with torch.device("meta"):
        model: nn.Module = kind(**geometry.config).eval()
    if hasattr(model, "rope"):
        own = model.rope
        model.rope = type(own)(own.attention_head_dim, own.patch_size, own.max_seq_len).to(device)
    whole = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    generator = torch.Generator(device).manual_seed(seed)
    for path, module in model.named_modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            names = {*path.split("."), name}
            dtype = torch.float32 if names & whole else geometry.dtype
            drawn = torch.empty(parameter.shape, dtype=dtype, device=device)
            module._parameters[name] = nn.Parameter(fill(drawn, name, generator))
    if left := [name for name, each in [*model.named_parameters(), *model.named_buffers()] if each.is_meta]:
        raise RuntimeError(f"nothing says what these are: {', '.join(left)}")
    return model


def fill(tensor: Tensor, name: str, generator: torch.Generator) -> Tensor:
    """Weights that keep the size of what passes; norms at one; biases small, and no gate at zero."""
    if tensor.dim() < 2:
        return tensor.fill_(1) if name == "weight" else tensor.normal_(0, SMALL, generator=generator)
    fan_in = tensor.shape[-1] if tensor.shape[0] == 1 else math.prod(tensor.shape[1:])  # tables are (1, 6, width)
    return tensor.normal_(0, fan_in**-0.5, generator=generator)
