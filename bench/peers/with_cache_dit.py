"""cache-dit's DBCache, as its user writes it: thresholds on the first blocks' change, and its masks of steps."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import nn

from bench.compare.subject import Subject, lists
from bench.peers.peer import Attached, Knob, Method

THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.8)
FEW = (0.05, 0.1, 0.2, 0.5)
MASKS = ("slow", "medium", "fast", "ultra")  # its presets, for any number of steps
INTERVALS = (2, 3, 4, 5)
TAYLOR = "TaylorSeer 1"
OTHERS = ("FoCa", "DMD")  # its other forecasts, which have nothing to set, or defaults
WARMUP = 4  # steps of 28; its default of 8 leaves at most 2.5 times fewer


def pattern(block: nn.Module) -> int:
    """Its name for what a block of the models here takes and returns."""
    return {"FluxTransformerBlock": 1, "FluxSingleTransformerBlock": 1, "WanTransformerBlock": 2}.get(
        type(block).__name__, 3
    )


def functor(transformer: nn.Module) -> Any:
    """What its own adapter of a DiT has: another forward, as the model's reads from its first block behind the last."""
    if type(transformer).__name__ != "DiTTransformer2DModel":
        return None
    from cache_dit.caching.patch_functors import DiTPatchFunctor

    return DiTPatchFunctor()


def calibrator(name: str) -> Any:
    """Its configuration of a forecast: ``FoCa``, ``DMD``, or ``TaylorSeer`` and an order; with an empty name, none."""
    import cache_dit

    if not name:
        return None
    if name.startswith("TaylorSeer"):
        return cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=int(name.split()[1]))
    return getattr(cache_dit, f"{name}CalibratorConfig")()


@contextmanager
def attached(subject: Subject, settings: dict[str, Any], forecast: str) -> Iterator[Attached]:
    """``enable_cache`` for all lists of blocks."""
    import cache_dit

    logging.getLogger("CACHE_DIT").setLevel(logging.ERROR)
    pipe, pieces = subject.pipe, lists(subject.pipe.transformer)
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=pieces,
        forward_pattern=[getattr(cache_dit.ForwardPattern, f"Pattern_{pattern(piece[0])}") for piece in pieces],
        patch_functor=functor(pipe.transformer),
        has_separate_cfg=subject.calls > 1,
    )
    call = type(pipe).__call__
    config = cache_dit.DBCacheConfig(num_inference_steps=subject.steps, **settings)
    adapter = cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator(forecast))
    try:
        yield Attached(shown=", ".join(f"{name} {value}" for name, value in settings.items()))
    finally:
        cache_dit.disable_cache(adapter)
        type(pipe).__call__ = call  # it puts its own into the class


def threshold(subject: Subject, value: float, *, first: int, forecast: str = "", **others: Any) -> Any:
    """DBCache with ``first`` blocks that decide, and none behind."""
    settings = {"Fn_compute_blocks": first, "Bn_compute_blocks": 0, "max_warmup_steps": WARMUP}
    return attached(subject, {**settings, "residual_diff_threshold": value, **others}, forecast)


def masked(subject: Subject, value: Knob, *, forecast: str = "") -> Any:
    """Its static masks: a preset, or every so many steps. One block computes on each, which is its least."""
    import cache_dit

    if isinstance(value, str):
        mask = cache_dit.steps_mask(total_steps=subject.steps, mask_policy=value)
    else:
        mask = [int(step % value == 0) for step in range(subject.steps)]
    settings = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 0, "steps_computation_mask": mask}
    return attached(subject, {**settings, "steps_computation_policy": "static"}, forecast)


def methods() -> list[Method]:
    """DBCache with thresholds, by one block and by eight, and with masks; each without and with its forecasts."""
    library, knob = f"cache-dit {version('cache-dit')}", "residual_diff_threshold"
    found = []
    for first, values in ((1, THRESHOLDS), (8, FEW)):
        name = f"DBCache F{first}B0"
        plain, taylor = partial(threshold, first=first), partial(threshold, first=first, forecast=TAYLOR)
        found += [Method(library, name, knob, values, plain, static=False)]
        found += [Method(library, f"{name}, {TAYLOR}", knob, values, taylor, static=False)]
    few = partial(threshold, first=1, forecast=TAYLOR, max_continuous_cached_steps=2)
    found.append(Method(library, f"DBCache F1B0, {TAYLOR}, two in a row", knob, THRESHOLDS, few, static=False))
    for forecast in OTHERS:
        attach = partial(threshold, first=1, forecast=forecast)
        found.append(Method(library, f"DBCache F1B0, {forecast}", knob, FEW, attach, static=False))
    for forecast in ("", TAYLOR, "TaylorSeer 2", *OTHERS):
        name = f"SCM static, {forecast}" if forecast else "SCM static"
        found.append(Method(library, name, "mask", MASKS, partial(masked, forecast=forecast)))
        found.append(Method(library, f"{name}, even", "interval", INTERVALS, partial(masked, forecast=forecast)))
    return found
