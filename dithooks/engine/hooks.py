"""Forward hooks: around the transformer, on a range's two ends and, until the wiring is known, on every block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..blocks.block_io import bind, parameter_names
from ..blocks.tap import EnterHook, Hook, LeaveHook, Tap, hooks_on, remove_hooks, tap
from .range_cache import RangeCache
from .replay import Replay

unhook = remove_hooks


class _Before(EnterHook):
    """An enter hook that applies what the integrations do to a block's arguments first."""

    def __init__(self, flow: RangeCache, react: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> None:
        super().__init__(flow, react)
        self.company = flow.company

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        if kwargs is not None:
            super().__call__(module, *self.company.given(module, args, kwargs))


def hook_call(flow: RangeCache, owner: nn.Module) -> None:
    """Tell the flow when the transformer is called and has returned. These two stay out of compiled graphs."""
    names = parameter_names(owner)

    # Classes of their own, made here: disabling is per function, and imports the compiler, which can wait until now.
    class Begins(Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
            if kwargs is not None:
                flow.begin(bind(names, args, kwargs), Replay(module, args, kwargs))

    class Ends(Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: Any, *kwargs_and_output: Any) -> None:
            flow.finish(kwargs_and_output[-1])

    flow.others = lambda: [other for other in flows_of([owner]) if other is not flow]
    owner.register_forward_pre_hook(Begins(flow), with_kwargs=True)
    owner.register_forward_hook(Ends(flow), with_kwargs=True)


def hook_lead(flow: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the flow what enters and leaves the blocks before the range."""
    first.register_forward_pre_hook(_Before(flow, flow.enter_lead), with_kwargs=True)
    last.register_forward_hook(LeaveHook(flow, flow.leave_lead), with_kwargs=True)


def hook_range(flow: RangeCache, first: nn.Module, last: nn.Module) -> None:
    """Give the flow what enters the range's first block and what leaves its last."""
    first.register_forward_pre_hook(_Before(flow, flow.enter), with_kwargs=True)
    last.register_forward_hook(LeaveHook(flow, flow.leave), with_kwargs=True)


def hook_observation(flow: RangeCache, blocks: Sequence[nn.Module]) -> list[Tap]:
    """Show the flow every block's arguments and output, by which it learns the wiring."""

    def enter(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        flow.watch_enter(index, *flow.company.given(blocks[index], args, kwargs))

    return [tap(blocks, enter, flow.watch_leave, owner=flow)]


def flows_of(modules: Iterable[nn.Module]) -> list[RangeCache]:
    """The flows whose hooks are on some modules, each once."""
    flows = {id(hook.owner): hook.owner for hook in hooks_on(modules)}
    return [flow for flow in flows.values() if isinstance(flow, RangeCache)]
