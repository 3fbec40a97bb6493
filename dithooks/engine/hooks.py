"""Forward hooks: around the transformer, on a range's two ends and, until the wiring is known, on every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..blocks.block_io import bind, parameter_names
from .range_cache import RangeCache
from .replay import Replay


class _Hook:
    """A hook of ours. A copy of the model gets one in its place that does nothing: copies are not cached.

    That one is a method of the standard library, which takes anything and returns ``None``, so that a model that was
    pickled can be loaded where there is no dithooks.
    """

    flow: RangeCache | None = None

    def __call__(self, *_: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return nullcontext().__exit__

    def __reduce__(self) -> Any:
        return getattr, (nullcontext(), "__exit__")


class _Before(_Hook):
    def __init__(self, flow: RangeCache, react: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        self.flow, self.react = flow, react

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None:  # in another thread, a hook may be called before it is registered to the end
            if self.flow is not None:
                args, kwargs = self.flow.company.given(module, args, kwargs)
            self.react(args, kwargs)


class _After(_Hook):
    def __init__(self, flow: RangeCache, react: Callable[[Any], None]) -> None:
        self.flow, self.react = flow, react

    def __call__(self, module: nn.Module, args: tuple[Any, ...], *kwargs_and_output: Any) -> None:
        self.react(kwargs_and_output[-1])


def hook_call(flow: RangeCache, owner: nn.Module) -> None:
    """Tell the flow when the transformer is called and has returned. These two stay out of compiled graphs."""
    names = parameter_names(owner)

    # Classes of their own, made here: disabling is per function, and imports the compiler, which can wait until now.
    class Begins(_Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if kwargs is not None:
                flow.begin(bind(names, args, kwargs), Replay(module, args, kwargs))

    class Ends(_Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
            flow.finish(kwargs_and_output[-1])

    before, after = Begins(), Ends()
    before.flow = after.flow = flow
    flow.others = lambda: [hook.flow for hook in _ours(owner._forward_pre_hooks) if hook.flow not in (None, flow)]
    owner.register_forward_pre_hook(before, with_kwargs=True)
    owner.register_forward_hook(after, with_kwargs=True)


def hook_lead(flow: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the flow what enters and leaves the blocks before the range."""
    first.register_forward_pre_hook(_Before(flow, flow.enter_lead), with_kwargs=True)
    last.register_forward_hook(_After(flow, flow.leave_lead), with_kwargs=True)


def hook_range(flow: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the flow what enters the range's first block and what leaves its last."""
    first.register_forward_pre_hook(_Before(flow, flow.enter), with_kwargs=True)
    last.register_forward_hook(_After(flow, flow.leave), with_kwargs=True)


def hook_observation(flow: RangeCache, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Show the flow every block's arguments and output, by which it learns the wiring."""
    handles = []
    for index, block in enumerate(blocks):
        before = _Before(flow, partial(flow.watch_enter, index))
        after = _After(flow, partial(flow.watch_leave, index))
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    return handles


def unhook(flow: RangeCache, modules: Iterable[nn.Module]) -> None:
    """Take off every hook of a flow, found by looking: so none is missed, whenever attaching was interrupted."""
    for module in modules:
        for registry in (module._forward_pre_hooks, module._forward_hooks):
            for number in [
                number for number, hook in registry.items() if isinstance(hook, _Hook) and hook.flow is flow
            ]:
                for flags in (module._forward_pre_hooks_with_kwargs, module._forward_hooks_with_kwargs):
                    flags.pop(number, None)
                del registry[number]  # last: interrupted before, it is found again


def flows_of(modules: Iterable[nn.Module]) -> list[RangeCache]:
    """The flows whose hooks are on some modules, each once."""
    flows: dict[int, RangeCache] = {}
    for module in modules:
        for hook in (*_ours(module._forward_pre_hooks), *_ours(module._forward_hooks)):
            if hook.flow is not None:
                flows.setdefault(id(hook.flow), hook.flow)
    return list(flows.values())


def _ours(registry: dict[int, Any]) -> list[_Hook]:
    return [hook for hook in registry.values() if isinstance(hook, _Hook)]
