"""A model that methods are compared on, and how its block executions are counted."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from diffusers import DiffusionPipeline
from torch import Tensor, nn

LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")  # of the models here, in the order they run


class Case(NamedTuple):
    """What is drawn: a caption, or a class, and the seed of its noise."""

    prompt: str | int
    seed: int


class Subject(Protocol):
    """A pipeline, and what is drawn with it.

    Attributes:
        name: in tables and of files.
        pipe: has a ``transformer`` and a ``scheduler``.
        steps: of the uncached run.
        calls: of the transformer in a step: 2 for guidance that asks twice.
        calibration: what searches and calibrations may draw.
        test: what is measured; none of it in ``calibration``.
    """

    name: str
    pipe: DiffusionPipeline
    steps: int
    calls: int
    calibration: tuple[Case, ...]
    test: tuple[Case, ...]

    def __hash__(self) -> int: ...

    def draw(self, cases: Sequence[Case], steps: int | None = None) -> Tensor:
        """Final latents of one batch, float32, (cases, …)."""
        ...

    def pictures(self, latents: Tensor) -> Tensor:
        """In 0…1: (cases, channels, height, width), or (cases, frames, channels, height, width)."""
        ...


def lists(transformer: nn.Module) -> list[nn.ModuleList]:
    """The lists of blocks, in the order they run."""
    found = [getattr(transformer, name, None) for name in LISTS]
    return [each for each in found if isinstance(each, nn.ModuleList)]


@dataclass
class Work:
    """Multiplications of the blocks' linear layers, by block.

    Some methods leave out whole blocks, others parts of them; so a block counts by the share of its multiplications
    that were done. Those between queries and keys, and with the values, are not counted: they go with the linear
    layers around them.
    """

    done: dict[int, int] = field(default_factory=dict)

    def executions(self, whole: Work) -> float:
        """In executions of a block, ``whole`` being one run with everything computed, all blocks alike."""
        return sum(self.done.get(block, 0) / count for block, count in whole.done.items())


@contextmanager
def counting(transformer: nn.Module) -> Iterator[Work]:
    """Count what runs inside; hooks on the linear layers alone, which no method that is compared here touches."""
    work = Work()

    def count(block: int, cost: int) -> Any:
        def seen(_: nn.Module, args: tuple[Tensor, ...], given: dict[str, Tensor]) -> None:
            taken = args[0] if args else given["input"]
            work.done[block] = work.done.get(block, 0) + taken.numel() // taken.shape[-1] * cost

        return seen

    blocks = [block for each in lists(transformer) for block in each]
    hooks = [
        layer.register_forward_pre_hook(count(number, layer.weight.numel()), with_kwargs=True)
        for number, block in enumerate(blocks)
        for layer in block.modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        yield work
    finally:
        for hook in hooks:
            hook.remove()
