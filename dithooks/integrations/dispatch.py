"""Other libraries that are at work in the blocks' own forwards: what they do there, where blocks are left out.

What else has to happen then is in a file for each: ``divided``, ``groups``, ``prefetched``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .diffusers_context_parallel import REGISTRY, divided, divides
from .diffusers_group_offloading import grouped, hand_over
from .fsdp_prefetch import drop_prefetched, sharded


class Integrations:
    """Who else is there, looked up at every call: all of them may come and go while the cache is attached."""

    def __init__(self) -> None:
        self._owner: nn.Module | None = None
        self._stack: Sequence[nn.Module] = ()
        self._blocks: Sequence[nn.Module] = ()
        self._hookable: Sequence[dict[str, Any]] = ()  # what these have of their own, diffusers' registry of hooks, too
        self._divides = False  # a block splits its tokens over ranks
        self._grouped = False  # weights may come and go in groups
        self._sharded = False  # FSDP has the range's weights
        # Not as decorators: these would import the compiler early.
        self._let_go, self._hand_over = torch.compiler.disable(drop_prefetched), torch.compiler.disable(hand_over)

    def among(self, owner: nn.Module, stack: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        """Tell the transformer, all its blocks, and those of the range."""
        self._owner, self._stack, self._blocks = owner, stack, blocks
        self._hookable = [vars(module) for module in (owner, *stack)]

    def look(self) -> None:
        """See who is there. Outside of compiled code."""
        self._sharded = sharded(self._blocks)
        registries = [own[REGISTRY] for own in self._hookable if REGISTRY in own]  # empty ones, of pipelines, are many
        self._divides = self._grouped = False
        if self._owner is not None and any(registry is not None and registry.hooks for registry in registries):
            self._divides, self._grouped = divides(self._stack), grouped((self._owner, *self._blocks))

    def given(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a block's own code is given, where it is called like this."""
        return divided(module, args, kwargs) if self._divides else (args, kwargs)

    def entering(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same of the range's first block."""
        return divided(self._blocks[0], args, kwargs) if self._divides else (args, kwargs)

    def passed_over(self) -> None:
        """The range's last block has been passed over, and none of them has run."""
        if self._sharded:
            self._let_go(self._blocks)
        if self._grouped:
            self._hand_over(self._blocks)
