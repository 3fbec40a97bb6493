"""The form of a transformer's output: what it holds beside the tensors that are forecast, and how to make it again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..blocks.block_io import OutputBuilder, take_apart
from ..blocks.containers import steps_of
from .arguments import CallArguments
from .output_comparison import tensors_in


@dataclass(frozen=True, eq=False)
class OutputForm:
    """The form of one output.

    Args:
        builder: builds an output from its values.
        values: of the output; ``None`` in the place of a tensor that is forecast.
        slots: by value, the number of its tensor among those that are forecast; ``None`` for another value.
        shapes: of the tensors that are forecast, with their dtype and device.
        given: shapes of the tensors that the call was given, by path.
    """

    builder: OutputBuilder
    values: tuple[Any, ...]
    slots: tuple[int | None, ...]
    shapes: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
    given: Mapping[str, torch.Size]

    def is_like(self, other: OutputForm) -> bool:
        """Return whether tensors of one output fit into the other."""
        return (self.builder, self.slots, self.shapes) == (other.builder, other.slots, other.shapes)

    def fits(self, given: CallArguments) -> bool:
        """Return whether a call is given tensors of the shapes that the computed call was given."""
        return shapes_in(given) == self.given

    def build(self, tensors: Sequence[Tensor]) -> Any:
        """Build another output: of these tensors, and of what else the computed one held."""
        pairs = zip(self.values, self.slots, strict=True)
        return self.builder([_another(value) if slot is None else tensors[slot] for value, slot in pairs], (), {})


def form_of(output: Any, given: CallArguments) -> tuple[OutputForm, tuple[Tensor, ...]] | None:
    """Return the form of an output, and its floating tensors, each once; ``None`` if no such output can be made.

    Args:
        output: what the transformer has returned.
        given: to the call.
    """
    if not isinstance(output, Tensor) and steps_of(output) is None:
        return None
    builder, values = take_apart(output)
    tensors: list[Tensor] = []
    slots: list[int | None] = []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            slots.append(next((slot for slot, each in enumerate(tensors) if each is value), len(tensors)))
            tensors += [value] * (slots[-1] == len(tensors))
        elif any(each.is_floating_point() or each.is_complex() for each in tensors_in(value).values()):
            return None
        else:
            slots.append(None)
    if not tensors:
        return None
    rest = tuple(_another(value) if slot is None else None for value, slot in zip(values, slots, strict=True))
    shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)
    form = OutputForm(builder, rest, tuple(slots), shapes, shapes_in(given))
    try:
        form.build(tensors)
    except Exception:  # a class of its own, that takes its parts otherwise
        return None
    return form, tuple(tensors)


def shapes_in(given: CallArguments) -> dict[str, torch.Size]:
    """Return the shape of each tensor that a call is given, by its path."""
    return {path: tensor.shape for path, tensor in (*given.latents.items(), *given.conditioning.items())}


def _another(value: Any) -> Any:
    """Return a copy of a tensor that is not forecast, such as a mask; all else is passed on as it is."""
    return value.clone() if isinstance(value, Tensor) else value
