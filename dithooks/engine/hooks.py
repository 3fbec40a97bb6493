"""Hooks: around the transformer (or a method), on a range's two ends and, until the wiring is known, on every block."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..blocks.block_io import bind, parameter_names
from ..blocks.tap import EnterHook, Hook, LeaveHook, Tap, hooks_on, remove_hooks, tap
from ..environment.compiler_support import refusing_compiled
from .compiled_code import compiler_in_force, outside_graphs, run_eagerly
from .output_cache import OutputCache
from .range_cache import RangeCache
from .replay import replaying
from .watched_method import WatchedMethod, names_of, unwatch, watch

_INSIDE = (
    "dithooks decides outside of compiled code, before the transformer's forward: compile the transformer itself "
    "(torch.compile(transformer)), not a function that calls it; or leave fullgraph=True out"
)


class _RangeEnter(EnterHook):
    """An enter hook that is given what the block's own code is given, other libraries' changes included."""

    def __init__(self, cache: RangeCache, react: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__(cache, react)
        self.integrations = cache.integrations

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None:  # another thread may call a hook before torch has noted that it takes kwargs
            if self.integrations.alters_arguments:
                args, kwargs = self.integrations.block_arguments(module, args, kwargs)
            self.react(args, kwargs)


def hook_call(cache: RangeCache, owner: nn.Module) -> None:
    """Call the range's cache before and after the transformer; both hooks stay out of compiled graphs."""
    cache.argument_names = parameter_names(owner)
    _hook_owner(cache, owner, cache.begin, cache.ends)


def hook_method(cache: RangeCache, owner: nn.Module, module: nn.Module, name: str) -> None:
    """Call the range's cache before and after a method, as :func:`hook_call` does before and after the transformer.

    A call of the transformer itself counts where it is neither made by the method nor calls it.
    """
    own = parameter_names(owner)

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not cache.state.in_method:
            cache.announce(bind(own, args, kwargs))

    def finish(output: Any) -> Any:
        return None if cache.state.in_method else cache.ends(output)

    _hook_owner(cache, owner, begin, finish)
    watch(module, name, _MethodWatcher(cache))
    cache.argument_names = names_of(vars(module)[name])
    cache.decider.latents_name = next(iter(cache.argument_names), None)
    cache.passes_are_calls = True


class _MethodWatcher:
    """The range's cache, notified of the calls of a method; it stays out of compiled graphs."""

    def __init__(self, cache: RangeCache) -> None:
        self.cache = cache
        self.starts = torch.compiler.disable(self._start)
        self.ends, self.leaves = torch.compiler.disable(cache.ends), torch.compiler.disable(self._leave)

    def _start(self, method: WatchedMethod, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        state = self.cache.state
        if state.in_method or replaying.get():  # it calls itself, or another cache repeats a call that calls it
            return False
        state.in_method, state.passes = True, ()
        try:
            self.cache.begin(method, args, kwargs)
        except BaseException:
            self._leave()
            raise
        return True

    def _leave(self) -> None:
        self.cache.abandon()
        self.cache.state.in_method, self.cache.state.passes = False, ()


def _hook_owner(
    cache: RangeCache,
    owner: nn.Module,
    begin: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None],
    finish: Callable[[Any], Any],
) -> None:
    begin = refusing_compiled(begin, lambda: cache.is_compiled)

    # Classes of their own, made here: disabling is per function, and imports the compiler, which can wait until now.
    begins, ends, compiler = run_eagerly(begin, _INSIDE), run_eagerly(finish, _INSIDE), compiler_in_force()

    class Begins(Hook):
        @outside_graphs(_INSIDE)
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if kwargs is not None:
                if compiler():
                    cache.compilable = ()
                begins(module, args, kwargs)

    class Ends(Hook):
        @outside_graphs(_INSIDE)
        def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> Any:
            return ends(kwargs_and_output[-1])

    def others() -> list[RangeCache]:
        alone = len(owner._forward_pre_hooks) == 1
        return [] if alone else [other for other in caches_of([owner]) if other is not cache]

    cache.others = others
    owner.register_forward_pre_hook(Begins(cache), with_kwargs=True)
    owner.register_forward_hook(Ends(cache), with_kwargs=True)


def hook_enclosing(cache: RangeCache | OutputCache, modules: Sequence[nn.Module]) -> None:
    """Show the clock what the modules around the transformer are called with: one of them may be given the timestep.

    Args:
        cache: of the range, or of the transformer as a whole.
        modules: around the transformer, from the inside out.
    """
    if not modules:
        return
    calls = _EnclosingCalls()

    class Enters(Hook):
        def __init__(self, owner: object, place: int, names: tuple[str, ...]) -> None:
            super().__init__(owner)
            self.place, self.names = place, names

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            calls.arguments[self.place] = bind(self.names, args, kwargs or {})

    class Leaves(Hook):
        def __init__(self, owner: object, place: int) -> None:
            super().__init__(owner)
            self.place = place

        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, *_: Any) -> None:
            calls.arguments.pop(self.place, None)

    for place, module in enumerate(modules):
        module.register_forward_pre_hook(Enters(cache, place, parameter_names(module)), with_kwargs=True)
        module.register_forward_hook(Leaves(cache, place), with_kwargs=True)
    cache.decider.clock.enclosing = lambda: [calls.arguments[place] for place in sorted(calls.arguments)]


class _EnclosingCalls(threading.local):
    """The arguments of the calls of enclosing modules that are under way in a thread, by place from the inside out."""

    def __init__(self) -> None:
        self.arguments: dict[int, Mapping[str, Any]] = {}


def hook_lead(cache: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the cache what enters and leaves the blocks before the range."""
    first.register_forward_pre_hook(_RangeEnter(cache, cache.enter_lead), with_kwargs=True)
    last.register_forward_hook(LeaveHook(cache, cache.leave_lead), with_kwargs=True)


def hook_range(cache: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the cache what enters the range's first block and what leaves its last."""
    first.register_forward_pre_hook(_RangeEnter(cache, cache.enter), with_kwargs=True)
    last.register_forward_hook(LeaveHook(cache, cache.leave), with_kwargs=True)


def hook_observation(cache: RangeCache, blocks: Sequence[nn.Module]) -> Tap:
    """Show the cache every block's arguments and output, by which it learns the wiring."""

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if cache.integrations.alters_arguments:
            args, kwargs = cache.integrations.block_arguments(blocks[index], args, kwargs)
        cache.observe_enter(index, args, kwargs)

    return tap(blocks, enter, cache.observe_leave, owner=cache)


def unhook(cache: RangeCache | OutputCache, modules: Iterable[nn.Module]) -> None:
    """Take off every hook of a cache, found by looking: none is missed, whenever attaching was interrupted."""
    remove_hooks(cache, modules)


def unhook_method(cache: RangeCache, module: nn.Module, name: str) -> None:
    """Take a method's hook off, if it is one of the cache's."""
    unwatch(module, name, lambda watcher: isinstance(watcher, _MethodWatcher) and watcher.cache is cache)


def caches_of(modules: Iterable[nn.Module]) -> list[RangeCache]:
    """Return the range caches whose hooks are on some modules, each once."""
    owners = {id(hook.owner): hook.owner for hook in hooks_on(modules)}
    return [cache for cache in owners.values() if isinstance(cache, RangeCache)]
