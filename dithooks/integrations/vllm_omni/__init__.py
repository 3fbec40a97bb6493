"""vLLM-Omni: an engine whose runner caches, whole requests or step by step, and a cache backend.

The classes are made when vLLM-Omni asks for them by name, as they derive from its own.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from .backend_parts import BackendParts
from .runner_parts import RunnerParts

RUNNER = "CachedModelRunner"


@cache
def __getattr__(name: str) -> Any:
    """Make a class of vLLM-Omni's: ``CachedEngine``, ``CachedModelRunner`` or ``CachedBackend``.

    Raises:
        AttributeError: it is none of these.
        ModuleNotFoundError: vLLM-Omni is not installed.
    """
    if name == "CachedEngine":
        engine = import_module("vllm_omni.diffusion.diffusion_engine").DiffusionEngine
        about = "vLLM-Omni's engine, with a runner that caches."
        names = {"default_diffusion_model_runner_cls": f"{__name__}.{RUNNER}", "__doc__": about}
        return type(name, (engine,), {**names, "__module__": __name__})
    if name == RUNNER:
        platform = import_module("vllm_omni.platforms").current_omni_platform
        path, _, kind = platform.get_diffusion_model_runner_cls().rpartition(".")
        return type(name, (RunnerParts, getattr(import_module(path), kind)), {"__module__": __name__})
    if name == "CachedBackend":
        base = import_module("vllm_omni.diffusion.cache.base").CacheBackend
        return type(name, (BackendParts, base), {"__module__": __name__})
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
