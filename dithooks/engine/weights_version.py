"""Whether a transformer's weights are still those that a residual was taken with, found out without reading any.

These show for certain that they are not: adapter layers that are active, scaled, merged or disabled otherwise; more
writes to a parameter, as torch counts them; another parameter in its place, alike in dtype and device; another layer.
Weights that are moved or cast, as offloading does all the time, show none of that. Not noticed are writes that
torch does not count (into ``.data``, as where one adapter is swapped for another in place), all into buffers, and
those into a few parameters only.
"""

from __future__ import annotations

import random
import threading
import weakref
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..fork import ForkLock
from .protocols import AdapterWatch

WATCHED = 64  # layers at most, drawn from all: what loads or fuses weights is seldom content with fewer

# It is asked at every call, of 64 layers: hence by functions that run in C, over lists.
_CHILDREN, _OWN = attrgetter("_modules"), attrgetter("__dict__")
_PARAMETERS, _VERSION = attrgetter("_parameters"), attrgetter("_version")
_DEREFERENCE = weakref.ref.__call__


class _Watched(NamedTuple):
    """The layers that are watched, found by a walk through the modules; none of them is kept alive.

    No tensor is referred to, even weakly: it could not be swapped with another then, as moving a quantised model does.
    """

    parents: list[weakref.ref[nn.Module]]
    names: list[str]  # of each layer in its parent
    parameters: list[str]  # of each layer, the first of its own
    identities: list[int]  # of the layers' dictionaries, which a block shares with its stand-in


class _Seen(NamedTuple):
    """What the layers were like when last looked at."""

    ids: list[int]  # of the parameters
    versions: list[int]
    forms: list[Any]  # dtype and device of each
    adapters: Any


class WeightsVersion(ForkLock):
    """Counts the changes of a model's weights.

    Example: ``version(walk=False)`` is 0 at every call of a run, and 1 once ``model.fuse_lora()`` has written into the
    weights.

    Args:
        model: the transformer.
        adapters: watches the strength of its adapters.
    """

    def __init__(self, model: nn.Module, adapters: AdapterWatch) -> None:
        super().__init__()
        self._model, self._adapters = weakref.ref(model), adapters
        self._has_adapters, self._listed = False, tuple[Any, ...]()
        self._state: tuple[_Watched, _Seen, int] | None = None  # at once: interrupted, it is the former

    def version(self, walk: bool) -> int:
        """Return how often the weights have changed: the same number, the same weights, as far as can be seen.

        Args:
            walk: walk through the modules once more, which takes some milliseconds.
        """
        model = self._model()
        if model is None:
            return -1
        # Attributes of tensors go through the code of a subclass, or of a mode, unless these are left out.
        with self.lock, torch._C.DisableTorchFunction():
            if self._state is None:
                self._state = *self._found(model), 0
                return 0
            watched, former, count = self._state
            try:
                now = self._look(watched, former)
            except (AttributeError, LookupError):  # a layer or parameter is another one, or gone
                now = None
            listed = model.__dict__.get(self._adapters.listing)
            walk = walk or (_names(listed) if listed else ()) != self._listed
            if now is former and not walk:
                return count
            changed = now is not None and now is not former and _differ(former, now)
            if now is None or walk:
                before = watched
                watched, now = self._found(model)
                places = before.identities != watched.identities or before.parameters != watched.parameters
                changed = changed or places or now.adapters != former.adapters
            if now is not former:
                self._state = watched, now, count + changed
            return count + changed

    def _found(self, model: nn.Module, tries: int = 3) -> tuple[_Watched, _Seen]:
        """Walk and look; once more where another thread changes the model meanwhile."""
        watched, modules = _walk(model)
        self._has_adapters = self._adapters.find(modules)
        self._listed = _names(vars(model).get(self._adapters.listing))
        try:
            return watched, self._look(watched)
        except (AttributeError, LookupError):
            if tries == 1:
                raise
            return self._found(model, tries - 1)

    def _look(self, watched: _Watched, former: _Seen | None = None) -> _Seen:
        """Return the present state; ``former`` itself, if nothing has changed.

        Raises:
            AttributeError, LookupError: a layer is another one, or one or its parameter is gone.
        """
        children = map(_CHILDREN, map(_DEREFERENCE, watched.parents))
        layers: list[Any] = list(map(dict.get, children, watched.names))
        if list(map(id, map(_OWN, layers))) != watched.identities:
            raise LookupError("another layer")
        parameters: list[Any] = list(map(dict.get, map(_PARAMETERS, layers), watched.parameters))
        ids, versions, adapters = list(map(id, parameters)), _versions(parameters), []
        if self._has_adapters:
            adapters = self._adapters.strengths()
        now = _Seen(ids, versions, former.forms if former is not None else [], adapters)
        # The others are moved along with the first.
        if now == former and (not parameters or _form(parameters[0]) == former.forms[0]):
            return former
        return _Seen(ids, versions, [_form(parameter) for parameter in parameters], adapters)


class BatchWeightsVersion(threading.local):
    """The version of a model's weights for the rows of a batch, read once for all of them.

    It belongs to a thread, as the batch that is being decided does.

    Args:
        weights: of the model.
    """

    def __init__(self, weights: WeightsVersion) -> None:
        self._weights = weights
        self._read: int | None = None
        self._walked = False

    def begin(self) -> None:
        """Begin another batch, whose weights have not been looked at."""
        self._read, self._walked = None, False

    def version(self, walk: bool) -> int:
        """Do as :meth:`WeightsVersion.version` for the first row, and for the first one that asks for a walk."""
        if self._read is None or walk > self._walked:
            self._read, self._walked = self._weights.version(walk), walk
        return self._read


def _names(adapters: Any) -> tuple[Any, ...]:
    """Return what changes where a model lists other adapters."""
    return (*adapters, *map(id, adapters.values())) if isinstance(adapters, dict) else ()


def _walk(model: nn.Module) -> tuple[_Watched, list[nn.Module]]:
    """Return the layers to watch, and all modules."""
    layers: list[tuple[nn.Module, str, str, int]] = []
    modules: list[nn.Module] = []
    met, left = {id(model)}, [model]
    while left:
        parent = left.pop()
        for name, module in tuple(parent._modules.items()):
            if module is None or id(module) in met:
                continue
            met.add(id(module))
            left.append(module)
            modules.append(module)
            own = next((own for own, value in tuple(module._parameters.items()) if value is not None), None)
            if own is not None:
                layers.append((parent, name, own, id(vars(module))))
    if len(layers) > WATCHED:  # by chance, not every n-th, which might be the same one of every block; always the same
        layers = random.Random(0).sample(layers, WATCHED)
    parents = [weakref.ref(parent) for parent, *_ in layers]
    names, parameters = [name for _, name, _, _ in layers], [own for *_, own, _ in layers]
    return _Watched(parents, names, parameters, [identity for *_, identity in layers]), modules


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
        return list(map(_VERSION, parameters))
    except RuntimeError:  # those made in inference mode do not count
        return [0 if each.is_inference() else each._version for each in parameters]


def _form(parameter: Tensor) -> Any:
    """``None`` of one on the meta device, which holds the place of one that is elsewhere.

    Sharded weights take turns with the gathered ones; else, with another type they are other weights: quantised.
    """
    if parameter.is_meta:
        return None
    return type(parameter).__name__ == "DTensor", parameter.dtype, parameter.device
