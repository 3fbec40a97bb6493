"""The engine's view of other libraries, as protocols that ``integrations`` implements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn


class PipelineBar(Protocol):
    """The progress bar of a pipeline that is running."""

    def show(self, reused: int, calls: int) -> None:
        """Write how many calls were reused behind the bar."""


class AdapterWatch(Protocol):
    """Adapter layers (LoRA) whose strength may change between two calls."""

    listing: str  # the attribute of a model by which it lists its adapters, by name

    def find(self, layers: Sequence[nn.Module]) -> bool:
        """Look for adapters among the layers of a model, once a run; return whether there are any."""

    def strengths(self) -> Any:
        """Return what compares equal as long as each adapter does what it did.

        Raises:
            LookupError: a layer is gone.
        """


class Integrations(Protocol):
    """Other libraries at work in the forwards of blocks; looked up at each call, as they come and go."""

    def bind(self, owner: nn.Module, stack: Sequence[nn.Module], blocks: Sequence[nn.Module]) -> None:
        """Take note of the transformer, of all its blocks, and of those of the range."""

    def refresh(self) -> None:
        """Look up which libraries are at work now; outside of compiled code."""

    @property
    def alters_arguments(self) -> bool:
        """Whether a block's own code is given other arguments than the block is called with."""

    def block_arguments(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what a block's own code is given when the block is called like this."""

    def range_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what the code of the range's first block is given when it is called like this."""

    def after_skip(self) -> None:
        """Make up for what the skipped blocks would have done for others: weights fetched, sent off, freed."""

    def progress_bar(self, steps: int | None, first: int) -> PipelineBar | None:
        """Return the one progress bar that counts the steps of a run, if there is one."""

    def adapters(self) -> AdapterWatch:
        """Return a watch on the adapters of a model."""

    def other_cache(self, model: nn.Module) -> str | None:
        """Return what another library's cache in the model is called; ``None``: there is none."""

    def ranks_sharing(self, model: nn.Module) -> str | None:
        """Return how several ranks run the model together, in words; ``None``: they do not."""
