"""Other libraries at work in the forwards of blocks, and what each needs where blocks are skipped."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from ..engine.protocols import AdapterWatch, PipelineBar
from .diffusers_context_parallel import REGISTRY, divided, divides
from .diffusers_group_offloading import grouped, hand_over
from .fsdp_prefetch import drop_prefetched, sharded
from .other_caches import other_cache
from .peft_adapters import PeftAdapters
from .shared_model import shared_by_ranks
from .tqdm_bar import find_bar

_HOOKS = attrgetter("hooks")


class BlockIntegrations:
    """The other libraries at work, looked up at every call: each may come and go while the cache is attached."""

    alters_arguments = False  # a block splits its tokens over ranks

    def __init__(self) -> None:
        self._owner: nn.Module | None = None
        self._stack: Sequence[nn.Module] = ()
        self._blocks: Sequence[nn.Module] = ()
        self._own: Sequence[dict[str, Any]] = ()  # attributes of these modules, diffusers' registry of hooks among them
        self._is_grouped = False  # weights may come and go in groups
        self._is_sharded = False  # FSDP has the range's weights
        self._kinds: set[type] = set()  # classes of the range's blocks
        # Not as decorators: these would import the compiler early.
        self._drop_prefetched = torch.compiler.disable(drop_prefetched)
        self._hand_over = torch.compiler.disable(hand_over)

    def bind(self, owner: nn.Module, stack: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        """Take note of the transformer, of all its blocks, and of those of the range."""
        self._owner, self._stack, self._blocks = owner, stack, blocks
        self._own = [vars(module) for module in (owner, *stack)]

    def refresh(self) -> None:
        """Look up which libraries are at work now; outside of compiled code."""
        kinds = set(map(type, self._blocks))
        if kinds != self._kinds:  # FSDP gives a block another class
            self._kinds, self._is_sharded = kinds, sharded(self._blocks)
        self.alters_arguments = self._is_grouped = False
        registries = filter(None, map(dict.get, self._own, repeat(REGISTRY)))
        if any(map(_HOOKS, registries)) and self._owner is not None:  # empty ones, of pipelines, are many
            self.alters_arguments = divides(self._stack)
            self._is_grouped = grouped((self._owner, *self._blocks))

    def block_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block's own code is given when the block is called like this."""
        return divided(module, args, kwargs) if self.alters_arguments else (args, kwargs)

    def range_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the code of the range's first block is given when it is called like this."""
        return self.block_arguments(self._blocks[0], args, kwargs)

    def after_skip(self) -> None:
        """Make up for what the skipped blocks would have done for others."""
        if self._is_sharded:
            self._drop_prefetched(self._blocks)
        if self._is_grouped:
            self._hand_over(self._blocks)

    def progress_bar(self, steps: int | None, first: int) -> PipelineBar | None:
        """Return the one progress bar that counts the steps of a run, if there is one."""
        return find_bar(steps, first)

    def adapters(self) -> AdapterWatch:
        """Return a watch on the adapters of a model."""
        return PeftAdapters()

    def other_cache(self, model: nn.Module) -> str | None:
        """Return what another library's cache in the model is called; ``None``: there is none."""
        return other_cache(model)

    def ranks_sharing(self, model: nn.Module) -> str | None:
        """Return how several ranks run the model together, in words; ``None``: they do not."""
        return shared_by_ranks(model)
