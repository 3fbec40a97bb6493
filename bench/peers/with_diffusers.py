"""The caches that diffusers brings: hooks on blocks, and on the layers within them."""

from __future__ import annotations

import ast
import contextlib
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from bench.compare.subject import Subject
from bench.peers.peer import Attached, Clock, Method, Spent, clock

THRESHOLDS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)
MAGNITUDES = (0.02, 0.06, 0.12, 0.24, 0.5)  # 0.06 is its default
INTERVALS = (2, 3, 4, 5, 6)
SKIPS = (2, 3, 4, 6)
BUDGETS = (0.1, 0.25, 0.5, 1.0, 2.0)  # 0.25 is its default
BRANCHES = ("cond", "uncond", "third")
ATTENTION = r".*blocks\.\d+\.attn\d?"
LAYERS = r".*blocks\.\d+\.(attn\d?|ff|ffn|ff_context|proj_mlp)"  # and the feed-forward ones


@contextmanager
def told(subject: Subject) -> Iterator[Clock]:
    """Every call is told what pipelines tell: branch, step and noise level. What was applied inside is taken off."""
    from diffusers.hooks.hooks import CacheContext, HookRegistry, _set_cache_context

    transformer = subject.pipe.transformer
    registry = HookRegistry.check_if_exists_or_initialize(transformer)

    def tell(now: Clock) -> None:
        if now.begins:
            registry.reset_stateful_hooks(recurse=True)
        name, level = BRANCHES[now.call], sigma(subject, now)
        _set_cache_context(transformer, CacheContext(name, now.step, subject.steps, now.timestep, level))

    with clock(subject, tell) as watch:
        try:
            yield watch
        finally:
            take_off(transformer)


@contextmanager
def attached(subject: Subject, value: Any, *, make: Callable[[Clock, Any], Any]) -> Iterator[Attached]:
    """A cache for one configuration."""
    with told(subject) as now:
        apply(subject.pipe.transformer, make(now, value))
        yield Attached()


@contextmanager
def by_magnitude(subject: Subject, threshold: float, *, most: int) -> Iterator[Attached]:
    """MagCache, with at most so many steps in a row, after its calibration: one run, after which it prints ratios.

    It prints a list for each branch, and takes one: the first.
    """
    from diffusers import MagCacheConfig

    transformer, printed, begun = subject.pipe.transformer, io.StringIO(), time.perf_counter()
    with told(subject), contextlib.redirect_stdout(printed):
        apply(transformer, MagCacheConfig(num_inference_steps=subject.steps, calibrate=True))
        subject.draw(subject.calibration)
    told_of = [line for line in printed.getvalue().splitlines() if line.startswith("[") and line.endswith("]")]
    ratios = ast.literal_eval(told_of[0])
    spent = Spent(1.0, time.perf_counter() - begun, 1)
    config = MagCacheConfig(threshold, most, num_inference_steps=subject.steps, mag_ratios=ratios)
    with told(subject):
        apply(transformer, config)
        yield Attached(spent=spent)


def apply(transformer: torch.nn.Module, config: Any) -> None:
    """As ``enable_cache`` does, which not every model has."""
    from diffusers import hooks
    from diffusers.hooks.sea_cache import apply_sea_cache

    how: dict[str, Callable[..., None]] = {
        "FirstBlockCacheConfig": hooks.apply_first_block_cache,
        "MagCacheConfig": hooks.apply_mag_cache,
        "TaylorSeerCacheConfig": hooks.apply_taylorseer_cache,
        "PyramidAttentionBroadcastConfig": hooks.apply_pyramid_attention_broadcast,
        "FasterCacheConfig": hooks.apply_faster_cache,
        "SeaCacheConfig": apply_sea_cache,
    }
    how[type(config).__name__](transformer, config)
    transformer._diffusers_hook.invalidate_child_registries_cache()


def take_off(transformer: torch.nn.Module) -> None:
    """Remove every hook of theirs, wherever it is."""
    registry = transformer._diffusers_hook
    known = [getattr(module, "_diffusers_hook", None) for module in transformer.modules()]
    for name in {name for each in known if each is not None for name in each.hooks}:
        registry.remove_hook(name, recurse=True)
    registry.invalidate_child_registries_cache()


def sigma(subject: Subject, now: Clock) -> float:
    """The noise's share of the latents, 0…1: of flow matching what the scheduler has, else by its variances."""
    variances = getattr(subject.pipe.scheduler, "alphas_cumprod", None)
    if variances is None or getattr(subject.pipe.scheduler.config, "use_flow_sigmas", False):
        return now.timestep / 1000
    kept = float(variances[int(now.timestep)])
    return (1 - kept) ** 0.5 / (kept**0.5 + (1 - kept) ** 0.5)


# -- configurations ---------------------------------------------------------------------------------------------


def first_block(_: Clock, threshold: float) -> Any:
    from diffusers import FirstBlockCacheConfig

    return FirstBlockCacheConfig(threshold=threshold)


def taylor(_: Clock, interval: int, *, order: int, layers: str | None) -> Any:
    """Of the layers of that name; or, lite, of what the model returns, with no block run at all.

    Left to itself it looks for layers called ``attn``, finds none in models that call them ``attn1``, and does nothing.
    """
    from diffusers import TaylorSeerCacheConfig

    return TaylorSeerCacheConfig(
        cache_interval=interval,
        max_order=order,
        use_lite_mode=layers is None,
        taylor_factors_dtype=torch.float32,
        cache_identifiers=None if layers is None else [layers],
    )


def pyramid(now: Clock, skip: int) -> Any:
    """With the timesteps its documentation uses."""
    from diffusers import PyramidAttentionBroadcastConfig

    return PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(100, 850),
        cross_attention_block_skip_range=skip + 1,
        cross_attention_timestep_skip_range=(100, 850),
        current_timestep_callback=lambda: int(now.timestep),
    )


def faster(now: Clock, skip: int) -> Any:
    """Attention only: its shortcut for guidance is for one batch with the unconditional half first."""
    from diffusers import FasterCacheConfig

    return FasterCacheConfig(
        spatial_attention_block_skip_range=skip,
        spatial_attention_timestep_skip_range=(-1, 681),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: int(now.timestep),
        attention_weight_callback=lambda _: 0.3,
    )


def sea(_: Clock, threshold: float, *, most: int) -> Any:
    """Its residuals go through a line, and the last step is computed."""
    from diffusers.hooks.sea_cache import SeaCacheConfig

    return SeaCacheConfig(threshold=threshold, max_consecutive_cached=most, raw_vision_callback=frames)


def frames(_: torch.nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> list[Tensor]:
    """What is drawn, of each sample (channels, frames, height, width)."""
    from dithooks.demo.emoji import SIZE
    from dithooks.demo.model import unpatchify

    latents: Tensor = given["hidden_states"] if "hidden_states" in given else args[0]
    if latents.ndim == 3:
        latents = unpatchify(latents, SIZE, SIZE)
    return list(latents if latents.ndim == 5 else latents[:, :, None])


def methods() -> list[Method]:
    """All that diffusers has for transformers of these kinds."""
    library = f"diffusers {version('diffusers')}"

    def method(name: str, knob: str, values: tuple[Any, ...], make: Any, static: bool = False) -> Method:
        return Method(library, name, knob, values, partial(attached, make=make), static)

    found = [method("FirstBlockCache", "threshold", THRESHOLDS, first_block)]
    for most in (3, 5):  # of the paper: 3 or more
        attach = partial(by_magnitude, most=most)
        found.append(Method(library, f"MagCache, {most} in a row", "threshold", MAGNITUDES, attach))
    for name, order, layers in (
        ("TaylorSeer 1, attention", 1, ATTENTION),
        ("TaylorSeer 1, layers", 1, LAYERS),
        ("TaylorSeer 1, lite", 1, None),
        ("TaylorSeer 2, lite", 2, None),
    ):
        found.append(method(name, "cache_interval", INTERVALS, partial(taylor, order=order, layers=layers), True))
    for most in (2, 4):
        found.append(method(f"SeaCache, {most} in a row", "threshold", BUDGETS, partial(sea, most=most)))
    found.append(method("PyramidAttentionBroadcast", "skip range", SKIPS, pyramid, True))
    found.append(method("FasterCache", "skip range", SKIPS[:3], faster, True))
    return found
