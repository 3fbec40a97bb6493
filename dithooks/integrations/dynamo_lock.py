"""The lock under which PyTorch's compiler follows a model's code, which finds no other model at the end of that."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from ..fork import ForkAware

_COMPILER = "torch._dynamo.convert_frame"


class DynamoLock(ForkAware):
    """The compiler's own lock, if it has been imported; taken before the lock of a model, never after."""

    def __init__(self) -> None:
        self._is_left_behind = False
        super().__init__()

    def after_fork(self) -> None:
        """Do without it in a forked child, where a thread that compiles for ever may seem to hold it."""
        self._is_left_behind = True

    def __reduce__(self) -> str:
        """Stay the only one, in copies of what refers to it, too."""
        return "DYNAMO_LOCK"

    def held(self) -> AbstractContextManager[object]:
        """Return what keeps the compiler from following any code meanwhile."""
        lock = self._lock()
        return nullcontext() if lock is None else lock

    def is_held_elsewhere(self) -> bool:
        """Return whether another thread is compiling, or keeps all from it."""
        lock = self._lock()
        if lock is None:
            return False
        if not lock.acquire(blocking=False):
            return True
        lock.release()
        return False

    def _lock(self) -> Any:
        return None if self._is_left_behind else getattr(sys.modules.get(_COMPILER), "compile_lock", None)


DYNAMO_LOCK = DynamoLock()
