"""Attached and removed again and again, or updated, while compiled, as a server does that caches some requests: the
code compiled first is found again, the compiler's limit is not met, and where it is, outputs are right,
or a warning says that they are not cached.
"""

import gc
import weakref

import pytest
import torch
from compilers import Counted, breaks, fresh
from torch._dynamo.exc import FailOnRecompileLimitHit
from toys import Net, latents, loop, prompt

from dithooks import DitCacheConfig, Linear, Reuse, dit_cache, timestep_scope
from dithooks.engine.stand_in import SkipBlock

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.on("toy net"), pytest.mark.slow]

CONFIG = DitCacheConfig(1, 2, 0, 3)


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


def quiet(depth=2):
    """Four blocks in two lists, which do not count how often they run: that would be compiled."""
    net = Net("two_lists", depth)
    for block in [*net.blocks, *net.singles]:
        block._forward_hooks.clear()
    return net


def drawn(number):
    """Latents and a prompt, other ones for every number."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2, 6, 4, generator=generator), torch.randn(2, 3, 8, generator=generator)


def runs(net, number, steps=4):
    """A run with inputs of its own."""
    x, e = drawn(number)
    return loop(net, x, steps=steps, scoped=True, encoder_hidden_states=e)


def cached(net, number, config=CONFIG, steps=4):
    """The same with a cache of its own."""
    with dit_cache(net, config) as cache:
        out = runs(net, number, steps)
        assert cache.stats.reused_calls > 0
    return out


def named(net):
    """A class that no other model's blocks are of."""

    class Own(type(net.blocks[0])):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    for block in [*net.blocks, *net.singles]:
        block.__class__ = Own
    return Own


def both(number):
    """The run without and with the cache, by eager code."""
    torch.manual_seed(0)
    net = quiet()
    plain, reused = runs(net, number), cached(net, number)
    assert (plain - reused).abs().max() > 1e-5
    return plain, reused


@pytest.mark.parametrize("how", ["whole", "blocks", "wrapped, the wrapper cached", "wrapped, the inside cached"])
def test_attached_and_removed_for_every_request(how):
    """Twelve requests, each with a cache of its own and then one without: three graphs in all, as many as for one."""
    expected = [both(number) for number in range(12)]
    torch.manual_seed(0)
    net, backend = quiet(), Counted()
    target = called = net
    if how == "whole":
        net.compile(backend=backend, fullgraph=True)
    elif how == "blocks":
        for block in [*net.blocks, *net.singles]:
            block.compile(backend=backend, fullgraph=True)
    else:
        called = torch.compile(net, backend=backend, fullgraph=True)
        target = called if how.endswith("wrapper cached") else net
    graphs = []
    for number, (plain, reused) in enumerate(expected):
        with dit_cache(target, CONFIG) as cache:
            torch.testing.assert_close(runs(called, number), reused, rtol=0, atol=0)
            assert cache.stats.reused_calls == 1
        assert not any(isinstance(block, SkipBlock) for block in [*net.blocks, *net.singles])
        torch.testing.assert_close(runs(called, number), plain, rtol=0, atol=0)
        graphs.append(backend.graphs)
    assert graphs[1:] == [graphs[1]] * 11
    assert graphs[0] == graphs[1] == (3 if how != "blocks" else 4)
    assert backend.runs >= 12 * 8 - 1
    assert not breaks()


def test_updated_while_compiled():
    """A handle that goes to other ranges and predictors and back, twice: as eager ones, two graphs for each range."""
    net, backend = quiet(), Counted()
    ranges = [(0, 4, None), (1, 2, None), (0, 4, Linear()), (2, 2, None)]
    configs = [DitCacheConfig(2, 2, first, number, predictor=how or Reuse()) for first, number, how in ranges]
    expected = [cached(net, 0, config, steps=6) for config in configs]
    plain = runs(net, 0, steps=6)
    assert all((one - other).abs().max() > 1e-6 for i, one in enumerate(expected) for other in expected[:i])
    net.compile(backend=backend, fullgraph=True)
    with dit_cache(net, configs[0]) as cache:
        for _ in range(2):
            for config, wanted in zip(configs, expected, strict=True):
                cache.update(config)
                torch.testing.assert_close(runs(net, 0, steps=6), wanted, rtol=0, atol=0)
                assert cache.stats.reused_calls == 2
            assert backend.graphs == 6
    torch.testing.assert_close(runs(net, 0, steps=6), plain, rtol=0, atol=0)
    assert backend.graphs == 7
    assert not breaks()


def test_compiled_in_the_middle_of_a_run():
    """Compiled after the first steps of a cached run: the run goes on, and reuses what eager code kept."""
    net, backend = quiet(), Counted()
    reused, (x, e) = cached(net, 0), drawn(0)
    with dit_cache(net, CONFIG) as cache:
        for k in range(4):
            if k == 2:
                net.compile(backend=backend, fullgraph=True)
            with timestep_scope(k):
                x = x - net(x, torch.tensor(1 - k / 4), encoder_hidden_states=e) / 4
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(x, reused, rtol=0, atol=0)
    assert backend.runs == 2


class TestTheLimit:
    """recompile_limit, at which the compiler gives a function up."""

    @pytest.mark.filterwarnings("ignore")
    def test_met_without_fullgraph(self):
        """The limit set to one graph: the compiler goes over to eager code, outputs stay right, steps are reused."""
        plain, reused = both(0)
        torch.manual_seed(0)
        net, backend = quiet(), Counted()
        net.compile(backend=backend)
        with torch._dynamo.config.patch(recompile_limit=1):
            for _ in range(3):
                torch.testing.assert_close(runs(net, 0), plain, rtol=0, atol=0)
                torch.testing.assert_close(cached(net, 0), reused, rtol=0, atol=0)
        assert backend.runs > 4

    def test_met_with_fullgraph(self):
        """The limit set to two graphs, one more needed: the compiler's error comes through, and removing cures it."""
        plain, reused = both(0)
        torch.manual_seed(0)
        net, backend = quiet(), Counted()
        net.compile(backend=backend, fullgraph=True)
        torch.testing.assert_close(runs(net, 0), plain, rtol=0, atol=0)
        with torch._dynamo.config.patch(recompile_limit=2):
            with dit_cache(net, CONFIG), pytest.raises(FailOnRecompileLimitHit):
                runs(net, 0)
            torch.testing.assert_close(runs(net, 0), plain, rtol=0, atol=0)
        torch.testing.assert_close(cached(net, 0), reused, rtol=0, atol=0)

    def test_fifty_requests_fit(self):
        """Fifty requests, with the limit set to the three graphs that one needs."""
        expected = both(1)
        torch.manual_seed(0)
        net, backend = quiet(), Counted()
        net.compile(backend=backend, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=3):
            for _ in range(50):
                torch.testing.assert_close(cached(net, 1), expected[1], rtol=0, atol=0)
                torch.testing.assert_close(runs(net, 1), expected[0], rtol=0, atol=0)
        assert backend.graphs == 3


class TestClassesOfStandIns:
    """Compiled code knows a block by its class, so stand-ins' classes outlive a cache; nothing else does."""

    def made(self, cls):
        gc.collect()  # the model, and then
        gc.collect()  # what it kept
        return [each for each in cls.__subclasses__() if issubclass(each, SkipBlock)]

    def test_they_go_with_the_model(self):
        """One class for all blocks of a class, kept by a compiled model alone, and gone with it."""
        net, backend = quiet(), Counted()
        cls = named(net)
        net.compile(backend=backend)
        for number in range(3):
            cached(net, number)
            assert len(self.made(cls)) == 1
        model = weakref.ref(net)
        del net
        torch._dynamo.reset()
        assert not self.made(cls)
        assert model() is None

    def test_none_of_a_model_that_is_not_compiled(self):
        """Without compiled code, no class is kept."""
        net = quiet()
        cls = named(net)
        cached(net, 0)
        assert not self.made(cls)

    def test_a_class_that_was_patched_is_not_used_again(self):
        """The block's class given another forward between two requests: the stand-ins are of a new class."""
        net, backend = quiet(), Counted()
        cls = named(net)
        net.compile(backend=backend)
        cached(net, 0)
        (first,) = self.made(cls)

        def forward(self, *args, more=None, **kwargs):
            return tuple(2 * each for each in super(cls, self).forward(*args, **kwargs))

        cls.forward = forward
        torch._dynamo.reset()
        with dit_cache(net, CONFIG):
            assert type(net.blocks[0]) is not first
            assert "more" in type(net.blocks[0]).forward.__wrapped__.__code__.co_varnames
            runs(net, 0)


def test_two_handles_in_turn():
    """Caches on two lists of one compiled model, put on and off five times: no graph after the second."""
    torch.manual_seed(0)
    net, backend, x, e = quiet(3), Counted(), latents(), prompt()

    def turn(first):
        ranges = DitCacheConfig(0, 2, 0, 3)
        handles = [dit_cache(net, ranges, blocks=name) for name in ("blocks", "singles")]
        out = loop(net, x, steps=4, scoped=True, encoder_hidden_states=e)
        assert [handle.stats.reused_calls for handle in handles] == [2, 2]
        for handle in handles if first else handles[::-1]:
            handle.remove()
        return out

    expected = turn(True)
    net.compile(backend=backend, fullgraph=True)
    graphs = []
    for number in range(5):
        torch.testing.assert_close(turn(number % 2), expected, rtol=0, atol=0)
        graphs.append(backend.graphs)
    assert graphs[1:] == graphs[1:2] * 4
    assert graphs[-1] <= 8
    assert not breaks()
