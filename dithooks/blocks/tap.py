"""Forward hooks that watch the blocks of a model, and how such hooks are found and removed again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

OnEnter = Callable[[int, tuple[Any, ...], dict[str, Any]], object]
OnLeave = Callable[[int, Any], object]


class Hook:
    """A forward hook with an owner, by which it is found again; in copies and pickles of the model it is inert.

    A deep copy or pickle of a module holds a method of the standard library in its place, which accepts any arguments
    and returns ``None``: the copy behaves as without the hook, and loads where dithooks is not installed.

    Args:
        owner: the object that the hook works for, if :func:`remove_hooks` is to find the hook by it.
    """

    def __init__(self, owner: object) -> None:
        self.owner = owner

    def __call__(self, *_: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class EnterHook(Hook):
    """A forward pre-hook, to be registered ``with_kwargs``, that passes on a module's arguments."""

    def __init__(self, owner: object, react: Callable[[tuple[Any, ...], dict[str, Any]], object]) -> None:
        super().__init__(owner)
        self.react = react

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None:  # another thread may call a hook before torch has noted that it takes kwargs
            self.react(args, kwargs)


class LeaveHook(Hook):
    """A forward hook, with or without kwargs, that passes on a module's output."""

    def __init__(self, owner: object, react: Callable[[Any], object]) -> None:
        super().__init__(owner)
        self.react = react

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        self.react(kwargs_and_output[-1])


class Tap:
    """The hooks of one :func:`tap`; a context manager that removes them at its end.

    Args:
        hooks: every hook with its module.
    """

    def __init__(self, hooks: Sequence[tuple[nn.Module, Hook]]) -> None:
        self.hooks = hooks

    def remove(self) -> None:
        """Remove the hooks; a second call does nothing."""
        for module, mine in self.hooks:
            _remove(module, lambda hook, mine=mine: hook is mine)  # type: ignore[misc]

    def __enter__(self) -> Tap:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def tap(
    blocks: Sequence[nn.Module],
    on_enter: OnEnter,
    on_leave: OnLeave,
    on_begin: Callable[[tuple[Any, ...], dict[str, Any]], object] | None = None,
    on_end: Callable[[Any], object] | None = None,
    *,
    model: nn.Module | None = None,
    owner: object = None,
) -> Tap:
    """Watch the calls of some blocks, and of the model that calls them, by forward hooks.

    Args:
        blocks: the modules to watch; one that is listed twice is watched under both numbers.
        on_enter: receives a block's number, ``args`` and ``kwargs`` before the block runs.
        on_leave: receives a block's number and output after it has run.
        on_begin: receives the model's ``args`` and ``kwargs`` before the model runs.
        on_end: receives the model's output after it has run.
        model: the module that ``on_begin`` and ``on_end`` watch.
        owner: the owner of the hooks, by which :func:`remove_hooks` finds them even without the handle.

    Returns:
        A handle with ``remove()``, which is a context manager as well. If registering fails, no hook stays behind.

    Example:
        >>> import torch
        >>> blocks = [torch.nn.Identity(), torch.nn.ReLU()]
        >>> with tap(blocks, lambda index, args, kwargs: None, lambda index, output: print(index, output.tolist())):
        ...     _ = blocks[1](blocks[0](torch.tensor([-1.0, 2.0])))
        0 [-1.0, 2.0]
        1 [0.0, 2.0]
        >>> _ = blocks[0](torch.ones(1))
    """
    hooks: list[tuple[nn.Module, Hook]] = []
    for index, block in enumerate(blocks):
        hooks.append((block, EnterHook(owner, partial(on_enter, index))))
        hooks.append((block, LeaveHook(owner, partial(on_leave, index))))
    if model is not None and on_begin is not None:
        hooks.append((model, EnterHook(owner, on_begin)))
    if model is not None and on_end is not None:
        hooks.append((model, LeaveHook(owner, on_end)))
    handle = Tap(hooks)
    try:
        for module, hook in hooks:
            if isinstance(hook, EnterHook):
                module.register_forward_pre_hook(hook, with_kwargs=True)
            else:
                module.register_forward_hook(hook, with_kwargs=True)
    except BaseException:
        handle.remove()
        raise
    return handle


def hooks_on(modules: Iterable[nn.Module]) -> Iterator[Hook]:
    """Iterate over the hooks of this kind that some modules have."""
    for module in modules:
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            yield from [hook for _, hook in _snapshot(registry) if isinstance(hook, Hook)]


def remove_hooks(owner: object, modules: Iterable[nn.Module]) -> None:
    """Remove all hooks of an owner, found by search: none is missed where registering was interrupted."""
    for module in modules:
        _remove(module, lambda hook: hook.owner is owner)


def _remove(module: nn.Module, chosen: Callable[[Hook], bool]) -> None:
    """Remove the chosen hooks of a module; another thread may be removing the same ones."""
    for registry in (module._forward_pre_hooks, module._forward_hooks):
        for number in [key for key, hook in _snapshot(registry) if isinstance(hook, Hook) and chosen(hook)]:
            for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                flags.pop(number, None)
            registry.pop(number, None)  # last: if this is interrupted before, the next search finds the hook


def _snapshot(registry: Mapping[int, Any]) -> list[tuple[int, Any]]:
    """List a registry's entries, though another thread may add or remove some meanwhile."""
    while True:
        try:
            return list(registry.items())  # in one go, unless garbage is collected in between and lets others run
        except (KeyError, RuntimeError):  # "mutated during iteration"
            continue
