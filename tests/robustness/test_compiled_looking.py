"""Policies that look at a call before they settle it, compiled block by block without a graph break, and compiled
whole, where the decision is the one break there is: decisions and outputs as in eager code, no graph more in later
runs.
"""

import pytest
import torch
from compilers import Counted, breaks, fresh
from torch._dynamo.exc import Unsupported
from toys import Net, Pipe, latents, prompt

from dithooks import Budget, DitCacheConfig, EasyCache, Linear, Threshold, dit_cache

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.on("toy net"), pytest.mark.slow]

LOOKING = {
    "threshold, F=0": DitCacheConfig(policy=Threshold(0.4, 2), predictor=Linear()),
    "threshold, F=1": DitCacheConfig(cache_block_start=1, policy=Threshold(0.4, 2)),
    "EasyCache": DitCacheConfig(policy=EasyCache(0.15, max_warmup_steps=2)),
    "budget": DitCacheConfig(cache_block_start=1, policy=Budget(1.3)),
}
STEPS, CALLS = 10, 20


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


@pytest.fixture
def pipe():
    net = Net("two_lists", 2)
    for block in [*net.blocks, *net.singles]:
        block._forward_hooks.clear()  # they count, which would be compiled
    return Pipe(net)


def tried(pipe, config, compile_it):
    """Three runs, guided by two calls a step, checked against eager code; how many looked, and the backend."""
    x, prompts, backend = latents(), [prompt(), prompt()], Counted()
    with dit_cache(pipe, config) as cache:
        expected = pipe(x, STEPS, prompts)
        told = [each[2:6] for each in cache.decisions]
    assert len(told) == CALLS
    assert {reuse for _, _, reuse, _ in told} == {True, False}
    compile_it(backend)
    graphs = []
    with dit_cache(pipe, config) as cache:
        for run in range(3):
            torch.testing.assert_close(pipe(x, STEPS, prompts), expected, rtol=1e-5, atol=1e-6)
            assert [each[2:6] for each in cache.decisions][run * CALLS :] == told
            graphs.append(backend.graphs)
    assert graphs[1] == graphs[2]
    return sum(each.value is not None for each in cache.decisions), backend


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.filterwarnings("ignore:.*[Bb]udget.*")
def test_by_blocks(pipe, name):
    """fullgraph=True for every block: three runs without a break, with a bounded number of graphs."""

    def compile_it(backend):
        for block in [*pipe.transformer.blocks, *pipe.transformer.singles]:
            block.compile(backend=backend, fullgraph=True)

    looked, backend = tried(pipe, LOOKING[name], compile_it)
    assert looked > 10
    assert not breaks()
    assert 2 < backend.graphs <= 12
    assert backend.runs > 3 * CALLS


@pytest.mark.parametrize("name", LOOKING)
@pytest.mark.filterwarnings("ignore:.*[Bb]udget.*")
def test_whole_with_breaks_that_nest(pipe, name):
    """The compiler set to resume in nested calls: the decision is the only thing that breaks a graph."""
    with torch._dynamo.config.patch(nested_graph_breaks=True):
        looked, backend = tried(pipe, LOOKING[name], lambda backend: pipe.transformer.compile(backend=backend))
    assert 1 <= breaks() <= looked
    assert all("CallDecider.judge" in why for why in torch._dynamo.utils.counters["graph_break"])
    assert backend.graphs <= 16
    assert backend.runs >= 3 * CALLS


@pytest.mark.parametrize("name", ["threshold, F=0", "threshold, F=1"])
def test_whole_by_default(pipe, name):
    """By default the compiler leaves all of forward at such a break, and compiles what it calls: still right."""
    looked, backend = tried(pipe, LOOKING[name], lambda backend: pipe.transformer.compile(backend=backend))
    assert 1 <= breaks() <= looked
    assert backend.graphs <= 24
    assert backend.runs >= 3 * CALLS


def test_whole_with_fullgraph_is_refused(pipe):
    """fullgraph=True asks for no break at all: the compiler's error says so, and the cache removed, the model runs."""
    x, e = latents(), prompt()
    plain = pipe(x, STEPS, [e])
    pipe.transformer.compile(backend="eager", fullgraph=True)
    with dit_cache(pipe, LOOKING["threshold, F=1"]), pytest.raises(Unsupported, match=r"compile_repeated_blocks"):
        pipe(x, STEPS, [e])
    torch.testing.assert_close(pipe(x, STEPS, [e]), plain, rtol=1e-5, atol=1e-6)
