"""Attached and compiled in whichever order and form users know: the steps that the policy says, two graphs for a whole
transformer, none more in later runs, outputs as in eager code, and what cannot be compiled so refused in words.
"""

import pytest
import torch
from compilers import Counted, breaks, fresh
from torch._dynamo.exc import Unsupported
from toys import Net

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.on("toy net"), pytest.mark.slow]

CONFIG, STEPS = DitCacheConfig(0, 2, 0, 3), 4
DRAWN = torch.Generator().manual_seed(0)
LATENTS, PROMPT = torch.randn(2, 6, 4, generator=DRAWN), torch.randn(2, 3, 8, generator=DRAWN)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


class Holder:
    """A pipeline, as far as a cache looks at it: its transformer may be assigned anew."""

    def __init__(self, transformer):
        self.transformer = transformer

    def __call__(self, *args, **kwargs):
        return self.transformer(*args, **kwargs)


def quiet():
    """Four blocks, which do not count how often they run: that would be compiled."""
    torch.manual_seed(0)
    net = Net("straight", 4)
    for block in net.blocks:
        block._forward_hooks.clear()
    return net


def attach(target, config=CONFIG):
    return dit_cache(target, config, blocks="transformer.blocks" if isinstance(target, Holder) else None)


def whole(net, **how):
    return torch.compile(net, **how)


def in_place(net, **how):
    net.compile(**how)
    return net


def its_forward(net, **how):
    net.forward = torch.compile(net.forward, **how)
    return net


def component(pipe, **how):
    pipe.transformer = torch.compile(pipe.transformer, **how)
    return pipe


def each_block(net, **how):
    for block in net.blocks:
        block.compile(**how)
    return net


def each_forward(net, **how):
    for block in net.blocks:
        block.forward = torch.compile(block.forward, **how)
    return net


def one_block(net, **how):
    net.blocks[1].compile(**how)
    return net


def unseen(net, **how):
    """In a way that nothing tells of: the model's forward is a function that calls a compiled one."""
    compiled = torch.compile(net.forward, **how)
    net.forward = lambda *args, **kwargs: compiled(*args, **kwargs)
    return net


WHOLE, PARTS = (whole, in_place, its_forward, component), (each_block, each_forward, one_block)


def step(called, number=0):
    with timestep_scope(number, steps=STEPS):
        return called(LATENTS, torch.tensor([1 - number / STEPS]), encoder_hidden_states=PROMPT).clone()


def run(called, cache):
    """The outputs of a run, and which of its steps were reused."""
    seen = len(cache.decisions)
    outputs = torch.stack([step(called, number) for number in range(STEPS)])
    return outputs, "".join("CR"[each.reuse] for each in cache.decisions[seen:])


def by_eager_code(config=CONFIG):
    net = quiet()
    plain = step(net)
    with dit_cache(net, config) as cache:
        return run(net, cache)[0], plain


@pytest.mark.parametrize("first", ["attached first", "compiled first"])
@pytest.mark.parametrize("way", [*WHOLE, *PARTS], ids=lambda way: way.__name__)
def test_every_order(way, first):
    """Two runs of four steps, every other one reused, then one step without: as in eager code, two graphs and one."""
    (expected, plain), backend = by_eager_code(), Counted()
    target = Holder(quiet()) if way is component else quiet()
    if first == "attached first":
        cache = attach(target)
        called = way(target, backend=backend, fullgraph=True)
    else:
        called = way(target, backend=backend, fullgraph=True)
        cache = attach(called)
    outputs, steps = run(called, cache)
    graphs = backend.graphs
    assert steps == "CRCR"
    assert torch.equal(outputs, expected)
    assert graphs == 2 if way in WHOLE else graphs <= 7
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs, steps = run(called, cache)
    assert steps == "CRCR"
    assert torch.equal(outputs, expected)
    cache.remove()
    for _ in range(2):
        assert torch.equal(step(called), plain)
    # A block whose forward was assigned while attached keeps its stand-in, inert: inside the range, and at its ends.
    assert backend.graphs - graphs <= (2 if way is each_forward else 1)
    assert not breaks()


def test_a_way_that_does_not_show():
    """Found out by the first call only: its residual is taken all the same, and there is one graph more."""
    (expected, _), backend, net = by_eager_code(), Counted(), quiet()
    with dit_cache(net, CONFIG) as cache:
        called = unseen(net, backend=backend, fullgraph=True)
        for _ in range(2):
            outputs, steps = run(called, cache)
            assert steps == "CRCR"
            assert torch.equal(outputs, expected)
    assert backend.graphs == 3


def test_after_a_run_in_eager_code():
    """Compiled after a run, with steps whose residual eager code would not keep: they make no graph of their own."""
    config, backend, net = DitCacheConfig(2, 2, 0, 3), Counted(), quiet()
    expected, _ = by_eager_code(config)
    with dit_cache(net, config) as cache:
        run(net, cache)
        called = torch.compile(net, backend=backend, fullgraph=True)
        outputs, steps = run(called, cache)
    assert steps == "CCCR"
    assert torch.equal(outputs, expected)
    assert backend.graphs == 2


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda net, **how: torch.compile(net.forward, **how),
        lambda net, **how: torch.compile(lambda *a, **k: net(*a, **k), **how),
    ],
    ids=["its forward alone", "a function that calls it"],
)
def test_what_cannot_be_one_graph_is_said_in_words(compile_it):
    """fullgraph=True of what leaves no place to decide in: the compiler's error says what to compile instead."""
    net = quiet()
    with dit_cache(net, CONFIG), pytest.raises(Unsupported, match=r"dithooks decides outside .*torch\.compile\(transf"):
        step(compile_it(net, backend="eager", fullgraph=True))


def test_a_function_that_calls_it():
    """Without fullgraph=True: the only break is at the transformer's call, the steps and outputs are right."""
    (expected, _), backend, net = by_eager_code(), Counted(), quiet()
    with dit_cache(net, CONFIG) as cache:
        called = torch.compile(lambda *args, **kwargs: net(*args, **kwargs), backend=backend)
        outputs, steps = run(called, cache)
    assert steps == "CRCR"
    assert torch.equal(outputs, expected)
    assert breaks() == 1


def test_updated_after_the_component_was_compiled():
    """A pipeline's transformer compiled and assigned back, then a handle's update: the same blocks are found again."""
    backend, pipe = Counted(), Holder(quiet())
    cache = attach(pipe, DitCacheConfig(2, 2, 0, 3))
    called = component(pipe, backend=backend, fullgraph=True)
    run(called, cache)
    cache.update(CONFIG)
    outputs, steps = run(called, cache)
    assert steps == "CRCR"
    assert torch.equal(outputs, by_eager_code()[0])
    cache.remove()
    assert torch.equal(step(called), by_eager_code()[1])
