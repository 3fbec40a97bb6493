"""Caches with one and the same pattern: at every second step all blocks run, at the others none but the first.

A method attaches to a pipeline for as long as its context is open. What it has to be told before a run, or before a
step, it is told by hooks of its own. Those that have no way to say "every second step" are forced to it by their own
settings: nothing of what they do at a step is left out, their looking at values and waiting for them included. Two
leave the first block out as well (MagCache, TaylorSeer); that is counted like everything else.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dithooks import CacheHandle, CachePlan, DitCacheConfig, Threshold, dit_cache

from .models import Loop
from .watching import blocks_of

EVERY = 2  # steps from one that is computed to the next
ALWAYS = 1e9  # a threshold that every change is below


@dataclass
class Setting:
    """What a method is attached to.

    Args:
        pipe: the pipeline.
        steps: of a run.
        plan: of this model and number of steps, once there is one.
    """

    pipe: Loop
    steps: int
    plan: CachePlan | None = None


@dataclass(frozen=True)
class Method:
    """One of them.

    Args:
        name: of the row.
        library: whose.
        what: settings, for the reader.
        attach: a context manager; gives the handle, where it is one of ours.
        needs: a package to import, if not installed with us.
        whole: whether ``fullgraph=True`` can be asked for when its blocks are compiled.
    """

    name: str
    library: str
    what: str
    attach: Callable[[Setting], Any] = field(compare=False)
    needs: str = "dithooks"
    whole: bool = False


class Unavailable(Exception):
    """A method cannot be tried here; the text says why. That is no failure."""


@contextmanager
def nothing(setting: Setting) -> Iterator[None]:
    """The pipeline as it is."""
    yield None


@contextmanager
def static(setting: Setting) -> Iterator[CacheHandle]:
    """An interval: settled beforehand."""
    with dit_cache(setting.pipe, DitCacheConfig(0, EVERY, cache_block_start=1)) as handle:
        yield handle


@contextmanager
def planned(setting: Setting) -> Iterator[CacheHandle]:
    """A plan that was made from a recorded run."""
    if setting.plan is None:
        raise Unavailable("there is no plan: the recording was not made, or failed")
    with dit_cache(setting.pipe, setting.plan) as handle:
        yield handle


@contextmanager
def dynamic(setting: Setting) -> Iterator[CacheHandle]:
    """A threshold on the first block's change that is never met, and one reused step in a row at most."""
    policy = Threshold(ALWAYS, max_warmup_steps=1, max_continuous_cached_steps=EVERY - 1)
    with dit_cache(setting.pipe, DitCacheConfig(cache_block_start=1, policy=policy)) as handle:
        yield handle


@contextmanager
def by_cache_dit(setting: Setting) -> Iterator[None]:
    """DBCache, F1B0, with a static mask of steps, as its user enables it for a pipeline that it knows."""
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "error")  # read when it is imported
    import cache_dit

    mask = [int(step % EVERY == 0) for step in range(setting.steps)]
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1,
        Bn_compute_blocks=0,
        max_warmup_steps=1,
        num_inference_steps=setting.steps,
        steps_computation_mask=mask,
        steps_computation_policy="static",
    )
    with as_it_was(setting.pipe):
        cache_dit.enable_cache(setting.pipe, cache_config=config)
        try:
            yield None
        finally:
            cache_dit.disable_cache(setting.pipe)


@contextmanager
def as_it_was(pipe: Loop) -> Iterator[None]:
    """Put back what cache-dit changes for good: forward methods, attributes, the class's call, the order of children.

    (It takes the lists of blocks out of the model and back in at every call, so that they come last and the other way
    round. Who then looks for the first block, as FirstBlockCache does, finds another one.)
    """
    transformer, kind = pipe.transformer, type(pipe)
    modules: list[Any] = [pipe, transformer, *blocks_of(transformer), *transformer.children()]
    kept = [(each, dict(vars(each))) for each in modules]
    children, named = dict(transformer._modules), dict(vars(kind))
    try:
        yield
    finally:
        for each, before in kept:
            for name in set(vars(each)) - set(before):
                vars(each).pop(name)
            vars(each).update(before)
        transformer._modules.clear()
        transformer._modules.update(children)
        for name in set(vars(kind)) - set(named):  # the call is inherited here, so it is among these
            delattr(kind, name)


@contextmanager
def in_diffusers(setting: Setting, config: Any) -> Iterator[None]:
    """One of diffusers' own hooks."""
    transformer = setting.pipe.transformer
    transformer.enable_cache(config)

    seen = setting.pipe.runs

    def begins(*_: object) -> None:
        nonlocal seen
        if seen != setting.pipe.runs:  # what the last run has left behind is of no use
            seen = setting.pipe.runs
            told = [(each, each._context) for each in managers(transformer)]
            transformer._reset_stateful_cache()
            for each, context in told:  # which the pipeline has just told
                each.set_context(context)

    handle = transformer.register_forward_pre_hook(begins)
    try:
        yield None
    finally:
        handle.remove()
        transformer.disable_cache()


def managers(transformer: nn.Module) -> list[Any]:
    """Of the hooks' states: each knows whether the call is of the prompt or not."""
    from diffusers.hooks.hooks import HookRegistry, StateManager

    registry = HookRegistry.check_if_exists_or_initialize(transformer)
    hooks = [hook for each in (registry, *registry._get_child_registries()) for hook in each.hooks.values()]
    return [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]


@contextmanager
def first_block_cache(setting: Setting) -> Iterator[None]:
    """Its threshold is set step by step to always or never: it compares, and waits for the result, at each of them."""
    from diffusers.hooks import FirstBlockCacheConfig
    from diffusers.hooks.first_block_cache import _FBC_LEADER_BLOCK_HOOK

    with in_diffusers(setting, FirstBlockCacheConfig(threshold=0.0)):
        first = blocks_of(setting.pipe.transformer)[0]
        hook: Any = first._diffusers_hook.get_hook(_FBC_LEADER_BLOCK_HOOK)

        def told(*_: object) -> None:
            hook.threshold = math.inf if (setting.pipe.scheduler.step_index or 0) % EVERY else -1.0

        handle = setting.pipe.transformer.register_forward_pre_hook(told)
        try:
            yield None
        finally:
            handle.remove()


@contextmanager
def mag_cache(setting: Setting) -> Iterator[None]:
    """With magnitudes that never change, and one reused step in a row at most."""
    from diffusers.hooks import MagCacheConfig

    config = MagCacheConfig(
        threshold=ALWAYS,
        max_skip_steps=EVERY - 1,
        retention_ratio=0.0,
        num_inference_steps=setting.steps,
        mag_ratios=[1.0] * setting.steps,
    )
    with in_diffusers(setting, config):
        yield None


@contextmanager
def taylor_seer(setting: Setting) -> Iterator[None]:
    """Its light mode, which forecasts the last layer's output, and has the blocks return zeros."""
    from diffusers.hooks import TaylorSeerCacheConfig

    config = TaylorSeerCacheConfig(
        cache_interval=EVERY, disable_cache_before_step=1, max_order=1, taylor_factors_dtype=None, use_lite_mode=True
    )
    with in_diffusers(setting, config):
        yield None


PLAIN = Method("plain", "none", "no cache", nothing, whole=True)
OURS = (
    Method("static", "dithooks", f"Interval(0, {EVERY}), blocks from 1 on", static, whole=True),
    Method("planned", "dithooks", "a CachePlan, for as many block executions", planned, whole=True),
    Method("dynamic", "dithooks", "Threshold, never met, one reused step in a row", dynamic, whole=True),
)
CACHE_DIT = Method("cache-dit", "cache-dit", "DBCache F1B0, static mask of steps", by_cache_dit, "cache_dit")
FIRST_BLOCK = Method("FirstBlockCache", "diffusers", "threshold forced at each step", first_block_cache)
MAGNITUDE = Method("MagCache", "diffusers", "magnitudes of 1, one reused step in a row", mag_cache)
TAYLOR = Method("TaylorSeer", "diffusers", "light mode, order 1, interval of 2", taylor_seer)
METHODS = (*OURS, CACHE_DIT, FIRST_BLOCK, MAGNITUDE, TAYLOR)  # by importance
