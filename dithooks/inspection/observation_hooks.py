"""Observe the blocks of a model by plain hooks, with no cache attached."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

from ..blocks.block_lists import Chain
from ..blocks.observation import Observation, ObservedBlock


@contextmanager
def watched(
    chains: Sequence[Chain], spots: Sequence[Sequence[ObservedBlock]], seen: list[Observation | None]
) -> Iterator[None]:
    """Observe the first call of each chain's owner."""
    handles = []
    for number, chain in enumerate(chains):
        current: list[Observation] = []

        def begin(*_: Any, number: int = number, current: list[Observation] = current) -> None:
            if seen[number] is None:
                current.append(Observation(spots[number]))

        def end(*_: Any, number: int = number, current: list[Observation] = current) -> None:
            if current:
                seen[number] = current.pop()
                seen[number].close()  # type: ignore[union-attr]

        handles.append(chain.owner.register_forward_pre_hook(begin))
        handles.append(chain.owner.register_forward_hook(end))
        for index, site in enumerate(chain.sites):

            def enter(_: nn.Module, args: Any, kwargs: Any, index: int = index, current: Any = current) -> None:
                if current:
                    current[0].enter(index, args, kwargs)

            def leave(
                _: nn.Module, args: Any, kwargs: Any, out: Any, index: int = index, current: Any = current
            ) -> None:
                if current:
                    current[0].leave(index, out)

            handles.append(site.block.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(site.block.register_forward_hook(leave, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
