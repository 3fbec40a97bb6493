"""The transformers of a target as wholes: also those without lists of blocks, and U-Nets."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from ..config.cache_config import DitCacheConfig
from ..errors import InvalidSetting
from .adapter import BlockAdapter
from .block_lists import WRAPPED, Chain
from .discovery import Blocks
from .model_kinds import is_unet
from .module_paths import denoisers_of, walk
from .registry import BlockAdapterRegistry, chains_of
from .trunk_heuristics import LIGHT


def models_of(
    target: object, blocks: Blocks, chosen: Collection[str] = ()
) -> list[tuple[Chain, DitCacheConfig | None]]:
    """Return the transformers whose calls can be left out as wholes, each with its lists of blocks, if it has any.

    Args:
        target: the model, pipeline or adapter.
        blocks: as for :func:`~dithooks.blocks.registry.chains_of`.
        chosen: as for :func:`~dithooks.blocks.registry.chains_of`.

    Raises:
        TypeError, ValueError: as :func:`~dithooks.blocks.registry.chains_of`, and the target has no denoiser.
    """
    is_declared = isinstance(target, BlockAdapter) or blocks is not None or isinstance(target, type)
    if not is_declared and BlockAdapterRegistry.hint_for(target) is None and (unets := _unets_in(target)):
        return [(Chain(module, path, ()), None) for path, module in unets]
    try:
        return chains_of(target, blocks, chosen)
    except InvalidSetting:
        if is_declared or isinstance(target, nn.Module) or not (found := _denoisers(target)):
            raise
        return [(Chain(module, path, ()), None) for path, module in found]


def _unets_in(target: object) -> list[tuple[str, nn.Module]]:
    """Return the U-Nets that a target is or holds, with their paths; none within another."""
    roots = {"": target} if isinstance(target, nn.Module) else denoisers_of(target)
    found: list[tuple[str, nn.Module]] = []
    for root, top in roots.items():
        for name, module in top.named_modules():
            path = ".".join(part for part in (root, name) if part)
            if is_unet(module) and not any(f"{path}.".startswith(f"{above}.") or not above for above, _ in found):
                found.append((path, walk(target, path)))
    return found


def _denoisers(target: object) -> list[tuple[str, nn.Module]]:
    """Return the denoisers of a pipeline, without those that are much lighter than the heaviest, and their paths."""
    found = []
    for name, module in denoisers_of(target).items():
        inner = dict(module.named_children()).get(WRAPPED)
        found.append((name, module) if inner is None else (f"{name}.{WRAPPED}", inner))
    loads = [sum(parameter.numel() for parameter in module.parameters()) for _, module in found]
    return [each for each, load in zip(found, loads, strict=True) if load * LIGHT >= max(loads)]
