"""The lock under which PyTorch's compiler follows a model's code, which finds no other model at the end of that."""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager, nullcontext

from ..fork import ForkAware


class DynamoLock(ForkAware):
    """The compiler's own lock, if it has been imported; taken before the lock of a model, never after."""

    def __init__(self) -> None:
        self._is_left_behind = False
        super().__init__()

    def after_fork(self) -> None:
        """Do without it in a forked child, where a thread that compiles for ever may seem to hold it."""
        self._is_left_behind = True

    def held(self) -> AbstractContextManager[object]:
        """Return what keeps the compiler from following any code meanwhile."""
        lock = getattr(sys.modules.get("torch._dynamo.convert_frame"), "compile_lock", None)
        return nullcontext() if lock is None or self._is_left_behind else lock


DYNAMO_LOCK = DynamoLock()
