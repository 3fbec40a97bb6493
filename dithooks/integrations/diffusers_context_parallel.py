"""Tokens that are split over ranks on their way into a block.

diffusers' context parallel splits them at the places of a model's plan: on the way into the model, or, as in Wan and
Qwen-Image, into its first block, within that block's ``forward``. Such a block is called with all tokens and returns
those of this rank, so that output − argument is no residual; output − what its own code is given is one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

REGISTRY, HOOK = "_diffusers_hook", "cp_input---"  # names that diffusers gives them


def divides(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of some modules splits its arguments over ranks."""
    return any(next(_hooks(module), None) is not None for module in modules)


def divided(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a module's own code is given when it is called like this."""
    for hook in _hooks(module):
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
    return args, kwargs


def _hooks(module: nn.Module) -> Iterator[Any]:
    """Those within its ``forward``; one put over a stand-in has split the tokens before that is called."""
    registry = vars(module).get(REGISTRY)
    if registry is None or "forward" not in vars(module):
        return iter(())
    return (hook for name, hook in registry.hooks.items() if name.startswith(HOOK))
