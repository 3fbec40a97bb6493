"""What a model does between two blocks besides adding: the noise that is put in says so, before a picture does."""

import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from toys import Double, Net, Single, latents, loop, prompt

from dithooks import BlockAdapter, DitCacheConfig, dit_cache, timestep_scope


class Glued(nn.Module):
    """Two lists with something in between; the residual of both is a function of tokens, so order matters."""

    def __init__(self, glue):
        super().__init__()
        self.first = nn.ModuleList(Single(4) for _ in range(2))
        self.second = nn.ModuleList(Single(4) for _ in range(2))
        self.glue = glue

    def forward(self, hidden_states, timestep):
        h, temb = hidden_states, timestep.reshape(1, 1).expand(hidden_states.shape[0], 4)
        for block in self.first:
            h = block(h, temb)
        h = self.glue(h)
        for block in self.second:
            h = block(h, temb.expand(4, 4)[: h.shape[0]] if h.shape[0] <= 4 else temb.repeat(2, 1))
        return h


POSITIONS = torch.randn(4, 4, 4, generator=torch.Generator().manual_seed(0))
REARRANGED = {
    "flipped": lambda h: h.flip(1),
    "rolled": lambda h: h.roll(1, 1),
    "negated": lambda h: -h,
    "halves of the batch exchanged": lambda h: torch.cat([h[2:], h[:2]]),
    "channels exchanged": lambda h: h[..., [1, 0, 3, 2]],
    "turned with as many frames as tokens, and added to": lambda h: h.transpose(0, 1).reshape(4, 4, 4) + POSITIONS,
    "windows": lambda h: h.reshape(8, 2, 4),
    "joined with a part of itself": lambda h: torch.cat([h[:, 2:], h], 1),
}
HANDED_ON = {
    "added to": lambda h: h + POSITIONS,
    "copied": lambda h: h.clone(),
    "turned with as many frames as tokens": lambda h: h.transpose(0, 1).contiguous(),
    "an adapter that looks at it": lambda h: h + 0.3 * torch.tanh(h.mean(1, keepdim=True)),
    "joined": lambda h: torch.cat([POSITIONS[:, :2], h], 1),
    "cut": lambda h: h[:, 1:],
}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("name", REARRANGED)
def test_rearranged_streams_are_refused(name):
    """The same inputs again would come out right, as what is wrong about it cancels; other inputs would not."""
    model, x, t = Glued(REARRANGED[name]), torch.randn(4, 4, 4), torch.tensor(0.5)
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)):
        for _ in range(2):  # and again: a residual that failed is not there for the next call
            with timestep_scope(0), pytest.raises(ValueError, match=r"more to hidden_states than was rec.*rearranged"):
                model(x, t)
    with dit_cache(model, DitCacheConfig(0, 2, 2, 2)) as cache:  # on one side of it all is well
        for step in (0, 1):
            with timestep_scope(step):
                model(x, t)
        assert cache.stats.reused_calls == 1


@pytest.mark.parametrize("name", HANDED_ON)
def test_other_inputs_on_a_reused_step(name):
    """By hand: what the model does to h_in between the lists, done to h_in alone, and the residual."""
    glue = HANDED_ON[name]
    model, t = Glued(glue), torch.tensor(0.5)
    one, two = torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    rearranged = glue if name in ("copied", "turned with as many frames as tokens", "cut") else (lambda h: h)
    if name == "joined":
        rearranged = lambda h: torch.cat([torch.zeros(4, 2, 4), h], 1)  # noqa: E731
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)) as cache:
        with timestep_scope(0, branch=0):
            computed = model(one, t)
        with timestep_scope(1, branch=0):
            reused = model(two, t)
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(reused, rearranged(two) + computed - rearranged(one))


def test_the_users_random_numbers_stay_as_they_are():
    model, x, t = Glued(HANDED_ON["added to"]), torch.randn(4, 4, 4), torch.tensor(0.5)
    torch.manual_seed(7)
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)), timestep_scope(0):
        model(x, t)
    drawn = torch.randn(3)
    torch.manual_seed(7)
    assert torch.equal(drawn, torch.randn(3))


def test_few_numbers_are_asked_for_with_several_draws():
    """Of four numbers, the first draw looks much the same with the outer two exchanged; a later one does not."""

    def exchanged(h):
        return h[..., [3, 1, 2, 0]]

    draws = [torch.randn(4, generator=torch.Generator().manual_seed(seed)) for seed in (0, 2)]
    assert [float(torch.cosine_similarity(each, exchanged(each), dim=0)) > 0.8 for each in draws] == [True, False]
    model = Glued(exchanged)
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)), timestep_scope(0), pytest.raises(ValueError, match="rearranged"):
        model(torch.randn(1, 1, 4), torch.tensor(0.5))


def test_tokens_put_in_the_place_of_a_prompts_are_no_prompt():
    """Most of the noise arrives, but none of the prompt's: another prompt would leave its mark where none belongs."""

    class Joining(nn.Module):
        own = False

        def __init__(self):
            super().__init__()
            self.doubles = nn.ModuleList(Double(4, swap=False) for _ in range(2))
            self.singles = nn.ModuleList(Single(4) for _ in range(2))
            self.register_buffer("tokens", torch.randn(1, 2, 4))

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            h, e, temb = hidden_states, encoder_hidden_states, timestep.reshape(1, 1).expand(1, 4)
            for block in self.doubles:
                h, e = block(h, encoder_hidden_states=e, temb=temb)
            h = torch.cat([self.tokens if self.own else e, h], 1)
            for block in self.singles:
                h = block(h, temb)
            return h

    model, given = Joining(), (torch.randn(1, 8, 4), torch.tensor(0.5), torch.randn(1, 2, 4))
    for model.own in (False, True):
        refused = pytest.raises(ValueError, match="or another stream") if model.own else nullcontext()
        with dit_cache(model, DitCacheConfig(0, 2, 0, 4), blocks=["doubles", "singles"]), timestep_scope(0), refused:
            model(*given)


def test_streams_exchanged_between_lists():
    """Text goes on as image and image as text; with as many tokens nothing but identity tells."""

    class Crossing(Net):
        def forward(self, hidden_states, timestep, encoder_hidden_states):
            h, e = self.embed(hidden_states), encoder_hidden_states
            temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
            for block in self.blocks:
                e, h = block(h, e, temb)
            h, e = e, h
            for block in self.singles:
                h, e = block(h, e, temb)
            return self.proj(h) + e.mean()

    net, t, e = Crossing("two_lists"), torch.tensor(0.5), prompt(tokens=6)
    x = latents()
    plain = net(x, t, e)
    with dit_cache(net, DitCacheConfig(0, 2, 2, 6), blocks=["blocks", "singles"]) as cache:
        with timestep_scope(0, branch=0):
            assert torch.equal(net(x, t, e), plain)
        with timestep_scope(1, branch=0):
            torch.testing.assert_close(net(x, t, e), plain)
        assert cache.stats.reused_calls == 1


class TestStreamsThatComeAndGo:
    class Optional(Net):
        def forward(self, hidden_states, timestep, encoder_hidden_states=None):
            h, e = self.embed(hidden_states), encoder_hidden_states
            temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
            for block in self.blocks:
                h, e = block(h, e, temb)
            return self.proj(h) + (0 if e is None else e.mean())

    class Block(nn.Module):
        def __init__(self, rate):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(rate))

        def forward(self, hidden_states, encoder_hidden_states, temb):
            if encoder_hidden_states is None:
                return hidden_states * (1 + self.rate), None
            return hidden_states + self.rate * encoder_hidden_states.mean(), encoder_hidden_states * (1 - self.rate)

    @pytest.mark.filterwarnings("ignore:.*reused nothing.*")
    @pytest.mark.parametrize("first_with", [True, False])
    def test_pictures_with_text_and_without(self, first_with):
        net = self.Optional()
        net.blocks = nn.ModuleList(self.Block(0.1 * (k + 1)) for k in range(5))
        x, t, e = latents(), torch.tensor(0.5), prompt()
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)):
            for given in (e, None, e) if first_with else (None, e, None):
                plain = None
                for step in (0, 1):
                    with timestep_scope(step):
                        out = net(x, t, given)
                    plain = out if plain is None else plain
                torch.testing.assert_close(out, plain)


def test_two_ranges_that_refresh_at_different_steps():
    """The residual of one is taken while the other is reused; it is tested under the same circumstances."""
    net, x = Net("two_lists"), latents()
    configs = [DitCacheConfig(0, 2, 0, 5), DitCacheConfig(1, 2, 0, 5)]
    with dit_cache(BlockAdapter(transformer=net, blocks=["blocks", "singles"], params=configs), configs[0]) as cache:
        loop(net, x, steps=6, scoped=True, encoder_hidden_states=prompt())
        # the one is reused at steps 1, 3 and 5, the other at 2 and 4
        assert cache.stats.reused_calls == 5


def test_an_interrupted_test_leaves_no_residual_behind():
    net, x, t = Net(), latents(), torch.tensor(0.5)
    calls = []

    class Stop(KeyboardInterrupt):
        pass

    def stop(*_):
        calls.append(len(calls))
        if len(calls) == 2:  # the replay, whose last block is outside of the range
            raise Stop

    with dit_cache(net, DitCacheConfig(0, 2, 0, 4)) as cache:
        hook = net.blocks[4].register_forward_hook(stop)
        with pytest.raises(Stop), timestep_scope(0):
            net(x, t)
        hook.remove()
        assert cache.stats.bytes_held == 0
        with timestep_scope(1):
            out = net(x, t)
        assert cache.stats.reused_calls == 0
    assert torch.equal(out, net(x, t))


@pytest.fixture
def restless():
    """Threads that take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_that_make_the_first_call_at_once(restless):
    """One of them finds that blocks count otherwise, and moves the range; the others go on as if there were none."""

    class Reversed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.ModuleList(Single(4) for _ in range(3)) for _ in range(2))

        def forward(self, hidden_states, timestep):
            h, temb = hidden_states, torch.ones(2, 4)
            for block in [*self.second, *self.first]:
                h = block(h, temb)
            return h

    model, wrong = Reversed(), []

    def work(barrier):
        x, plain = torch.randn(2, 3, 4), None
        barrier.wait()
        with torch.no_grad():
            for step in range(4):
                with timestep_scope(step):
                    out = model(x, torch.tensor(0.5))
                plain = out if plain is None else plain
                if not torch.allclose(out, plain, atol=1e-5):
                    wrong.append(step)

    for _ in range(25):
        with dit_cache(model, DitCacheConfig(0, 2, 0, 3)):
            barrier = threading.Barrier(3)
            threads = [threading.Thread(target=work, args=(barrier,)) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert wrong == []
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.modules())


def test_one_class_set_up_otherwise_in_another_list():
    """What the other list's blocks return in which order tells nothing sure about these."""

    class Turning(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.swap, self.rate = swap, nn.Parameter(torch.tensor(0.1))

        def forward(self, h, e):
            h, e = h + self.rate * torch.tanh(e), e - self.rate * torch.tanh(h)
            return (e, h) if self.swap else (h, e)

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.ModuleList(Turning(False) for _ in range(3))
            self.second = nn.ModuleList([Turning(True)])

        def forward(self, h, timestep, e):
            for block in self.first:
                h, e = block(h, e)
            for block in self.second:
                e, h = block(h, e)
            return h - 2 * e

    model, given = Both(), {"timestep": torch.tensor(0.5), "e": torch.randn(1, 3, 4)}
    unclear = pytest.raises(ValueError, match=r"second\.0: which argument does output 0.*alike: h, e: say which with")
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4), blocks=["first", "second"]), timestep_scope(0), unclear:
        model(torch.randn(1, 3, 4), **given)
    adapter = BlockAdapter(transformer=model, blocks=["first", "second"], forward_pattern=[None, 1])
    one, two = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    with dit_cache(adapter, DitCacheConfig(0, 2, 0, 4)) as cache:
        with timestep_scope(0, branch=0):
            computed = model(one, **given)
        with timestep_scope(1, branch=0):
            reused = model(two, **given)
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(reused, computed + two - one)


def test_a_model_that_writes_into_its_input():
    """The call is made again with the input as it was, and the caller's tensor is written into once."""

    class Scaling(Net):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states.mul_(0.5), timestep)

    net, x = Scaling(), latents()
    given, expected = x.clone(), net(x.clone(), torch.tensor(0.5))
    with dit_cache(net, DitCacheConfig(0, 2, 0, 5)):
        with timestep_scope(0):
            assert torch.equal(net(given, torch.tensor(0.5)), expected)
        assert torch.equal(given, 0.5 * x)
        with timestep_scope(1):
            torch.testing.assert_close(net(x.clone(), torch.tensor(0.5)), expected)


def test_an_extra_output_at_another_resolution():
    """What a block returns besides its stream has the form of the picture at hand, not of the first one."""

    class Extra(nn.Module):
        def __init__(self):
            super().__init__()
            self.rate = nn.Parameter(torch.tensor(0.1))

        def forward(self, h):
            return h + self.rate * torch.tanh(h), h.sum(-1)

    class Gathering(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Extra() for _ in range(4))

        def forward(self, h, timestep):
            extra = torch.zeros(h.shape[:2])
            for block in self.blocks:
                h, extra = block(h)
                extra = extra[:, : h.shape[1]] * torch.ones(h.shape[:2])
            return h + extra.unsqueeze(-1)

    model = Gathering()
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)) as cache:
        for tokens in (3, 7):
            x = torch.randn(1, tokens, 4)
            outs = []
            for step in (0, 1):
                with timestep_scope(step):
                    outs.append(model(x, torch.tensor(0.5)))
            torch.testing.assert_close(*outs)
        assert cache.stats.reused_calls == 2


def test_a_first_call_on_constants_is_refused_and_says_so():
    model = Glued(HANDED_ON["cut"])
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)), timestep_scope(0):
        with pytest.raises(ValueError, match=r"stream hidden_states \[4, 3, 4\] float32 is lost.*warm-up on zeros"):
            model(torch.zeros(4, 4, 4), torch.tensor(0.5))
        model(torch.randn(4, 4, 4), torch.tensor(0.5))


def test_positions_that_hide_how_tokens_were_exchanged():
    """With as many frames as tokens nothing shows but at the other blocks, where no positions are added."""

    class Video(nn.Module):
        def __init__(self):
            super().__init__()
            self.spatial, self.temporal = (nn.ModuleList(Single(4) for _ in range(3)) for _ in range(2))

        def forward(self, h, timestep):
            temb = torch.ones(4, 4)
            for number, (space, time) in enumerate(zip(self.spatial, self.temporal, strict=True)):
                h = space(h, temb).transpose(0, 1).contiguous()
                h = h + POSITIONS if number == 0 else h
                h = time(h, temb).transpose(0, 1).contiguous()
            return h

    model, one, two = Video(), torch.randn(4, 4, 4), torch.randn(4, 4, 4)
    with dit_cache(model, DitCacheConfig(0, 2, 0, 6)) as cache:
        with timestep_scope(0, branch=0):
            computed = model(one, torch.tensor(0.5))
        with timestep_scope(1, branch=0):
            reused = model(two, torch.tensor(0.5))
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(reused, computed + two - one)


def test_noise_that_overflows_tells_nothing_and_is_asked_for_again():
    """In half precision, beside values near its end: what is flipped is refused on this call or another."""
    model, t = Glued(lambda h: h.flip(1)).half(), torch.tensor(0.5).half()
    great = torch.randn(4, 4, 4).half()
    great[..., 0] = 65500
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)) as cache:
        with timestep_scope(0):
            model(great, t)
        with timestep_scope(1):
            model(great, t)
        with timestep_scope(2), pytest.raises(ValueError, match="rearranged"):
            model(torch.randn(4, 4, 4).half(), t)
        assert cache.stats.reused_calls <= 1


@pytest.mark.parametrize(("size", "dtype"), [(1e-7, torch.float16), (1e-22, torch.float32)])
def test_a_stream_of_next_to_nothing_is_tested_without_dividing_by_it(size, dtype):
    model, t = Glued(lambda h: h + 0).to(dtype), torch.tensor(0.5, dtype=dtype)
    for block in [*model.first, *model.second]:
        block.proj.weight.zero_()
        block.proj.bias.zero_()
    with dit_cache(model, DitCacheConfig(0, 2, 0, 4)) as cache:
        for step in range(4):
            with timestep_scope(step):
                out = model(torch.full((4, 4, 4), size, dtype=dtype), t)
        assert cache.stats.reused_calls >= 1
    torch.testing.assert_close(out, torch.full((4, 4, 4), size, dtype=dtype))
