"""msmodelslim's DiT cache under its own names: ``from dithooks.compat.msmodelslim import DitCacheAdaptor, …``.

Written for code that used ``msmodelslim.pytorch.multi_modal.dit_cache`` (version 26.1.0); only the import changes. What
differs is in ``docs/migration.md``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, overload

import torch

from ..blocks.find import find_chains
from ..cache_plan import CachePlan
from ..config import DitCacheConfig as Config
from ..handle import CacheHandle, dit_cache
from ..policy.base import check_count
from ..scope import tell_step
from ..search.intervals import numbers_of
from ..search.ranks import leads
from ..search.search import search


@dataclass
class DitCacheConfig:
    """Which blocks are passed over, and at which steps.

    Args:
        cache_step_start: compute at every step before this one, ≥ 0;
        cache_step_interval: from there on at every so many steps, ≥ 1.
        cache_block_start: first block that is passed over, ≥ 0.
        cache_num_blocks: how many are; 0: none.

    Raises:
        ValueError: one is no whole number, or too small.

    Example:
        >>> config = DitCacheConfig(10, 5, cache_block_start=2, cache_num_blocks=4)
        >>> dict(config)["cache_step_interval"]
        5
    """

    cache_step_start: int = -1  # to leave one out is an error as any other
    cache_step_interval: int = -1
    cache_block_start: int = -1
    cache_num_blocks: int = -1

    def __post_init__(self) -> None:
        for name, least in zip(self.to_dict(), (0, 1, 0, 0), strict=True):
            _counted(self, name, least)

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(self.to_dict().items())

    def to_dict(self) -> dict[str, int]:
        """The four numbers by name, as JSON takes them."""
        return asdict(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the four numbers to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> DitCacheConfig:
        """Read what :meth:`save`, or ``json.dump(dict(config), file)``, wrote.

        Raises:
            ValueError: naming the file: these four numbers are not what is in it.
        """
        try:
            return cls(**json.loads(Path(path).read_text(encoding="utf-8")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)} is not a DitCacheConfig: {error}") from None


@dataclass
class DitCacheSearchConfig:
    """What is wanted of a search.

    Args:
        cache_ratio: times fewer block executions, > 1.
        dit_block_num: number of blocks, to be compared with what is there; left out, as many as there are.
        num_sampling_steps: of the run that is searched with.
        cache_step_interval: from one computed step to the next, ≥ 2; a larger one is taken where the ratio asks for it.
        num_hidden_states: that a block takes and returns. It is observed, so nothing depends on this.

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
            raise ValueError(f"cache_ratio={ratio!r} must be a number above 1: so many times fewer blocks are run")
        if self.num_sampling_steps is None:
            raise ValueError("num_sampling_steps must be given: the number of steps that the pipeline takes")
        if self.dit_block_num is not None:
            _counted(self, "dit_block_num", 1)
        for name, least in (("num_sampling_steps", 1), ("cache_step_interval", 2), ("num_hidden_states", 1)):
            _counted(self, name, least)


class DitCacheAdaptor:
    """Caches one list of blocks of a pipeline, with four numbers that are given or searched for.

    Nothing is attached until there is a config: given to :meth:`update_cache_config`, found by :meth:`search`, or
    assigned to ``dit_cache_config``.

    Args:
        pipeline: any object that the blocks are part of.
        config: for :meth:`search`; not needed otherwise.
        dit_block_path: where the blocks are, from the pipeline.

    Raises:
        ValueError: ``config`` is of another type, or counts other blocks than there are; ``dit_block_path`` is empty
            or not a dotted path, or does not lead to an ``nn.ModuleList`` with blocks in it.

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
        pipeline: object,
        config: DitCacheSearchConfig | None = None,
        dit_block_path: str = "transformer.transformer_blocks",
    ) -> None:
        if config is not None and not isinstance(config, DitCacheSearchConfig):
            raise ValueError(f"config must be a DitCacheSearchConfig, not {config!r} ({type(config).__name__})")
        if not isinstance(dit_block_path, str) or not dit_block_path:
            raise ValueError(
                f"dit_block_path={dit_block_path!r} must be a path such as 'transformer.transformer_blocks'"
            )
        try:
            blocks = len(find_chains(pipeline, dit_block_path)[0].sites)
        except (TypeError, ValueError) as error:
            raise ValueError(f"dit_block_path={dit_block_path!r} leads to no blocks: {error}") from None
        if config is not None and config.dit_block_num not in (None, blocks):
            raise ValueError(f"dit_block_num={config.dit_block_num}, but {dit_block_path} has {blocks} blocks")
        self.pipeline, self.search_config, self.dit_block_path = pipeline, config, dit_block_path
        self.handle: CacheHandle | None = None  # what is attached
        self._config: DitCacheConfig | CachePlan | None = None

    @classmethod
    def set_timestep_idx(cls, t_idx: int) -> None:
        """Tell the sampling step that the calls which follow belong to, in this thread or task.

        Told at each step, it decides; told once, the pipeline's scheduler, or the timestep that the transformer is
        given, goes on from there. Where these tell by themselves, it can be left out.

        Raises:
            ValueError: not a whole number, or negative.
        """
        if t_idx is None:
            raise ValueError("t_idx must be the index of a step, not None")
        try:
            tell_step(t_idx)
        except TypeError as error:
            raise ValueError(str(error)) from None

    @property
    def dit_cache_config(self) -> DitCacheConfig | CachePlan | None:
        """What is in force; assign a :class:`DitCacheConfig` or plan to change it, ``None`` to be without a cache.

        Raises:
            ValueError: of another type, or the range goes past the end.
        """
        return self._config

    @dit_cache_config.setter
    def dit_cache_config(self, config: DitCacheConfig | CachePlan | None) -> None:
        ours: Config | CachePlan | None
        if config is None or isinstance(config, CachePlan):
            ours = config
        elif isinstance(config, DitCacheConfig):
            numbers: tuple[Any, ...] = tuple(config.to_dict().values())
            ours = Config(*numbers) if config.cache_num_blocks else None
        else:
            raise ValueError(f"dit_cache_config must be a DitCacheConfig, not {config!r} ({type(config).__name__})")
        if ours is None:
            self.remove()
        elif self.handle is None:
            self.handle = dit_cache(self.pipeline, ours, blocks=self.dit_block_path)
        else:
            self.handle.update(ours)
        self._config = config

    def update_cache_config(
        self, cache_block_start: int, cache_num_blocks: int, cache_step_start: int, cache_step_interval: int
    ) -> None:
        """Cache from now on as these four numbers say.

        Raises:
            ValueError: one is no whole number, too small, or the range goes past the end; what was, stays in force.
        """
        self.dit_cache_config = DitCacheConfig(
            cache_step_start, cache_step_interval, cache_block_start, cache_num_blocks
        )

    @overload
    def search(
        self,
        run_pipeline_and_save_videos: Callable[[Any], Any],
        prompts_num: int = ...,
        num_videos: int = ...,
        *,
        plan: Literal["interval"] = ...,
        **options: Any,
    ) -> DitCacheConfig: ...

    @overload
    def search(
        self,
        run_pipeline_and_save_videos: Callable[[Any], Any],
        prompts_num: int = ...,
        num_videos: int = ...,
        *,
        plan: Literal["free"],
        **options: Any,
    ) -> CachePlan: ...

    @torch.no_grad()
    def search(
        self,
        run_pipeline_and_save_videos: Callable[[Any], Any],
        prompts_num: int = 1,
        num_videos: int = 1,
        *,
        plan: Literal["interval", "free"] = "interval",
        **options: Any,
    ) -> DitCacheConfig | CachePlan:
        """Find what saves ``cache_ratio`` and changes the videos least, and cache like that from now on.

        Under ``torch.distributed`` every rank calls this; rank 0 compares videos, and all return the same.

        Args:
            run_pipeline_and_save_videos: is given the pipeline, draws, and returns a list of videos, (frames, height,
                width, channels) each, always the same ones; on ranks other than 0 whatever it likes.
            prompts_num: videos that it returns;
            num_videos: for each prompt, so many.
            plan: ``"interval"``: one interval and one range, the four numbers; ``"free"``: any steps, with forecasts.
            options: further ones of :func:`dithooks.search`, such as ``max_evals`` or ``journal``.

        Raises:
            ValueError: there is no search config; the function cannot be called, or returns another number of videos,
                or videos of other shapes than without a cache; it takes other steps than ``num_sampling_steps``; or
                the ratio cannot be reached.
        """
        wanted = self.search_config
        if wanted is None:
            raise ValueError(
                "search needs to know what is wanted: DitCacheAdaptor(pipeline, DitCacheSearchConfig(...))"
            )
        if not callable(run_pipeline_and_save_videos):
            raise ValueError(f"run_pipeline_and_save_videos must be a function, not {run_pipeline_and_save_videos!r}")
        if plan not in ("interval", "free"):
            raise ValueError(f"plan={plan!r}: there are 'interval' and 'free'")
        try:
            expected = check_count("prompts_num", prompts_num, 1) * check_count("num_videos", num_videos, 1)
        except TypeError as error:
            raise ValueError(str(error)) from None

        def run(pipeline: Any) -> Any:
            videos = run_pipeline_and_save_videos(pipeline)
            if leads() and not (isinstance(videos, list) and len(videos) == expected):
                got = f"{len(videos)} of them" if isinstance(videos, list) else type(videos).__name__
                raise ValueError(f"run_pipeline_and_save_videos must return a list of {expected} videos, not {got}")
            return videos

        before = self.dit_cache_config
        self.dit_cache_config = None
        try:
            found = search(
                self.pipeline,
                run,
                wanted.cache_ratio,
                num_inference_steps=wanted.num_sampling_steps,
                blocks=self.dit_block_path,
                **{"cost": "blocks", "interval": wanted.cache_step_interval if plan == "interval" else None, **options},
            )
            if not found.reached:
                raise ValueError(
                    f"cache_ratio={wanted.cache_ratio:g} cannot be reached in {wanted.num_sampling_steps} steps: the "
                    f"most is {found.plan.speedup:.4g}"
                )
        except BaseException:
            self.dit_cache_config = before
            raise
        if plan == "free":
            self.dit_cache_config = found.plan
            return found.plan
        best = numbers_of(found.plan.pieces[0], wanted.cache_step_interval)
        self.update_cache_config(**{name: getattr(best, name) for name in DitCacheConfig.__dataclass_fields__})
        assert isinstance(self._config, DitCacheConfig)
        return self._config

    def remove(self) -> None:
        """Take the cache off the pipeline; nothing of it stays. A config can be given again later."""
        if self.handle is not None:
            self.handle.remove()
        self.handle = self._config = None


def _counted(config: object, name: str, least: int) -> None:
    """See that a field is a whole number, and not below ``least``."""
    try:
        vars(config)[name] = check_count(name, getattr(config, name), least)
    except TypeError as error:
        raise ValueError(str(error)) from None
