"""The parts of what a block returns that are those of a container it was given: it replaces some, and leaves others.

A block that is given a dataclass and returns it with another ``x`` leaves embeddings and masks as they are. These are
no streams: on a reused step they have to be those of that step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from .block_io import CallReader
from .containers import Step, Way
from .observation import BlockCall

Container = tuple[str, Way]  # an argument and a way in it


@dataclass(frozen=True)
class PassedParts:
    """The containers that a block returns with some parts replaced.

    Args:
        containers: by the way to a container in the output, the one that it is made of.
        kept: by output position, the argument that is left as it is.
    """

    containers: Mapping[Way, Container] = field(default_factory=dict)
    kept: Mapping[int, str] = field(default_factory=dict)

    def readers(self, reader: CallReader) -> dict[Way, Callable[[tuple[Any, ...], dict[str, Any]], Any]]:
        """Return what reads each of the containers from a call."""
        return {way: reader.container(*container) for way, container in self.containers.items()}


def passed_parts(reader: CallReader, call: BlockCall, carried: Callable[[int], str | None]) -> PassedParts:
    """Find which containers of a block's output are given ones with some parts replaced.

    It is the one that holds the streams which the output's parts carry on; without new parts, the one that holds the
    same objects.

    Args:
        reader: of the block's calls.
        call: of the block.
        carried: returns the argument that an output carries on.
    """
    if not call.output_builder.parts:
        return PassedParts()
    within: dict[Way, list[int]] = {}
    for position, way in enumerate(call.output_builder.ways):
        within.setdefault(way[:-1], []).append(position)
    containers: dict[Way, Container] = {}
    kept: dict[int, str] = {}
    for way in sorted(within, key=len):  # from the outermost inwards
        new: Counter[Container] = Counter()
        same: Counter[Container] = Counter()
        for position in within[way]:
            names, votes = call.kept.get(position, ()), same
            if not names and call.outputs[position] is not None:
                name = carried(position)
                names, votes = () if name is None else (name,), new
            step = step_at(call, position)
            votes.update({_above(reader, name): 1 for name in names if step_of(reader, name) == step})
        candidates = list(dict.fromkeys([*new, *same]))
        if not candidates:
            continue
        around = containers.get(way[:-1]) if way else None
        within_that = None if around is None else (around[0], (*around[1], way[-1]))
        taken = set(containers.values())
        chosen = max(candidates, key=lambda each: (new[each], same[each], each == within_that, each not in taken))
        containers[way] = chosen
        for position in within[way]:
            step = step_at(call, position)
            for name in call.kept.get(position, ()):
                if _above(reader, name) == chosen and step_of(reader, name) == step:
                    kept[position] = name
    return PassedParts(containers, kept)


def step_at(call: BlockCall, position: int) -> Step | None:
    """Return the last step to an output; ``None`` in a plain tuple or list, whose parts have no names."""
    return call.output_builder.ways[position][-1] if call.output_builder.parts else None


def step_of(reader: CallReader, name: str) -> Step | None:
    """Return the last step to the value ``name``; ``None`` for an argument by itself."""
    way = reader.way(name)[1]
    return way[-1] if way else None


def _above(reader: CallReader, name: str) -> Container:
    """Return the container that holds the value ``name``."""
    argument, way = reader.way(name)
    return argument, way[:-1]
