"""MindIE-SD's ``CacheConfig``, field by field: which blocks are left out, and at which steps."""

from __future__ import annotations

from dataclasses import dataclass

from ...config.cache_config import DitCacheConfig
from ...errors import InvalidSetting
from ...validation import check_count, shown

BLOCK_CACHE = "dit_block_cache"
INSTEAD = {
    "attention_cache": "attention by itself is not cached here; 'dit_block_cache' leaves out whole blocks, and "
    "dithooks.Threshold decides by how much they change",
}


@dataclass
class CacheConfig:
    """The range of blocks that reused steps leave out, and which steps these are, under MindIE-SD's names.

    Args:
        method: ``"dit_block_cache"``.
        blocks_count: number of blocks of the model, each of which is applied once a step.
        steps_count: number of steps of a run.
        step_start: every step before this one is computed.
        step_interval: from there on, one of so many steps is computed; 1: no cache.
        step_end: equal to ``step_start``, no cache; otherwise without effect, as in MindIE-SD 3.1.0.
        block_start: first block of the range.
        block_end: block behind the range; equal to ``block_start``, no cache.

    Raises:
        ValueError: by :class:`CacheAgent`, a number is not an integer or out of range, or ``method`` is another.

    Example:
        >>> config = CacheConfig("dit_block_cache", 28, 50, step_start=10, step_interval=3, block_start=2, block_end=26)
        >>> config.dit_cache_config().cache_num_blocks
        24
    """

    method: str
    blocks_count: int
    steps_count: int
    step_start: int = 0
    step_interval: int = 1
    step_end: int = 10000
    block_start: int = 0
    block_end: int = 10000

    def check(self) -> None:
        """Check the fields as MindIE-SD does.

        Raises:
            ValueError: a number is not an integer or out of range, or ``method`` is another.
        """
        if self.method != BLOCK_CACHE:
            hint = INSTEAD.get(self.method) if isinstance(self.method, str) else None
            raise InvalidSetting(f"method={shown(self.method)}: {hint or f'there is {shown(BLOCK_CACHE)}'}")
        least = {"blocks_count": 1, "steps_count": 1, "step_start": 0, "step_interval": 1, "block_start": 0}
        least |= {"step_end": self.step_start, "block_end": self.block_start}
        for name, bound in least.items():
            try:
                check_count(name, getattr(self, name), bound)
            except TypeError as error:
                raise InvalidSetting(str(error)) from None
        if self.block_end > self.blocks_count:
            raise InvalidSetting(
                f"block_end={self.block_end} goes past blocks_count={self.blocks_count}: it is the block behind the "
                "range, at most blocks_count"
            )

    @property
    def reuses(self) -> bool:
        """Whether these settings ever leave out a block."""
        steps = self.step_start < self.steps_count and self.step_end != self.step_start and self.step_interval > 1
        return steps and self.block_start < self.block_end

    def dit_cache_config(self) -> DitCacheConfig:
        """Return the same settings for :func:`dithooks.dit_cache`, which finds the blocks of a pipeline by itself.

        Raises:
            ValueError: as :meth:`check`, or the settings leave out no block.
        """
        self.check()
        if not self.reuses:
            raise InvalidSetting(
                f"these settings leave out no block: step_interval={self.step_interval}, step_start={self.step_start} "
                f"of {self.steps_count}, blocks {self.block_start} to {self.block_end}"
            )
        return DitCacheConfig(self.step_start, self.step_interval, self.block_start, self.block_end - self.block_start)
