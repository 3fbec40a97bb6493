"""Compiled code: whether a call is about to run in it, and what has to stay outside of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

_WRAPPER = "_torchdynamo_orig_callable"  # what torch.compile notes on the function that it returns for another


def outside_graphs(why: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Mark a function as one that the compiler does not read, though it still sees what that calls.

    Args:
        why: for those who want no graph break.
    """
    from torch._dynamo.decorators import skip  # imports the compiler, which can wait until a cache is attached

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        vars(function)["_torchdynamo_disable_msg"] = why
        kept_out: Callable[..., Any] = skip(function)
        return kept_out

    return mark


def run_eagerly(function: Callable[..., Any], why: str) -> Callable[..., Any]:
    """Return a function that runs eagerly, with all that it calls; ``why``: for those who want no graph break."""
    disable: Callable[..., Any] = torch.compiler.disable
    if "reason" in inspect.signature(disable).parameters:  # since torch 2.7
        disable = partial(disable, reason=why)
    eager: Callable[..., Any] = disable(function)
    return eager


def compiler_in_force() -> Callable[[], object]:
    """Return a function that returns what would compile the next function that this thread calls, or ``None``.

    It shows ``torch.compile(model)``, of which nothing is to be seen on the model: only who calls it differs.
    """
    import torch._dynamo  # loads what the next line asks for

    # Since torch 2.6; with older releases no model can be compiled as a whole.
    found: Callable[[], object] = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)
    return found


def are_compiled(modules: Iterable[nn.Module]) -> bool:
    """Return whether one of some modules has been compiled in place, or its forward is a compiled function."""
    return any(module._compiled_call_impl is not None or hasattr(module.forward, _WRAPPER) for module in modules)
