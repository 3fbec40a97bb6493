"""The model is trained, or differentiated through, while the cache is attached: nothing is cached or reused, gradients
are bit for bit those of a plain model, and one warning says so.
"""

import copy
import gc
import warnings
import weakref

import pytest
import torch
from toys import Net, latents, loop, prompt

from dithooks import DitCacheConfig, Linear, Mask, Threshold, dit_cache, timestep_scope

pytestmark = [pytest.mark.line("Training"), pytest.mark.on("small models of one stream and of two")]

CONFIGS = {
    "Interval": DitCacheConfig(2, 2, 1, 3),
    "Mask, Linear": DitCacheConfig(cache_block_start=1, policy=Mask((1, 1, 0, 0, 1, 0, 0, 1)), predictor=Linear()),
    "Threshold": DitCacheConfig(cache_block_start=1, policy=Threshold(0.35, max_warmup_steps=1)),
}
SAID = "called with gradients enabled, so nothing is cached or reused"


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture(params=["single", "in_place", "swapped"])
def net(request):
    return Net(request.param)


def given(net):
    return {} if net.kind in ("single", "in_place") else {"encoder_hidden_states": prompt()}


def trained(net, x, target, extra, steps=8, inputs=False):
    """A few steps of SGD on the way through a sampling run; the gradients of each, of parameters or of the input."""
    optimizer, found = torch.optim.SGD(net.parameters(), 0.1), []
    with torch.enable_grad():
        for step in range(steps):
            begun = x.clone().requires_grad_(inputs)
            out = net(begun, torch.tensor(1 - step / steps), **extra)
            loss = (out - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            found += [begun.grad] if inputs else [p.grad.clone() for p in net.parameters() if p.grad is not None]
            optimizer.step()
    return found


@pytest.mark.parametrize("inputs", [False, True], ids=["parameters", "inputs"])
def test_gradients_are_those_of_a_plain_model(net, config, inputs):
    """Eight steps of training, with gradients of parameters and of the input: bit for bit as without, one warning."""
    x, target, extra = latents(), latents(), given(net)
    expected = trained(copy.deepcopy(net), x, target, extra, inputs=inputs)
    with dit_cache(net, config) as cache:
        with pytest.warns(UserWarning, match=SAID) as said:
            found = trained(net, x, target, extra, inputs=inputs)
        assert len([each for each in said if SAID in str(each.message)]) == 1
        assert cache.stats.reasons == {"gradients": 8}
        assert cache.stats.bytes_held == 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert any(float(each.abs().max()) > 0 for each in expected)


def test_sampling_between_steps_of_training(net, config):
    """A picture is sampled after each step of training: it is that of the weights as they then are, and reuses."""
    x, target, extra = latents(), latents(), given(net)
    with dit_cache(net, config) as cache, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            trained(net, x, target, extra, steps=1)
            before = cache.stats.reused_calls
            found = loop(net, x, 8, scoped=True, **extra)
            assert cache.stats.reused_calls > before
            alone = copy.deepcopy(net)
            with dit_cache(alone, config):
                assert torch.equal(loop(alone, x, 8, scoped=True, **extra), found)
    assert len([each for each in said if SAID in str(each.message)]) == 1


def test_gradients_at_every_step_of_a_run(net, config):
    """Guidance by a gradient: a call with gradients and one without at each step. The latter reuses, as alone."""
    x, extra = latents(), given(net)

    def run(guided):
        y = x
        for step in range(8):
            with timestep_scope(step):
                t = torch.tensor(1 - step / 8)
                if guided:
                    with torch.enable_grad():
                        begun = y.clone().requires_grad_()
                        net(begun, t, **extra).square().mean().backward()
                    assert begun.grad.abs().max() > 0
                y = y - net(y, t, **extra) / 8
        return y

    with dit_cache(net, config) as cache:
        expected = run(False)
        reused = cache.stats.reused_calls
        assert reused
    with dit_cache(net, config) as cache:
        with pytest.warns(UserWarning, match=SAID):
            found = run(True)
        assert torch.equal(found, expected)
        assert cache.stats.reused_calls == reused
        assert cache.stats.reasons["gradients"] == 8


@pytest.mark.parametrize("kind", ["single", "swapped"])  # what works in place cannot run again
def test_checkpointed_blocks(kind, config):
    """Blocks under torch.utils.checkpoint run again in the backward pass: gradients bit for bit as without."""
    from torch.utils.checkpoint import checkpoint

    class Checkpointed(Net):
        def forward(self, hidden_states, timestep, encoder_hidden_states=None):
            h, e = self.embed(hidden_states), encoder_hidden_states
            temb = self.time(timestep.reshape(-1, 1)).expand(h.shape[0], -1)
            for block in self.blocks:
                if e is None:
                    h = checkpoint(block, h.clone(), temb, use_reentrant=False)
                else:
                    e, h = checkpoint(block, h, e, temb, use_reentrant=False)
            return self.proj(h)

    net = Checkpointed(kind)
    x, target, extra = latents(), latents(), given(net)
    expected = trained(copy.deepcopy(net), x, target, extra)
    with dit_cache(net, config) as cache:
        with pytest.warns(UserWarning, match=SAID):
            found = trained(net, x, target, extra)
        assert cache.stats.reasons == {"gradients": 8}  # not one more for each block that ran again
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


class Labelled(torch.nn.Module):
    """A block that returns a label beside its stream, which no range can hand on."""

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)

    def forward(self, hidden_states):
        return hidden_states + self.proj(hidden_states).tanh(), object()


class Labels(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Labelled() for _ in range(5))

    def forward(self, hidden_states, timestep):
        h = hidden_states * timestep
        for block in self.blocks:
            h, _ = block(h)
        return h


@pytest.mark.parametrize("verify", [True, False])
def test_blocks_that_cannot_be_followed_are_trained_all_the_same(config, verify):
    """What is refused without gradients is not even looked at with them."""
    torch.manual_seed(0)
    net, x, target = Labels(), latents(), latents()
    expected = trained(copy.deepcopy(net), x, target, {})
    with dit_cache(net, config, verify=verify) as cache:
        with pytest.warns(UserWarning, match=SAID):
            found = trained(net, x, target, {})
        assert cache.stats.reasons == {"gradients": 8}
        with torch.no_grad(), pytest.raises(ValueError, match="object; tensors, alone or in tuples"):
            net(x, torch.tensor(1.0))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_blocks_that_are_trained_without_their_model(config):
    """The loop calls the blocks itself: the same."""
    torch.manual_seed(0)
    net, x = Labels(), latents()

    def gradients():
        h = x.clone().requires_grad_()
        begun = h
        for block in net.blocks:
            h, _ = block(h)
        h.square().mean().backward()
        return begun.grad

    with torch.enable_grad():
        expected = gradients()
        with dit_cache(net, config), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert all(torch.equal(gradients(), expected) for _ in range(4))


def test_nothing_of_the_graph_is_kept(net, config):
    """After a step of training, nothing of ours keeps what was computed on the way alive."""
    x, extra, refs = latents(), given(net), []
    hooks = [block.register_forward_hook(lambda m, a, out: refs.extend(tensors(out))) for block in net.blocks]

    def tensors(out):
        return [weakref.ref(each) for each in (out if isinstance(out, tuple) else (out,))]

    with dit_cache(net, config), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.enable_grad():
            net(x, torch.tensor(0.5), **extra).square().mean().backward()
        gc.collect()
        assert refs
        assert all(ref() is None for ref in refs)
    for hook in hooks:
        hook.remove()


def test_frozen_weights_and_inputs(net, config):
    """Gradients left enabled where nothing requires any: not cached either, and the warning says what to do."""
    net.requires_grad_(False)
    with dit_cache(net, config) as cache, torch.enable_grad():
        with pytest.warns(UserWarning, match=r"sample under torch\.no_grad\(\) or torch\.inference_mode\(\)"):
            loop(net, latents(), 8, **given(net))
        assert cache.stats.reused_calls == 0


def test_inference_mode(net, config):
    """Sampling in inference mode, whose tensors have no version and cannot be written to afterwards: as without it."""
    x, extra = latents(), given(net)
    with dit_cache(net, config) as cache:
        expected = loop(net, x, 8, scoped=True, **extra)
        reused = cache.stats.reused_calls
        with torch.inference_mode():
            found = loop(net, x, 8, scoped=True, **extra)
        again = loop(net, x, 8, scoped=True, **extra)  # what was kept in inference mode is not in the way
        assert reused > 0
        assert cache.stats.reused_calls == 3 * reused
    assert torch.equal(found, expected)
    assert torch.equal(again, expected)
