"""One or several streams, in whatever order, by position or keyword; what cannot be followed is refused, and why."""

import pytest
import torch
from torch import nn
from toys import Double, Net, Pipe, Single, latents, prompt

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = pytest.mark.core

KINDS = ["single", "in_place", "swapped", "straight", "positional", "two_lists"]
RANGES = [(0, 5), (0, 1), (4, 1), (2, 1), (1, 3)]


def given(kind):
    return {} if kind in ("single", "in_place") else {"encoder_hidden_states": prompt()}


def exactly(net, start, count, **inputs):
    """A step reused with the inputs of the step its residual comes from must give what the model gives."""
    x, t = latents(), torch.tensor(0.5)
    plain = net(x, timestep=t, **inputs)
    net.executions = 0
    with dit_cache(net, DitCacheConfig(0, 2, start, count), blocks=lists(net)) as cache:
        with timestep_scope(0):
            computed = net(x, timestep=t, **inputs)
        with timestep_scope(1):
            reused = net(x, timestep=t, **inputs)
        assert (cache.stats.computed_calls, cache.stats.reused_calls) == (1, 1)
    total = len(net.blocks) + len(getattr(net, "singles", []))
    # computed, tested on the same call with the range left out, reused; and where the parent makes new tensors between
    # its blocks, asked how it hands them on: once without noise and, as there are few numbers, four times with; and
    # where it adds anything there, asked whether that depends on the streams, once without noise and once with
    asked = (2 if net.in_place_control else 7) if "control" in inputs and count > 1 else 0
    assert net.executions == total + (2 + asked) * (total - count)
    assert torch.equal(computed, plain)
    return reused, plain


def lists(net):
    return ["blocks", "singles"] if hasattr(net, "singles") else "blocks"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("start", "count"), RANGES)
def test_same_inputs_same_output(kind, start, count):
    reused, plain = exactly(Net(kind), start, count, **given(kind))
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("start", "count"), [(0, 10), (3, 4), (4, 2), (5, 5), (9, 1)])
def test_a_range_may_cross_two_lists(start, count):
    reused, plain = exactly(Net("two_lists"), start, count, **given("two_lists"))
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("start", "count"), [(0, 5), (1, 3), (2, 1)])
def test_what_the_parent_adds_between_blocks_counts_once(kind, in_place, start, count):
    """ControlNet-like: a tensor is added to the image stream after every block, from the very first call on."""
    net = Net(kind)
    net.in_place_control = in_place
    reused, plain = exactly(net, start, count, control=0.3 * torch.randn(2, 6, 8), **given(kind))
    torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)


def test_a_changed_control_acts_within_the_range_and_after_it():
    """After each of five blocks, of which all are passed over."""
    net, x = Net("single"), latents()
    one, two = torch.randn(2, 6, 8), torch.randn(2, 6, 8)

    def after_one(control):
        return net.proj(control) - net.proj.bias

    with dit_cache(Pipe(net), DitCacheConfig(0, 2, 0, 5)):
        outs = []
        pipe = Pipe(net)
        pipe.scheduler.set_timesteps(2)
        with timestep_scope(0, branch=0):
            outs.append(net(x, torch.tensor(0.5), control=one))
        with timestep_scope(1, branch=0):
            outs.append(net(x, torch.tensor(0.5), control=two))
    torch.testing.assert_close(outs[1] - outs[0], 5 * (after_one(two) - after_one(one)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [3, 6])
def test_two_streams_of_one_length_are_not_mixed(tokens):
    """With as many text tokens as image tokens, only identity and names tell the streams apart."""
    for kind in ("swapped", "straight", "positional", "two_lists"):
        reused, plain = exactly(Net(kind), 1, 3, encoder_hidden_states=prompt(tokens=tokens))
        torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)


def test_a_block_that_returns_none_for_a_stream():
    """As the last block of SD3 does."""

    class Last(Double):
        def forward(self, hidden_states, encoder_hidden_states, temb):
            return None, super().forward(hidden_states, encoder_hidden_states, temb)[1]

    class Dropping(Net):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            h, e = self.embed(hidden_states), encoder_hidden_states
            temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
            for block in self.blocks:
                e, h = block(hidden_states=h, encoder_hidden_states=e, temb=temb)
            assert e is None
            return self.proj(h)

    net = Dropping("swapped")
    last = Last()
    last.register_forward_hook(net._count)
    net.blocks[4] = last
    for start, count in [(0, 5), (3, 2)]:
        reused, plain = exactly(net, start, count, encoder_hidden_states=prompt())
        torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)


class TestRefused:
    """The first call, which is computed, says what was seen; nothing is cached wrongly."""

    def refuse(self, net, match, start=0, count=4, blocks=None, **inputs):
        x = latents()
        handle = dit_cache(net, DitCacheConfig(0, 2, start, count), blocks=blocks)
        with pytest.raises(ValueError, match=match):
            net(x, timestep=torch.tensor(0.5), **inputs)
        handle.remove()
        net(x, timestep=torch.tensor(0.5), **inputs)

    def test_long_skips(self):
        """U-ViT style: an early output feeds a late block."""

        class Skipping(Net):
            def forward(self, hidden_states, timestep):
                h = self.embed(hidden_states)
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                early = h = self.blocks[0](h, temb)
                for block in self.blocks[1:4]:
                    h = block(h, temb)
                return self.proj(h + self.blocks[4](early, temb))

        self.refuse(Skipping(), r"output of blocks\.0 goes to blocks\.4 \(hidden_states=\), past the end", 0, 3)

    def test_token_counts_that_change(self):
        """Text and image tokens are woven into one another: no joining that could be followed."""

        class Weaving(Net):
            def forward(self, hidden_states, timestep, encoder_hidden_states):
                h, e = self.embed(hidden_states), encoder_hidden_states
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks:
                    e, h = block(h, e, temb)
                h = torch.cat([e[:, :1], h, e[:, 1:]], 1)
                for block in self.singles:
                    h = block(h, temb)
                return self.proj(h[:, 1:7])

        net = Weaving("two_lists")
        net.singles = nn.ModuleList(Single() for _ in range(5))
        lists = ["blocks", "singles"]
        self.refuse(net, r"between blocks\.4 and singles\.0", 3, 4, lists, encoder_hidden_states=prompt())
        reused, plain = exactly(net_with_counts(net), 5, 5, encoder_hidden_states=prompt())
        torch.testing.assert_close(reused, plain, rtol=1e-5, atol=1e-6)

    def test_an_output_that_is_no_stream(self):
        class Odd(Single):
            def forward(self, hidden_states, temb):
                return super().forward(hidden_states, temb), object()

        class Unpacking(Net):
            def forward(self, hidden_states, timestep):
                h = self.embed(hidden_states)
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks:
                    h, _ = block(h, temb)
                return self.proj(h)

        net = Unpacking()
        net.blocks = nn.ModuleList(Odd() for _ in range(5))
        self.refuse(net, r"blocks\.0 returns position 1: object.*patch_functor")

    def test_an_ambiguous_single_block(self):
        class Pair(nn.Module):
            def forward(self, a, b):
                return b + 1, a + 1

        class One(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Pair()])

            def forward(self, x, timestep):
                a, b = self.blocks[0](x, x * 2)
                return a + b

        self.refuse(One(), r"which argument does output 0, \[2, 6, 4\] float32, carry on", 0, 1)


def net_with_counts(net):
    for block in net.singles:
        block.register_forward_hook(net._count)
    return net


@pytest.mark.filterwarnings("ignore:.*reused nothing.*")
def test_a_block_left_out_on_a_reused_step_is_an_error_not_a_wrong_picture():
    class Guided(Net):
        skip = None

        def forward(self, hidden_states, timestep):
            h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
            for index, block in enumerate(self.blocks):
                if index != self.skip:
                    h = block(h, temb)
            return self.proj(h)

    net, x, t = Guided(), latents(), torch.tensor(0.5)
    with dit_cache(net, DitCacheConfig(0, 2, 1, 3)) as cache:
        with timestep_scope(0):
            net(x, t)
        net.skip = 3
        with pytest.raises(RuntimeError, match=r"did not call blocks\.3"), timestep_scope(1):
            net(x, t)
        net.skip = 1  # the range's first block: nothing is known of its input, so the others run
        with timestep_scope(0):
            net(x, t)
        with timestep_scope(1):
            expected = net(x, t)
        assert cache.stats.reasons.get("no anchor") == 1
    assert torch.equal(net(x, t), expected)
