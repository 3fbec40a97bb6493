"""A stand-in for a block: runs the original on a computed step and short-circuits it on a reused one.

To other code a stand-in looks like its block. It shares the original's instance dictionary, so that attributes,
parameters, buffers, children and hooks are the same ones, read, written or deleted through either. Its class is created
for it: a subclass of the block's class, with the same name. Only the call differs.
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
from .call import ASK, LOOK, ROWS, RUN, SKIP, Shortcut
from .range_cache import CallState, RangeCache


class _Forward:
    """``forward`` of a stand-in, as a data descriptor: an instance attribute of the original must not shadow it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __get__(self, block: SkipBlock | None, owner: type) -> Callable[..., Any]:
        if block is None:
            return self.function
        wrapped: Callable[..., Any] | None = vars(block).get("forward")
        if wrapped is not None:  # another library wrapped the original: show its wrapper
            return wrapped
        return block._dithooks.override or types.MethodType(self.function, block)

    def __set__(self, block: SkipBlock, value: Callable[..., Any]) -> None:
        block._dithooks.state = Asking  # no shortcuts: the wrapper has to be called
        if "forward" in vars(block):
            vars(block)["forward"] = value
        elif isinstance(value, types.MethodType) and value.__self__ is block and value.__func__ is self.function:
            block._dithooks.override = None  # the wrapper is removed again
        else:
            block._dithooks.override = value

    def __delete__(self, block: SkipBlock) -> None:
        if block._dithooks.override is not None:
            block._dithooks.override = None
        else:
            vars(block).pop("forward")


def _no_shortcut(_: object) -> Any:
    """Raise LookupError, so that the stand-in asks the cache instead."""
    raise LookupError


class Asking:
    """The state of a stand-in that asks the cache at every call; the class itself is used."""

    shortcut: Shortcut = ASK


class _StandInState:
    """The stand-in's own attributes, apart from the dictionary it shares with the block."""

    __slots__ = (
        "by_name",
        "by_place",
        "cache",
        "device",
        "is_end",
        "is_engaged",
        "offset",
        "original",
        "override",
        "state",
    )

    cache: RangeCache  # once it was engaged, for good: compiled code under way may read it again

    def __init__(self, original: nn.Module, offset: int, is_end: bool) -> None:
        self.original, self.offset, self.is_end = original, offset, is_end
        self.is_engaged = False  # inert: calls the original
        self.state: CallState | type[Asking] = Asking  # the cache's, unless the stand-in always asks the cache
        self.override: Callable[..., Any] | None = None  # a forward that another library has assigned
        self.device: torch.device | None = None  # where the block was to be moved, which waits until it runs
        # They pick the block's outputs from its keyword or positional arguments.
        self.by_name: Callable[[Any], Any] = _no_shortcut
        self.by_place: Callable[[Any], Any] = _no_shortcut

    def put_off(self, device: torch.device | None) -> None:
        """Note where the block is to be moved before it runs; ``None``: nowhere."""
        self.device = device
        asks = self.is_end or device is not None or self.override is not None or not self.is_engaged
        self.state = Asking if asks else self.cache.state

    def make_up(self) -> None:
        """Move the block to where it was to be moved."""
        device = self.device
        if device is not None:
            self.put_off(None)
            self.original.to(device)

    def set_shortcut(self, io: BlockIO | None) -> None:
        """Set how to return the block's streams directly from its arguments, if its outputs are plain arguments."""
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
        shortcut = own.state.shortcut
        if shortcut is SKIP:
            try:
                return own.by_place(args) if args else own.by_name(kwargs)
            except LookupError:  # an argument is missing, or some are positional and some keywords
                pass
        elif shortcut is RUN:
            return own.original(*args, **kwargs)
        return call_stand_in(own, args, kwargs) if own.override is None else own.override(*args, **kwargs)

    def __init_subclass__(cls, **_: Any) -> None:
        """Skip the block class's own hook, which may register its subclasses: stand-in classes must not be."""

    @property
    def __class__(self) -> type:
        """The block's class; setting it (parametrizations, sharding) changes the class of the block itself."""
        return type(self._dithooks.original)

    @__class__.setter
    def __class__(self, value: type) -> None:
        object.__setattr__(self._dithooks.original, "__class__", value)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._dithooks.original, name)  # the block's class may have changed since, and have more

    def __eq__(self, other: object) -> bool:
        """Equal the block it stands for, so that state keyed by a module (FSDP's) is found by either."""
        block = self._dithooks.original
        return other is block or (isinstance(other, SkipBlock) and other._dithooks.original is block)

    def __hash__(self) -> int:
        return hash(self._dithooks.original)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the block; a move to another device waits, on a reused step, until the block runs.

        Models that keep their blocks in the host's memory fetch each before its turn, and put it back.
        """
        own, device = self._dithooks, _device_among(*args, **kwargs)
        if device is None:  # a cast is of the block as it would be now
            own.make_up()
        elif own.is_engaged and own.cache.passes_over():
            own.put_off(None if _is_on(own.original, device) else device)
            return self
        else:
            own.put_off(None)
        moved = own.original.to(*args, **kwargs)
        return self if moved is own.original else moved

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        """Move or cast the block with the whole model: whatever waits is out of date."""
        own = self._dithooks
        own.put_off(None)
        own.original._apply(*args, **kwargs)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the original, which leaves the stand-in outside of compiled code."""
        self._dithooks.original.compile(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._dithooks.original, memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self._dithooks.original.__reduce_ex__(protocol)


def call_stand_in(own: _StandInState, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the output of a stand-in's call: ask the cache to pass over the block, else run the block."""
    if own.is_engaged:
        output = own.cache.pass_over(own.offset, args, kwargs)
        if output is LOOK:
            return _shown(own, own.cache, args, kwargs)
        if output is not NotImplemented:
            return output
    if own.device is not None:
        own.make_up()
    # Compiled code does not check hooks: call hooked blocks from a line of their own, so that it compiles them apart.
    if own.is_end:
        return own.original(*args, **kwargs)
    return own.original(*args, **kwargs)


def _device_among(*args: Any, **kwargs: Any) -> torch.device | None:
    """Return the device in arguments of ``to`` that name one and nothing else."""
    named = {name: value for name, value in kwargs.items() if name != "non_blocking"}
    given = [*args, *named.values()]
    is_device = len(given) == 1 and isinstance(given[0], str | int | torch.device) and named.keys() <= {"device"}
    return torch.device(given[0]) if is_device else None


def _is_on(block: nn.Module, device: torch.device) -> bool:
    """Return whether all of a block's weights are on a device; ``cuda`` is any of that kind, as it is for PyTorch."""
    tensors = [*block.parameters(), *block.buffers()]
    return all(each.device.type == device.type and device.index in (None, each.device.index) for each in tensors)


def _shown(own: _StandInState, cache: RangeCache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the block, and show the cache its output; of a batch, perhaps for some of its rows only."""
    own.make_up()
    call, rows = cache.state.call, cache.state.rows
    if rows is not None and call is not None and call.mode is ROWS:
        return rows.run(own.offset, own.original, args, kwargs)
    if own.is_end:  # from a line of its own, as above
        output = own.original(*args, **kwargs)
        cache.look(own.offset, output)
        return output
    output = own.original(*args, **kwargs)
    cache.look(own.offset, output)
    return output


def stand_in(
    original: nn.Module, offset: int, is_end: bool = False, classes: dict[type, type] | None = None
) -> nn.Module:
    """Return a :class:`SkipBlock` for one block, ready to be put into its list; inert until engaged.

    Args:
        original: the block.
        offset: index of the block within the range.
        is_end: whether the block is the first or last of the range, which are hooked.
        classes: stand-in classes by block class, to reuse and to add to; ``None``: make a class for this stand-in.

    Raises:
        WrongType: the block's class cannot be subclassed, or the block is a scripted module.
    """
    cls = original.__class__  # not type(original), which for an inert stand-in is not the block's
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
        skip: Any = object.__new__(skip_class)  # not cls.__new__: FSDP's makes an unsharded object
        object.__setattr__(skip, "__dict__", original.__dict__)
    except Exception as error:
        raise WrongType(f"{cls.__name__} cannot be given a stand-in: {error}") from error
    object.__setattr__(skip, "_dithooks", _StandInState(original, offset, is_end))
    if classes is not None:
        classes[cls] = skip_class
    module: nn.Module = skip
    return module


def _untouched(skip_class: type, cls: type[nn.Module]) -> bool:
    """Return whether a stand-in class and its block class still have the ``forward`` of when the former was made."""
    forward = vars(skip_class).get("forward")
    return isinstance(forward, _Forward) and vars(forward.function).get("__wrapped__") is cls.forward


def classes_of(owner: nn.Module) -> dict[type, type]:
    """Return the stand-in classes kept for a transformer by :func:`outlive`, by block class; else a new dict."""
    for reference in weakref.getweakrefs(owner):
        end = reference.__callback__
        held = end.peek() if isinstance(end, weakref.finalize) else None
        if held is not None and held[1] is _drop:
            classes: dict[type, type] = held[2][0]
            return classes
    return {}


def outlive(owner: nn.Module, classes: dict[type, type]) -> None:
    """Keep stand-in classes alive as long as their transformer, so that compiled code recognises them.

    Compiled code recognises a block by its class: new classes at each attaching would recompile it each time, until the
    compiler gives up.
    """
    if classes_of(owner) is not classes:
        weakref.finalize(owner, _drop, classes).atexit = False


def _drop(classes: dict[type, type]) -> None:
    classes.clear()


def engage(module: nn.Module, cache: RangeCache) -> None:
    """Connect a stand-in to a range's cache."""
    assert isinstance(module, SkipBlock)
    own = module._dithooks
    own.cache, own.is_engaged = cache, True
    own.state = Asking if own.is_end or own.override is not None else cache.state


def set_streams(module: nn.Module, io: BlockIO) -> None:
    """Give a stand-in inside the range the streams of its block."""
    assert isinstance(module, SkipBlock)
    module._dithooks.set_shortcut(io)


def is_engaged(module: object) -> bool:
    """Return whether a module is a stand-in connected to a cache."""
    return isinstance(module, SkipBlock) and module._dithooks.is_engaged


def disengage(module: nn.Module) -> bool:
    """Disconnect a stand-in from the cache; return whether another library has wrapped it."""
    assert isinstance(module, SkipBlock)
    own = module._dithooks
    own.set_shortcut(None)
    own.make_up()
    own.is_engaged, own.state = False, Asking
    return own.override is not None
