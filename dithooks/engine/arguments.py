"""What a call of the transformer is given, sorted once: latents, conditioning, and the form that must not change."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor

from .output_comparison import autocast_of
from .timestep_argument import FORM, TIMESTEP_NAMES

# What must not change between storing a residual and adding it: the weights, shape, dtype and device of every tensor
# argument, and every argument that switches something (flags, names, lists of layers, which objects are given). Numbers
# may change.
Signature = tuple[tuple[Any, ...], ...]
TIME = frozenset((*TIMESTEP_NAMES, "timestep_r", "r_timestep"))  # the latter: where a step of a flow map leads to
_SWITCHES = (bool, str, Enum)
_IS_AUTOCAST = torch._C._is_any_autocast_enabled  # on any device, asked once: most calls are without


class CallArguments:
    """The arguments of one call: ``f(h, t, prompt)`` has the latents h and the conditioning prompt.

    Args:
        arguments: of the transformer, by name.
        latents: names of the arguments that hold latents, or paths of tensors in them: those of a second stream, too.
        time: names of arguments that tell the time.
    """

    __slots__ = ("conditioning", "form", "latents", "scales")

    def __init__(
        self,
        arguments: Mapping[str, Any],
        latents: frozenset[str],
        time: frozenset[str] = TIME,
    ) -> None:
        streams: dict[str, Tensor] = {}
        conditioning: dict[str, Tensor] = {}
        form: list[tuple[Any, ...]] = []
        scales: tuple[float, ...] = ()
        for name, value in arguments.items():
            if isinstance(value, Tensor):
                form.append((name, *FORM(value)))
                if name not in time:
                    (streams if name in latents else conditioning)[name] = value
            elif isinstance(value, _SWITCHES):
                form.append((name, value))
            elif value is not None and not isinstance(value, (int, float)):
                if isinstance(value, dict) and isinstance(scale := value.get("scale"), (int, float)):
                    scales += (scale,)
                if name not in time:
                    if not isinstance(value, (list, tuple, Mapping)):  # an object: by its kind, so that each may be new
                        form.append((name, type(value)))
                    elif isinstance(value, (list, tuple)) and _switches(value):
                        form.append((name, repr(value)))
                    form.extend(_switches_in(name, value))
                    for path, tensor in tensors_in(name, value):
                        if path not in time and path.rpartition(".")[2] not in time:
                            (streams if name in latents or path in latents else conditioning)[path] = tensor
        if _IS_AUTOCAST():
            form.append(("autocast", autocast_of([*streams.values(), *conditioning.values()])))
        self.latents, self.conditioning = streams, conditioning
        self.form: Signature = tuple(form)
        self.scales = scales  # strengths of adapters: joint_attention_kwargs={"scale": 0.5}

    def sort(self, latents: frozenset[str]) -> None:
        """Sort latents and conditioning again, now that it is known which are latents."""
        tensors = {**self.latents, **self.conditioning}
        self.latents = {path: tensor for path, tensor in tensors.items() if path in latents}
        self.conditioning = {path: tensor for path, tensor in tensors.items() if path not in latents}


def latents_among(arguments: Mapping[str, Any], primary: str | None, output: Any) -> frozenset[str]:
    """Return the paths of the tensors that a model denoises: its first argument, and one for each further output.

    A model returns one prediction for each kind of latents, of their shape: LTX-2 for video and for audio.

    Example:
        >>> import torch
        >>> video, audio, text = torch.zeros(1, 8, 4), torch.zeros(1, 3, 4), torch.zeros(1, 5, 4)
        >>> given = {"hidden_states": video, "audio_hidden_states": audio, "text": text}
        >>> sorted(latents_among(given, "hidden_states", (video, audio)))
        ['audio_hidden_states', 'hidden_states']
    """
    found = [(path, tensor) for name, value in arguments.items() for path, tensor in tensors_in(name, value)]
    found = [(path, tensor) for path, tensor in found if path.rpartition(".")[2] not in TIME]
    given = arguments.get(primary) if primary is not None else None
    own = [(path, tensor) for path, tensor in found if path.split(".")[0] == primary]
    shapes = [tensor.shape for _, tensor in tensors_in("output", output)]
    if isinstance(given, (Tensor, list, tuple)):  # all of it, and the first outputs are its predictions
        chosen = [path for path, _ in own]
        shapes = shapes[len(chosen) :]
    else:
        chosen = []
    for path, tensor in found:
        if path not in chosen and tensor.shape in shapes:
            shapes.remove(tensor.shape)
            chosen.append(path)
    return frozenset(chosen or [path for path, _ in own[:1]])


def tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    """Iterate over the tensors in lists, dicts and dataclasses, each with the path to it."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from tensors_in(f"{name}.{index}", item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from tensors_in(f"{name}.{key}", item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(f"{name}.{field.name}", getattr(value, field.name, None))


def _switches_in(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Iterate over the switches within dicts and dataclasses, each with the path to it."""
    if isinstance(value, Mapping):
        fields = value.items()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}.items()
    else:
        return
    for key, item in fields:
        if isinstance(item, (bool, str, Enum)):
            yield f"{name}.{key}", item
        elif isinstance(item, (list, tuple)) and item and _switches(item):  # an empty one may be there to be filled
            yield f"{name}.{key}", repr(item)
        else:
            yield from _switches_in(f"{name}.{key}", item)


def _switches(value: Any) -> bool:
    """Whether a sequence holds whole numbers, flags and names only."""
    if isinstance(value, (list, tuple)):
        return all(map(_switches, value))
    return value is None or isinstance(value, (bool, int, str, Enum))
