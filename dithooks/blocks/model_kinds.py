"""Models that give more than what leaves their last block, recognised by their structure: U-Nets and ControlNets."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from torch import nn

from .block_lists import WRAPPED

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_CONTROL = "controlnet|zero_conv"  # of layers; in a model that is steered, others put a control into each block
_SAMPLES = r"block.*samples?$"  # down_block_res_samples, controlnet_block_samples


def why_not_a_trunk(module: nn.Module) -> str | None:
    """Say that a model is a U-Net or a ControlNet, and why its blocks cannot be cached as a trunk; ``None`` if not."""
    module = getattr(module, WRAPPED, module)
    name = type(module).__name__
    if is_unet(module):
        return (
            f"{name} is a U-Net: what each block on the way down returns goes to one on the way up, past all between "
            "them. Name the blocks of one stage: blocks='mid_block.attentions.0.transformer_blocks', say; or leave the "
            "whole out, payload='output'"
        )
    if is_controlnet(module):
        return (
            f"{name} is a ControlNet: what each of its blocks returns is an output of its own, so that none can be "
            "left out. Cache the model that it steers"
        )
    return None


def is_unet(module: nn.Module) -> bool:
    """Return whether a model has a list of convolutional blocks on the way down and another on the way up.

    Transformers that go down and up need not hand anything past the blocks between: of those, the first call shows it.
    """
    blocks = {name for name, each in _lists(module).items() if not _are_layers(each) and _has_convolutions(each)}
    return all(any(name.split("_")[0] == way for name in blocks) for way in ("down", "up"))


def is_controlnet(module: nn.Module) -> bool:
    """Return whether a model returns what each of its blocks does: through a layer for each, or as it declares.

    Weights do not tell: those layers are zeros before it is trained.
    """
    lists = _lists(module)
    layers = {name for name, each in lists.items() if _are_layers(each)}
    blocks = [len(each) for name, each in lists.items() if name not in layers]
    one_for_each = any(re.search(_CONTROL, name) and len(lists[name]) in blocks for name in layers)
    return one_for_each or any(re.search(_SAMPLES, name) for name in _returned(module)) or _returns_by_number(module)


def _lists(module: nn.Module) -> dict[str, nn.ModuleList]:
    return {name: each for name, each in module.named_children() if isinstance(each, nn.ModuleList) and len(each)}


def _are_layers(entries: nn.ModuleList) -> bool:
    return all(isinstance(entry, _LAYERS) for entry in entries)


def _has_convolutions(blocks: nn.ModuleList) -> bool:
    return any(isinstance(each, _CONVOLUTIONS) for each in blocks.modules())


def _returns(module: nn.Module) -> Any:
    """Return what a model's ``forward`` is annotated to return; ``None`` where that cannot be read."""
    try:
        return get_type_hints(inspect.unwrap(type(module).forward)).get("return")
    except Exception:  # names that are imported for type checkers only
        return None


def _returned(module: nn.Module) -> list[str]:
    """Return the names of the fields of a dataclass that a model returns; those of outputs of blocks are no samples."""
    kinds = [_returns(module), *get_args(_returns(module))]
    return [field.name for kind in kinds if isinstance(kind, type) and is_dataclass(kind) for field in fields(kind)]


def _returns_by_number(module: nn.Module) -> bool:
    """Return whether a model returns a dict with the outputs of blocks by their numbers."""
    kind = _returns(module)
    return get_origin(kind) is dict and get_args(kind)[0] is int
