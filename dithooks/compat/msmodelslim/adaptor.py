"""msmodelslim's ``DitCacheAdaptor``: ``dit_cache`` and ``search`` under its interface."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from ...blocks.discovery import find_chains
from ...blocks.module_paths import walk
from ...config.cache_config import DitCacheConfig as Config
from ...config.cache_plan import CachePlan
from ...errors import InvalidSetting, WrongType
from ...handle import CacheHandle, dit_cache
from ...planning.interval_planner import interval_config
from ...recording.image_metrics import FIELDS
from ...recording.rank_broadcast import is_rank_0
from ...tuning.search import search
from ...validation import check_count, shown
from .adaptor_configs import DitCacheConfig, DitCacheSearchConfig
from .step_index import get_step_index, set_step_index

MAX_RUNS = 6.0  # block executions of a search, in uncached runs: one is recorded, and four plans are run


class DitCacheAdaptor:
    """A cache of one list of blocks of a pipeline, set by four numbers that are given or searched for.

    Nothing is attached until there is a config: from :meth:`update_cache_config`, from :meth:`search`, or assigned to
    ``dit_cache_config``.

    Args:
        pipeline: any object that the blocks are part of.
        config: for :meth:`search`; not needed otherwise.
        dit_block_path: dotted path from the pipeline to the list of blocks.

    Raises:
        ValueError: ``config`` is of another type, or has another number of blocks than the list; or
            ``dit_block_path`` is not a dotted path to an ``nn.ModuleList`` with blocks in it.

    Example:
        >>> class Pipeline:
        ...     def __init__(self):
        ...         self.transformer = torch.nn.Module()
        ...         self.transformer.transformer_blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(6))
        ...     def __call__(self, steps):
        ...         h = torch.ones(1, 4)
        ...         for step in range(steps):
        ...             DitCacheAdaptor.set_timestep_idx(step)
        ...             for block in self.transformer.transformer_blocks:
        ...                 h = block.forward(h)
        >>> pipeline = Pipeline()
        >>> adaptor = DitCacheAdaptor(pipeline)
        >>> adaptor.dit_cache_config = DitCacheConfig(2, 2, cache_block_start=1, cache_num_blocks=4)
        >>> with torch.no_grad():
        ...     pipeline(8)
        >>> adaptor.handle.stats.blocks_run, adaptor.handle.stats.blocks_total
        (36, 48)
        >>> adaptor.remove()
    """

    def __init__(
        self,
        pipeline: Any,
        config: DitCacheSearchConfig | None = None,
        dit_block_path: str = "transformer.transformer_blocks",
    ) -> None:
        if config is not None and not isinstance(config, DitCacheSearchConfig):
            raise InvalidSetting(
                f"config must be a DitCacheSearchConfig, not {shown(config)} ({type(config).__name__})"
            )
        if not isinstance(dit_block_path, str) or not dit_block_path:
            raise InvalidSetting(
                f"dit_block_path={shown(dit_block_path)} must be a path such as 'transformer.transformer_blocks'"
            )
        try:
            blocks = len(find_chains(pipeline, dit_block_path)[0].block_refs)
        except (TypeError, ValueError) as error:
            raise InvalidSetting(f"dit_block_path={shown(dit_block_path)} leads to no blocks: {error}") from None
        if config is not None and config.dit_block_num not in (None, blocks):
            raise InvalidSetting(f"dit_block_num={config.dit_block_num}, but {dit_block_path} has {blocks} blocks")
        if config is not None:
            config.dit_block_num = blocks
        self.pipeline, self.search_config, self.dit_block_path = pipeline, config, dit_block_path
        self.handle: CacheHandle | None = None  # of the cache that is attached
        self._config: DitCacheConfig | CachePlan | None = None
        self._enabled = True

    @classmethod
    def set_timestep_idx(cls, t_idx: int) -> None:
        """Set the sampling step of the calls that follow in this thread or task.

        Set at each step, this index decides. Set once, it is where runs begin, and the pipeline's scheduler, or else
        the transformer's timestep argument, counts on from there. With either of these, it can be left out.

        Raises:
            ValueError: ``t_idx`` is not an integer, or is negative.
        """
        if t_idx is None:
            raise InvalidSetting("t_idx must be the index of a step, not None")
        try:
            set_step_index(t_idx)
        except TypeError as error:
            raise InvalidSetting(str(error)) from None

    @classmethod
    def get_timestep_idx(cls) -> int:
        """Return the index that :meth:`set_timestep_idx` has set in this thread or task.

        Raises:
            ValueError: none has been set.
        """
        return get_step_index()

    @staticmethod
    def get_and_check_blocks(obj: object, block_path: str) -> nn.ModuleList:
        """Return the list of blocks that a dotted path leads to.

        Raises:
            TypeError: it leads to something else.
            ValueError: it leads nowhere, or the list is empty.
        """
        if not isinstance(block_path, str) or not block_path:
            raise InvalidSetting(f"block_path={shown(block_path)} must be a path such as 'transformer.blocks'")
        blocks = walk(obj, block_path)
        if not isinstance(blocks, nn.ModuleList):
            raise WrongType(f"{block_path} must be an nn.ModuleList, not {shown(blocks)} ({type(blocks).__name__})")
        if not len(blocks):
            raise InvalidSetting(f"{block_path} is an empty nn.ModuleList: give the path of the blocks")
        return blocks

    @property
    def dit_cache_config(self) -> DitCacheConfig | CachePlan | None:
        """The config in force; assign a :class:`DitCacheConfig` or plan to change it, ``None`` to remove the cache.

        Raises:
            ValueError: the value is of another type, or its range goes past the end.
        """
        return self._config

    @dit_cache_config.setter
    def dit_cache_config(self, config: DitCacheConfig | CachePlan | None) -> None:
        if not (config is None or isinstance(config, (DitCacheConfig, CachePlan))):
            raise InvalidSetting(
                f"dit_cache_config must be a DitCacheConfig, not {shown(config)} ({type(config).__name__})"
            )
        self._attach(config if self._enabled else None)
        self._config = config

    @property
    def enable_cache(self) -> bool:
        """Whether the config in force is attached; assign ``False`` to run without a cache for a while."""
        return self._enabled

    @enable_cache.setter
    def enable_cache(self, value: bool) -> None:
        self._attach(self._config if value else None)
        self._enabled = bool(value)

    def update_cache_config(
        self, cache_block_start: int, cache_num_blocks: int, cache_step_start: int, cache_step_interval: int
    ) -> None:
        """Replace the config in force by these four numbers.

        Raises:
            ValueError: a number is not an integer or too small, or the range goes past the end; the former config
                stays in force.
        """
        self.dit_cache_config = DitCacheConfig(
            cache_step_start, cache_step_interval, cache_block_start, cache_num_blocks
        )

    @torch.no_grad()
    def search(
        self,
        run_pipeline_and_save_videos: Callable[[Any], Any],
        prompts_num: int = 1,
        num_videos: int = 1,
        *,
        plan: Literal["interval", "free"] = "interval",
        max_evals: int = 4,
        journal: str | os.PathLike[str] | None = None,
        verbose: bool = True,
    ) -> Any:
        """Search for the config that saves ``cache_ratio`` and changes the videos least, and put it in force.

        Under ``torch.distributed``, every rank calls this; rank 0 compares videos, and all ranks return the same.

        Args:
            run_pipeline_and_save_videos: receives the pipeline, generates, and returns the videos, always of the same
                prompts and seeds: a list of arrays or tensors, (frames, height, width, channels) each, one array or
                tensor of all of them, or the pipeline's output that has either as ``images``. Ranks other than 0 may
                return anything.
            prompts_num: number of prompts.
            num_videos: number of videos for each prompt.
            plan: ``"interval"``: one interval and one range, the four numbers; ``"free"``: any steps, with forecasts.
            max_evals: as for :func:`dithooks.search`.
            journal: as for :func:`dithooks.search`.
            verbose: as for :func:`dithooks.search`.

        Returns:
            A :class:`DitCacheConfig`; with ``plan="free"`` a :class:`dithooks.CachePlan`.

        Raises:
            ValueError: there is no search config; the function cannot be called, or returns another number of videos,
                or videos of other shapes than without a cache; the run has another number of steps than
                ``num_sampling_steps``; or the ratio cannot be reached. The former config is in force again then.
            KeyboardInterrupt: the search was interrupted; the former config is in force again. With a journal, the
                next search continues from there.
        """
        wanted = self.search_config
        if wanted is None:
            raise InvalidSetting(
                "search needs to know what is wanted: DitCacheAdaptor(pipeline, DitCacheSearchConfig(...))"
            )
        if not callable(run_pipeline_and_save_videos):
            raise InvalidSetting(
                f"run_pipeline_and_save_videos must be a function, not {shown(run_pipeline_and_save_videos)}"
            )
        if plan not in ("interval", "free"):
            raise InvalidSetting(f"plan={shown(plan)}: there are 'interval' and 'free'")
        try:
            expected = check_count("prompts_num", prompts_num, 1) * check_count("num_videos", num_videos, 1)
        except TypeError as error:
            raise InvalidSetting(str(error)) from None

        def run(pipeline: Any) -> Any:
            videos = run_pipeline_and_save_videos(pipeline)
            if not is_rank_0():
                return videos
            found = _listed(videos)
            if found is None or len(found) != expected:
                got = type(videos).__name__ if found is None else f"{len(found)} of them"
                raise InvalidSetting(f"run_pipeline_and_save_videos must return a list of {expected} videos, not {got}")
            return found

        before = self.dit_cache_config
        self.dit_cache_config = None
        try:
            found = search(
                self.pipeline,
                run,
                wanted.cache_ratio,
                num_inference_steps=wanted.num_sampling_steps,
                blocks=self.dit_block_path,
                cost="blocks",
                interval=wanted.cache_step_interval if plan == "interval" else None,
                max_evals=max_evals,
                max_runs=MAX_RUNS,
                journal=journal,
                verbose=verbose,
            )
            if found.interrupted:
                raise KeyboardInterrupt
            if not found.reached:
                raise InvalidSetting(
                    f"cache_ratio={wanted.cache_ratio:g} cannot be reached in {wanted.num_sampling_steps} steps: the "
                    f"most is {found.plan.speedup:.4g}"
                )
        except BaseException:
            self.dit_cache_config = before
            raise
        self._enabled = True
        if plan == "free":
            self.dit_cache_config = found.plan
            return found.plan
        best = interval_config(found.plan.pieces[0], wanted.cache_step_interval)
        self.update_cache_config(**{name: getattr(best, name) for name in DitCacheConfig.__dataclass_fields__})
        assert isinstance(self._config, DitCacheConfig)
        return self._config

    def remove(self) -> None:
        """Remove the cache from the pipeline, without a trace. A config can be given again later."""
        self._attach(None)
        self._config = None

    def _attach(self, config: DitCacheConfig | CachePlan | None) -> None:
        """Attach a config in place of the present one; an error leaves the present one attached."""
        ours: Config | CachePlan | None = config if isinstance(config, CachePlan) else None
        if isinstance(config, DitCacheConfig):
            numbers: tuple[Any, ...] = tuple(config.to_dict().values())
            ours = Config(*numbers) if config.cache_num_blocks else None
        if self.handle is not None and (ours is None or not self.handle.active):
            self.handle.remove()
            self.handle = None
        if ours is None:
            return
        if self.handle is None:
            self.handle = dit_cache(self.pipeline, ours, blocks=self.dit_block_path)
        else:
            self.handle.update(ours)


def _listed(videos: Any) -> list[Any] | None:
    """Return videos as a list: of a pipeline's output, a batch of five dimensions, or one video of four.

    ``None``, if they are none of these.
    """
    if not isinstance(videos, (list, np.ndarray, torch.Tensor)):
        videos = next((value for name in FIELDS if (value := getattr(videos, name, None)) is not None), videos)
    if isinstance(videos, (np.ndarray, torch.Tensor)) and videos.ndim in (4, 5):
        return [videos] if videos.ndim == 4 else list(videos)
    return videos if isinstance(videos, list) else None
