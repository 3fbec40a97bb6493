"""Which of several stacks is the trunk, by their first calls: the one whose input is another one at every step."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from enum import Enum, IntEnum
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_lists import Chain
from ..blocks.containers import leaves_of
from ..blocks.tap import Hook, Tap, remove_hooks, tap
from ..environment.torch_api import is_dynamo_compiling
from .attachment import original
from .compiled_code import are_compiled, compiler_in_force, outside_graphs, run_eagerly
from .replay import replaying

NEW_IN_A_ROW = 2  # new inputs of one stack, and none of another meanwhile: it is called at every step
ALONE = 8  # as many, where no other stack has been called at all
UNDECIDED_AFTER = 12  # new inputs of stacks in turn: all of them denoise

# What the compiler says of a graph break that fullgraph=True rules out.
_APART = (
    "dithooks looks at the first calls of several parts of this model to find its trunk: compile these parts, not a "
    "function that calls them; or name the blocks with blocks=..."
)


class Evidence(Enum):
    """How sure it is, by the calls so far, that a stack is the trunk."""

    LIKELY = "it is called with new inputs; the others may not have been called yet"
    CERTAIN = "it is the trunk"


class _Place(IntEnum):
    """Which block of a stack a hook is on."""

    FIRST = 0
    LAST = 1


class _InputsSeen(threading.local):
    """What one thread has called: runs in several threads do not mix."""

    def __init__(self) -> None:
        self.inputs: set[tuple[int, str]] = set()
        self.leader, self.in_a_row = -1, 0
        self.inside: set[int] = set()  # stacks whose owner has been called and has not returned


class TrunkWatch:
    """A watch on some stacks, until one of them is known to be the trunk.

    Args:
        chains: the stacks; the first one is taken for the trunk so far.
        on_found: is called with the watch, a stack and the evidence for it, once that stack has been left.
    """

    def __init__(self, chains: Sequence[Chain], on_found: Callable[[TrunkWatch, Chain, Evidence], object]) -> None:
        self.chains, self._on_found = tuple(chains), on_found
        self._seen = _InputsSeen()
        self._tap: Tap | None = None
        self._hooked: list[nn.Module] = []

    def attach(self) -> None:
        """Hook the first and last block of each stack, and the module that calls it."""
        modules: list[nn.Module] = []
        for chain in self.chains:
            modules += [original(chain.block_refs[0].block), original(chain.block_refs[-1].block)]
        owners = [chain.owner for chain in self.chains]
        self._hooked = modules + owners  # first: an interruption in between leaves hooks that are found by them
        for number, owner in enumerate(owners):
            self._hook_owner(number, owner)
        self._tap = tap(modules, self._enter, self._leave, owner=self)

    def _hook_owner(self, number: int, owner: nn.Module) -> None:
        """Hook the module that calls a stack; these hooks stay out of compiled graphs, which the blocks' may be in."""
        enters, leaves = run_eagerly(self._enter_owner, _APART), run_eagerly(self._leave_owner, _APART)
        compiler = compiler_in_force()

        class EntersStack(Hook):
            @outside_graphs(_APART)
            def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
                if kwargs is not None:
                    enters(number, args, kwargs, bool(compiler()) or are_compiled([module]))

        class LeavesStack(Hook):
            @outside_graphs(_APART)
            def __call__(self, *_: Any) -> None:
                leaves(number)

        owner.register_forward_pre_hook(EntersStack(self), with_kwargs=True)
        owner.register_forward_hook(LeavesStack(self), with_kwargs=True)

    def remove(self) -> None:
        """Take the hooks off; a second call does nothing."""
        self._tap = None
        remove_hooks(self, self._hooked)

    def is_about(self, chain: Chain) -> bool:
        """Return whether a chain is of the stack that is taken for the trunk so far."""
        return chain.owner is self.chains[0].owner

    def inputs(self, chain: Chain) -> int:
        """Return how many different inputs a stack was given in this thread."""
        return sum(self.chains[number] is chain for number, _ in self._seen.inputs)

    def _enter_owner(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any], compiled: bool) -> None:
        """Note that a stack is called; ``compiled``: also with what, as its blocks will show nothing."""
        if _looks_away():
            return
        self._seen.inside.add(number)
        if compiled:
            self._note(number, args, kwargs)

    def _leave_owner(self, number: int) -> None:
        if not _looks_away():
            self._seen.inside.discard(number)
            self._report(number)

    def _enter(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the input of a stack at its first block."""
        if not (is_dynamo_compiling() or _looks_away() or index % len(_Place) != _Place.FIRST):
            self._note(index // len(_Place), args, kwargs)

    def _note(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note an input of a stack, if it had not been given that one before."""
        seen = self._seen
        mark = _mark((*args, *kwargs.values()))
        if mark is None or (number, mark) in seen.inputs:
            return
        seen.inputs.add((number, mark))
        seen.in_a_row = seen.in_a_row + 1 if seen.leader == number else 1
        seen.leader = number

    def _leave(self, index: int, output: Any) -> None:
        """Report the findings at the last block, for stacks that run without their owner."""
        if not (is_dynamo_compiling() or _looks_away() or index % len(_Place) != _Place.LAST):
            self._report(index // len(_Place))

    def _report(self, number: int) -> None:
        """Report the findings when a stack has been left: stand-ins would be met by the rest of its call."""
        seen = self._seen
        if number in seen.inside or seen.leader != number or self._tap is None:
            return
        others = len({each for each, _ in seen.inputs}) > 1
        if seen.in_a_row >= (NEW_IN_A_ROW if others else ALONE):
            self._on_found(self, self.chains[number], Evidence.CERTAIN)
        elif len(seen.inputs) >= UNDECIDED_AFTER:
            self._on_found(self, self.chains[0], Evidence.CERTAIN)
        elif number == 0 and seen.in_a_row >= NEW_IN_A_ROW:
            self._on_found(self, self.chains[0], Evidence.LIKELY)


def _looks_away() -> bool:
    """Return whether a call is none to learn from: it is made again, or with gradients."""
    return replaying.get() or torch.is_grad_enabled()


def _mark(arguments: Sequence[Any]) -> str | None:
    """Return what distinguishes one input from another: of the first tensor, its shape and two sums over it."""
    tensors = (leaf for value in arguments for _, leaf in leaves_of(value) if isinstance(leaf, Tensor))
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is None or first.is_meta or not first.numel():
        return None
    values = first.detach().float()
    places = torch.arange(values.numel(), device=values.device).remainder(997).reshape(values.shape)
    return f"{list(first.shape)} {float(values.sum()):.9g} {float((values * places).sum()):.9g}"
