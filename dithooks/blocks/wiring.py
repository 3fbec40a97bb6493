"""How the streams run through a range of blocks: observed on one computed call, not declared.

Which output of a block *is* (the same object) which input of the next one tells what each block takes and returns, by
position or keyword, in whatever order. Where the parent puts a new tensor between two blocks (a ControlNet's addition),
the other blocks of the class tell, then the shape; what stays ambiguous is refused.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


class WiringError(ValueError):
    """The streams of a range could not be followed; the message says what was seen."""


def parameter_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the positional parameters of a module's forward; empty where it does not say."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return ()
    return tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))


def bind(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name; positions without a name are called ``*0``, ``*1``, …"""
    bound = {names[i] if i < len(names) else f"*{i}": value for i, value in enumerate(args)}
    bound.update(kwargs)
    return bound


@dataclass(frozen=True)
class Ports:
    """How to read the streams of one block from a call, and build its output from them.

    ``names`` are its parameters; ``carries[p]`` is the argument that output position p carries on (``None``: the
    block returns ``None`` there); ``kind`` is ``Tensor``, ``tuple`` or ``list``.
    """

    names: tuple[str, ...]
    carries: tuple[str | None, ...]
    kind: type

    def read(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument called ``name``, however it was passed."""
        if name in kwargs:
            return kwargs[name]
        return args[int(name[1:]) if name.startswith("*") else self.names.index(name)]

    def build(self, values: Sequence[Tensor | None]) -> Any:
        """An output like the block's own, from one value per position."""
        return values[0] if self.kind is Tensor else self.kind(values)


@dataclass(frozen=True)
class Wiring:
    """The streams of a range: their names at its first block, and which of them its last returns at each position."""

    ports: tuple[Ports, ...]  # of each block of the range
    entry: tuple[str, ...]
    leave: tuple[int | None, ...]


def parts(output: Any) -> tuple[type, tuple[Any, ...]]:
    """The kind of a block's output, and its values by position."""
    if isinstance(output, Tensor):
        return Tensor, (output,)
    if type(output) in (tuple, list):
        return type(output), tuple(output)
    return type(output), ()


def _form(value: Any) -> tuple[Any, ...] | None:
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else None


@dataclass
class _Seen:
    """One block's call: forms of its tensor arguments, of its outputs, and where the outputs went next."""

    index: int
    names: tuple[str, ...]
    inputs: dict[str, tuple[Any, ...]]
    kind: type = object
    outputs: tuple[tuple[Any, ...] | None, ...] = ()
    odd: tuple[str, ...] = ()  # outputs that are neither tensor nor None
    next: _Seen | None = None
    fed: dict[int, str] = field(default_factory=dict)  # output position → the next block's argument, same object


class Observation:
    """Watches one computed call of a chain of blocks; holds on to no more than one block's outputs at a time."""

    def __init__(self, classes: Sequence[type], paths: Sequence[str]) -> None:
        self._classes, self._paths = classes, paths
        self._calls: list[_Seen] = []
        self._last: tuple[Any, ...] = ()
        self._produced: list[tuple[int, weakref.ref[Tensor]]] = []
        self._late: list[tuple[int, int, str]] = []  # producer, later consumer, its argument

    @property
    def empty(self) -> bool:
        """Whether no block was seen to run."""
        return not self._calls

    def enter(self, index: int, names: tuple[str, ...], arguments: Mapping[str, Any]) -> None:
        """A block of the chain is about to run."""
        here = _Seen(index, names, {name: form for name, value in arguments.items() if (form := _form(value))})
        if self._calls:
            before = self._calls[-1]
            before.next = here
            for name, value in arguments.items():
                for position, output in enumerate(self._last):
                    if isinstance(output, Tensor) and output is value:
                        before.fed.setdefault(position, name)
                if isinstance(value, Tensor) and not any(output is value for output in self._last):
                    self._late += [
                        (i, index, name) for i, ref in self._produced if i != before.index and ref() is value
                    ]
        self._last = ()
        self._calls.append(here)

    def leave(self, index: int, output: Any) -> None:
        """… and has run."""
        here = self._calls[-1]
        here.kind, self._last = parts(output)
        here.outputs = tuple(_form(value) for value in self._last)
        here.odd = tuple(
            f"position {p}: {type(v).__name__}" for p, v in enumerate(self._last) if not (v is None or _form(v))
        )
        if not self._last:
            here.odd = (type(output).__name__,)
        self._produced += [(index, weakref.ref(value)) for value in self._last if isinstance(value, Tensor)]

    def resolve(self, start: int, end: int) -> Wiring | None:
        """The wiring of blocks start … end; ``None`` if this call did not run them all.

        Raises:
            WiringError: they ran, but not as one chain of streams.
        """
        self._last = ()
        order = [call.index for call in self._calls]
        if not set(range(start, end + 1)) <= set(order):
            return None
        first = order.index(start)
        if order[first : first + end - start + 1] != list(range(start, end + 1)):
            seen = ", ".join(self._paths[i] for i in order[first : first + end - start + 2])
            raise WiringError(f"{self._range(start, end)} do not run one after another: seen {seen}, …")
        if order.count(start) > 1:
            raise WiringError(f"{self._paths[start]} runs {order.count(start)} times in one call of the transformer")
        calls = self._calls[first : first + end - start + 1]
        for producer, consumer, name in self._late:
            if start <= producer < end and consumer > end:
                raise WiringError(
                    f"an output of {self._paths[producer]} goes to {self._paths[consumer]} ({name}=), past the end "
                    f"of the range at {self._paths[end]}: what is skipped would be missing there"
                )
        ports = tuple(self._ports(call) for call in calls)
        return self._follow(calls, ports)

    def _ports(self, call: _Seen) -> Ports:
        if call.odd:
            raise WiringError(
                f"{self._paths[call.index]} returns {', '.join(call.odd)}; tensors and tuples are understood"
            )
        carries = tuple(None if form is None else self._carried(call, p) for p, form in enumerate(call.outputs))
        if len(set(carries) - {None}) < len(carries) - carries.count(None):
            raise WiringError(f"{self._paths[call.index]}: two outputs seem to carry on the same argument ({carries})")
        return Ports(call.names, carries, call.kind)

    def _carried(self, call: _Seen, position: int) -> str:
        """The argument of this block that output ``position`` carries on."""
        form = call.outputs[position]
        alike = [name for name, other in call.inputs.items() if other == form]
        kin = [other for other in self._calls if self._classes[other.index] is self._classes[call.index]]
        fed: dict[int, str] = {}  # where this block's outputs were seen to go, else those of the nearest of its class
        for other in sorted(kin, key=lambda other: abs(other.index - call.index)):
            fed = {**other.fed, **fed}
        if fed.get(position) in alike:  # it goes on under a name that this block has, too
            return fed[position]
        alike = [name for name in alike if name not in {to for p, to in fed.items() if p != position}]
        if call.next is None and (before := self._before(call)) is not None and set(before.fed.values()) & set(alike):
            alike = [name for name in alike if name in before.fed.values()]
        if "hidden_states" in alike and len(call.outputs) == 1:
            return "hidden_states"
        if len(alike) == 1:
            return alike[0]
        seen = ", ".join(f"{name} {_show(other)}" for name, other in call.inputs.items())
        raise WiringError(
            f"{self._paths[call.index]}: which argument does output {position}, {_show(form)}, carry on? "
            f"Its arguments are {seen}; " + (f"alike: {', '.join(alike)}" if alike else "none is alike")
        )

    def _before(self, call: _Seen) -> _Seen | None:
        return next((other for other in self._calls if other.next is call), None)

    def _follow(self, calls: list[_Seen], ports: tuple[Ports, ...]) -> Wiring:
        """Follow each stream from the first block's arguments to a position of the last one's output."""
        entry = tuple(name for name in ports[0].carries if name is not None)
        names = dict(enumerate(entry))  # stream → its argument at the current block
        for call, port, after, following in zip(calls, ports, ports[1:], calls[1:], strict=False):
            moved = {}
            for stream, current in names.items():
                position = port.carries.index(current)
                onward = call.fed.get(position)
                if onward is None:
                    onward = self._onward(call, following, after, position, current)
                if onward in after.carries:
                    moved[stream] = onward
            names = moved
        last = ports[-1].carries
        streams = dict(zip(names.values(), names.keys(), strict=True))
        for position, name in enumerate(last):
            if name is not None and name not in streams:
                raise WiringError(
                    f"output {position} of {self._paths[calls[-1].index]} ({name}) does not come from an argument of "
                    f"{self._paths[calls[0].index]}: the streams change on the way"
                )
        kept = sorted(streams.values())
        return Wiring(
            ports, tuple(entry[s] for s in kept), tuple(None if n is None else kept.index(streams[n]) for n in last)
        )

    def _onward(self, call: _Seen, following: _Seen, after: Ports, position: int, name: str) -> str:
        """Under which name an output goes on where the parent put a new tensor in between."""
        form = call.outputs[position]
        if name in after.carries and following.inputs.get(name) == form:
            return name
        free = [
            n for n in after.carries if n is not None and n not in call.fed.values() and following.inputs[n] == form
        ]
        if len(free) == 1:
            return free[0]
        raise WiringError(
            f"between {self._paths[call.index]} and {self._paths[following.index]} the stream {name} {_show(form)} is "
            f"lost: the next block takes {', '.join(f'{n} {_show(f)}' for n, f in following.inputs.items())}"
        )

    def _range(self, start: int, end: int) -> str:
        return f"blocks {self._paths[start]} … {self._paths[end]}"


def _show(form: tuple[Any, ...] | None) -> str:
    return "None" if form is None else f"{list(form[0])} {str(form[1]).removeprefix('torch.')}"
