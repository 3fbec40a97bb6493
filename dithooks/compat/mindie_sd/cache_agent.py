"""MindIE-SD's ``CacheAgent``: its ``apply`` calls a block, or leaves it out, by the engine of ``dit_cache``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from ...engine.requests import Request
from ...engine.sessions import Session, current_session, timestep_scope
from ...errors import InvalidSetting, WrongType
from ...handle import CacheHandle, dit_cache
from ...stats.user_warning import warn_user
from ...validation import shown
from .agent_config import CacheConfig

IMAGE, TEXT = "hidden_states", "encoder_hidden_states"  # which apply hands to a block by position


@dataclass(eq=False)
class AgentProgress:
    """How far the run of a thread, task or request has come.

    Args:
        request: the run, whose residuals are freed with it.
        step: of the blocks that are being applied.
        block: which of them is the next.
    """

    request: Request
    step: int = 0
    block: int = 0


class AppliedBlock(nn.Module):
    """The place of one block in a model's loop: it calls whichever function is applied there."""

    def forward(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        return function(*args, **kwargs)


class AppliedBlocks(nn.Module):
    """The places of all blocks in a model's loop, whose order is that of the calls of ``apply``."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AppliedBlock() for _ in range(count))


class CacheAgent:
    """A cache of one range of blocks, applied by a model's own forward: ``self.cache.apply(block, hidden_states=h)``.

    Each call of :meth:`apply` is the next block, after ``blocks_count`` of them the next step, and after
    ``steps_count`` steps another run. Nothing is put on the model. Where the forward does not call ``apply``,
    ``dit_cache(pipe, config.dit_cache_config())`` needs no change of it.

    Args:
        config: which blocks, and which steps.

    Raises:
        TypeError: ``config`` is no :class:`CacheConfig`.
        ValueError: a field is out of range, or names a method that is not here.

    Warns:
        UserWarning: ``step_end`` lies before the last step: it has no effect.

    Example:
        >>> import torch
        >>> blocks = [nn.Linear(4, 4) for _ in range(6)]
        >>> cache = CacheAgent(CacheConfig("dit_block_cache", 6, 8, step_interval=2, block_start=1, block_end=5))
        >>> with torch.no_grad():
        ...     for step in range(8):
        ...         h = torch.ones(1, 4)
        ...         for block in blocks:
        ...             h = cache.apply(block, hidden_states=h)
        >>> cache.handle.stats.blocks_run, cache.handle.stats.blocks_total
        (32, 48)
    """

    def __init__(self, config: CacheConfig) -> None:
        if not isinstance(config, CacheConfig):
            raise WrongType(f"config={shown(config)} ({type(config).__name__}): give a CacheConfig")
        config.check()
        self.config = config
        self.handle: CacheHandle | None = None  # of the cache; None where the settings leave out no block
        self._progress: WeakKeyDictionary[Session, AgentProgress] = WeakKeyDictionary()
        if not config.reuses:
            return
        self._places = AppliedBlocks(config.blocks_count)
        self.handle = dit_cache(self._places, config.dit_cache_config(), blocks="blocks")
        if config.step_end < config.steps_count - 1:
            warn_user(
                f"CacheConfig: step_end={config.step_end} has no effect on {config.method!r}, as in MindIE-SD 3.1.0: "
                "steps behind it are reused, too"
            )

    def apply(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the next block of the model's loop, or leave it out.

        Args:
            function: the block.
            *args: what it is given by position behind its streams.
            **kwargs: ``hidden_states`` and, of a block that has two streams, ``encoder_hidden_states``, which it is
                given by position; and whatever else it is given by name.

        Returns:
            What the block returns: one tensor, or ``hidden_states`` and ``encoder_hidden_states``.

        Raises:
            TypeError: ``function`` cannot be called.
            ValueError: ``hidden_states`` is no tensor given by name.
        """
        if not callable(function):
            raise WrongType(f"apply: {shown(function)} ({type(function).__name__}) cannot be called: give the block")
        if self.handle is None:
            return function(*args, **kwargs)
        if not isinstance(kwargs.get(IMAGE), Tensor):
            raise InvalidSetting(
                "apply: hidden_states must be a tensor, given by name: cache.apply(block, hidden_states=h, ...)"
            )
        image = kwargs.pop(IMAGE)
        text = (kwargs.pop(TEXT),) if TEXT in kwargs else ()
        session = current_session()
        progress = self._progress.get(session)
        if progress is None:
            progress = self._progress[session] = AgentProgress(self.handle.request())
        place = self._places.blocks[progress.block]
        try:
            with progress.request, timestep_scope(progress.step, branch=0, steps=self.config.steps_count):
                output = place(function, image, *text, *args, **kwargs)
        except BaseException:
            self.reset()
            raise
        progress.block += 1
        if progress.block == self.config.blocks_count:
            progress.step, progress.block = progress.step + 1, 0
        if progress.step == self.config.steps_count:
            self.reset()
        return output

    def reset(self) -> None:
        """Free the residuals of a run that was broken off; the next call begins another."""
        self._progress.pop(current_session(), None)
