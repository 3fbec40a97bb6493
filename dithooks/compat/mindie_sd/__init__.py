"""MindIE-SD's block cache under its own names: ``from dithooks.compat.mindie_sd import CacheAgent, CacheConfig``.

Written for code that used ``mindiesd`` (version 3.1.0), on Ascend NPUs and elsewhere; only the import changes. What
differs is in ``docs/howto/mindie_sd.md``.
"""

from .agent_config import CacheConfig
from .cache_agent import CacheAgent

__all__ = ["CacheAgent", "CacheConfig"]
