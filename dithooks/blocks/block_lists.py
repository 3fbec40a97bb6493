"""The blocks of one transformer, one after another, as the config counts them."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .block_io import PatchFunctor
from .pattern import ForwardPattern

WRAPPED = "_orig_mod"  # where torch.compile(model) keeps the model


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer, and what is declared about it."""

    path: str
    blocks: nn.ModuleList
    pattern: ForwardPattern | None = None
    functor: PatchFunctor | None = None
    strict: bool = True  # the pattern counts; else what is observed does, as far as that is clear


@dataclass(frozen=True)
class BlockRef:
    """A block's place: entry ``index`` of its lane's list, called ``path`` in the model."""

    lane: BlockList
    index: int

    @property
    def path(self) -> str:
        return f"{self.lane.path}.{self.index}"

    @property
    def block(self) -> nn.Module:
        return self.lane.blocks[self.index]

    def holds(self, module: nn.Module) -> bool:
        """Whether a module is the entry; a list may have been cut shorter."""
        return self.index < len(self.lane.blocks) and self.lane.blocks[self.index] is module

    def put(self, module: nn.Module) -> None:
        """Make another module the entry."""
        self.lane.blocks[self.index] = module


@dataclass(frozen=True)
class Expected:
    """What is believed of the runs. Nothing depends on it; where they turn out otherwise, that is said once.

    Args:
        has_separate_cfg: guidance takes several calls a step (``True``), or one (``False``).
        num_inference_steps: of a run.
    """

    has_separate_cfg: bool | None = None
    num_inference_steps: int | None = None


@dataclass(frozen=True)
class Chain:
    """The block lists of one transformer, in the order in which they were found or named.

    Args:
        owner: the module that calls them.
        path: of the owner, from the target; "" for the target itself.
        lanes: the lists.
        found: whether they were found, not named: then those that turn out to be no part of the trunk are left out.
        separate_cfg: whether guidance is by two calls per step, where that is declared.
        expected: what else is believed of the runs.
        part: whether the owner has other lists, which are ranges of their own.
    """

    owner: nn.Module
    path: str
    lanes: tuple[BlockList, ...]
    found: bool = False
    separate_cfg: bool | None = None
    expected: Expected | None = None
    part: bool = False

    @property
    def sites(self) -> tuple[BlockRef, ...]:
        return tuple(BlockRef(lane, index) for lane in self.lanes for index in range(len(lane.blocks)))

    @property
    def compiled(self) -> bool:
        """Whether the owner was reached through a wrapper of ``torch.compile``."""
        return WRAPPED in self.path.split(".")

    @property
    def name(self) -> str:
        path = self.lanes[0].path if self.part else self.path
        return f"{path} ({type(self.owner).__name__})" if path else type(self.owner).__name__

    def below(self, name: str) -> Chain:
        """The same with paths from one level above."""
        lanes = tuple(replace(lane, path=f"{name}.{lane.path}") for lane in self.lanes)
        return replace(self, path=f"{name}.{self.path}".rstrip("."), lanes=lanes)

    def weights(self) -> dict[str, int]:
        """Parameters of each list."""
        return {lane.path: sum(parameter.numel() for parameter in lane.blocks.parameters()) for lane in self.lanes}

    def fingerprint(self) -> str:
        """16 hex digits that tell the architecture: classes, lists and widths; not weights, dtype or adapters."""
        config, sites = getattr(self.owner, "config", None), self.sites
        if isinstance(config, Mapping):
            shape: Any = {k: v for k, v in sorted(config.items()) if not k.startswith("_")}
        else:
            shape = _shape(sites[0].block)
        prefix = len(self.path) + 1 if self.path else 0
        blocks = [(site.path[prefix:], _class_name(site.block)) for site in sites]
        text = json.dumps([_class_name(self.owner), blocks, shape], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _class_name(module: nn.Module) -> str:
    """As it was before FSDP put one of its own over it: a model that is sharded is the same model."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    cls = module.__class__  # of a stand-in, that of its block
    return next(each for each in cls.__mro__ if kind is None or not issubclass(each, kind)).__name__


def _shape(block: nn.Module) -> list[tuple[str, list[int]]]:
    """Names and shapes of a block's parameters; as they are without adapters, where a layer has some put over it."""
    over = tuple(f"{path}." for path, module in block.named_modules() if "_active_adapter" in vars(module))
    parameters = [(name, list(value.shape)) for name, value in block.named_parameters()]
    own = [(name, shape) for name, shape in parameters if not name.startswith(over) or ".base_layer." in name]
    return sorted((name.replace(".base_layer.", "."), shape) for name, shape in own)


def fingerprint(chains: Sequence[Chain]) -> str:
    """Of several transformers at once."""
    return "+".join(chain.fingerprint() for chain in chains)
