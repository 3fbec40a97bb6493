"""Offloading on an accelerator: a cached run with it has to be the one without it, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from dithooks import DitCacheConfig, dit_cache

STEPS = 8
RANGES = ((1, 3), (1, 2))  # first block and number of blocks


def offload(device: torch.device) -> dict[str, Any]:
    """However weights are offloaded, a cached run has the bits of one without, and leaves no more weights behind."""
    given = inputs(device)
    figures: dict[str, Any] = {"ok": True}
    for first, count in RANGES:
        for name, way in ways(device).items():
            config = DitCacheConfig(2, 2, first, count)
            base, model = tiny_flux().to(device), tiny_flux()
            if way is casting:  # that changes what comes out
                way(base, device)
            plain = run(base, given)
            with dit_cache(base, config):
                expected = run(base, given)
            way(model, device)
            run(model, given)
            usual = on(device, model)  # one that is offloaded whole stays until another is needed
            with dit_cache(model, config) as cache:
                same, reused = torch.equal(run(model, given), expected), cache.stats.reused_calls
            left = on(device, model) - usual
            fine = {
                "not the same bits": not same,
                "nothing reused": reused == 0,
                "other bits after removal": not torch.equal(run(model, given), plain),
                "the cache shows nothing": torch.equal(plain, expected),
                f"{left} weights left on the device": left > 0,
            }
            wrong = ", ".join(what for what, is_so in fine.items() if is_so)
            figures[f"{name}, blocks {first} … {first + count - 1}"] = wrong or f"{reused} calls reused"
            figures["ok"] = figures["ok"] and not wrong
    return figures


def tiny_flux() -> FluxTransformer2DModel:
    """Two and three blocks, the same each time."""
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    for parameter in model.parameters():  # gates are zero when new, and blocks with them do nothing
        parameter.data.normal_(std=0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)
    return model


def inputs(device: torch.device) -> dict[str, Tensor]:
    """Of a call, less the timestep."""
    generator = torch.Generator().manual_seed(1)
    shapes: dict[str, tuple[int, ...]] = {"hidden_states": (1, 16, 4), "encoder_hidden_states": (1, 5, 32)}
    shapes |= {"pooled_projections": (1, 32), "img_ids": (16, 3), "txt_ids": (5, 3)}
    return {name: torch.randn(shape, generator=generator).to(device) for name, shape in shapes.items()}


def run(model: nn.Module, given: dict[str, Tensor]) -> Tensor:
    """The outputs of all steps."""
    device = given["hidden_states"].device
    times = [torch.tensor([1 - k / STEPS], device=device) for k in range(STEPS)]
    return torch.stack([model(**given, timestep=time, return_dict=False)[0].cpu() for time in times])


def on(device: torch.device, model: nn.Module) -> int:
    """How many of a model's weights are on a device."""
    return sum(weight.device.type == device.type for weight in model.parameters())


def casting(model: Any, device: torch.device) -> None:
    """Weights in float8, cast for each layer."""
    model.to(device).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def ways(device: torch.device) -> dict[str, Callable[[Any, torch.device], Any]]:
    """The ways to offload, by name."""
    import accelerate

    def groups(kind: str, **options: Any) -> Callable[[Any, torch.device], Any]:
        return lambda model, device: model.enable_group_offload(
            device, torch.device("cpu"), offload_type=f"{kind}_level", **options
        )

    found: dict[str, Callable[[Any, torch.device], Any]] = {
        "whole model": accelerate.cpu_offload_with_hook,
        "sequential": accelerate.cpu_offload,
        "layerwise casting": casting,
        "groups of 2 blocks": groups("block", num_blocks_per_group=2),
    }
    for stream in (False, True) if device.type != "cpu" else (False,):
        told = ", stream" if stream else ""
        found[f"groups of a block{told}"] = groups("block", num_blocks_per_group=1, use_stream=stream)
        found[f"leaves{told}"] = groups("leaf", use_stream=stream)
    return found
