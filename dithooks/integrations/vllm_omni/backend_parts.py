"""The parts of a cache backend as vLLM-Omni has them: put on when a pipeline is loaded, made new before each run."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from ...config.cache_config import DitCacheConfig
from ...config.cache_plan import CachePlan
from ...errors import InvalidSetting
from ...handle import CacheHandle
from ..serving.cache_switch import CacheSwitch
from ..serving.served_plans import PLAN, ServedPlans

LOG = logging.getLogger("vllm_omni.dithooks")  # vLLM shows what its own loggers are given
TRANSFORMERS = ("transformer", "transformer_2")


def plans_of(config: Any) -> ServedPlans | None:
    """Return the plans that a cache config names, as ``{"plan": file, "tier": name}``, or else the environment.

    Raises:
        OSError, TypeError, ValueError: the file cannot be read, holds no plan, or has no such tier.
    """
    extra = config if isinstance(config, dict) else getattr(config, "_extra_params", None) or {}
    if extra.get("plan"):
        return ServedPlans.load(extra["plan"], extra.get("tier"))
    return ServedPlans.from_environment()


def transformers_of(pipeline: Any) -> dict[str, nn.Module]:
    """Return the transformers of a pipeline, by the names of its attributes."""
    names = getattr(pipeline, "_dit_modules", None) or TRANSFORMERS
    found = {name: getattr(pipeline, name, None) for name in names}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


class BackendParts:
    """What a backend of this cache does; vLLM-Omni's ``CacheBackend``, which it is mixed into, has the rest.

    Args:
        config: vLLM-Omni's cache config.

    Raises:
        ValueError: neither the config nor the environment names a plan.
    """

    config: Any
    enabled: bool

    def __init__(self, config: Any) -> None:
        parent: Any = super()
        parent.__init__(config)
        plans = plans_of(config)
        if plans is None:
            raise InvalidSetting(f'no plan is named: give {PLAN}, or cache_config={{"plan": "plans.json"}}')
        self.plans, self.switch = plans, CacheSwitch()
        self._next: DitCacheConfig | CachePlan | None = plans.choose(None)

    @property
    def handle(self) -> CacheHandle | None:
        """The cache that is on the pipeline, if one is."""
        return self.switch.handle

    def enable(self, pipeline: Any) -> None:
        """Put the server's own plan on a pipeline.

        Raises:
            TypeError, ValueError: as :func:`~dithooks.dit_cache`.
        """
        self.switch.use(self._next, transformers_of(pipeline))
        self.enabled = True

    def ask(self, asked: list[object]) -> None:
        """Choose the plan of the runs after the next :meth:`refresh`, by what the requests of a batch ask for.

        Raises:
            ValueError, TargetMissed: there is no such tier.
        """
        self._next = self.plans.choose_for_batch(asked)

    def refresh(self, pipeline: Any, num_inference_steps: int, verbose: bool = True) -> None:
        """Begin another run: nothing of the last one is kept.

        Args:
            pipeline: as for :meth:`enable`.
            num_inference_steps: of the run; the cache reads the step from the timesteps.
            verbose: whether to log what the last run came to.

        Raises:
            TypeError, ValueError: as :func:`~dithooks.dit_cache`.
        """
        self.finish(verbose)
        self.switch.use(self._next, transformers_of(pipeline))

    def finish(self, verbose: bool = True) -> None:
        """End a run: free what it has kept, and log what it came to."""
        line = self.switch.end()
        if line and verbose and not line.startswith("0 of 0"):
            LOG.info("dithooks: %s", line)
