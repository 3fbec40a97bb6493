"""Runs of DiffSynth-Studio's pipelines with the cache, each compared with a cache by hand.

Imported in an environment that has the package.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from bench.checks.diffsynth_pipelines import (
    NAMED,
    ONE,
    QWEN,
    STEPS,
    TWO,
    BlockForm,
    CacheByHand,
    flux,
    qwen_image,
    wan,
    z_image,
)
from dithooks import DitCacheConfig, dit_cache
from dithooks.integrations.diffsynth import diffsynth_steps

START, INTERVAL = 2, 2
BOUNDARY = 875  # of timesteps, below which Wan 2.2 has its second expert
VIDEO = {"output_type": "floatpoint"}
Lists = Sequence[tuple[str, BlockForm]]


@dataclass
class Case:
    """One run of a pipeline.

    Args:
        make: returns the pipeline.
        lists: of blocks, from the transformer, in the order of their calls.
        first: block of the range.
        count: of its blocks.
        passes: of the blocks in each step.
        given: to the pipeline's call.
    """

    make: Callable[[], Any]
    lists: Lists
    first: int
    count: int
    passes: int
    given: dict[str, Any] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Return the figures of the run: whether it is the one by hand, and nothing is left."""
        pipe = self.make()
        plain, before = self.draw(pipe), snapshot(pipe)
        noisy = int((pipe.scheduler.timesteps >= BOUNDARY).sum())
        experts = {"dit": 0} if getattr(pipe, "dit2", None) is None else {"dit": 0, "dit2": noisy}
        hands = [self.by_hand(getattr(pipe, name), step) for name, step in experts.items()]
        expected = self.draw(pipe)
        for hand in hands:
            hand.remove()
        config = DitCacheConfig(START, INTERVAL, cache_block_start=self.first, cache_num_blocks=self.count)
        with diffsynth_steps(pipe), dit_cache(pipe, config) as cache:
            same = torch.equal(self.draw(pipe), expected) and torch.equal(self.draw(pipe), expected)
            freed = cache.stats.bytes_held == 0
        by_hand = sum(hand.reused for hand in hands)
        left = torch.equal(self.draw(pipe), plain) and snapshot(pipe) == before
        shown = [
            f"{each.first} to {each.first + each.blocks - 1} of {each.total} in {each.range}" for each in cache.ranges
        ]
        return {
            "pipeline": type(pipe).__name__,
            "ranges": ", ".join(shown),
            "calls": cache.stats.calls // 2,
            "reused": cache.stats.reused_calls // 2,
            "by_hand": by_hand,
            "ok": bool(same and freed and left and by_hand * 2 == cache.stats.reused_calls)
            and not torch.equal(plain, expected),
        }

    def draw(self, pipe: Any) -> torch.Tensor:
        """Call the pipeline; what it draws is latents."""
        result: torch.Tensor = pipe("a", num_inference_steps=STEPS, progress_bar_cmd=iter, **self.given)
        return result

    def by_hand(self, dit: nn.Module, first_step: int) -> CacheByHand:
        """Put a cache by hand over a transformer's blocks."""
        blocks = [(block, form) for name, form in self.lists for block in getattr(dit, name)]
        return CacheByHand(blocks, self.first, self.count, START, INTERVAL, self.passes, first_step)


def snapshot(pipe: nn.Module) -> list[Any]:
    """Return all that a cache might leave behind: the objects in attributes, lists and hooks."""
    found: list[Any] = [(name, id(value)) for name, value in vars(pipe).items()]
    for path, module in pipe.named_modules():
        hooks = [len(value) for name, value in sorted(vars(module).items()) if name.endswith("_hooks")]
        found.append((path, id(module), sorted(vars(module)), hooks))
    return found


WINDOWS = {"sliding_window_size": 3, "sliding_window_stride": 2}
TILES = {"tiled": True, "tile_size": 8, "tile_stride": 4}
JOINT = [("blocks", TWO), ("single_blocks", TWO)]
CASES = {
    "Wan 2.1, guidance by two calls": Case(wan, [("blocks", ONE)], 1, 3, 2, {**VIDEO, "cfg_scale": 3.0}),
    "… by one batch": Case(
        lambda: wan(merged=True), [("blocks", ONE)], 1, 3, 1, {**VIDEO, "cfg_scale": 3.0, "cfg_merge": True}
    ),
    "… sliding windows": Case(wan, [("blocks", ONE)], 1, 3, 6, {**VIDEO, "cfg_scale": 3.0, **WINDOWS}),
    "… VRAM management": Case(lambda: wan(managed=True), [("blocks", ONE)], 1, 3, 2, {**VIDEO, "cfg_scale": 3.0}),
    "Wan 2.2, two experts": Case(lambda: wan(experts=2), [("blocks", ONE)], 1, 3, 2, {**VIDEO, "cfg_scale": 3.0}),
    "FLUX.1": Case(flux, JOINT, 1, 2, 1, {"cfg_scale": 1.0}),
    "… from joint to single blocks, guidance": Case(flux, JOINT, 1, 4, 2, {"cfg_scale": 3.0}),
    "… tiles": Case(flux, JOINT, 1, 4, 8, {"cfg_scale": 2.0, **TILES}),
    "Qwen-Image": Case(qwen_image, [("transformer_blocks", QWEN)], 1, 2, 2, {"cfg_scale": 4.0}),
    "Z-Image, bfloat16": Case(z_image, [("layers", NAMED)], 1, 2, 2, {"cfg_scale": 4.0}),
}
