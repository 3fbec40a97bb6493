"""A stand-in for a block: runs the original on a computed step and short-circuits it on a reused one.

Seen from outside it is the block. It shares the original's instance dictionary, so every attribute, parameter, buffer,
child and hook registry is one and the same, read, written or deleted through either; its class is made on the spot, a
subclass of the block's own with the same name. Only calling it is different.
"""

from __future__ import annotations

import copy
import functools
import types
import weakref
from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.block_io import BlockIO
from ..errors import WrongType
from .call import RUN, SKIP
from .range_cache import CallState, RangeCache


class _Forward:
    """``forward`` of a stand-in, as a data descriptor: an instance attribute of the original must not shadow it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, block: SkipBlock | None, owner: type) -> Callable[..., Any]:
        if block is None:
            return self.function
        wrapped: Callable[..., Any] | None = vars(block).get("forward")
        if wrapped is not None:  # others wrapped the original: to them it must look as they left it
            return wrapped
        return block._dithooks.override or types.MethodType(self.function, block)

    def __set__(self, block: SkipBlock, value: Callable[..., Any]) -> None:
        block._dithooks.state = None  # what is put over it is to be called
        if "forward" in vars(block):
            vars(block)["forward"] = value
        elif isinstance(value, types.MethodType) and value.__self__ is block and value.__func__ is self.function:
            block._dithooks.override = None  # what was put over it is taken off again
        else:
            block._dithooks.override = value

    def __delete__(self, block: SkipBlock) -> None:
        if block._dithooks.override is not None:
            block._dithooks.override = None
        else:
            vars(block).pop("forward")


def _no_shortcut(_: object) -> Any:
    """Refuse to pass on: what this block takes and returns has to be looked at."""
    raise LookupError


class _StandInState:
    """What a stand-in has of its own."""

    __slots__ = ("by_name", "by_place", "cache", "is_end", "offset", "original", "override", "state")

    def __init__(self, original: nn.Module, offset: int, is_end: bool) -> None:
        self.original, self.offset, self.is_end = original, offset, is_end
        self.cache: RangeCache | None = None  # None: inert, an ordinary way to call the original
        self.state: CallState | None = None  # of the cache, by thread; None at the range's ends, which always ask it
        self.override: Callable[..., Any] | None = None
        # What a block inside the range passes on, out of its arguments by name or by place.
        self.by_name: Callable[[Any], Any] = _no_shortcut
        self.by_place: Callable[[Any], Any] = _no_shortcut

    def set_shortcut(self, io: BlockIO | None) -> None:
        """Let the block's streams be passed on in one step, in C, where an output is just some of the arguments."""
        self.by_name = self.by_place = _no_shortcut
        if io is None or not io.slots:
            return
        if io.output_builder.kind is (Tensor if len(io.slots) == 1 else tuple):
            names, places = zip(*io.slots, strict=True)
            self.by_name, self.by_place = itemgetter(*names), itemgetter(*places)


class SkipBlock:
    """Base of all stand-ins, next to the original's class; see :func:`stand_in`."""

    __slots__ = ("_dithooks",)
    _dithooks: _StandInState

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._dithooks
        state = own.state  # once: another thread may retire the stand-in at any moment
        if state is not None:
            shortcut = state.shortcut
            if shortcut is SKIP:
                try:
                    return own.by_place(args) if args else own.by_name(kwargs)
                except LookupError:  # an argument is left out, or some come by place and some by name
                    pass
            elif shortcut is RUN:
                return own.original(*args, **kwargs)
        return call_stand_in(own, args, kwargs) if own.override is None else own.override(*args, **kwargs)

    def __init_subclass__(cls, **_: Any) -> None:
        """Stop here: a block class that registers its subclasses is not to learn of ours."""

    @property
    def __class__(self) -> type:
        """The block's class, also to who changes it (parametrizations, sharding): the change is the block's own."""
        return type(self._dithooks.original)

    @__class__.setter
    def __class__(self, value: type) -> None:
        object.__setattr__(self._dithooks.original, "__class__", value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dithooks.original, name)  # what a class put on the block since has

    def __eq__(self, other: object) -> bool:
        """Equal to its block: who keeps something for a module by it (FSDP, its state) finds it by either."""
        mine = self._dithooks.original
        return other is mine or (isinstance(other, SkipBlock) and other._dithooks.original is mine)

    def __hash__(self) -> int:
        return hash(self._dithooks.original)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the original: the short-circuit stays outside."""
        self._dithooks.original.compile(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._dithooks.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dithooks.original.__reduce_ex__(protocol)


def call_stand_in(own: _StandInState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a stand-in: pass over the block, or run it."""
    cache = own.cache
    if cache is not None:
        output = cache.pass_over(own.offset, args, kwargs)
        if output is not NotImplemented:
            return output
    # Compiled code does not look at hooks: two calls, so that a block that has ours is not taken for one that has none.
    if own.is_end:
        return own.original(*args, **kwargs)
    return own.original(*args, **kwargs)


def stand_in(
    original: nn.Module, offset: int, is_end: bool = False, classes: dict[type, type] | None = None
) -> nn.Module:
    """A :class:`SkipBlock` for one block, ready to be put into its list; inert until engaged.

    Args:
        original: the block.
        offset: its place in the range.
        is_end: whether it is one of the range's ends, which are given hooks.
        classes: of stand-ins, by the class of a block: its own is taken from here, or put in.

    Raises:
        TypeError: the block's class cannot be subclassed, or it is a scripted module.
    """
    cls = original.__class__  # of an inert stand-in, the block's own
    if isinstance(original, torch.jit.ScriptModule):
        raise WrongType(
            f"{original.original_name} is a scripted module, which takes no stand-in: cache before scripting"
        )

    def forward(self: SkipBlock, *args: Any, **kwargs: Any) -> Any:
        return call_stand_in(self._dithooks, args, kwargs)

    functools.update_wrapper(forward, cls.forward)
    namespace = {
        "forward": _Forward(forward),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__slots__": (),
    }
    try:
        skip_class: Any = None if classes is None else classes.get(cls)
        if skip_class is None or not _untouched(skip_class, cls):
            bases = (SkipBlock, cls)
            skip_class = types.new_class(cls.__name__, bases, exec_body=lambda body: body.update(namespace))
        skip: Any = object.__new__(skip_class)  # a class's own may make another object: FSDP's makes an unsharded one
        object.__setattr__(skip, "__dict__", original.__dict__)
    except Exception as error:
        raise WrongType(f"{cls.__name__} cannot be given a stand-in: {error}") from error
    object.__setattr__(skip, "_dithooks", _StandInState(original, offset, is_end))
    if classes is not None:
        classes[cls] = skip_class
    module: nn.Module = skip
    return module


def _untouched(skip_class: type, cls: type[nn.Module]) -> bool:
    """Whether neither a stand-in's class nor the block's was given another ``forward`` since the former was made."""
    forward = vars(skip_class).get("forward")
    return isinstance(forward, _Forward) and vars(forward.function).get("__wrapped__") is cls.forward


def classes_of(owner: nn.Module) -> dict[type, type]:
    """Stand-ins' classes by those of the blocks: what :func:`outlive` keeps for a transformer, or else a new dict."""
    for reference in weakref.getweakrefs(owner):
        end = reference.__callback__
        held = end.peek() if isinstance(end, weakref.finalize) else None
        if held is not None and held[1] is _drop:
            classes: dict[type, type] = held[2][0]
            return classes
    return {}


def outlive(owner: nn.Module, classes: dict[type, type]) -> None:
    """Keep classes for as long as a transformer lives, of which compiled code has met stand-ins.

    Compiled code recognises a block by its class: with new classes at each attaching it would recompile each time,
    until the compiler gives up.
    """
    if classes_of(owner) is not classes:
        weakref.finalize(owner, _drop, classes).atexit = False


def _drop(classes: dict[type, type]) -> None:
    classes.clear()


def engage(module: nn.Module, cache: RangeCache) -> None:
    """Let a stand-in work for a range."""
    assert isinstance(module, SkipBlock)
    own = module._dithooks
    own.cache = cache
    own.state = None if own.is_end or own.override is not None else cache.state


def set_streams(module: nn.Module, io: BlockIO) -> None:
    """Give a stand-in inside the range the streams of its block, once they are known."""
    assert isinstance(module, SkipBlock)
    module._dithooks.set_shortcut(io)


def is_engaged(module: object) -> bool:
    """Return whether a list entry is a stand-in at work."""
    return isinstance(module, SkipBlock) and module._dithooks.cache is not None


def disengage(module: nn.Module) -> bool:
    """Make a stand-in a plain way to its block, free of the cache; return whether others put something over it."""
    assert isinstance(module, SkipBlock)
    own = module._dithooks
    own.set_shortcut(None)
    own.cache = own.state = None
    return own.override is not None
