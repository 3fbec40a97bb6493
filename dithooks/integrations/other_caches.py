"""Other libraries' caches at work in a model, recognised by the marks that they leave on it.

They count the calls of blocks or of layers within them, or compare what those are given: where a cache of this library
passes blocks over, they stand still, and then take one step for another.
"""

from __future__ import annotations

from torch import nn

REGISTRY = "_diffusers_hook"  # the name that diffusers gives its registry of a module's hooks


def other_cache(model: nn.Module) -> str | None:
    """Return what another cache in a model is called; ``None`` if there is none.

    Of diffusers' hooks, those are meant that keep something from call to call; those of group offloading, casting and
    context parallel do not. cache-dit and its kin mark a model that they have changed.
    """
    config = vars(model).get("_cache_config")
    if config is not None and getattr(model, "is_cache_enabled", False) is True:  # else it is the model's own
        return type(config).__name__
    if vars(model).get("_is_cached") is True:
        return "cache-dit or one like it"
    for module in model.modules():
        registry = vars(module).get(REGISTRY)
        hooks = () if registry is None else registry.hooks.values()
        found = next((hook for hook in hooks if getattr(hook, "_is_stateful", False)), None)
        if found is not None:
            return type(found).__name__
    return None
