"""The parts of a model runner of vLLM-Omni: the plan of each request, and rows of many requests in step mode."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib import import_module
from typing import Any

from ...config.cache_config import DitCacheConfig
from ...engine.row import Row
from ...errors import DitHooksError
from ...handle import CacheHandle
from ...policies.uncached import Uncached
from ...predictors.polynomial import Reuse
from .backend_parts import LOG, BackendParts, plans_of, transformers_of

KEY = "dithooks"  # in a request's extra_args


class RunnerParts:
    """What a runner does beside vLLM-Omni's own, which it is mixed into.

    A request says what it asks for in its ``extra_args``: ``{"dithooks": "fast"}``, ``True`` or ``False``. Without a
    plan in the environment or the cache config, the runner is as it was.
    """

    pipeline: Any
    od_config: Any
    cache_backend: Any
    state_cache: dict[str, Any]
    _dithooks: BackendParts | None = None
    _dithooks_rows: ExitStack | None = None
    _dithooks_names: frozenset[str] = frozenset()
    _dithooks_plain: DitCacheConfig | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load as ever, then put the cache on.

        Raises:
            OSError, TypeError, ValueError: the plan cannot be read, or is of another model.
        """
        parent: Any = super()
        parent.load_model(*args, **kwargs)
        config = getattr(self.od_config, "cache_config", None)
        if self.pipeline is None or self.cache_backend is not None or plans_of(config) is None:
            return
        backend = import_module(__package__).CachedBackend(config)
        if self._is_stepwise() and _is_compiled(self.pipeline):
            LOG.warning("dithooks: nothing is cached in step mode where blocks are compiled: give enforce_eager=True")
            return
        self._dithooks = backend
        if self._is_stepwise():
            self._rows_handle()
        else:
            backend.enable(self.pipeline)
            self.cache_backend = backend

    def _refresh_cache_for_requests(self, reqs: Sequence[Any], *, od_config: Any) -> None:
        """Before whole requests are drawn: switch to what they ask for."""
        if self._dithooks is None:
            parent: Any = super()
            parent._refresh_cache_for_requests(reqs, od_config=od_config)
            return
        self._dithooks_names = frozenset()  # of steps that are under way, which start over with the next batch
        self._dithooks.ask([self._asked(each.sampling_params, each.request_id) for each in reqs])
        self._dithooks.refresh(self.pipeline, reqs[0].sampling_params.num_inference_steps)

    def _execute_request_list(self, *args: Any, **kwargs: Any) -> Any:
        """Around whole requests: free what they have kept, also where they fail."""
        parent: Any = super()
        try:
            return parent._execute_request_list(*args, **kwargs)
        finally:
            if self._dithooks is not None:
                self._dithooks.finish()
                if self._is_stepwise():  # of requests that are drawn as a whole, with another plan, or none
                    self._dithooks.switch.remove()

    def _execute_stepwise_core(self, *args: Any, **kwargs: Any) -> Any:
        """Around a step of several requests: end the rows' scope, then free the requests that are over."""
        parent: Any = super()
        try:
            with ExitStack() as self._dithooks_rows:
                return parent._execute_stepwise_core(*args, **kwargs)
        finally:
            self._dithooks_rows = None
            self._forget_ended()

    def _prepare_batch_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """After a batch was put together: tell the cache whose its rows are, until the step is over."""
        parent: Any = super()
        states, batch, outputs = parent._prepare_batch_inputs(*args, **kwargs)
        if self._dithooks is not None and self._dithooks_rows is not None and batch is not None:
            handle = self._rows_handle()
            for state in states:
                self._make_request(handle, state)
            rows = [Row(each.request_id, each.step_index) for each in states for _ in range(len(each.latents))]
            self._dithooks_rows.enter_context(handle.rows(rows))
        return states, batch, outputs

    def _cleanup_finished_step_requests(self, *args: Any, **kwargs: Any) -> None:
        """After the scheduler's wave has ended requests, also such as were cancelled."""
        parent: Any = super()
        parent._cleanup_finished_step_requests(*args, **kwargs)
        self._forget_ended()

    def _rows_handle(self) -> CacheHandle:
        """Return the cache that batches of rows go by, put on with a plan of the blocks that all tiers have."""
        assert self._dithooks is not None
        if self._dithooks.handle is None:
            self._dithooks.switch.use(self._dithooks.plans.slowest, transformers_of(self.pipeline))
        assert self._dithooks.handle is not None
        return self._dithooks.handle

    def _make_request(self, handle: CacheHandle, state: Any) -> None:
        """Tell the cache of a request that it does not know yet, with its plan; one drawn in chunks is computed."""
        if self._dithooks is None or state.request_id in self._dithooks_names:
            return
        asked = self._asked(state.sampling, state.request_id)
        plan = self._dithooks.plans.choose(asked) if state.chunk_num_steps is None else None
        handle.request(
            state.request_id,
            scheduler=state.scheduler if hasattr(state.scheduler, "timesteps") else None,
            plan=self._plain_plan(handle) if plan is None else self._dithooks.switch.fitted(plan),
            steps=state.total_steps or None,
        )
        self._dithooks_names |= {state.request_id}

    def _plain_plan(self, handle: CacheHandle) -> DitCacheConfig:
        """Return the plan of requests that are not cached, one for all of them."""
        if self._dithooks_plain is None:
            self._dithooks_plain = uncached(handle.config)
        return self._dithooks_plain

    def _forget_ended(self) -> None:
        """Free the residuals of the requests that are over, were cancelled, or have failed."""
        handle = None if self._dithooks is None else self._dithooks.handle
        ended = self._dithooks_names - self.state_cache.keys()
        self._dithooks_names -= ended
        if handle is not None:
            for name in ended:
                handle.forget(name)

    def _asked(self, parameters: Any, request: object) -> object:
        """Return what a request asks for; where there is no such tier, to be computed: others are in its batch."""
        assert self._dithooks is not None
        asked = (getattr(parameters, "extra_args", None) or {}).get(KEY)
        try:
            self._dithooks.plans.choose(asked)
        except DitHooksError as error:
            LOG.warning("dithooks: request %s is drawn without a cache: %s", request, error)
            return False
        return asked

    def _is_stepwise(self) -> bool:
        return bool(getattr(self.od_config, "step_execution", False))


def uncached(config: DitCacheConfig) -> DitCacheConfig:
    """Return the configuration of the same blocks by which each step is computed; of several ranges, the first's.

    Example:
        >>> uncached(DitCacheConfig(1, 2, 3, 4))
        DitCacheConfig(cache_block_start=3, cache_num_blocks=4, policy=Uncached())
    """
    plain = {"policy": Uncached(), "predictor": Reuse(), "more_ranges": ()}
    numbers = {"cache_step_start": None, "cache_step_interval": None}
    overrides = {path: {**changes, **plain} for path, changes in config.overrides.items()}
    return replace(config, **numbers, **plain, overrides=overrides)  # type: ignore[arg-type]


def _is_compiled(pipeline: Any) -> bool:
    """Return whether a transformer or a block of it is to run in compiled code."""
    modules = [module for part in transformers_of(pipeline).values() for module in part.modules()]
    return any(module._compiled_call_impl is not None or hasattr(module, "_orig_mod") for module in modules)
