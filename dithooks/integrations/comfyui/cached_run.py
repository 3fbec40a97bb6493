"""A sampler's run with a cache: by a plan or a configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...config.cache_config import DitCacheConfig
from ...config.cache_plan import CachePlan
from ...handle import dit_cache
from .model_cache import ModelCache
from .run_report import summary_line
from .sampler_clock import SamplerSession


@dataclass(eq=False)
class CachedRun(ModelCache):
    """Draws with a cache.

    Args:
        config: a plan, or a configuration.
        label: what it is called in reports.
    """

    config: CachePlan | DitCacheConfig
    label: str

    def draw(self, model: nn.Module, draw: Callable[[], Any], session: SamplerSession) -> Any:
        """Draw with the model cached, and report what was reused."""
        with dit_cache(model, self.config) as cache:
            drawn = draw()
        line, is_nothing = summary_line(cache, len(session.levels))
        self.report.add(f"{line} ({type(model).__name__}, {self.label})", is_nothing)
        return drawn
