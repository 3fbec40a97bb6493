"""What is found on a target: the handles on it, the scheduler that tells its steps, the dtype of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from .blocks.adapter import BlockAdapter
from .blocks.target import modules_of
from .hooks import flows_of

if TYPE_CHECKING:
    from .handle import CacheHandle


def handles_of(target: object) -> list[CacheHandle]:
    """The handles of all that is cached in a model, a pipeline or what an adapter names, found by the hooks in it.

    Nothing else holds them: a copy of a model has none, and one that is gone has taken them along.
    """
    target = target.target if isinstance(target, BlockAdapter) else target
    tops = [target] if isinstance(target, nn.Module) else modules_of(target).values()
    found = {id(flow.handle): flow.handle for top in tops for flow in flows_of(top.modules())}
    return list(found.values())


def scheduler_of(target: object, explicit: object) -> Callable[[], Any]:
    """What looks up the scheduler that tells the steps: at every call, as pipelines get new ones.

    Raises:
        TypeError: what was given explicitly is no scheduler.
    """
    if explicit is not None and (isinstance(explicit, type) or not hasattr(explicit, "timesteps")):
        raise TypeError(f"scheduler={explicit!r} has no timesteps: give a scheduler as diffusers has them, or none")
    return lambda: getattr(target, "scheduler", None) if explicit is None else explicit


def dtype_of(owner: nn.Module) -> str | None:
    """Of a transformer's weights, the first that are no whole numbers."""
    dtypes = (parameter.dtype for parameter in owner.parameters() if parameter.is_floating_point())
    return next((str(dtype).removeprefix("torch.") for dtype in dtypes), None)
