"""Forward hooks: around the transformer, on a range's first and last block and, until the wiring is known, on every block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from .blocks.wiring import bind, parameter_names
from .flow import Flow


class _Hook:
    """Passes what happens to a module on to ``react``. Copies of a model are not cached: theirs do nothing."""

    def __init__(self, react: Callable[[Any], None] | None = None, names: tuple[str, ...] = ()) -> None:
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


def _around(module: nn.Module, before: Callable[[Any], None], after: Callable[[Any], None]) -> list[RemovableHandle]:
    return [_before(module, before), _after(module, after)]


def _before(module: nn.Module, react: Callable[[Any], None]) -> RemovableHandle:
    return module.register_forward_pre_hook(_Before(react, parameter_names(module)), with_kwargs=True)


def _after(module: nn.Module, react: Callable[[Any], None]) -> RemovableHandle:
    return module.register_forward_hook(_After(react), with_kwargs=True)


def hook_call(flow: Flow, owner: nn.Module) -> list[RemovableHandle]:
    """Tell the flow when the transformer is called and has returned."""
    return _around(owner, flow.begin, flow.finish)


def hook_range(flow: Flow, first: nn.Module, last: nn.Module) -> list[RemovableHandle]:
    """Give the flow what enters the range's first block and what leaves its last."""
    return [_before(first, flow.enter), _after(last, flow.leave)]


def hook_observation(flow: Flow, blocks: Sequence[nn.Module]) -> list[RemovableHandle]:
    """Show the flow every block's arguments and output, by which it learns the wiring."""
    handles = []
    for index, block in enumerate(blocks):
        names = parameter_names(block)
        handles += _around(block, partial(flow.watch_enter, index, names), partial(flow.watch_leave, index))
    return handles
