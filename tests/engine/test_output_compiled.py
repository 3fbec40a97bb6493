"""Compiled transformers whose whole call is left out: one graph, no break, and none compiled again."""

import pytest
import torch
from outputs_by_hand import OutputsByHand, counted, line
from torch import nn
from torch._dynamo.utils import counters
from toys import Pipe, Single, latents

from dithooks import DitCacheConfig, Interval, Linear, dit_cache

pytestmark = pytest.mark.slow
STEPS = 8
EVERY_SECOND = DitCacheConfig(policy=Interval(2, 2), predictor=Linear(), payload="output")


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Single(4) for _ in range(3))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep.expand(hidden_states.shape[0], 4))
        return hidden_states


def whole(pipe, net, early):
    pipe.transformer = torch.compile(net, backend="eager", fullgraph=early)  # what leaves calls out is no graph


def in_place(pipe, net, early):
    net.compile(backend="eager", fullgraph=True)


def blocks(pipe, net, early):
    for block in net.blocks:
        block.compile(backend="eager", fullgraph=True)


@pytest.fixture(autouse=True)
def _compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("way", [whole, in_place, blocks])
@pytest.mark.parametrize("early", [True, False], ids=["compiled first", "cached first"])
def test_one_graph(way, early):
    net, x = Plain(), latents()
    hand = Pipe(net)
    hand.transformer = OutputsByHand(net, counted(hand.scheduler), (0, 1, 2, 4, 6), line)
    expected, pipe = hand(x, STEPS), Pipe(net)
    if early:
        way(pipe, net, early)
    held = pipe.transformer
    with dit_cache(pipe, EVERY_SECOND) as cache:
        if not early:
            way(pipe, pipe.transformer, early)
        for _ in range(2):
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
        assert cache.stats.reused_calls == 6
    if early:
        assert pipe.transformer is held
        with dit_cache(pipe, EVERY_SECOND):  # attached again: nothing is compiled again
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
    elif way is whole:
        assert pipe.transformer._orig_mod is net
    pipe(x, STEPS)
    assert counters["stats"]["unique_graphs"] == 1 or (not early and way is whole)
    assert not counters["graph_break"]


def test_a_loop_that_is_compiled_is_cached_all_the_same():
    net, x = Plain(), latents()
    pipe = Pipe(net)
    with dit_cache(pipe, EVERY_SECOND) as cache:
        expected = pipe(x, STEPS)
        found = torch.compile(lambda x: pipe(x, STEPS), backend="eager")(x)
        assert cache.stats.reused_calls == 6
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)
