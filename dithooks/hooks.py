"""Forward hooks: around the transformer, on a range's two ends and, until the wiring is known, on every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .blocks.wiring import bind, parameter_names
from .flow import Flow


class _Hook:
    """Passes what happens to a module on to ``react``. Copies of a model are not cached: theirs do nothing."""

    def __init__(self, react: Callable[..., None] | None = None, names: tuple[str, ...] = ()) -> None:
        self.react, self.names = react, names

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _Before(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.react is not None:
            self.react(bind(self.names, args, kwargs))


class _After(_Hook):
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.react is not None:
            self.react(output)


class _CallBegins(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.react is not None:
            self.react(bind(self.names, args, kwargs), partial(module.forward, *args, **kwargs))


class _CallEnds(_Hook):
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.react is not None:
            self.react()


def hook_call(flow: Flow, owner: nn.Module) -> list[RemovableHandle]:
    """Tell the flow when the transformer is called and has returned. These two stay out of compiled graphs."""
    before, after = _CallBegins(flow.begin, parameter_names(owner)), _CallEnds(flow.finish)
    return [
        owner.register_forward_pre_hook(before, with_kwargs=True),
        owner.register_forward_hook(after, with_kwargs=True),
    ]


def hook_range(flow: Flow, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
    """Give the flow what enters the range's first block and what leaves its last."""
    return [
        first.register_forward_pre_hook(_Before(flow.enter, parameter_names(first)), with_kwargs=True),
        last.register_forward_hook(_After(flow.leave), with_kwargs=True),
    ]


def hook_observation(flow: Flow, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Show the flow every block's arguments and output, by which it learns the wiring."""
    handles = []
    for index, block in enumerate(blocks):
        names = parameter_names(block)
        before, after = (
            _Before(partial(flow.watch_enter, index, names), names),
            _After(partial(flow.watch_leave, index)),
        )
        handles.append(block.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(block.register_forward_hook(after, with_kwargs=True))
    return handles
