"""The steps of DiffSynth-Studio's pipelines, whose ``model_fn`` runs blocks without their transformer's call."""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..engine.model_lock import MODEL_LOCK
from ..engine.sessions import Scope, Session, current_session, enter_scope, open_scope
from ..engine.watched_method import WatchedMethod, unwatch, watch
from ..errors import InvalidSetting, WrongType
from ..validation import shown

MODEL_FN = "model_fn"  # an attribute of each pipeline: the function that every call of a step goes through
TILINGS = ("tiled", "sliding_window_size")  # a model_fn that has one of these runs the blocks once for each part


@contextmanager
def diffsynth_steps(pipe: nn.Module) -> Iterator[None]:
    """Declare step and branch of every call that a pipeline of DiffSynth-Studio makes, until the ``with`` is left.

    Such a pipeline hands its transformer to a function, ``pipe.model_fn``, which runs the blocks and passes the
    transformer's ``forward`` by; its scheduler counts no steps. Here each call of ``model_fn`` is a
    :func:`timestep_scope`, with the scheduler's noise level and number of steps; ``"positive"`` and ``"negative"`` are
    its branches. Sliding windows and tiles are distinguished by their order. The attribute is as it was afterwards.

    Args:
        pipe: a ``WanVideoPipeline``, ``FluxImagePipeline``, ``QwenImagePipeline`` or the like.

    Raises:
        TypeError: ``pipe`` has no ``model_fn`` or no scheduler.
        ValueError: at a call, ``tea_cache_l1_thresh`` was given: two caches would leave out the same blocks.

    Example:
        >>> from types import SimpleNamespace
        >>> class Pipeline(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.scheduler = SimpleNamespace(timesteps=[999, 500])
        ...         self.model_fn = lambda timestep: open_scope().step
        >>> pipe = Pipeline()
        >>> with diffsynth_steps(pipe):
        ...     print([pipe.model_fn(timestep=t) for t in pipe.scheduler.timesteps])
        [0, 1]
    """
    if not (isinstance(pipe, nn.Module) and callable(getattr(pipe, MODEL_FN, None)) and hasattr(pipe, "scheduler")):
        raise WrongType(
            f"diffsynth_steps: {shown(pipe)} ({type(pipe).__name__}) has no model_fn or no scheduler: give a pipeline "
            "of DiffSynth-Studio; elsewhere, write `for t in dithooks.steps(timesteps):`"
        )
    watcher = ModelFnWatcher(pipe)
    with MODEL_LOCK.lock:
        watch(pipe, MODEL_FN, watcher)
    try:
        yield
    finally:
        watcher.is_closed = True  # whoever has wrapped model_fn meanwhile still calls it
        with MODEL_LOCK.lock:
            unwatch(pipe, MODEL_FN, lambda other: other is watcher)


@dataclass(eq=False)
class LoopMark:
    """One denoising loop, as the scopes of its calls have it; runs keep it, so it holds nothing of the loop.

    Args:
        watcher: of the loop's calls.
        is_in_call: whether one of them has begun and not returned.
    """

    watcher: ModelFnWatcher
    is_in_call: bool = False


class DenoisingLoop:
    """One denoising loop of a pipeline, as the calls of its ``model_fn`` show it.

    Args:
        mark: of the loop.
        session: which the calls belong to: a request's, or one of the loop's own, with which residuals are freed.
        scheduler: of the pipeline, whose ``set_timesteps`` has just begun the loop.
    """

    def __init__(self, mark: LoopMark, session: Session, scheduler: Any) -> None:
        self.mark, self.session = mark, session
        self.timesteps = getattr(scheduler, "timesteps", ())
        sigmas = getattr(scheduler, "sigmas", ())
        self._sigmas: list[float] = sigmas.tolist() if hasattr(sigmas, "tolist") else list(sigmas)  # waits once a loop
        self.step, self._timestep, self._branches = -1, object(), Counter[str]()
        self._calls, self._calls_before = 0, 0  # of this step, and of the one before

    def goes_on(self, scheduler: Any, kwargs: dict[str, Any]) -> bool:
        """Return whether a call is one of this loop."""
        index = kwargs.get("progress_id", self.step + self._has_moved(kwargs))
        return getattr(scheduler, "timesteps", ()) is self.timesteps and self.step <= index < len(self.timesteps)

    def move(self, kwargs: dict[str, Any]) -> None:
        """Go to the step of a call: the pipeline's own index, else one further for each new timestep."""
        before = self.step
        self.step = kwargs.get("progress_id", before + self._has_moved(kwargs))
        self._timestep = _timestep(kwargs)
        if self.step != before:
            self._branches.clear()
            self._calls, self._calls_before = 0, self._calls
        self._calls += 1

    def branch(self, kwargs: dict[str, Any]) -> str:
        """Name a call by its prompt; a second one of the step by a number, too."""
        is_positive = kwargs.get("positive", "negative_prompt" not in kwargs)
        name = "positive" if is_positive else "negative"
        self._branches[name] += 1
        count = self._branches[name]
        return name if count == 1 else f"{name} {count}"

    @property
    def is_over(self) -> bool:
        """Whether the last step has had as many calls as the one before."""
        return self.step + 1 == len(self.timesteps) and self._calls == self._calls_before

    @property
    def sigma(self) -> float | None:
        """The noise level of the step, where the scheduler has one."""
        level = self._sigmas[self.step] if self.step < len(self._sigmas) else math.nan
        return level if 0 <= level < math.inf else None

    def _has_moved(self, kwargs: dict[str, Any]) -> bool:
        # The object, not its value: in bfloat16 neighbouring timesteps are one number, and reading it waits.
        return _timestep(kwargs) is not self._timestep


class ModelFnWatcher:
    """Opens a scope around every call of a pipeline's ``model_fn``.

    Args:
        pipe: the pipeline.
    """

    def __init__(self, pipe: nn.Module) -> None:
        self._pipe, self.is_closed = pipe, False
        self._loops: WeakKeyDictionary[Session, DenoisingLoop] = WeakKeyDictionary()

    def starts(self, method: WatchedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Open the scope of a call."""
        if self.is_closed:
            return False
        if kwargs.get("tea_cache") is not None:
            raise InvalidSetting(
                "tea_cache_l1_thresh: TeaCache would leave out the same blocks, in calls of its own choice: give one "
                "of both; dithooks.Threshold decides by a change, too"
            )
        session, scheduler = current_session(), self._pipe.scheduler
        loop = self._loops.get(session)
        if loop is None or not loop.goes_on(scheduler, kwargs):
            own = session if session.owner is None else Session(None)
            loop = self._loops[session] = DenoisingLoop(LoopMark(self), own, scheduler)
        loop.move(kwargs)
        parameters = inspect.signature(method.forward).parameters
        has_parts = any(name in parameters and kwargs.get(name) for name in TILINGS)
        branch = None if has_parts else loop.branch(kwargs)
        steps = len(loop.timesteps) or None
        enter_scope(Scope(loop.step, branch, loop.sigma, steps, loop.session, loop.mark, open_scope()))
        loop.mark.is_in_call = True
        return True

    def ends(self, output: Any) -> None:
        """Note that a call has returned, and no exception has left it."""
        for _, mark in self._scopes():
            mark.is_in_call = False

    def leaves(self) -> None:
        """Close the scope of a call; what was cached before an exception is not trusted."""
        for scope, mark in self._scopes():
            scope.is_closed = True
            enter_scope(scope.outer)
            scope.session.epoch += mark.is_in_call
            session = current_session()
            loop = self._loops.get(session)
            if loop is not None and (loop.is_over or mark.is_in_call):
                del self._loops[session]

    def _scopes(self) -> Iterator[tuple[Scope, LoopMark]]:
        """Iterate over the open scopes of this watcher's calls, of which there is one."""
        scope = open_scope()
        while scope is not None:
            if isinstance(scope.loop, LoopMark) and scope.loop.watcher is self:
                yield scope, scope.loop
            scope = scope.outer


def _timestep(kwargs: dict[str, Any]) -> object:
    return next((value for name, value in kwargs.items() if name.startswith("timestep")), None)
