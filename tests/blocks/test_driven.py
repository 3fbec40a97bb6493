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
    found = search(
        pipeline, lambda pipe: pipe(), 1.4, cost="blocks", blocks=PATH, interval=interval, max_runs=6.0, verbose=False
    )
    assert found.reached
    assert len(found.evaluations) == 4
    assert found.plan.speedup >= 1.4


def test_a_run_that_calls_nothing_of_it_is_an_error_still():
    with pytest.raises(ValueError, match="run made no step of the target"):
        record(Pipeline("called"), lambda pipe: [torch.ones(3)], blocks=PATH)


class TestRunsThatDoMore:
    def left(self, pipeline):
        blocks = list(pipeline.transformer.transformer_blocks)
        return blocks, [dict(vars(module)) for module in pipeline.transformer.modules()]

    @pytest.mark.parametrize("way", ["called", "loop"])
    def test_a_list_that_the_run_rebuilds(self, way):
        pipeline = Pipeline(way)
        blocks = list(pipeline.transformer.transformer_blocks)

        def run(pipe):
            pipe.transformer.transformer_blocks = nn.ModuleList(pipe.transformer.transformer_blocks)
            return pipe()

        record(pipeline, run, blocks=PATH)
        assert all(one is other for one, other in zip(pipeline.transformer.transformer_blocks, blocks, strict=True))

    def test_a_block_that_the_run_replaces_is_the_run_s(self):
        pipeline, new = Pipeline("called"), Block(9, 1)

        def run(pipe):
            results = pipe()
            pipe.transformer.transformer_blocks[2] = new
            return results

        record(pipeline, run, blocks=PATH)
        assert pipeline.transformer.transformer_blocks[2] is new
        assert not new._forward_hooks

    def test_a_list_that_the_run_shortens_does_not_hide_its_error(self):
        pipeline = Pipeline("called")

        def run(pipe):
            del pipe.transformer.transformer_blocks[-1]
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            record(pipeline, run, blocks=PATH)
        assert type(pipeline.transformer.transformer_blocks[0]) is Block

    @pytest.mark.parametrize("beforehand", [(0,), (2,), (0, 0, 3)])
    def test_blocks_that_are_called_by_themselves_beforehand(self, beforehand):
        def run(pipe):
            with torch.no_grad(), timestep_scope(0, steps=STEPS):
                for number in beforehand:
                    pipe.transformer.transformer_blocks[number](torch.ones(1, 4, 6), shift=1.0)
            return pipe()

        known = record(Pipeline("called"), lambda pipe: pipe(), blocks=PATH).traces[0]
        found = record(Pipeline("loop"), run, blocks=PATH).traces[0]
        np.testing.assert_allclose(found.grams, known.grams)
        np.testing.assert_array_equal(found.ranges, known.ranges)

    @pytest.mark.parametrize("ways", [("called", "loop"), ("loop", "called")])
    def test_one_transformer_that_is_called_and_one_that_is_not(self, ways):
        class Both:
            def __init__(self):
                torch.manual_seed(0)
                self.transformer, self.transformer_2 = Transformer(ways[0], 1), Transformer(ways[1], 1)

            @torch.no_grad()
            def __call__(self):
                x = torch.linspace(-1, 1, 24).reshape(1, 4, 6)
                for step in range(STEPS):
                    name = "transformer" if step < 4 else "transformer_2"
                    each, timestep = getattr(self, name), 1 - step / STEPS
                    with timestep_scope(step, steps=STEPS):
                        velocity = each(x, timestep) if each.way == "called" else blocks_by("loop", each, x, timestep)
                    x = x - velocity / STEPS
                return [x[0].numpy()]

        paths = [PATH, PATH.replace("transformer.", "transformer_2.")]
        calls = []

        def run(pipe):
            calls.append(0)
            return pipe()

        found = search(Both(), run, 1.4, cost="blocks", blocks=paths, verbose=False)
        assert found.reached
        assert [trace.calls for trace in found.recording.traces] == [4 * (way == "called") or 4 for way in ways]
        assert len(calls) == 2 + len(found.evaluations)
        assert found.run_equivalents == pytest.approx(2 + sum(each.blocks for each in found.evaluations))

    def test_streams_that_cannot_be_followed_are_the_reason(self):
        pipeline = Pipeline("loop")
        for block in pipeline.transformer.transformer_blocks:
            block.forward = lambda hidden_states: torch.cat([hidden_states, hidden_states], 1)

        @torch.no_grad()
        def run(pipe):
            for step in range(3):
                with timestep_scope(step):
                    h = torch.ones(1, 2, 6)
                    for block in pipe.transformer.transformer_blocks:
                        h = block(h)
            return [h]

        with pytest.raises(ValueError, match=r"no range of its blocks can be followed: .*carry on"):
            record(pipeline, run, blocks=PATH)


def test_a_reset_is_not_the_end_of_a_cache():
    for way in WAYS:
        pipeline = Pipeline(way)
        with dit_cache(pipeline, DitCacheConfig(1, 3, 1, 3), blocks=PATH) as cache:
            pipeline()
            cache.reset()
            pipeline()
            assert cache.stats.reused_calls == 4
