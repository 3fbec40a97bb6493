"""A method that is watched as the model's call is: by an attribute of the instance, in front of the class's method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, Protocol

from torch import nn

from ..blocks.block_io import positional_names
from ..errors import InvalidSetting, WrongType
from ..validation import shown


class MethodWatcher(Protocol):
    """Who is notified of the calls of a method."""

    def starts(self, method: WatchedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Begin a call; return whether it is one of its own, of whose end it is to be notified."""

    def ends(self, output: Any) -> Any:
        """Finish a call; return another output in place of the method's own, or ``None``."""

    def leaves(self) -> None:
        """Forget a call, whether it has ended or an exception did."""


class WatchedMethod:
    """A method of one module, and who is notified of its calls: put into the module's dictionary, and taken out again.

    In copies and pickles of the module it is the copy's own plain method, and loads where dithooks is not installed.

    Args:
        module: the module.
        name: of the method.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module, self.name, self.watchers = module, name, tuple[MethodWatcher, ...]()
        self.former: tuple[Any, ...] = (vars(module)[name],) if name in vars(module) else ()

    @property
    def forward(self) -> Callable[..., Any]:
        """The method itself, as it is without watchers: the instance's own, or else the class's as it is now."""
        if self.former:
            plain: Callable[..., Any] = self.former[0]
            return plain
        found = _of_class(self.module, self.name)
        bound: Callable[..., Any] = found.__get__(self.module, type(self.module))
        return bound

    __wrapped__ = forward  # where its signature is read from

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        started: list[MethodWatcher] = []
        try:
            for watcher in self.watchers:
                if watcher.starts(self, args, kwargs):
                    started.append(watcher)
            output = given = self.forward(*args, **kwargs)
            for watcher in started:
                other = watcher.ends(output)
                given = given if other is None else other
            return given
        finally:
            for watcher in started:
                watcher.leaves()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.forward, name)  # __self__, __name__ and the like

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return deepcopy(self.former[0], memo) if self.former else getattr(deepcopy(self.module, memo), self.name)

    def __reduce__(self) -> Any:
        if self.former:
            return getattr, (nullcontext(self.former[0]), "enter_result")
        return getattr, (self.module, self.name)


def watch(module: nn.Module, name: str, watcher: MethodWatcher) -> None:
    """Tell someone of a method's calls."""
    method = vars(module).get(name)
    if not isinstance(method, WatchedMethod):
        method = WatchedMethod(module, name)
    method.watchers += (watcher,)
    vars(module)[name] = method


def unwatch(module: nn.Module, name: str, concerned: Callable[[MethodWatcher], bool]) -> None:
    """Tell those concerned no longer, and leave the module's dictionary as it was if that was all of them."""
    method = vars(module).get(name)
    if not isinstance(method, WatchedMethod):  # somebody has put another in its place, which may call it
        return
    method.watchers = tuple(watcher for watcher in method.watchers if not concerned(watcher))
    if method.watchers:
        return
    if method.former:
        vars(module)[name] = method.former[0]
    else:
        del vars(module)[name]


def module_with(name: object, target: object, owner: nn.Module) -> nn.Module:
    """Return the module whose method is to be watched: the target if it has such a method, else the transformer.

    Raises:
        WrongType: the name is no text, or what it names is no method.
        InvalidSetting: there is no such method, or it is the forward that the model's own call runs.
    """
    if not isinstance(name, str):
        raise WrongType(f"method={shown(name)} ({type(name).__name__}): give the name of a method, such as 'decode'")
    if name in ("forward", "__call__"):
        raise InvalidSetting(
            f"method={shown(name)} is what a call of the model runs, which is watched: leave method= out"
        )
    module = target if isinstance(target, nn.Module) and _has(target, name) else owner
    kind = type(module).__name__
    if not _has(module, name):
        if isinstance(module._modules.get(name), nn.Module):
            raise WrongType(
                f"method={shown(name)} is a module of {kind}, not a method: give it as target, without method="
            )
        raise InvalidSetting(f"method={shown(name)}: {kind} has no method of that name")
    if not callable(value := getattr(module, name)):
        raise WrongType(f"method={shown(name)} of {kind} is {shown(value)}, which cannot be called")
    return module


def names_of(method: WatchedMethod) -> tuple[str, ...]:
    """Return the names of a method's parameters that can be given by position."""
    return positional_names(method.forward)


def _has(module: nn.Module, name: str) -> bool:
    return name in vars(module) or _of_class(module, name) is not None


def _of_class(module: nn.Module, name: str) -> Any:
    """Return what the module's class has under a name, unbound; ``None`` if it has nothing."""
    return next((vars(cls)[name] for cls in type(module).__mro__ if name in vars(cls)), None)
