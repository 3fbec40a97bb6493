"""What a user asks for: a static schedule of refreshes over one range of blocks."""

from __future__ import annotations

import json
import operator
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

SCHEMA = 1


@dataclass(frozen=True)
class DitCacheConfig:
    """Compute while ``t < cache_step_start``; from there on refresh every ``cache_step_interval``-th step, else reuse.

    On a computed step all blocks run, and the range's residual (output of its last block minus input of its first) is
    kept. On a reused step the blocks of the range do not run, and the kept residual is added instead.

    Args:
        cache_step_start: first sampling step at which the schedule holds, ≥ 0; itself computed.
        cache_step_interval: steps from one refresh to the next, ≥ 1. 1 reuses nothing.
        cache_block_start: first block of the range, ≥ 0, counted over the model's block list (or lists, in order).
        cache_num_blocks: number of blocks in the range, ≥ 1.
        fingerprint: of the model the numbers were chosen for; attaching to another model is refused.
            ``None`` fits every model. ``handle.config`` has it filled in.

    Raises:
        TypeError: a field is not an integer (``fingerprint``: not a string).
        ValueError: a field is out of its range.

    Example:
        >>> config = DitCacheConfig(cache_step_start=2, cache_step_interval=3, cache_block_start=0, cache_num_blocks=4)
        >>> DitCacheConfig.from_json(config.to_json()) == config
        True
    """

    cache_step_start: int
    cache_step_interval: int
    cache_block_start: int
    cache_num_blocks: int
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not hasattr(value, "__index__"):
                raise TypeError(f"{name} must be an int, not {value!r} ({type(value).__name__})")
            value = operator.index(value)  # NumPy's integers, too
            object.__setattr__(self, name, value)
            if value < least:
                raise ValueError(f"{name}={value} is out of range: it must be at least {least}")
        if self.fingerprint is not None and not isinstance(self.fingerprint, str):
            raise TypeError(f"fingerprint must be a string or None, not {self.fingerprint!r}")

    def to_json(self) -> str:
        """The configuration as a JSON object with a schema version."""
        return json.dumps({"schema": SCHEMA, "kind": "DitCacheConfig", **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> DitCacheConfig:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, another kind or schema, or fields missing or unknown.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a DitCacheConfig: the text is not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("kind") != "DitCacheConfig":
            raise ValueError('not a DitCacheConfig: a JSON object with "kind": "DitCacheConfig" is expected')
        if data.get("schema") != SCHEMA:
            raise ValueError(f"DitCacheConfig schema {data.get('schema')!r} is not known: this version reads {SCHEMA}")
        values = {name: value for name, value in data.items() if name not in ("schema", "kind")}
        known = {field.name for field in fields(cls)}
        if strange := set(values) - known:
            raise ValueError(f"DitCacheConfig has no field {', '.join(sorted(strange))}: known are {sorted(known)}")
        if missing := set(_LEAST) - set(values):
            raise ValueError(f"DitCacheConfig lacks {', '.join(sorted(missing))}")
        return cls(**values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DitCacheConfig:
        """Read a file that :meth:`save` wrote; errors as :meth:`from_json`, naming the path."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            raise type(error)(f"{os.fspath(path)}: {error}") from None


_LEAST = {"cache_step_start": 0, "cache_step_interval": 1, "cache_block_start": 0, "cache_num_blocks": 1}
