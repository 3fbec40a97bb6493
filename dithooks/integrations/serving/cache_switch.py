"""The cache of a server's pipeline, switched on, to another plan and off between two requests."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

from torch import nn

from ...config.cache_config import DitCacheConfig
from ...config.cache_plan import CachePlan
from ...handle import CacheHandle, dit_cache
from ...stats.warning_collector import collect_warnings
from .served_plans import plan_for


class CacheSwitch:
    """One cache at most, and the transformers that it is on.

    Example:
        >>> class Model(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        >>> switch, parts = CacheSwitch(), {"transformer": Model()}
        >>> switch.use(DitCacheConfig(1, 2), parts)
        <CacheHandle transformer.blocks.0 … transformer.blocks.2 of 3 blocks>
        >>> switch.use(None, parts), type(parts["transformer"].blocks[0]).__name__
        (None, 'Linear')
    """

    def __init__(self) -> None:
        self.handle: CacheHandle | None = None
        self._plan: DitCacheConfig | CachePlan | None = None
        self._parts: dict[str, nn.Module] = {}
        self._fitted: dict[int, tuple[object, DitCacheConfig | CachePlan]] = {}  # by identity, with what has it

    def use(self, plan: DitCacheConfig | CachePlan | None, parts: Mapping[str, nn.Module]) -> CacheHandle | None:
        """Let the next run be cached by a plan, and nothing be kept of the last one.

        Args:
            plan: of the run; ``None``: it is drawn without a cache, and the blocks are as they were.
            parts: the pipeline's transformers, by the names that they have there.

        Raises:
            TypeError, ValueError: as :func:`~dithooks.dit_cache`; there is no cache then.
        """
        if plan is None or self._parts != {**parts}:
            self.remove()
        if plan is None:
            return None
        if self.handle is not None and plan is self._plan:
            self.handle.reset()
            return self.handle
        try:
            self._parts = dict(parts)
            if self.handle is None:
                self.handle = dit_cache(SimpleNamespace(**parts), self.fitted(plan))
            else:
                self.handle.update(self.fitted(plan))
        except BaseException:
            self.remove()
            raise
        self._plan = plan
        return self.handle

    def fitted(self, plan: DitCacheConfig | CachePlan) -> DitCacheConfig | CachePlan:
        """Return a plan as it holds for the transformers that the cache is on, made once for each plan."""
        if id(plan) not in self._fitted:
            self._fitted[id(plan)] = plan, plan_for(plan, SimpleNamespace(**self._parts))
        return self._fitted[id(plan)][1]

    def end(self) -> str:
        """Free what the run has kept; return a line about it for a log, empty where nothing was cached."""
        if self.handle is None:
            return ""
        line = summary_line(self.handle)
        self.handle.reset()
        return line

    def remove(self) -> None:
        """Put the blocks back."""
        handle, self.handle, self._plan = self.handle, None, None
        self._parts, self._fitted = {}, {}
        if handle is not None:
            with collect_warnings([]):  # that no call was seen, as the counts begin at zero with each run
                handle.remove()


def summary_line(handle: CacheHandle) -> str:
    """Return the numbers of a run in a line."""
    stats = handle.stats
    fewer = f", {stats.blocks_total / stats.blocks_run:.2f}× fewer blocks" if stats.blocks_run else ""
    return f"{stats.reused_calls} of {stats.calls} calls reused{fewer}"
