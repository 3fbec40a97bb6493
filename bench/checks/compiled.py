"""A whole model compiled with ``mode="reduce-overhead"``: on CUDA, graphs that are recorded and replayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dithooks import DitCacheConfig, Linear, dit_cache, timestep_scope
from dithooks.tiny import build

STEPS = 12
CONFIGS = (DitCacheConfig(3, 3, 0, 6), DitCacheConfig(3, 3, 1, 5, predictor=Linear()))


def compiled(device: torch.device) -> dict[str, Any]:
    """Compiled for little overhead, a cached model gives what it gives uncompiled, in two graphs without a break."""
    model, make = build("FluxTransformer2DModel")
    model = model.to(device)
    given = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in make().items()
        if name not in ("timestep", "return_dict")
    }
    figures: dict[str, Any] = {"ok": True, "relative L2 to eager": 0.0, "calls reused": 0}
    plain = run(model, given, device)
    for config in CONFIGS:
        with dit_cache(model, config):
            expected = run(model, given, device)
        torch._dynamo.reset()
        counters.clear()
        model.compile(mode="reduce-overhead", fullgraph=True)
        try:
            with dit_cache(model, config) as cache:
                offs = [apart(run(model, given, device), expected) for _ in range(3)]  # warmed up, recorded, replayed
                reused = cache.stats.reused_calls
            graphs, breaks = counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())
            after = apart(run(model, given, device), plain)
        finally:
            model._compiled_call_impl = None
        fine = max(*offs, after) < 1e-3 and graphs == 2 and not breaks and reused > 0
        figures["ok"] = figures["ok"] and fine
        figures["relative L2 to eager"] = max(figures["relative L2 to eager"], *offs)
        figures["calls reused"] += reused
        figures |= {"graphs": graphs, "breaks": breaks, "CUDA graphs skipped": counters["inductor"]["cudagraph_skips"]}
    return figures


def run(model: nn.Module, given: dict[str, Any], device: torch.device) -> Tensor:
    """The outputs of all steps."""
    outs = []
    for step in range(STEPS):
        torch.compiler.cudagraph_mark_step_begin()
        with timestep_scope(step, steps=STEPS):
            time = torch.full((1,), 1 - step / STEPS, device=device)
            outs.append(model(**given, timestep=time, return_dict=False)[0].clone())
    return torch.stack(outs)


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance."""
    return float((ours - theirs).norm() / theirs.norm())
