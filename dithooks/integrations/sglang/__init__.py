"""SGLang diffusion: caches for its denoising stages, by the hooks that it has for plugins."""

from .stage_hooks import register

__all__ = ["register"]
