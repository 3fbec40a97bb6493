"""Call the transformer once more with the same arguments, to learn from it or to test a residual."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..fork import ForkLock
from .argument_copies import Uncopyable, copied, copied_where_possible, is_copyable
from .output_comparison import tensors_in

# Set while a call is replayed, so that other caches on the same model stand aside.
replaying: ContextVar[bool] = ContextVar("dithooks.replaying", default=False)


class _Stance(ForkLock):
    """The compiler's stance is the whole process's: two threads that change it at once would leave it changed."""

    def __init__(self) -> None:
        super().__init__()
        self.changed: tuple[int, Any] | None = None  # by which thread, and what takes it back

    def after_fork(self) -> None:
        """Take back, in a forked child, what a thread has changed that is not there."""
        super().after_fork()
        if self.changed is not None and self.changed[0] != threading.get_ident():
            self.changed[1].__exit__(None, None, None)
            self.changed = None


_STANCE = _Stance()


class Callee(Protocol):
    """What a call is of: a module, or a method that is watched as a module's call is."""

    @property
    def forward(self) -> Callable[..., Any]: ...


class CallResult(NamedTuple):
    """What a call leaves behind: its output, and the tensors that it put or changed inside its arguments, by path."""

    output: Any
    written: dict[str, Tensor]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of them, by path."""
        return {f"output{path}": tensor for path, tensor in tensors_in(self.output).items()} | self.written


class Replay:
    """One call of a module, to be made again.

    Arguments are copied, so that a cache kept in one is not fed twice, and nobody's tensor is written into.
    """

    def __init__(self, module: Callee, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._module, self._args, self._kwargs = module, args, kwargs
        self._given, self._before = (args, kwargs), _states(args, kwargs)

    def keep(self) -> None:
        """Copy them before the call itself, too, which may write into them or take things out."""
        self._args, self._kwargs = _copied(self._args, self._kwargs)

    @property
    def safe(self) -> bool:
        """Whether the arguments can be copied, so that none of them could remember a repeat of the call."""
        return not self.unsafe_argument

    @property
    def unsafe_argument(self) -> str | None:
        """The first argument that cannot be copied, and its type."""
        named = _named(self._args, self._kwargs)
        return next((f"{k} ({type(v).__name__})" for k, v in named.items() if not is_copyable(v)), None)

    def outcome(self, output: Any) -> CallResult:
        """Return what the call itself left behind, once it has returned ``output``."""
        return CallResult(output, _written(self._before, *self._given))

    def __call__(self, eager: bool) -> CallResult:
        """Call again, without gradients and hooks of the module itself; ``eager``: without compiled code, too."""
        args, kwargs = _copied(self._args, self._kwargs)
        before = _states(args, kwargs)
        token = replaying.set(True)
        try:
            with torch.no_grad(), eagerly() if eager else nullcontext():
                output = self._module.forward(*args, **kwargs)
        finally:
            replaying.reset(token)
        return CallResult(output, _written(before, args, kwargs))


@contextmanager
def eagerly() -> Iterator[None]:
    """Compiled code stands aside, in the whole process."""
    with _STANCE.lock:
        former, stance = _STANCE.changed, torch.compiler.set_stance("force_eager")
        with stance:
            _STANCE.changed = threading.get_ident(), stance
            try:
                yield
            finally:
                _STANCE.changed = former


def _copied(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    try:
        return copied((args, kwargs))
    except Uncopyable:
        copies: dict[int, Any] = {}
        return copied_where_possible(args, copies), copied_where_possible(kwargs, copies)


def _named(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**{f"argument {i}": value for i, value in enumerate(args)}, **kwargs}


def _inside(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors inside containers and objects; those that are arguments themselves may be a block's to use."""
    named = {name: value for name, value in _named(args, kwargs).items() if not isinstance(value, Tensor)}
    return {f"{name}{path}": tensor for name, value in named.items() for path, tensor in tensors_in(value).items()}


def _states(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, tuple[Tensor, int | None]]:
    return {name: (tensor, _version(tensor)) for name, tensor in _inside(args, kwargs).items()}


def _written(
    before: dict[str, tuple[Tensor, int | None]], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> dict[str, Tensor]:
    """Return the tensors that were not there before, or have been written into since."""
    written = {}
    for name, tensor in _inside(args, kwargs).items():
        then, version = before.get(name, (None, None))
        if tensor is not then or _version(tensor) != version:
            written[name] = tensor
    return written


def _version(tensor: Tensor) -> int | None:
    """Return torch's count of the writes into a tensor; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version
