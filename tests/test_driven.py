"""Blocks that a loop calls otherwise than by calling the transformer and them: all the same."""

import numpy as np
import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, record, search, timestep_scope

STEPS = 8


class Block(nn.Module):
    def __init__(self, number, streams):
        super().__init__()
        self.image, self.text = nn.Linear(6, 6), nn.Linear(6, 6)
        self.number, self.streams = number, streams

    def forward(self, hidden_states, shift):
        if self.streams == 1:
            return hidden_states + torch.tanh(self.image(hidden_states) + shift)
        image, text = hidden_states
        return image + torch.tanh(self.image(image) + text.mean() + shift), text + torch.tanh(self.text(text) - shift)


class Transformer(nn.Module):
    def __init__(self, way, streams):
        super().__init__()
        self.way = way
        self.transformer_blocks = nn.ModuleList(Block(number, streams) for number in range(5))

    def forward(self, image, timestep):
        return blocks_by(self.way, self, image, timestep)


def blocks_by(way, transformer, image, timestep):
    streams = transformer.transformer_blocks[0].streams
    hidden_states = image if streams == 1 else (image, image[:, :2] * 0.5)
    for block in transformer.transformer_blocks:
        call = block.forward if way.endswith("block.forward") else block
        hidden_states = call(hidden_states, shift=timestep)
    return hidden_states if streams == 1 else hidden_states[0] + hidden_states[1].mean()


class Pipeline:
    """Calls the transformer or, in its own loop, its blocks."""

    def __init__(self, way, streams=1):
        torch.manual_seed(0)
        self.way, self.transformer = way, Transformer(way, streams)

    @torch.no_grad()
    def __call__(self):
        x = torch.linspace(-1, 1, 24).reshape(1, 4, 6)
        for step in range(STEPS):
            timestep = 1 - step / STEPS
            with timestep_scope(step, steps=STEPS):
                if self.way.startswith("loop"):
                    velocity = blocks_by(self.way, self.transformer, x, timestep)
                elif self.way == "forward":
                    velocity = self.transformer.forward(x, timestep)
                else:
                    velocity = self.transformer(x, timestep)
            x = x - velocity / STEPS
        return [x[0].numpy()]


WAYS = ("called", "forward", "called, block.forward", "loop", "loop, block.forward")
PATH = "transformer.transformer_blocks"


@pytest.mark.parametrize("streams", [1, pytest.param(2, id="tuple")])
@pytest.mark.parametrize("way", WAYS[1:])
@pytest.mark.parametrize(("first", "number"), [(0, 5), (1, 3), (2, 1)])
def test_cached_as_if_they_were_called(way, streams, first, number):
    config, outs = DitCacheConfig(1, 3, first, number), []
    for each in ("called", way):
        pipeline = Pipeline(each, streams)
        with dit_cache(pipeline, config, blocks=PATH) as cache:
            outs.append(pipeline()[0])
            assert (cache.stats.reused_calls, cache.stats.blocks_run) == (4, 5 * STEPS - 4 * number)
    np.testing.assert_array_equal(*outs)


@pytest.mark.parametrize("way", WAYS[1:])
def test_recorded_as_if_they_were_called(way):
    known, pipeline = record(Pipeline("called"), lambda pipe: pipe(), blocks=PATH), Pipeline(way)
    before = [dict(vars(module)) for module in pipeline.transformer.modules()], list(pipeline.transformer.modules())
    found = record(pipeline, lambda pipe: pipe(), blocks=PATH)
    (ours,), (theirs,) = found.traces, known.traces
    np.testing.assert_allclose(ours.grams, theirs.grams)
    np.testing.assert_array_equal(ours.ranges, theirs.ranges)
    assert (found.steps, ours.branches, ours.calls) == (STEPS, 1.0, STEPS)
    after = [dict(vars(module)) for module in pipeline.transformer.modules()], list(pipeline.transformer.modules())
    assert after[0] == before[0]
    assert all(one is other for one, other in zip(before[1], after[1], strict=True))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("interval", [None, 2])
def test_searched_as_if_they_were_called(way, interval):
    pipeline = Pipeline(way)
    found = search(pipeline, lambda pipe: pipe(), 1.4, cost="blocks", blocks=PATH, interval=interval, verbose=False)
    assert found.reached
    assert len(found.evaluations) == 4
    assert found.plan.speedup >= 1.4


def test_a_run_that_calls_nothing_of_it_is_an_error_still():
    with pytest.raises(ValueError, match="run made no step of the target"):
        record(Pipeline("called"), lambda pipe: [torch.ones(3)], blocks=PATH)
