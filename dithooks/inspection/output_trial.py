"""Whether the call of a whole transformer can be left out, tried on a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..config.cache_config import DitCacheConfig
from ..engine.output_comparison import tensors_in
from ..engine.sessions import timestep_scope
from ..errors import InvalidSetting, WiringError, WrongType
from ..handle import dit_cache
from ..policies.interval import Interval


def why_not_left_out(model: nn.Module, inputs: Callable[[int], dict[str, Any]]) -> str:
    """Try to leave out one call of three, and return why that cannot be done; empty if it can.

    The reused call is given other inputs than the computed one before, so that it comes out like that only if nothing
    of the transformer has run.

    Args:
        model: the transformer, which is left as it is.
        inputs: makes the arguments of a call, from a seed.

    Example:
        >>> from dithooks.tiny import build
        >>> model, inputs = build("DiTTransformer2DModel")
        >>> why_not_left_out(model, inputs)
        ''
    """
    holder = SimpleNamespace(transformer=model)
    with torch.no_grad():
        plain = model(**inputs(2))
        try:
            with dit_cache(holder, DitCacheConfig(policy=Interval(0, 2), payload="output")) as cache:
                outputs = []
                for step in range(3):
                    with timestep_scope(step, branch=0):
                        outputs.append(holder.transformer(**inputs(step)))
                reused, parts = [record.step for record in cache.decisions if record.reuse], cache.ranges
        except (InvalidSetting, WiringError, WrongType) as error:
            return str(error)
    if len(parts) > 1:
        return f"only parts of it, each by itself: {', '.join(each.range for each in parts)}"
    if reused != [1]:
        return "it writes into what it is given, or returns what no other can be made of"
    if not (_are_equal(outputs[1], outputs[0]) and _are_equal(outputs[2], plain)):
        return "its output is not the one that was forecast"
    return ""


def _are_equal(one: Any, other: Any) -> bool:
    """Return whether two outputs are of one type, and all tensors in them equal."""
    mine, theirs = tensors_in(one), tensors_in(other)
    alike = type(one) is type(other) and mine.keys() == theirs.keys()
    return alike and all(torch.equal(mine[path].nan_to_num(), theirs[path].nan_to_num()) for path in mine)
