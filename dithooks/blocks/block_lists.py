"""The lists of blocks of one transformer, in the order in which a config counts them."""

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
    """One list of blocks of a transformer, and the declarations about it.

    Args:
        path: of the list, from the target, such as ``transformer.transformer_blocks``.
        blocks: the list.
        pattern: declared for its blocks.
        functor: reads and builds its blocks' streams.
        strict: whether the pattern overrules observation; else it decides only where observation leaves it open.
    """

    path: str
    blocks: nn.ModuleList
    pattern: ForwardPattern | None = None
    functor: PatchFunctor | None = None
    strict: bool = True


@dataclass(frozen=True)
class BlockRef:
    """The place of a block: entry ``index`` of a list, such as ``transformer_blocks.3``.

    The module at that place may change (a stand-in takes it, FSDP wraps it); the place stays.
    """

    block_list: BlockList
    index: int

    @property
    def path(self) -> str:
        return f"{self.block_list.path}.{self.index}"

    @property
    def block(self) -> nn.Module:
        return self.block_list.blocks[self.index]

    def holds(self, module: nn.Module) -> bool:
        """Whether the entry is this module; ``False`` if the list has become too short to have the entry."""
        return self.index < len(self.block_list.blocks) and self.block_list.blocks[self.index] is module

    def put(self, module: nn.Module) -> None:
        """Replace the entry by another module."""
        self.block_list.blocks[self.index] = module


@dataclass(frozen=True)
class Chain:
    """The block lists of one transformer, in the order in which they were found or named.

    Of Flux, for example: owner ``FluxTransformer2DModel``, lists ``transformer_blocks`` and
    ``single_transformer_blocks``.

    Args:
        owner: the module that calls the blocks.
        path: of the owner, from the target; "" for the target itself.
        block_lists: the lists; none of a model that is cached as a whole and has none.
        found: whether the lists were found rather than named; found ones that are not part of the trunk are left out.
        separate_cfg: whether guidance takes two calls per step, where that is declared.
        part: whether the owner has other lists, each of which is a range of its own.
        rivals: chains of other parts of the model of which one may be the trunk instead, where the lists were found.
        span: of one of several ranges of the same lists, its blocks, such as ``[0:8]``.
        elsewhere: number of blocks that the other ranges of the same lists count, so that each block counts once;
            ``None``: another one counts all that are not of this range.
        is_behind: whether one of these comes before it, whose blocks may be left out when it is reached.
    """

    owner: nn.Module
    path: str
    block_lists: tuple[BlockList, ...]
    found: bool = False
    separate_cfg: bool | None = None
    part: bool = False
    rivals: tuple[Chain, ...] = ()
    span: str = ""
    elsewhere: int | None = 0
    is_behind: bool = False

    @property
    def block_refs(self) -> tuple[BlockRef, ...]:
        return tuple(BlockRef(each, index) for each in self.block_lists for index in range(len(each.blocks)))

    @property
    def compiled(self) -> bool:
        """Whether the owner was reached through a wrapper of ``torch.compile``."""
        return WRAPPED in self.path.split(".")

    @property
    def name(self) -> str:
        path = self.block_lists[0].path if self.part else self.path
        kind = type(self.owner).__name__
        return f"{path}{self.span} ({kind})" if path else f"{kind}{self.span}"

    def counted(self, called: int, cached: int) -> int:
        """Return how many of the blocks that the model calls count here, if so many are of this range."""
        return cached if self.elsewhere is None else called - self.elsewhere

    def below(self, name: str) -> Chain:
        """Return this chain with paths from one level above, where the target is called ``name``."""
        moved = tuple(replace(each, path=f"{name}.{each.path}") for each in self.block_lists)
        return replace(self, path=f"{name}.{self.path}".rstrip("."), block_lists=moved)

    def weights(self) -> dict[str, int]:
        """Count the parameters of each list, by its path."""
        return {
            each.path: sum(parameter.numel() for parameter in each.blocks.parameters()) for each in self.block_lists
        }

    def fingerprint(self) -> str:
        """Hash the architecture (classes, lists, widths; not weights, dtype or adapters) to 16 hex digits."""
        config, refs = getattr(self.owner, "config", None), self.block_refs
        if isinstance(config, Mapping):
            shape: Any = {k: v for k, v in sorted(config.items()) if not k.startswith("_")}
        else:
            shape = _shape(refs[0].block if refs else self.owner)
        prefix = len(self.path) + 1 if self.path else 0
        blocks = [(ref.path[prefix:], _class_name(ref.block)) for ref in refs]
        text = json.dumps([_class_name(self.owner), blocks, shape], default=str, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _class_name(module: nn.Module) -> str:
    """Name a module's class; of one that FSDP shards, the class before: a sharded model has the same fingerprint."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    cls = module.__class__  # of a stand-in, that of its block
    return next(each for each in cls.__mro__ if kind is None or not issubclass(each, kind)).__name__


def _shape(block: nn.Module) -> list[tuple[str, list[int]]]:
    """List names and shapes of a block's parameters, of layers with adapters (PEFT) as they are without them."""
    over = tuple(f"{path}." for path, module in block.named_modules() if hasattr(type(module), "active_adapter"))
    parameters = [(name, list(value.shape)) for name, value in block.named_parameters()]
    own = [(name, shape) for name, shape in parameters if not name.startswith(over) or ".base_layer." in name]
    return sorted((name.replace(".base_layer.", "."), shape) for name, shape in own)


def fingerprint(chains: Sequence[Chain]) -> str:
    """Join the fingerprints of several transformers; several ranges of the same lists have one."""
    each = {(id(chain.owner), tuple(part.path for part in chain.block_lists)): chain for chain in chains}
    return "+".join(chain.fingerprint() for chain in each.values())
