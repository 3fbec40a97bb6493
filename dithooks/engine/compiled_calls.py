"""The calls of compiled models that are under way in other threads while a cache is changed: never both at once.

Compiled code reads the stand-ins once to choose a graph, and again to run it; in between they have to be there.
"""

from __future__ import annotations

import inspect
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any, Protocol

from torch import nn

from ..fork import ForkAware
from .active_calls import PATIENCE, ThreadCalls, listed

_CALL = vars(nn.Module)["__call__"].__code__  # is on the stack for as long as a module is called


class CompilerLock(Protocol):
    """The lock under which PyTorch's compiler follows code."""

    def held(self) -> AbstractContextManager[object]:
        """Return the context in which it follows none."""
        ...

    def is_held_elsewhere(self) -> bool:
        """Return whether another thread has it."""
        ...


class CompiledCalls(ForkAware):
    """The calls of compiled models with one handle's caches, and its changes, during which none goes on.

    A call says that it begins, and then asks for changes; who changes says so, and then looks for calls. So one of them
    sees the other. Both hold no lock of ours meanwhile, and wait a bounded time in which nothing is compiled, which may
    take minutes.

    Args:
        compiler: the compiler's lock.
    """

    def __init__(self, compiler: CompilerLock) -> None:
        self._compiler = compiler
        self._changing: list[int] = []  # threads, each as often as it is in a change
        self._threads: weakref.WeakSet[ThreadCalls] = weakref.WeakSet()
        super().__init__()

    def __reduce__(self) -> tuple[Any, ...]:
        """Copy to one without calls, as is that of a handle that was removed."""
        return CompiledCalls, (self._compiler,)

    def after_fork(self) -> None:
        """Forget, in a forked child, the threads that are not there."""
        me = threading.get_ident()
        self._changing = [thread for thread in self._changing if thread == me]
        self._threads = weakref.WeakSet(calls for calls in listed(self._threads) if calls.thread == me)

    def enter(self, calls: ThreadCalls) -> None:
        """Note that this thread's call is about to run compiled code, once other threads have made their changes."""
        self._threads.add(calls)
        is_inside = any(each is not calls for each in self._under_way(mine=True))  # who changes waits for that call
        calls.are_compiled = True
        while not is_inside and self._is_changing() and calls.are_compiled:
            calls.are_compiled = False
            if self._wait_while(self._is_changing, 2 * PATIENCE):
                calls.are_compiled = True
            else:  # it waits for something else, or was broken off: it is waited for once
                self._changing.clear()
        calls.are_compiled = True

    @contextmanager
    def kept_out(self) -> Iterator[None]:
        """Change a model, once no other thread is in compiled code; calls that begin meanwhile wait."""
        me = threading.get_ident()
        mine = self._under_way(mine=True)  # it may be in a call itself, but outside of compiled code
        try:
            self._changing.append(me)
            for calls in mine:
                calls.are_compiled = False
            if not self._wait_while(lambda: bool(self._under_way(mine=False)), PATIENCE):
                for calls in self._under_way(mine=False):
                    calls.are_compiled = False  # ended by an exception, it may be: it is waited for once
            yield
        finally:
            for calls in mine:
                calls.are_compiled = True
            if me in self._changing:
                self._changing.remove(me)

    def nothing_compiled(self) -> AbstractContextManager[object]:
        """Return the context in which no code is compiled; to be entered before the lock of models."""
        return self._compiler.held()

    def _under_way(self, mine: bool) -> list[ThreadCalls]:
        """Return the threads that are in compiled code: this one, or others; with an entry for each range."""
        me = threading.get_ident()
        return [
            each for each in listed(self._threads) if (each.thread == me) is mine and each.are_compiled and each.calls
        ]

    def _is_changing(self) -> bool:
        me = threading.get_ident()
        return any(thread != me for thread in self._changing.copy())

    def _wait_while(self, is_so: Callable[[], bool], patience: float) -> bool:
        """Wait until something is no longer so; return whether that came in time."""
        until = time.monotonic() + patience
        while is_so():
            if self._compiler.is_held_elsewhere():
                until = time.monotonic() + patience
            elif time.monotonic() > until:
                return False
            time.sleep(0.0005)
        return True


def is_called_here(module: nn.Module) -> bool:
    """Return whether this thread is in a call of a module."""
    frame: FrameType | None = inspect.currentframe()
    while frame is not None:
        code = frame.f_code  # a copy, where the compiler has read it
        is_call = code.co_name == _CALL.co_name and code.co_filename == _CALL.co_filename
        if is_call and frame.f_locals.get("self") is module:
            return True
        frame = frame.f_back
    return False
