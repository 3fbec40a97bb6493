"""Whether a transformer's weights are still those that a residual was taken with, told without reading any.

These say for certain that they are not: adapter layers that are active, scaled, merged or disabled otherwise; more
writes to a parameter, as torch counts them; another parameter in its place, alike in dtype and device; another layer.
Weights that are moved or cast, as offloading does all the time, show none of that. What is not noticed: writes that
torch does not count (into ``.data``, as where one adapter is swapped for another in place), all into buffers, and
those into a few parameters only.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Mapping, Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WATCHED = 64  # layers at most, drawn from all: what loads or fuses weights is seldom content with fewer


class _Watched(NamedTuple):
    """What is looked at, found by a walk through the modules. It keeps none of them alive.

    No tensor is referred to, even weakly: it could not be swapped with another then, as moving a quantised model does.
    """

    layers: list[tuple[weakref.ref[nn.Module], str, str]]  # parent, name in it, and the first of its own parameters
    identities: list[int]  # of these layers: of their dictionaries, which a block shares with what stands in for it
    adapters: list[weakref.ref[nn.Module]]
    tensors: bool  # whether the strength of one of these is a tensor
    configs: tuple[Any, ...]  # adapters, as the model lists them

    @property
    def places(self) -> list[Any]:
        """What may not be otherwise if the model is built as it was."""
        return [(identity, own) for identity, (_, _, own) in zip(self.identities, self.layers, strict=True)]


class _Seen(NamedTuple):
    """What it was when last looked at."""

    ids: list[int]  # of the parameters
    versions: list[int]
    forms: list[Any]  # dtype and device of each
    adapters: list[Any]


class WeightsVersion:
    """Counts the changes of a model's weights.

    Args:
        model: the transformer.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self._lock = threading.Lock()
        self._state: tuple[_Watched, _Seen, int] | None = None  # at once: interrupted, it is the former

    def changes(self, anew: bool) -> int:
        """How many there have been: as long as it is the same number, so are the weights, as far as can be told.

        ``anew`` is to walk through the modules once more, which takes some milliseconds.
        """
        model = self._model()
        if model is None:
            return -1
        # Attributes of tensors go through the code of a subclass, or of a mode, unless these are left out.
        with self._lock, torch._C.DisableTorchFunction():
            if self._state is None:
                self._state = *_found(model), 0
                return 0
            watched, former, count = self._state
            try:
                now = _look(watched, former)
            except AttributeError:  # a layer or parameter is another one, or gone
                now = None
            changed = now is not None and now is not former and _differ(former, now)
            if now is None or anew or _configs(model) != watched.configs:
                before = watched
                watched, now = _found(model)
                changed = changed or watched.places != before.places or now.adapters != former.adapters
            if now is not former:
                self._state = watched, now, count + changed
            return count + changed


def _found(model: nn.Module, tries: int = 3) -> tuple[_Watched, _Seen]:
    """What there is to look at, and what is seen; once more where another thread changes the model meanwhile."""
    watched = _walk(model)
    try:
        return watched, _look(watched)
    except AttributeError:
        if tries == 1:
            raise
        return _found(model, tries - 1)


def _walk(model: nn.Module) -> _Watched:
    layers: list[tuple[nn.Module, str, str, int]] = []
    adapters: list[nn.Module] = []
    met, left = {id(model)}, [model]
    while left:
        parent = left.pop()
        for name, module in tuple(parent._modules.items()):
            if module is None or id(module) in met:
                continue
            met.add(id(module))
            left.append(module)
            own = next((own for own, value in tuple(module._parameters.items()) if value is not None), None)
            if own is not None:
                layers.append((parent, name, own, id(vars(module))))
            if "_active_adapter" in vars(module):  # as PEFT's layers have it
                adapters.append(module)
    if len(layers) > WATCHED:  # by chance, not every n-th, which might be the same one of every block; always the same
        layers = random.Random(0).sample(layers, WATCHED)
    strengths = [each for module in adapters for each in tuple((vars(module).get("scaling") or {}).values())]
    return _Watched(
        [(weakref.ref(parent), name, own) for parent, name, own, _ in layers],
        [identity for *_, identity in layers],
        [weakref.ref(module) for module in adapters],
        any(isinstance(each, Tensor) for each in strengths),
        _configs(model),
    )


def _configs(model: nn.Module) -> tuple[Any, ...]:
    configs = vars(model).get("peft_config")
    return tuple((name, id(config)) for name, config in tuple(configs.items())) if isinstance(configs, dict) else ()


def _look(watched: _Watched, former: _Seen | None = None) -> _Seen:
    """What is seen now; ``former`` itself, if nothing is other than then.

    Raises:
        AttributeError: a layer is another one, or one or its parameter is gone.
    """
    layers: list[Any] = [parent()._modules.get(name) for parent, name, _ in watched.layers]  # type: ignore[union-attr]
    if [id(layer.__dict__) for layer in layers] != watched.identities:
        raise AttributeError("another layer")
    parameters: list[Any] = [
        layer._parameters.get(own) for layer, (_, _, own) in zip(layers, watched.layers, strict=True)
    ]
    ids, versions, adapters = list(map(id, parameters)), _versions(parameters), _strengths(watched)
    if former is not None and (ids, versions, adapters) == (former.ids, former.versions, former.adapters):
        moved = [_form(each) for each in parameters[:1]] != former.forms[:1]  # the others are moved along with it
        if not moved:
            return former
    return _Seen(ids, versions, [_form(parameter) for parameter in parameters], adapters)


def _differ(former: _Seen, now: _Seen) -> bool:
    """Whether it is other weights, and not the same ones elsewhere."""
    if now.adapters != former.adapters:
        return True
    for index, form in enumerate(now.forms):
        if now.ids[index] == former.ids[index]:
            if now.versions[index] > former.versions[index]:  # fewer: its contents were swapped with a new tensor's
                return True
        elif form == former.forms[index] is not None:  # else it was moved, or an empty one holds its place
            return True
    return False


def _versions(parameters: Sequence[Any]) -> list[int]:
    try:
        return list(map(attrgetter("_version"), parameters))
    except RuntimeError:  # those made in inference mode do not count
        return [0 if each.is_inference() else each._version for each in parameters]


def _form(parameter: Tensor) -> Any:
    """``None`` of one on the meta device, which holds the place of one that is elsewhere.

    What is sharded takes turns with what it is gathered to; else, with another type they are other weights: quantised.
    """
    if parameter.is_meta:
        return None
    return type(parameter).__name__ == "DTensor", parameter.dtype, parameter.device


def _strengths(watched: _Watched) -> list[Any]:
    """What the adapter layers do, one after another in one list, and ``None`` for each that does nothing.

    It is asked at every call, of hundreds of layers: hence by the instances' dictionaries, and not by properties.
    """
    found: list[Any] = []
    for reference in watched.adapters:
        own = reference().__dict__  # of a layer that is gone, this raises
        merged, disabled = own.get("merged_adapters"), own.get("_disable_adapters")
        if disabled and not merged:
            found.append(None)
            continue
        active, scaling = own["_active_adapter"], own.get("scaling")
        if type(active) is str:
            active = (active,)
        found += active
        if scaling:
            found += map(scaling.get, active)
        if merged:
            found += merged
        found.append(disabled)
    if not watched.tensors:
        return found
    return [(id(each), each._version) if isinstance(each, Tensor) else each for each in found]


def lora_scales(arguments: Mapping[str, Any]) -> tuple[float, ...]:
    """The strength of adapters where it is told to each call, as in ``joint_attention_kwargs={"scale": 0.5}``."""
    told = [value.get("scale") for value in arguments.values() if isinstance(value, dict)]
    return tuple([scale for scale in told if isinstance(scale, (int, float))])
