"""What a call of the transformer is given, sorted once: latents, conditioning, and the form that must not change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

TIMESTEP_NAMES = ("timestep", "timesteps", "t")

# What must not change between storing a residual and adding it: the weights, shape, dtype and device of every tensor
# argument, and every argument that switches something (flags, names, lists of layers). Numbers may change.
Signature = tuple[tuple[Any, ...], ...]
FORM = attrgetter("shape", "dtype", "device")


class CallArguments:
    """The arguments of one call: ``f(h, t, prompt)`` has the latents h and the conditioning prompt.

    Args:
        arguments: of the transformer, by name.
        primary: the argument that holds the latents.
    """

    __slots__ = ("conditioning", "form", "latents", "scales")

    def __init__(self, arguments: Mapping[str, Any], primary: str | None) -> None:
        latents: dict[str, Tensor] = {}
        conditioning: dict[str, Tensor] = {}
        form: list[tuple[Any, ...]] = []
        scales: tuple[float, ...] = ()
        for name, value in arguments.items():
            if value is None:
                continue
            if isinstance(value, Tensor):
                form.append((name, *FORM(value)))
                if name not in TIMESTEP_NAMES:
                    (latents if name == primary else conditioning)[name] = value
            elif isinstance(value, (bool, str)):
                form.append((name, value))
            elif not isinstance(value, (int, float)):
                if isinstance(value, dict) and isinstance(scale := value.get("scale"), (int, float)):
                    scales += (scale,)
                if name not in TIMESTEP_NAMES:
                    if isinstance(value, (list, tuple)) and _switches(value):
                        form.append((name, repr(value)))
                    (latents if name == primary else conditioning).update(_tensors_in(name, value))
        self.latents, self.conditioning = latents, conditioning
        self.form: Signature = tuple(form)
        self.scales = scales  # strengths of adapters: joint_attention_kwargs={"scale": 0.5}


def _switches(value: Any) -> bool:
    """Whether a sequence holds whole numbers, flags and names only."""
    if isinstance(value, (list, tuple)):
        return all(map(_switches, value))
    return value is None or isinstance(value, (bool, int, str))


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors in lists and dicts, each by the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _tensors_in(f"{name}.{index}", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors_in(f"{name}.{key}", item)
