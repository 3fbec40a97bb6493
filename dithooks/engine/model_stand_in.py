"""A stand-in for a whole transformer: asks the cache at every call, which leaves the call out on a reused step.

To other code it is its transformer: it belongs to that one's class, and all that is read, set or called through it is
the transformer's own, with the transformer as ``self``. Walks through the modules around it come to the transformer,
not to it; copies and pickles hold the transformer. Only its own call differs.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from ..errors import WrongType
from .compiled_code import outside_graphs
from .held_difference import GivenArguments
from .output_cache import PLAIN_CALL, OutputCache

_OUTSIDE = (
    "dithooks decides outside of compiled code whether the transformer is called: compile the transformer itself "
    "(torch.compile(transformer), transformer.compile()), not a function that calls it; or leave fullgraph=True out"
)
_OWN = frozenset({"__call__", "__class__", "__deepcopy__", "__reduce_ex__", "__reduce__"})


class _Behind:
    """The model behind a stand-in."""

    __slots__ = ("cache", "original")

    def __init__(self, original: nn.Module) -> None:
        self.original = original
        self.cache: OutputCache | None = None  # inert: every call is the original's


class ModelStandIn:
    """Base of stand-ins for transformers, next to the transformer's class; see :func:`model_stand_in`."""

    __slots__ = ("_dithooks_model",)
    _dithooks_model: _Behind

    def __init_subclass__(cls, **_: Any) -> None:
        """Skip the model class's own hook, which may register its subclasses: stand-in classes must not be."""

    @property
    def __class__(self) -> type:
        """The transformer's class; setting it (sharding) changes the class of the transformer itself."""
        return type(_behind(self).original)

    @__class__.setter
    def __class__(self, value: type) -> None:
        object.__setattr__(_behind(self).original, "__class__", value)

    def __getattribute__(self, name: str) -> Any:
        return object.__getattribute__(self, name) if name in _OWN else getattr(_behind(self).original, name)

    def __setattr__(self, name: str, value: Any) -> None:
        _behind(self).original.__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        _behind(self).original.__delattr__(name)

    def __eq__(self, other: object) -> bool:
        """Equal the transformer it stands for, so that state keyed by a module is found by either."""
        return original_model(self) is original_model(other)

    def __hash__(self) -> int:
        return hash(_behind(self).original)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_behind(self).original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle as what returns the transformer, so that this is one object in the pickle, wherever it is held."""
        return getattr, (nullcontext(_behind(self).original), "enter_result")


_behind: Callable[[Any], _Behind] = vars(ModelStandIn)["_dithooks_model"].__get__  # the slot, past all attributes


def model_stand_in(original: nn.Module) -> nn.Module:
    """Return a stand-in for a transformer, ready to be put into the transformer's place; inert until engaged.

    Raises:
        WrongType: its class cannot be subclassed, or it is a scripted module.
    """
    cls = original.__class__
    if isinstance(original, torch.jit.ScriptModule):
        raise WrongType(
            f"{original.original_name} is a scripted module, which takes no stand-in: cache before scripting"
        )

    # Of its own, made here: marking is per function, and imports the compiler, which can wait until now.
    @outside_graphs(_OUTSIDE)
    def call(self: ModelStandIn, *args: Any, **kwargs: Any) -> Any:
        behind = _behind(self)
        cache = behind.cache
        output = PLAIN_CALL if cache is None else cache.pass_over(args, kwargs)
        if output is PLAIN_CALL:
            return behind.original(*args, **kwargs)
        if type(output) is GivenArguments:
            args, kwargs = output
        elif output is not NotImplemented:
            return output
        assert cache is not None
        try:
            return cache.conclude(behind.original(*args, **kwargs))
        finally:
            cache.leave()

    namespace = {"__call__": call, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__slots__": ()}
    try:
        bases = (ModelStandIn, cls)
        kind: Any = types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))
        made: Any = object.__new__(kind)
        object.__setattr__(made, "__dict__", original.__dict__)  # for what reads it past all attributes
    except Exception as error:
        raise WrongType(f"{cls.__name__} cannot be given a stand-in: {error}") from error
    object.__setattr__(made, "_dithooks_model", _Behind(original))
    module: nn.Module = made
    return module


def engage_model(module: nn.Module, cache: OutputCache | None) -> None:
    """Connect a stand-in to a cache; ``None``: disconnect it."""
    assert isinstance(module, ModelStandIn)
    _behind(module).cache = cache


def cache_behind(module: object) -> OutputCache | None:
    """Return the cache that a stand-in for a transformer is connected to; ``None`` of any other module."""
    return _behind(module).cache if issubclass(type(module), ModelStandIn) else None


def original_model(module: Any) -> Any:
    """Return the transformer behind a stand-in, or the module itself."""
    return _behind(module).original if issubclass(type(module), ModelStandIn) else module
