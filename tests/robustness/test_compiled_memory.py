"""``mode="reduce-overhead"``, whose CUDA graphs write every output where the last one lay: simulated by a backend that
fills outputs of earlier calls with NaN. What is kept survives, as it is copied out of what compiled code returned.
"""

import pytest
import torch
from compilers import Overwriting, breaks, flux, fresh, inputs, sample
from toys import Net, latents, loop, prompt

from dithooks import DitCacheConfig, EasyCache, Linear, Mask, Taylor, Threshold, dit_cache

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.on("tiny FLUX, simulated CUDA graphs"), pytest.mark.slow]

CONFIGS = {
    "interval": DitCacheConfig(2, 2, 0, 4),
    "Taylor": DitCacheConfig(policy=Mask((1, 1, 1, 0, 1, 0, 0, 0)), predictor=Taylor(2)),
    "threshold": DitCacheConfig(cache_block_start=1, policy=Threshold(0.4, 2), predictor=Linear()),
    "EasyCache": DitCacheConfig(policy=EasyCache(0.15, max_warmup_steps=2)),
}


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.on("toy net, simulated CUDA graphs")
def test_what_is_kept_survives(name):
    """Two cached runs, every output of an earlier call overwritten: equal to eager ones, with the same decisions."""
    net, config, backend = Net("two_lists", 2), CONFIGS[name], Overwriting()
    for block in [*net.blocks, *net.singles]:
        block._forward_hooks.clear()  # they count, which would be compiled
    x, e = latents(), prompt()
    with dit_cache(net, config) as cache:
        expected = loop(net, x, steps=8, scoped=True, encoder_hidden_states=e)
        told = [each[2:6] for each in cache.decisions]
    assert {reuse for _, _, reuse, _ in told} == {True, False}
    looks = config.when.metric is not None
    called = net
    if name == "interval":  # which does not show from inside, but by the tracing of it
        called = torch.compile(net, backend=backend, fullgraph=True)
    else:
        net.compile(backend=backend, fullgraph=not looks)
    with dit_cache(net, config) as cache:
        for run in range(2):
            got = loop(lambda *a, **k: called(*a, **k).clone(), x, steps=8, scoped=True, encoder_hidden_states=e)
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
            assert [each[2:6] for each in cache.decisions][run * 8 :] == told
    assert backend.overwritten > 8
    if not looks:
        assert not breaks()


def test_on_a_whole_transformer():
    """Compiled in place, the line through two residuals: two graphs, as eager code, the call that is tested, too."""
    model, given, config, backend = flux(), inputs(), DitCacheConfig(2, 2, 1, 3, predictor=Linear()), Overwriting()
    with dit_cache(model, config):
        expected = sample(model, given)
    model.compile(backend=backend, fullgraph=True)
    with dit_cache(model, config) as cache:
        torch.testing.assert_close(sample(model, given), expected, rtol=1e-5, atol=1e-5)
        assert cache.stats.reused_calls == 3
    assert backend.graphs == 2
    assert backend.overwritten > 8
    assert not breaks()


def test_the_simulation_overwrites():
    """An output that was not copied is another one after the next call: what the cache kept would be, too."""
    model, given, backend = flux(), inputs(), Overwriting()
    model.compile(backend=backend, fullgraph=True)
    first = model(**given, timestep=torch.ones(1), return_dict=False)[0]
    was = first.clone()
    model(**given, timestep=torch.zeros(1), return_dict=False)
    assert was.isfinite().all()
    assert (first - was).abs().max() > 1e-2
