"""Blocks that return one tensor twice: a reused step does so, too, with and without a declared pattern."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from dithooks import BlockAdapter, DitCacheConfig, Threshold, dit_cache

STEPS, X = 8, torch.ones(1, 3, 4)
WEIGHTS = [0.1 * number + 0.7 for number in range(6)]
PATTERNS = {None: "both", 4: "h, e", 5: "e, h"}


@dataclass
class Pair:
    h: torch.Tensor
    e: torch.Tensor


class Block(nn.Module):
    def __init__(self, factor, form):
        super().__init__()
        self.factor, self.form = factor, form

    def forward(self, hidden_states, timestep):
        h = hidden_states * self.factor + timestep
        return {"tuple": (h, h), "list": [h, h], "dict": {"h": h, "e": h}, "dataclass": Pair(h, h)}[self.form]


class Model(nn.Module):
    """Hands on the output ``taken`` of each block, or adds up both of them behind the last one."""

    def __init__(self, taken, form="tuple", writes=False):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Block(factor, form) for factor in WEIGHTS)
        self.taken, self.writes, self.were_twins = taken, writes, []

    def forward(self, hidden_states, timestep):
        h = hidden_states
        for block in self.transformer_blocks:
            outputs = block(h, timestep)
            outputs = list(outputs.values()) if isinstance(outputs, dict) else outputs
            pair = (outputs.h, outputs.e) if isinstance(outputs, Pair) else tuple(outputs)
            self.were_twins.append(pair[0] is pair[1])
            h = pair[self.taken]
        if self.writes:
            pair[0].add_(1)  # shows in the other one, if they are one tensor
        return pair[0] + 10 * pair[1]


def by_hand(start, writes):
    """Reused at the odd steps: what the blocks from ``start`` on, the last one left out, did at the step before."""
    outputs, delta = [], None
    for step in range(STEPS):
        t, h = torch.tensor(float(STEPS - step)), X + step
        for factor in WEIGHTS[:start]:
            h = h * factor + t
        entered = h
        if step % 2:
            h = h + delta
        else:
            for factor in WEIGHTS[start:5]:
                h = h * factor + t
            delta = h - entered
        h = h * WEIGHTS[5] + t
        outputs.append(11 * (h + writes))
    return outputs


def run(model):
    with torch.no_grad():
        return [model(X + step, torch.tensor(float(STEPS - step))) for step in range(STEPS)]


def same(ones, others):
    return all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(ones, others, strict=True))


@pytest.mark.parametrize("form", ["tuple", "list", "dict", "dataclass"])
@pytest.mark.parametrize("taken", [0, 1])
@pytest.mark.parametrize("start", [0, 1])
def test_one_tensor_twice(taken, start, form):
    model = Model(taken, form)
    with dit_cache(model, DitCacheConfig(0, 2, start, 5 - start)) as cache:
        outputs = run(model)
        assert cache.stats.reused_calls == STEPS // 2
    assert same(outputs, by_hand(start, 0))
    assert all(model.were_twins)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("taken", [0, 1])
def test_a_pattern_is_no_objection(pattern, taken):
    """Whichever of the two is declared the stream: they are one."""
    model = Model(taken)
    target = model if pattern is None else BlockAdapter(model, blocks="transformer_blocks", forward_pattern=pattern)
    with dit_cache(target, DitCacheConfig(0, 2, 1, 4)) as cache:
        outputs = run(model)
        assert cache.stats.reused_calls == STEPS // 2
    assert same(outputs, by_hand(1, 0))


def test_the_end_of_the_range_is_written_into():
    """Behind a range that ends with the last block, the model writes into one output and reads the other."""
    model = Model(1, writes=True)
    with dit_cache(model, DitCacheConfig(0, 2, 0, 6)) as cache:
        outputs = run(model)
        assert cache.stats.reused_calls == STEPS // 2
    expected, delta = [], None
    for step in range(STEPS):
        t, h = torch.tensor(float(STEPS - step)), X + step
        entered = h
        if step % 2:
            h = h + delta
        else:
            for factor in WEIGHTS:
                h = h * factor + t
            delta = h - entered
        expected.append(11 * (h + 1))
    assert same(outputs, expected)
    assert all(model.were_twins)


class Both(Block):
    """Takes both streams, which are one tensor from the second block on."""

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        h = hidden_states * self.factor + 0.01 * encoder_hidden_states + timestep
        return h, h


class TwoStreams(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList(Both(factor, "tuple") for factor in WEIGHTS)

    def forward(self, hidden_states, encoder_hidden_states, timestep):
        h, e = hidden_states, encoder_hidden_states
        for block in self.transformer_blocks:
            e, h = block(h, e, timestep)
        return h - 0.5 * e


@pytest.mark.parametrize("pattern", [None, 0, 1])
@pytest.mark.parametrize("start", [0, 2])
def test_two_streams_that_become_one(pattern, start):
    model, text = TwoStreams(), torch.full((1, 3, 4), 5.0)
    target = model if pattern is None else BlockAdapter(model, blocks="transformer_blocks", forward_pattern=pattern)
    with torch.no_grad(), dit_cache(target, DitCacheConfig(0, 2, start, 6 - start)) as cache:
        outputs = [model(X + step, text, torch.tensor(float(STEPS - step))) for step in range(STEPS)]
        assert cache.stats.reused_calls == STEPS // 2
    expected, delta = [], None
    for step in range(STEPS):
        t, h, e = torch.tensor(float(STEPS - step)), X + step, text
        for factor in WEIGHTS[:start]:
            h = e = h * factor + 0.01 * e + t
        entered = h
        if step % 2:
            h = h + delta
        else:
            for factor in WEIGHTS[start:]:
                h = e = h * factor + 0.01 * e + t
            delta = h - entered
        expected.append(h - 0.5 * h)
    assert same(outputs, expected)


class Sometimes(nn.Module):
    """From some step on, the last block returns two tensors."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block(factor, "tuple") for factor in WEIGHTS)
        self.apart = False
        self.blocks[5].forward = self.last

    def last(self, hidden_states, timestep):
        h = hidden_states * WEIGHTS[5] + timestep
        return (h, h + 1) if self.apart else (h, h)

    def forward(self, hidden_states, timestep):
        h = hidden_states
        for block in self.blocks:
            h, e = block(h, timestep)
        return h + 10 * e


def test_twins_that_part_later_are_computed():
    """What is another tensor now has no residual: that step is not reused from, rather than wrongly."""
    model, plain = Sometimes(), Sometimes()
    config = DitCacheConfig(policy=Threshold(1e9, max_warmup_steps=1), cache_block_start=0)
    with torch.no_grad(), dit_cache(model, config) as cache:
        for step in range(4):
            if step == 2:
                model.apart = plain.apart = True
                cache.reset()
            out = model(X + step, torch.tensor(8.0 - step))
        assert torch.equal(out, plain(X + 3, torch.tensor(5.0)))
        assert cache.stats.reused_calls == 0
