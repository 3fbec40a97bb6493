"""The outputs of blocks that are still held when later blocks return: does a model use the inside of a range later?

Where a call cannot be repeated, that alone shows it.
"""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .observation import ObservedBlock


class HeldOutputs:
    """The tensors that blocks have returned in one call, held weakly, and how long each of them lives.

    A variable of the model's loop may hold the output of a list's last block, or of every other one, until it is
    assigned again. So such tensors count only if they are collected in a list, or outlive two more blocks.

    Args:
        observed: the blocks.
    """

    def __init__(self, observed: Sequence[ObservedBlock]) -> None:
        self._observed = observed
        self._calls: list[int] = []  # blocks as they were called
        self._living: list[tuple[int, weakref.ref[Tensor]]] = []  # by number of the call that made it
        self._given: list[weakref.ref[Tensor]] = []  # to the block that runs
        self._returned: list[weakref.ref[Tensor]] = []  # by the block before
        self._made_anew: set[int] = set()  # calls that were given a tensor that the block before neither had nor made
        self._own_lists: set[int] = set()  # lists in which blocks take and return their streams, by id
        self._held: set[tuple[int, int]] = set()  # numbers of two calls: what one made is held when the other returns
        self._looked_for: set[int] = set()  # tensors of which it is known whether a list holds them, by id
        self._collected: set[int] = set()  # calls of which it does

    def enter(self, index: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what a block is given."""
        number = len(self._calls)
        for made, tensor in self._alive():
            if made == number - 2:
                self._look_for_lists(made, tensor)
        before = [tensor for tensor in map(_deref, self._given + self._returned) if tensor is not None]
        known, memory = set(map(id, before)), set(map(_memory, before))
        del before
        if any(id(tensor) not in known and _memory(tensor) not in memory for tensor in self._tensors((args, kwargs))):
            self._made_anew.add(number)
        self._given = [weakref.ref(tensor) for tensor in self._tensors((args, kwargs))]
        self._calls.append(index)

    def leave(self, index: int, output: Any) -> None:
        """Note the output of a block, and which earlier ones are still held."""
        if not self._calls or self._calls[-1] != index:  # blocks within blocks: the outer call is not followed
            return
        number = len(self._calls) - 1
        taken = {id(tensor) for tensor in map(_deref, self._given) if tensor is not None}
        own = {_memory(tensor) for tensor in map(_deref, self._given)} - {None}
        passed = {_memory(tensor) for tensor in self._tensors(output)} - {None}
        self._living = [each for each in self._living if each[1]() is not None]
        for made, tensor in self._alive():
            if id(tensor) not in taken and _memory(tensor) not in passed:
                if self._ends_list(made):
                    self._look_for_lists(made, tensor)
                if made < number - 1 and (made in self._collected or not self._ends_list(made)):
                    self._held.add((made, number))
        if len(set(self._calls)) == len(self._observed):  # the last one: nothing enters behind it
            for made, tensor in self._alive():
                if made == number - 1:
                    self._look_for_lists(made, tensor)
        self._returned = [weakref.ref(tensor) for tensor in self._tensors(output)]
        for tensor in self._tensors(output):
            if id(tensor) not in taken and _memory(tensor) not in own:
                self._living.append((number, weakref.ref(tensor)))

    def inside(self, blocks: Sequence[int]) -> int | None:
        """Return a block of a range, other than its last, whose output is held behind the range; ``None``: none is.

        Args:
            blocks: those of the range, in the order of their calls.
        """
        first, end = self._calls.index(blocks[0]), self._calls.index(blocks[-1])
        for made in range(first, end):
            # Behind the range, and longer than a variable that is assigned in every other block.
            late = min(max(end, made + 3), len(self._calls) - 1)
            collected = made in self._collected and (made == end - 1 or (made, end) in self._held)
            inside, behind = range(made + 2, end + 1), range(end + 1, len(self._calls))
            used = bool(self._made_anew.intersection(inside)) and not self._made_anew.intersection(behind)
            if collected or ((made, late) in self._held and not used):  # else its use is inside the range, too
                return self._calls[made]
        return None

    def _alive(self) -> Iterator[tuple[int, Tensor]]:
        for made, reference in self._living:
            tensor = reference()
            if tensor is not None:
                yield made, tensor

    def _ends_list(self, number: int) -> bool:
        """Return whether one of the next two blocks is of another list; a loop's variables may outlive it there."""
        return len({self._observed[index].group for index in self._calls[number : number + 3]}) > 1

    def _look_for_lists(self, made: int, tensor: Tensor) -> None:
        """Note whether a tensor is held in a list, once for each: that looks through all objects."""
        if id(tensor) not in self._looked_for:
            self._looked_for.add(id(tensor))
            if self._is_collected(made, tensor):
                self._collected.add(made)

    def _is_collected(self, made: int, tensor: Tensor) -> bool:
        """Return whether a list holds a tensor or a tuple of it, or a tuple holds it beside another block's output."""
        taken = set(map(id, map(_deref, self._given)))
        others = {id(other) for number, other in self._alive() if number != made} - taken
        holders = gc.get_referrers(tensor)
        tuples = [holder for holder in holders if isinstance(holder, tuple)]
        if any(others & set(map(id, holder)) for holder in tuples):  # held = held + (hidden_states,)
            return True
        around = gc.get_referrers(*tuples) if tuples else []
        lists = [each for each in holders + around if isinstance(each, (list, deque))]
        return bool({id(each) for each in lists} - {id(holders), id(tuples)} - self._own_lists)

    def _tensors(self, value: Any) -> Iterator[Tensor]:
        """Iterate over the tensors that a block is given or returns, and note the lists that hold them."""
        if isinstance(value, Tensor):
            if not isinstance(value, nn.Parameter):
                yield value
            return
        if isinstance(value, list):
            self._own_lists.add(id(value))
        if isinstance(value, Mapping):
            value = value.values()
        elif not isinstance(value, (list, tuple)):  # an output object of any kind
            value = vars(value).values() if hasattr(value, "__dict__") and not isinstance(value, nn.Module) else ()
        for item in value:
            yield from self._tensors(item)


def _deref(reference: weakref.ref[Tensor]) -> Tensor | None:
    return reference()


def _memory(tensor: Tensor | None) -> int | None:
    """Return the address of a tensor's memory; ``None`` if there is none."""
    try:
        return None if tensor is None else tensor.untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without storage
        return None
