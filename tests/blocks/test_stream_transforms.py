"""What a model does to streams between two blocks: told by values, done again to other values and other lengths."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks.blocks.stream_transforms import (
    Concat,
    Slice,
    Stream,
    SwapBatchTokens,
    Unrelated,
    build,
    recognise,
    recognise_swap_by_shape,
    streams_of,
    substitute,
    text,
)

LENGTHS = st.integers(1, 5)


def random(*shape):
    return torch.randn(shape, dtype=torch.float64)


def turned(x, frames):
    """``(b f) n c`` to ``(b n) f c``, by NumPy."""
    bf, n, c = x.shape
    return np.ascontiguousarray(x.numpy().reshape(bf // frames, frames, n, c).swapaxes(1, 2)).reshape(-1, frames, c)


class TestRecognised:
    @given(LENGTHS, LENGTHS, st.booleans(), st.booleans())
    def test_two_streams_joined_in_either_order(self, text_tokens, image_tokens, swapped, changed):
        """Also where something was added to one of them, as a ControlNet does to the last block's output."""
        e, h = random(2, text_tokens, 4), random(2, image_tokens, 4)
        added = h + random(*h.shape) if changed else h
        whole = torch.cat([added, e] if swapped else [e, added], 1)
        expected = (Stream(1), Stream(0)) if swapped else (Stream(0), Stream(1))
        assert recognise(whole, [e, h]) == Concat(expected, 1)

    def test_three_streams(self):
        a, b, c = (random(1, n, 4) for n in (2, 3, 4))
        assert recognise(torch.cat([c, a, b], 1), [a, b, c]) == Concat((Stream(2), Stream(0), Stream(1)), 1)

    @pytest.mark.parametrize("first", [True, False])
    def test_tokens_from_elsewhere(self, first):
        h, other = random(2, 3, 4), random(2, 2, 4)
        whole = torch.cat([h, other] if first else [other, h], 1)
        assert recognise(whole, [h]) == Concat((Stream(0), None) if first else (None, Stream(0)), 1)

    @pytest.mark.parametrize("head", [True, False])
    def test_a_part(self, head):
        h = random(2, 5, 4)
        assert recognise(h[:, :3] if head else h[:, 2:], [None, h]) == Slice(Stream(1), 1, head)

    def test_a_copy(self):
        h = random(2, 5, 4)
        assert recognise(h.clone(), [random(2, 5, 4), h]) == Stream(1)

    @given(LENGTHS, LENGTHS, LENGTHS)
    def test_tokens_and_batch_exchanged(self, batch, frames, tokens):
        h = random(batch * frames, tokens, 3)
        there = torch.from_numpy(turned(h, frames))
        found = recognise(there, [h])
        # with one frame or one token nothing moves, and it may be the very stream
        assert found == (Stream(0) if torch.equal(there, h) and there.shape == h.shape else SwapBatchTokens(Stream(0)))

    def test_what_was_added_to_leaves_the_shape_to_tell(self):
        h = random(6, 4, 3)
        assert recognise(random(8, 3, 3), [h]) is None
        assert recognise_swap_by_shape(random(8, 3, 3), [h]) == SwapBatchTokens(Stream(0))
        assert recognise_swap_by_shape(random(8, 3, 3), [h, h]) is None  # which one?

    def test_what_could_be_made_in_several_ways_is_not_guessed(self):
        """Text that is a copy of the image, as at a first step it may be."""
        h = random(2, 3, 4)
        assert recognise(h.clone(), [h, h.clone()]) is None
        assert recognise(torch.cat([h, h], 1), [h, h.clone()]) is None
        assert recognise(torch.ones(2, 2, 4), [torch.ones(2, 3, 4)]) is None  # its first tokens, or its last?

    def test_a_copy_in_another_dtype(self):
        h, e = random(2, 3, 4), random(2, 2, 4)
        assert recognise(h.float(), [h, e]) == Stream(0)
        assert recognise(h.long(), [h, e]) is None

    def test_nothing_that_is_unlike(self):
        h, e = random(2, 3, 4), random(2, 2, 4)
        woven = torch.cat([e[:, :1], h, e[:, 1:]], 1)
        for value in (random(2, 5, 4), woven, h[0], random(2, 3, 4)):
            assert recognise(value, [h, e]) is None


class TestBuilt:
    @settings(max_examples=60)
    @given(LENGTHS, LENGTHS, LENGTHS, st.integers(0, 2))
    def test_lengths_are_those_of_the_tensors_at_hand(self, text_tokens, image_tokens, others, where):
        """A transform that was recognised at one resolution holds at any other."""
        parts = [Stream(1), Stream(0)]
        parts.insert(where, None)
        e, h = random(2, text_tokens, 4), random(2, image_tokens, 4)
        pieces = [h.numpy(), e.numpy()]
        pieces.insert(where, np.zeros((2, others, 4)))
        expected = np.concatenate(pieces, 1)
        made = build(Concat(tuple(parts), 1), [e, h], torch.Size(expected.shape))
        np.testing.assert_array_equal(made.numpy(), expected)

    @given(LENGTHS, LENGTHS, LENGTHS)
    def test_tokens_and_batch_exchanged_there_and_back(self, batch, frames, tokens):
        h = random(batch * frames, tokens, 3)
        there = turned(h, frames)
        made = build(SwapBatchTokens(Stream(0)), [h], torch.Size(there.shape))
        np.testing.assert_array_equal(made.numpy(), there)
        back = build(SwapBatchTokens(Stream(0)), [made], h.shape)
        assert torch.equal(back, h)

    def test_a_part(self):
        h = random(2, 6, 4)
        assert torch.equal(build(Slice(Stream(0), 1, True), [h], torch.Size((2, 2, 4))), h[:, :2])
        assert torch.equal(build(Slice(Stream(0), 1, False), [h], torch.Size((2, 2, 4))), h[:, 4:])
        assert build(Slice(Stream(0), 1, False), [h], torch.Size((2, 7, 4))) is None

    def test_what_is_new_starts_from_nothing(self):
        assert torch.equal(build(Unrelated(), [random(1)], torch.Size((2, 3))), torch.zeros(2, 3, dtype=torch.float64))

    @pytest.mark.parametrize("transform", [Stream(0), Concat((Stream(0), Stream(0)), 1), SwapBatchTokens(Stream(0))])
    def test_shapes_that_do_not_fit_give_nothing(self, transform):
        assert build(transform, [random(2, 3, 4)], torch.Size((2, 5, 4))) is None

    @pytest.mark.parametrize(
        ("transform", "shape"),
        [
            (Concat((Stream(1), None, Stream(0)), 1), (2, 9, 4)),
            (SwapBatchTokens(Stream(0)), (3, 2, 4)),
            (Slice(Concat((Stream(0), Stream(1)), 1), 1, False), (2, 4, 4)),
        ],
    )
    def test_it_is_linear(self, transform, shape):
        """That is why the same can be done to −h_in, and the residual comes out as if it were done to both."""
        a, b = [random(2, 3, 4), random(2, 4, 4)], [random(2, 3, 4), random(2, 4, 4)]
        both = build(transform, [x - 2 * y for x, y in zip(a, b, strict=True)], torch.Size(shape))
        apart = build(transform, a, torch.Size(shape)) - 2 * build(transform, b, torch.Size(shape))
        torch.testing.assert_close(both, apart)


class TestOneAfterAnother:
    def test_twice_exchanged_is_as_before(self):
        assert substitute(SwapBatchTokens(Stream(0)), {0: SwapBatchTokens(Stream(3))}) == Stream(3)

    def test_joined_with_the_joined(self):
        inner = Concat((Stream(1), None), 1)
        assert substitute(Concat((Stream(0), Stream(1)), 1), {0: inner, 1: Stream(5)}) == Concat(
            (Stream(1), None, Stream(5)), 1
        )

    def test_a_part_of_the_joined(self):
        e, h = random(2, 2, 4), random(2, 3, 4)
        transform = substitute(Slice(Stream(0), 1, False), {0: Concat((Stream(0), Stream(1)), 1)})
        assert torch.equal(build(transform, [e, h], h.shape), h)

    def test_what_is_lost_stays_lost(self):
        assert substitute(Stream(0), {0: None}) is None
        assert substitute(SwapBatchTokens(Stream(0)), {}) is None
        assert substitute(Concat((Stream(0), Stream(1), None), 1), {0: Stream(0), 1: None}) is None  # two unknown

    def test_streams_and_words(self):
        transform = Concat((Stream(1), None, Slice(SwapBatchTokens(Stream(0)), 1, True)), 1)
        assert sorted(streams_of(transform)) == [0, 1]
        assert text(transform, "ab".__getitem__) == (
            "cat(b, other tokens, first of a, tokens and batch exchanged (dim 1); dim 1)"
        )
