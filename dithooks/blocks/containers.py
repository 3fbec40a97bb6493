"""Containers that hold tensors (tuples, lists, dicts, dataclasses, one in another), and the way to what they hold."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn


class Step(NamedTuple):
    """One step into a container: a field of a dataclass or named tuple, else an index or the key of a dict.

    Example:
        >>> Step("x", is_field=True).text, Step(0).text, Step("image").text
        ('.x', '[0]', "['image']")
    """

    key: Any
    is_field: bool = False

    @property
    def text(self) -> str:
        """The step as Python writes it."""
        return f".{self.key}" if self.is_field else f"[{self.key!r}]"


Way = tuple[Step, ...]


def steps_of(value: Any) -> list[Step] | None:
    """Return the steps to the parts of a container; ``None`` of anything else, such as a tensor."""
    kind = type(value)
    if kind in (tuple, list):
        return [Step(index) for index in range(len(value))]
    if kind in (dict, OrderedDict):
        return [Step(key) for key in value]
    if issubclass(kind, tuple) and hasattr(kind, "_fields"):
        return [Step(name, True) for name in kind._fields]
    if dataclasses.is_dataclass(kind) and not isinstance(value, nn.Module):  # diffusers' outputs are dicts, too
        return [Step(field.name, True) for field in dataclasses.fields(kind) if field.init]
    return None


def part_of(value: Any, step: Step) -> Any:
    """Return one part of a container; ``None`` if it has no such part."""
    if step.is_field:
        return getattr(value, step.key, None)
    try:
        return value[step.key]
    except (LookupError, TypeError):
        return None


def follow(value: Any, way: Sequence[Step]) -> Any:
    """Return the value at the end of a way into a container; ``None`` if the way ends before."""
    for step in way:
        value = part_of(value, step)
    return value


def leaves_of(value: Any, above: tuple[Any, ...] = ()) -> list[tuple[Way, Any]]:
    """Return all that containers within containers hold, each with the way to it; ``above``: those around the value.

    Example:
        >>> [("".join(step.text for step in way), leaf) for way, leaf in leaves_of({"a": (1, [2]), "b": 3})]
        [("['a'][0]", 1), ("['a'][1][0]", 2), ("['b']", 3)]
    """
    steps = steps_of(value)
    if steps is None or any(value is each for each in above):  # one that holds itself ends there
        return [((), value)]
    found = []
    for step in steps:
        for way, leaf in leaves_of(part_of(value, step), (*above, value)):
            found.append(((step, *way), leaf))
    return found


def replaced(given: Any, changes: Mapping[Step, Any]) -> Any:
    """Return a container like the given one, with some parts replaced."""
    if not changes:
        return given
    kind = type(given)
    if kind in (dict, OrderedDict):
        made = kind(given)
        made.update({step.key: value for step, value in changes.items()})
        return made
    if kind in (tuple, list):
        return kind([changes.get(Step(index), value) for index, value in enumerate(given)])
    fields = {step.key: value for step, value in changes.items()}
    return given._replace(**fields) if hasattr(kind, "_fields") else dataclasses.replace(given, **fields)
