"""What a model does to its streams between two blocks: join them, slice one, swap batch and tokens.

A reused range has to compute what leaves its last block from what enters its first, so it has to apply the same
transform to h_in. Every transform is linear: it is applied to −h_in on a computed step, to take the residual, and to
h_in on a reused step. Lengths are not stored, since they change from one image size to another: they follow from the
shape of the result.

Flux joins text and image before its single blocks: ``Concat((Stream(1), Stream(0)), dim=1)``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stream:
    """A stream, unchanged, by its number."""

    number: int


@dataclass(frozen=True)
class Concat:
    """Several parts joined along a dimension; ``None`` is a part that is made of no stream (at most one)."""

    parts: tuple[StreamTransform | None, ...]
    dim: int


@dataclass(frozen=True)
class Slice:
    """The first part of a tensor along a dimension (``head``), or its last."""

    whole: StreamTransform
    dim: int
    head: bool


@dataclass(frozen=True)
class SwapBatchTokens:
    """Tokens swapped with a part of the batch: ``(b f) n c`` to ``(b n) f c``, or back."""

    whole: StreamTransform


@dataclass(frozen=True)
class Unrelated:
    """A tensor made of no stream: a reused step returns it as it was last computed."""


StreamTransform = Stream | Concat | Slice | SwapBatchTokens | Unrelated


def build(transform: StreamTransform, streams: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    """Apply a transform to streams; ``None`` if the result cannot have the shape.

    Args:
        transform: refers to streams by their numbers.
        streams: the streams by number.
        shape: of the result.
    """
    result: Tensor | None
    if isinstance(transform, Stream):
        result = streams[transform.number]
    elif isinstance(transform, Unrelated):
        result = streams[0].new_zeros(shape) if streams else None
    elif isinstance(transform, SwapBatchTokens):
        result = _turn(build(transform.whole, streams, _turned(shape, _length(transform.whole, streams, shape))), shape)
    elif isinstance(transform, Slice):
        length, there = shape[transform.dim], _length(transform.whole, streams, shape, transform.dim)
        whole = build(transform.whole, streams, _resized(shape, transform.dim, there))
        if whole is None or whole.shape[transform.dim] < length:
            return None
        result = whole.narrow(transform.dim, 0 if transform.head else whole.shape[transform.dim] - length, length)
    else:
        result = _join(transform, streams, shape)
    return result if result is not None and result.shape == shape else None


def substitute(transform: StreamTransform, of: Mapping[int, StreamTransform | None]) -> StreamTransform | None:
    """Replace each stream of a transform by what it is made of; ``None`` if that is not known of one."""
    if isinstance(transform, Unrelated):
        return transform
    if isinstance(transform, Stream):
        return of.get(transform.number)
    if isinstance(transform, Concat):
        parts: list[StreamTransform | None] = []
        for part in transform.parts:
            before = None if part is None else substitute(part, of)
            nested = isinstance(before, Concat) and before.dim == transform.dim
            parts += before.parts if nested and isinstance(before, Concat) else [before]
        return Concat(tuple(parts), transform.dim) if len(parts) - 1 <= sum(map(bool, parts)) > 0 else None
    whole = substitute(transform.whole, of)
    if whole is None:
        return None
    if isinstance(transform, SwapBatchTokens):
        return whole.whole if isinstance(whole, SwapBatchTokens) else SwapBatchTokens(whole)
    return Slice(whole, transform.dim, transform.head)


def streams_of(transform: StreamTransform | None) -> Iterator[int]:
    """Iterate over the numbers of the streams that a transform uses."""
    if isinstance(transform, Stream):
        yield transform.number
    elif isinstance(transform, Concat):
        for part in transform.parts:
            yield from streams_of(part)
    elif isinstance(transform, (Slice, SwapBatchTokens)):
        yield from streams_of(transform.whole)


def has_other_tokens(transform: StreamTransform) -> bool:
    """Return whether a part of a transform's result is made of no stream."""
    if isinstance(transform, Concat):
        return any(part is None or has_other_tokens(part) for part in transform.parts)
    if isinstance(transform, (Slice, SwapBatchTokens)):
        return has_other_tokens(transform.whole)
    return isinstance(transform, Unrelated)


def text(transform: StreamTransform, name: Callable[[int], str]) -> str:
    """Write a transform as text."""
    if isinstance(transform, Stream):
        return name(transform.number)
    if isinstance(transform, Concat):
        parts = ", ".join("other tokens" if part is None else text(part, name) for part in transform.parts)
        return f"cat({parts}; dim {transform.dim})"
    if isinstance(transform, Slice):
        return f"{'first' if transform.head else 'last'} of {text(transform.whole, name)} (dim {transform.dim})"
    return (
        f"{text(transform.whole, name)}, tokens and batch exchanged"
        if isinstance(transform, SwapBatchTokens)
        else "new"
    )


def recognise(value: Tensor, outputs: Sequence[Tensor | None]) -> StreamTransform | None:
    """Recognise by value how a tensor was made of a block's outputs.

    Of several joined parts, at least one has to match by value: the model may have added something to the others.
    ``None`` if the tensor was not made of the outputs, or could have been in several ways (equal text and image, say).

    Example:
        >>> image, text = torch.ones(1, 3, 8), torch.zeros(1, 2, 8)
        >>> recognise(torch.cat([text, image], 1), [image, text])
        Concat(parts=(Stream(number=1), Stream(number=0)), dim=1)
    """
    if value.is_meta:
        return None
    akin = [(i, out.to(value.dtype)) for i, out in enumerate(outputs) if out is not None and _akin(value, out)]
    readings = list(_readings(value, akin))
    best = max((rank for rank, _ in readings), default=None)
    likeliest = [transform for rank, transform in readings if rank == best]
    return likeliest[0] if len(likeliest) == 1 else None


def _readings(
    value: Tensor, outputs: Sequence[tuple[int, Tensor]]
) -> Iterator[tuple[tuple[int, ...], StreamTransform]]:
    """Iterate over the ways to make a tensor of some outputs, with a rank: kind, elements matched by value, parts."""
    for number, out in outputs:
        if out.shape == value.shape and torch.equal(out, value):
            yield (2,), Stream(number)
        turned = _turn(out, value.shape)
        if turned is not None and torch.equal(turned, value):
            yield (1,), SwapBatchTokens(Stream(number))
    for dim in range(value.dim()):
        pieces = [(i, out) for i, out in outputs if _resized(value.shape, dim, out.shape[dim]) == out.shape]
        for number, out in pieces:
            spare = out.shape[dim] - value.shape[dim]
            for head in (True, False):
                if spare > 0 and torch.equal(out.narrow(dim, 0 if head else spare, value.shape[dim]), value):
                    yield (0, value.numel()), Slice(Stream(number), dim, head)
        for count in range(1, min(len(pieces), 3) + 1):
            for chosen in permutations(pieces, count):
                for found, joined in _joints(value, chosen, dim):
                    yield (0, found, count), joined


def recognise_swap_by_shape(value: Tensor, outputs: Sequence[Tensor | None]) -> StreamTransform | None:
    """Recognise a swap of tokens and batch by shape alone, for a model that also adds something to the values."""
    fitting = [
        i
        for i, out in enumerate(outputs)
        if out is not None and out.shape != value.shape and _turnable(out, value.shape)
    ]
    return SwapBatchTokens(Stream(fitting[0])) if len(fitting) == 1 else None


def _joints(value: Tensor, pieces: Sequence[tuple[int, Tensor]], dim: int) -> Iterator[tuple[int, StreamTransform]]:
    """Iterate over the joins of parts in this order from either end, with the number of elements matched by value."""
    spare = value.shape[dim] - sum(out.shape[dim] for _, out in pieces)
    if spare < 0 or (spare == 0 and len(pieces) == 1):
        return
    for start in {0, spare}:
        offset, found = start, 0
        for _, out in pieces:
            length = out.shape[dim]
            found += out.numel() * torch.equal(value.narrow(dim, offset, length), out)
            offset += length
        parts: tuple[StreamTransform | None, ...] = tuple(Stream(number) for number, _ in pieces)
        if spare:
            parts = (None, *parts) if start else (*parts, None)
        if found:
            yield found, Concat(parts, dim)


def _join(transform: Concat, streams: Sequence[Tensor], shape: torch.Size) -> Tensor | None:
    known = [None if part is None else _length(part, streams, shape, transform.dim) for part in transform.parts]
    left = shape[transform.dim] - sum(length for length in known if length is not None)
    if left < 0:
        return None
    pieces = []
    for part, length in zip(transform.parts, known, strict=True):
        wanted = _resized(shape, transform.dim, left if length is None else length)
        piece = streams[0].new_zeros(wanted) if part is None else build(part, streams, wanted)
        if piece is None:
            return None
        pieces.append(piece)
    return torch.cat(pieces, transform.dim)


def _length(transform: StreamTransform, streams: Sequence[Tensor], shape: torch.Size, dim: int = 1) -> int:
    """Return a result's length along a dimension, as far as it follows from the streams; else that of ``shape``."""
    if isinstance(transform, Stream):
        return streams[transform.number].shape[dim]
    if isinstance(transform, Concat) and None not in transform.parts:
        return sum(_length(part, streams, shape, dim) for part in transform.parts if part is not None)
    return shape[dim]


def _akin(value: Tensor, out: Tensor) -> bool:
    floating = value.is_floating_point() and out.is_floating_point()
    return value.dim() == out.dim() and value.device == out.device and (floating or value.dtype == out.dtype)


def _resized(shape: torch.Size, dim: int, length: int) -> torch.Size:
    return torch.Size((*shape[:dim], length, *shape[dim + 1 :]))


def _turnable(whole: Tensor, shape: torch.Size) -> bool:
    """Whether ``(b f) n c`` can become ``(b n) f c`` of this shape."""
    if whole.dim() != 3 or len(shape) != 3 or whole.shape[2] != shape[2]:
        return False
    return whole.shape[0] * whole.shape[1] == shape[0] * shape[1] and not whole.shape[0] % max(shape[1], 1)


def _turned(shape: torch.Size, tokens: int) -> torch.Size:
    return torch.Size((shape[0] * shape[1] // max(tokens, 1), tokens, *shape[2:]))


def _turn(whole: Tensor | None, shape: torch.Size) -> Tensor | None:
    if whole is None or not _turnable(whole, shape):
        return None
    tokens, frames = whole.shape[1], shape[1]
    turned = whole.reshape(-1, frames, tokens, whole.shape[2]).transpose(1, 2)
    return turned.reshape(shape)
