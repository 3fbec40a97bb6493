"""msmodelslim's configurations: which blocks are skipped at which steps, and the goal of a search."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from ...config.safe_json import JSON_BYTES, parsed
from ...errors import InvalidSetting
from ...storage.regular_file import read_bytes
from ...storage.replacement import write_text
from ...validation import check_count, shown


@dataclass(frozen=True)
class DitCacheConfig:
    """The range of blocks that reused steps skip, and which steps these are; immutable.

    Args:
        cache_step_start: every step before this one is computed, ≥ 0.
        cache_step_interval: from there on, one of so many steps is computed, ≥ 1.
        cache_block_start: first block of the range, ≥ 0.
        cache_num_blocks: number of blocks of the range; 0: no cache.

    Raises:
        ValueError: a number is not an integer, or too small.

    Example:
        >>> config = DitCacheConfig(10, 5, cache_block_start=2, cache_num_blocks=4)
        >>> dict(config)["cache_step_interval"]
        5
    """

    cache_step_start: int = -1  # defaults out of range: a missing number raises the same error
    cache_step_interval: int = -1
    cache_block_start: int = -1
    cache_num_blocks: int = -1

    def __post_init__(self) -> None:
        for name, least in zip(self.to_dict(), (0, 1, 0, 0), strict=True):
            _counted(self, name, least)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.to_dict().items())

    def to_dict(self) -> dict[str, int]:
        """Return the four numbers by name, for JSON."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the four numbers to a JSON file."""
        write_text(path, json.dumps(self.to_dict(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DitCacheConfig:
        """Read a file written by :meth:`save` or ``json.dump(dict(config), file)``.

        Raises:
            ValueError: the file does not hold these four numbers; the message names the file.
        """
        data = read_bytes(path, JSON_BYTES)
        try:
            return cls(**parsed(data.decode("utf-8"), "DitCacheConfig"))
        except (TypeError, ValueError) as error:
            raise InvalidSetting(f"{os.fspath(path)} is not a DitCacheConfig: {error}") from None


@dataclass
class DitCacheSearchConfig:
    """The goal of a search.

    Args:
        cache_ratio: factor by which block executions decrease, > 1.
        dit_block_num: number of blocks, checked against the list; left out, an adaptor that is given this fills it in.
        num_sampling_steps: number of steps of the runs that the search makes.
        cache_step_interval: steps from one computed step to the next, ≥ 2; larger if the ratio requires it.
        num_hidden_states: number of streams of a block; observed, so this has no effect.

    Raises:
        ValueError: a value is missing, of the wrong type or out of range.

    Example:
        >>> DitCacheSearchConfig(cache_ratio=1.3, num_sampling_steps=100).cache_step_interval
        2
    """

    cache_ratio: float = 1.3
    dit_block_num: int | None = None
    num_sampling_steps: int | None = None
    cache_step_interval: int = 2
    num_hidden_states: int = 1

    def __post_init__(self) -> None:
        ratio: object = self.cache_ratio
        if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 1 < ratio < float("inf"):
            raise InvalidSetting(
                f"cache_ratio={shown(ratio)} must be a number above 1: so many times fewer blocks are run"
            )
        if self.num_sampling_steps is None:
            raise InvalidSetting("num_sampling_steps must be given: the number of steps that the pipeline takes")
        if self.dit_block_num is not None:
            _counted(self, "dit_block_num", 1)
        for name, least in (("num_sampling_steps", 1), ("cache_step_interval", 2), ("num_hidden_states", 1)):
            _counted(self, name, least)


def _counted(config: object, name: str, least: int) -> None:
    """Check that a field is an integer, and not below ``least``."""
    try:
        vars(config)[name] = check_count(name, getattr(config, name), least)
    except TypeError as error:
        raise InvalidSetting(str(error)) from None
