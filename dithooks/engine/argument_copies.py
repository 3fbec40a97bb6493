"""Copies of a call's arguments: whatever a repeat of the call writes into them stays in the copy.

What decides is whether a value can take something in that its copy would not. Most can be kept as they are or copied:

- What nothing can be written into (numbers, names, members of enumerations, UUIDs, functions, classes; tuples, frozen
  sets and frozen dataclasses of these) is kept as it is, so that it stays the same object.
- Modules are kept as they are, too: like the transformer itself, which is not copied either.
- Tensors, random generators, containers and all other objects are copied as deep as they go, each once: one in two
  places is one object in the copy as well.

All others cannot be copied: an iterator that would be used up, a lock, an open file, an object of a class whose state
only its C code knows. A call with such an argument cannot be repeated.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from enum import Enum
from pathlib import PurePath
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar
from uuid import UUID

import numpy as np
import torch
from torch import Tensor, nn

T = TypeVar("T")

_UNWRITABLE = (
    *(type(None), bool, int, float, complex, str, bytes, range, type(...), type(NotImplemented), type),
    *(Enum, UUID, PurePath, FunctionType, ModuleType, np.generic, np.dtype),
    *(torch.Size, torch.dtype, torch.device, torch.layout, torch.memory_format),
)


class Uncopyable(Exception):
    """A value that cannot be copied in such a way that it and its copy do not share writes into one."""


def copied(value: T, copies: dict[int, Any] | None = None) -> T:
    """Return a copy that shares nothing with the value that can be written into, modules aside.

    Args:
        value: the value to copy.
        copies: the copy of each tensor and random generator so far, by its id; added to.

    Raises:
        Uncopyable: it holds what cannot be copied.
    """
    copies = {} if copies is None else copies
    shared: list[Any] = []
    stream = io.BytesIO()
    try:
        _Writer(stream, shared).dump(value)
    except Exception as error:  # a class may raise anything where it cannot be copied
        raise Uncopyable(str(error)) from error
    for item in shared:  # not within the next `try`: without memory for a tensor this raises
        if id(item) not in copies and isinstance(item, (Tensor, torch.Generator)):
            copies[id(item)] = item.clone() if isinstance(item, Tensor) else _same_draws(item)
    stream.seek(0)
    try:
        result: T = _Reader(stream, [copies.get(id(item), item) for item in shared]).load()
    except Exception as error:
        raise Uncopyable(str(error)) from error
    return result


def copied_where_possible(value: Any, copies: dict[int, Any] | None = None) -> Any:
    """Return a copy of lists, tuples, dicts and what can be copied of all that is in them."""
    copies = {} if copies is None else copies
    if type(value) in (list, tuple):
        return type(value)(copied_where_possible(item, copies) for item in value)
    if type(value) is dict:
        return {key: copied_where_possible(item, copies) for key, item in value.items()}
    try:
        return copied(value, copies)
    except Uncopyable:
        try:
            return copy.copy(value)
        except Exception:  # a generator, say: taken as it is
            return value


def is_copyable(value: Any) -> bool:
    """Return whether :func:`copied` can copy a value, without copying its tensors."""
    shared: list[Any] = []
    stream = io.BytesIO()
    try:
        _Writer(stream, shared).dump(value)
        stream.seek(0)
        _Reader(stream, shared).load()
    except Exception:
        return False
    return True


class _Writer(pickle.Pickler):
    """A pickler of a value's containers and objects; parts that are not to be pickled are appended to ``shared``."""

    def __init__(self, stream: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._shared, self._places = shared, dict[int, int]()

    def persistent_id(self, value: Any) -> int | None:
        if isinstance(value, Iterator):
            raise Uncopyable(f"{type(value).__name__} would be used up")
        if not isinstance(value, (Tensor, nn.Module, torch.Generator)) and not _is_unwritable(value):
            return None
        place = self._places.setdefault(id(value), len(self._shared))
        if place == len(self._shared):
            self._shared.append(value)
        return place

    def reducer_override(self, value: Any) -> Any:
        # As pickle has it, a method is looked up again by the name of its function, which may have another by now.
        return (MethodType, (value.__func__, value.__self__)) if isinstance(value, MethodType) else NotImplemented


class _Reader(pickle.Unpickler):
    """The unpickler of what :class:`_Writer` wrote, with ``shared`` put in."""

    def __init__(self, stream: io.BytesIO, shared: list[Any]) -> None:
        super().__init__(stream)
        self._shared = shared

    def persistent_load(self, place: int) -> Any:
        return self._shared[place]


def _is_unwritable(value: Any) -> bool:
    """Return whether nothing can be written into a value."""
    if isinstance(value, _UNWRITABLE) or type(value) is object:
        return True
    if isinstance(value, BuiltinFunctionType):  # or a method of an object, as list.append, which pickle copies with it
        return value.__self__ is None or isinstance(value.__self__, (ModuleType, type))
    if isinstance(value, (tuple, frozenset)):
        return not hasattr(value, "__dict__") and all(map(_is_unwritable, value))
    if getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False):
        names = {*getattr(value, "__dict__", ()), *type(value).__dataclass_fields__}
        return all(_is_unwritable(getattr(value, name, None)) for name in names)
    return False


def _same_draws(generator: torch.Generator) -> torch.Generator:
    return torch.Generator(generator.device).set_state(generator.get_state())
