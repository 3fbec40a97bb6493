"""A sampling loop that announces its steps: ``for t in dithooks.steps(timesteps):``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import TypeVar

from ..errors import InvalidSetting
from .sessions import Scope, current_session, enter_scope, open_scope

T = TypeVar("T")


def steps(timesteps: Iterable[T], *, sigmas: Sequence[float] | None = None) -> Iterator[T]:
    """Iterate over the timesteps of a sampling loop, and tell the calls inside which step they belong to.

    Each pass is a run of its own. The step is over with the next one, with the loop's end, and when the loop is left by
    ``break`` or an exception, which discards what the run had cached. Put it outermost: ``steps(tqdm(timesteps))``. A
    pipeline that takes a function around its timesteps can be given this one: ``progress_bar_cmd=dithooks.steps``.

    Args:
        timesteps: what the loop goes over, one item for each step.
        sigmas: noise level of each step, for forecasters, which count in it.

    Raises:
        InvalidSetting: there are fewer noise levels than steps.

    Example:
        >>> import dithooks
        >>> for t in dithooks.steps([999, 500]):
        ...     print(t)  # model(x, t)
        999
        500
    """
    total = len(timesteps) if isinstance(timesteps, Sized) else None
    if sigmas is not None and total is not None and len(sigmas) < total:
        raise InvalidSetting(f"steps: {len(sigmas)} sigmas for {total} timesteps: give one for each step")
    return _iterate(timesteps, sigmas, total)


def _iterate(timesteps: Iterable[T], sigmas: Sequence[float] | None, total: int | None) -> Iterator[T]:
    loop, session, scope = object(), current_session(), None
    outer = open_scope()
    is_over = False
    try:
        for index, timestep in enumerate(timesteps):
            if scope is not None:
                scope.is_closed = True
            sigma = None if sigmas is None else float(sigmas[index])
            scope = Scope(index, None, sigma, total, session, loop, outer)
            enter_scope(scope)
            yield timestep
        is_over = True
    finally:
        if scope is not None:
            was_open = open_scope() is scope  # else it was forgotten, and another loop has begun, or this is a thread
            scope.is_closed = True
            if was_open:
                enter_scope(outer)
                if not is_over:
                    session.epoch += 1
