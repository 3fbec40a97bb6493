"""Forward hooks: around the transformer, on a range's two ends and, until the wiring is known, on every block."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .blocks.wiring import bind, parameter_names
from .flow import Flow
from .replay import Replay


class _Hook:
    """A hook that does nothing, which is what a copy of a model gets in place of ours: copies are not cached."""

    def __call__(self, *_: Any) -> None: ...

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return _Hook()

    def __reduce__(self) -> Any:
        return _Hook, ()


class _Before(_Hook):
    def __init__(self, react: Callable[[Any], None], names: tuple[str, ...]) -> None:
        self.react, self.names = react, names

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.react(bind(self.names, args, kwargs))


class _After(_Hook):
    def __init__(self, react: Callable[[Any], None]) -> None:
        self.react = react

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.react(output)


def hook_call(flow: Flow, owner: nn.Module) -> Iterator[RemovableHandle]:
    """Tell the flow when the transformer is called and has returned. These two stay out of compiled graphs."""
    names = parameter_names(owner)

    # Classes of their own, made here: disabling is per function, and imports the compiler, which can wait until now.
    class Begins(_Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            flow.begin(bind(names, args, kwargs), Replay(module, args, kwargs))

    class Ends(_Hook):
        @torch.compiler.disable  # type: ignore[untyped-decorator]
        def __call__(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            flow.finish(output)

    yield owner.register_forward_pre_hook(Begins(), with_kwargs=True)
    yield owner.register_forward_hook(Ends(), with_kwargs=True)


def hook_range(flow: Flow, first: nn.Module, last: nn.Module) -> Iterator[RemovableHandle]:
    """Give the flow what enters the range's first block and what leaves its last."""
    yield first.register_forward_pre_hook(_Before(flow.enter, parameter_names(first)), with_kwargs=True)
    yield last.register_forward_hook(_After(flow.leave), with_kwargs=True)


def hook_observation(flow: Flow, blocks: Sequence[nn.Module]) -> Iterator[RemovableHandle]:
    """Show the flow every block's arguments and output, by which it learns the wiring."""
    for index, block in enumerate(blocks):
        names = parameter_names(block)
        before, after = (
            _Before(partial(flow.watch_enter, index, names), names),
            _After(partial(flow.watch_leave, index)),
        )
        yield block.register_forward_pre_hook(before, with_kwargs=True)
        yield block.register_forward_hook(after, with_kwargs=True)
