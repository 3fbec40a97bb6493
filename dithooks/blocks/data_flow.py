"""The data flow of one call: which blocks' outputs are used again behind the next block, and until when.

Followed from operation to operation, whatever their values: a clone, a slice and a join that was made early count, and
so does a skip through weights that are still zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from .containers import leaves_of


class Origin(NamedTuple):
    """What something is made of: the output of a call, by number; and whether only by a product or a mean of it."""

    call: int
    is_mixed: bool


Origins = frozenset[Origin]
Region = tuple[int, int, tuple[int, ...], tuple[int, ...]]  # of a storage: first byte, end, shape and strides

_NONE: Origins = frozenset()
# Behind these, numbers are no longer those that a residual could be added to.
_MIXES = frozenset(
    {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linear", "convolution", "mean", "sum", "_scaled_mm", "_int_mm"}
)
_OVERWRITES = frozenset({"copy_", "fill_", "zero_", "normal_", "uniform_"})  # whatever was there before


class DataFlow:
    """The use of the outputs of blocks: between blocks, and up to what the model returns.

    It holds no tensors. Inside of blocks, and before the first one, nothing is followed: what a block returns counts as
    made by that block.
    """

    def __init__(self) -> None:
        self._calls: list[int] = []  # blocks as they were called
        self._entered: list[Origins] = []  # what each was given is made of
        self._named: list[Mapping[str, Origins]] = []  # by argument
        self._returned: Origins = _NONE  # what the model returned is made of
        self._memory: dict[StorageWeakRef, dict[Region, Origins]] = {}
        self._given: dict[StorageWeakRef, int | None] = {}  # to the block that runs, with the versions
        self._depth = 0  # of blocks within blocks
        self._watch: _OperationWatch | None = None  # while it is on

    def enter(self, index: int, given: Iterable[Tensor], arguments: Mapping[str, Any]) -> None:
        """Note the tensors that a block is given, all of them and those that are arguments with a name."""
        self._stop()
        self._depth += 1
        given = list(given)
        self._calls.append(index)
        self._entered.append(self._sources(given))
        self._named.append({n: self._sources([each]) for n, each in arguments.items() if isinstance(each, Tensor)})
        self._given = {storage: _version(each) for each in given if (storage := _storage(each)) is not None}

    def leave(self, index: int, returned: Iterable[Tensor]) -> None:
        """Note the tensors that a block returns."""
        self._depth -= 1
        if self._calls[-1] == index:  # else it has blocks within it, which are followed in its place
            made = frozenset({Origin(len(self._calls) - 1, False)})
            for tensor in returned:
                # What no block has made, and this one hands on as it was given it (an embedding), still is not.
                if not self._is_as_given(tensor) or self._sources([tensor]):
                    self._put(tensor, made)
        if not self._depth:
            self._watch = _OperationWatch(self._note)
            self._watch.__enter__()  # type: ignore[no-untyped-call]

    def end(self, returned: Iterable[Tensor]) -> None:
        """Note the tensors that the model returns."""
        self._returned = self._sources(returned)

    def close(self) -> None:
        """Follow nothing any more, at the end of the model's call or where it was cut short."""
        self._stop()
        self._memory, self._given = {}, {}

    def last_uses(self, order: Sequence[int]) -> list[int]:
        """Return, for each block, the last one whose call is given something made of its output.

        Args:
            order: the blocks, in which they count; what others return counts as made of what they are given.

        Returns:
            By block of ``order``, the place of that other block; ``len(order)`` for what the model returns.
        """
        places = {index: place for place, index in enumerate(order)}
        made: list[frozenset[int]] = []  # by call: places of the blocks that what it returns is made of
        uses = [place + 1 for place in range(len(order))]

        def origins(sources: Origins) -> frozenset[int]:
            return frozenset[int]().union(*(made[source.call] for source in sources))

        for index, sources in zip(self._calls, self._entered, strict=True):
            place = places.get(index)
            if place is None:
                made.append(origins(sources))
                continue
            for origin in origins(sources):
                uses[origin] = max(uses[origin], place)
            made.append(frozenset({place}))
        for origin in origins(self._returned):
            uses[origin] = len(order)
        return uses

    def carries(self, producer: int, consumer: int, name: str) -> bool:
        """Return whether an argument of a block holds what an earlier one returned, other than mixed by a product.

        Args:
            producer: the block that returned it.
            consumer: the block that is given it.
            name: the argument.
        """
        sources = self._named[self._calls.index(consumer)].get(name, _NONE)
        return Origin(self._calls.index(producer), False) in sources

    def _stop(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)  # type: ignore[no-untyped-call]

    def _is_as_given(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage in self._given and self._given[storage] == _version(tensor)

    def _note(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], result: Any) -> None:
        """Note what an operation has made its results of."""
        name = getattr(getattr(func, "overloadpacket", func), "__name__", "")
        given, written = list(_tensors((args, kwargs))), dict(_written(func, args, kwargs))
        # What takes only the shape of a tensor is not made of it.
        by_shape = name.endswith("_like") or name.startswith("new_")
        sources = _NONE if by_shape else self._sources(each for each in given if id(each) not in written)
        if name.rstrip("_") in _MIXES:
            sources = frozenset(Origin(source.call, True) for source in sources)
        former = self._sources(tensor for tensor, _ in written.values())
        for tensor, is_whole in written.values():
            self._put(tensor, sources if is_whole or name in _OVERWRITES else sources | self._sources([tensor]))
        storages = set(map(_storage, given))
        for tensor in _tensors(result):
            if _storage(tensor) not in storages:  # else a view, or written above
                self._put(tensor, sources | former)

    def _sources(self, tensors: Iterable[Tensor]) -> Origins:
        """Return what some tensors are made of."""
        found = _NONE
        for tensor in tensors:
            storage = _storage(tensor)
            regions = None if storage is None else self._memory.get(storage)
            if regions:
                begin, end, *_ = _region(tensor)
                found = found.union(*(made for (a, b, *_), made in regions.items() if a < end and begin < b))
        return found

    def _put(self, tensor: Tensor, sources: Origins) -> None:
        """Note what the memory of a tensor is made of from now on."""
        storage = _storage(tensor)
        if storage is None:
            return
        regions, region = self._memory.setdefault(storage, {}), _region(tensor)
        begin, end, *_ = region
        if end - begin == tensor.numel() * tensor.element_size():  # without holes
            for other in [other for other in regions if begin <= other[0] and other[1] <= end]:
                del regions[other]
        regions[region] = sources


class _OperationWatch(TorchDispatchMode):
    """Hands every operation to a function, once it is done."""

    supports_higher_order_operators = True

    def __init__(self, note: Callable[[Any, tuple[Any, ...], Mapping[str, Any], Any], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._note = note

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        self._note(func, args, kwargs or {}, result)
        return result


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[tuple[int, tuple[Tensor, bool]]]:
    """Iterate over the tensors that an operation writes into, by id, with whether it is where its result goes."""
    for place, argument in enumerate(getattr(getattr(func, "_schema", None), "arguments", ())):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for tensor in _tensors(value):
                yield id(tensor), (tensor, argument.kwarg_only)


def _tensors(value: Any) -> Iterator[Tensor]:
    yield from (leaf for _, leaf in leaves_of(value) if isinstance(leaf, Tensor))


def _storage(tensor: Tensor) -> StorageWeakRef | None:
    """Return a reference to a tensor's memory that holds none of it; ``None`` if there is none."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):  # sparse, or a subclass without storage
        return None


def _version(tensor: Tensor) -> int | None:
    """Return torch's count of the writes into a tensor; inference tensors have none."""
    return None if tensor.is_inference() else tensor._version


def _region(tensor: Tensor) -> Region:
    """Return which part of its storage a tensor takes up."""
    size = tensor.element_size()
    begin = int(tensor.storage_offset()) * size
    spans = [(number - 1) * step for number, step in zip(tensor.shape, tensor.stride(), strict=True)]
    end = begin + (sum(spans) + 1) * size if tensor.numel() else begin
    return begin, end, tuple(tensor.shape), tuple(tensor.stride())
