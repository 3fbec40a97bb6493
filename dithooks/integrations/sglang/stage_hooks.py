"""Hooks around SGLang's denoising stage: which plan a request has, which step a call is of, and where a run ends."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from ...config.cache_config import DitCacheConfig
from ...config.cache_plan import CachePlan
from ...engine.sessions import timestep_scope
from ...errors import DitHooksError
from ..serving.cache_switch import CacheSwitch
from ..serving.served_plans import ServedPlans

STAGE = "sglang.multimodal_gen.runtime.pipelines_core.stages.denoising.DenoisingStage"
PARAMETERS, KEY = "cache_dit_params", "dithooks"  # where a request says what it asks for
LOG = logging.getLogger("dithooks.sglang")


def register() -> None:
    """Register the hooks with SGLang's plugins, if ``DITHOOKS_PLAN`` names a file; its entry point calls this.

    Raises:
        OSError, TypeError, ValueError: the file cannot be read, or holds no plan.
    """
    plans = ServedPlans.from_environment()
    if plans is None:
        return
    plugins = import_module("sglang.multimodal_gen.runtime.platforms.plugins")
    hooks = StageHooks(plans)
    for name, hook in (
        ("_maybe_enable_cache_dit", hooks.begin),
        ("_predict_noise", hooks.predict),
        ("_denoise", hooks.denoise),
    ):
        plugins.HookRegistry.register(f"{STAGE}.{name}", hook, plugins.HookType.AROUND)


@dataclass
class StageRun:
    """The run that a stage is at.

    Args:
        switch: the stage's cache.
        steps: number of steps of the run; ``None``: it is not cached.
        sigmas: the noise level of each step, if the scheduler has them.
        step: the last one of which a call was made.
        calls: how many calls that step has had with the prompt, and without.
    """

    switch: CacheSwitch = field(default_factory=CacheSwitch)
    steps: int | None = None
    sigmas: list[float] | None = None
    step: int = -1
    calls: Counter[str] = field(default_factory=Counter)

    @contextmanager
    def scope(self, step: int, is_negative: bool) -> Iterator[None]:
        """Tell the cache which step a call is of, and which of its branches."""
        if step != self.step:
            self.step, self.calls = step, Counter()
        name = "uncond" if is_negative else "cond"
        number = self.calls[name]
        self.calls[name] += 1
        branch = f"{name} {number + 1}" if number else name  # policies of guidance may have more than two
        sigma = self.sigmas[step] if self.sigmas and step < len(self.sigmas) else None
        with timestep_scope(step, branch=branch, sigma=sigma, steps=self.steps):
            yield


class StageHooks:
    """The hooks of all stages of a process, each of which is called with what it is around, and with its arguments.

    Args:
        plans: of the server.
    """

    def __init__(self, plans: ServedPlans) -> None:
        self._plans = plans
        self._runs: WeakKeyDictionary[Any, StageRun] = WeakKeyDictionary()

    def begin(self, original: Callable[..., Any], stage: Any, num_inference_steps: Any, batch: Any) -> Any:
        """Around ``_maybe_enable_cache_dit``: put on, change or take off the cache, as the request asks.

        Raises:
            ValueError: the request names a tier that there is not, or one of another model.
        """
        mine = self._runs.setdefault(stage, StageRun())
        mine.steps, mine.step = None, -1
        asked, theirs = _asked(batch.sampling_params)
        plan = None if theirs or _is_kept_out(stage, batch) else self._plans.choose(asked)
        parts = {
            name: part
            for name in ("transformer", "transformer_2")
            if isinstance(part := getattr(stage, name, None), nn.Module)
        }
        if plan is None or not parts:
            mine.switch.remove()
            return original(stage, num_inference_steps, batch) if asked is None else None
        if getattr(stage, "_cache_dit_enabled", False):  # of a request before that has asked for that one
            stage._unmount_cache_dit()
        self._attach(mine, plan, parts, is_asked=asked is not None)
        if mine.switch.handle is not None:
            mine.steps, mine.sigmas = _schedule(num_inference_steps, batch)
        return None

    def predict(self, original: Callable[..., Any], stage: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``_predict_noise``: tell the cache step and branch, by the forward context."""
        mine = self._runs.get(stage)
        context = import_module("sglang.multimodal_gen.runtime.managers.forward_context")
        here = context.get_forward_context_or_none() if mine is not None and mine.steps is not None else None
        if mine is None or here is None or here.forward_batch is None:
            return original(stage, *args, **kwargs)
        with mine.scope(int(here.current_timestep), bool(here.forward_batch.is_cfg_negative)):
            return original(stage, *args, **kwargs)

    def denoise(self, original: Callable[..., Any], stage: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
        """Around ``_denoise``: free what the run has kept, also where it fails, and log what it came to."""
        try:
            return original(stage, batch, *args, **kwargs)
        finally:
            mine = self._runs.get(stage)
            if mine is not None and mine.steps is not None:
                mine.steps = None
                if line := mine.switch.end():
                    LOG.info("dithooks: request %s: %s", getattr(batch, "request_id", None), line)

    def _attach(
        self, mine: StageRun, plan: DitCacheConfig | CachePlan, parts: dict[str, nn.Module], is_asked: bool
    ) -> None:
        try:
            mine.switch.use(plan, parts)
        except DitHooksError as error:
            if is_asked:
                raise
            LOG.warning("dithooks: %s is drawn without a cache: %s", "+".join(parts), error)


def _asked(parameters: Any) -> tuple[object, bool]:
    """Return what a request asks of this cache, ``None`` if nothing; and whether it asks for Cache-DiT."""
    given, enabled = getattr(parameters, PARAMETERS, None), getattr(parameters, "enable_cache_dit", None)
    if isinstance(given, dict) and KEY in given:
        return given[KEY], False
    if enabled is False:
        return False, False
    return None, bool(enabled) or bool(given)


def _is_kept_out(stage: Any, batch: Any) -> bool:
    """Return whether nothing can be cached: in warm-up, which is of other steps, and where whole steps are graphs."""
    args = getattr(stage, "server_args", None)
    if getattr(args, "enable_breakable_cuda_graph", False):
        return True
    return bool(getattr(batch, "is_warmup", False)) and not getattr(args, "enable_torch_compile", False)


def _schedule(num_inference_steps: Any, batch: Any) -> tuple[int, list[float] | None]:
    """Return the number of steps of a run, both experts' together, and their noise levels."""
    timesteps = getattr(batch, "timesteps", None)
    whole = sum(num_inference_steps) if isinstance(num_inference_steps, tuple) else num_inference_steps
    steps = int(whole) if timesteps is None else len(timesteps)
    levels = getattr(getattr(batch, "scheduler", None), "sigmas", None)
    if isinstance(levels, torch.Tensor) and len(levels) >= steps:
        return steps, [float(level) for level in levels[:steps].tolist()]
    return steps, None
