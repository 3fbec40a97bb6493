"""What a call leaves behind in its thread, and what a reused one makes of what happens between its blocks."""

import gc
import threading
import weakref

import pytest
import torch
from torch import nn
from toys import Double, Ladder, Net, Pipe, latents

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.compat.msmodelslim.step_index import set_step_index
from dithooks.engine.arguments import CallArguments

EVERY_OTHER = DitCacheConfig(0, 2, 0, 5)


def reuses(cache):
    return [(each.step, each.branch, each.reuse, each.reason) for each in cache.decisions]


@torch.no_grad()
def test_blocks_that_are_driven_after_a_call_of_the_model_are_no_part_of_it():
    net, x = Ladder(), torch.ones(2, 3)
    with dit_cache(net, EVERY_OTHER) as cache:
        with torch.enable_grad():
            net(x, torch.tensor(1.0))  # nothing is kept of it, so nothing is tested yet
        for step in range(4):
            with timestep_scope(step):
                h = x
                for block in net.blocks:
                    h = block(h, torch.tensor(1.0))
        assert [reuse for *_, reuse, _ in reuses(cache)] == [False, True, False, True]


class _Optional(Double):
    def forward(self, hidden_states, encoder_hidden_states, temb):
        if encoder_hidden_states is None:
            return hidden_states * 1.5, None
        return super().forward(hidden_states, encoder_hidden_states, temb)


class _DropsText(nn.Module):
    """Gives its blocks no text at times, which does not show in what it is given itself."""

    def __init__(self):
        super().__init__()
        self.blocks, self.drops = nn.ModuleList(_Optional(swap=False) for _ in range(5)), False

    def forward(self, h, timestep, e):
        for block in self.blocks:
            h, e = block(h, None if self.drops else e, timestep.expand(len(h), 8))
        return h


@torch.no_grad()
def test_a_call_that_lacks_a_stream_is_not_counted_as_reused():
    net, h, e = _DropsText(), torch.randn(2, 6, 8), torch.randn(2, 3, 8)
    with dit_cache(net, EVERY_OTHER) as cache:
        for step in range(4):
            net.drops = step == 3
            net(h, torch.tensor(1 - step / 4), e)
        assert [reason for *_, reason in reuses(cache)] == ["refresh", "reuse", "refresh", "shape"]
        assert cache.stats.reused_calls == 1


class _Loop(nn.Module):
    """Samples in its own forward, and tells each step there."""

    def __init__(self):
        super().__init__()
        self.blocks = Ladder().blocks

    def forward(self, h, steps):
        for step in range(steps):
            set_step_index(step)
            for block in self.blocks:
                h = block(h, torch.tensor(1.0))
        return h


@torch.no_grad()
def test_steps_are_told_between_several_passages_of_one_call():
    net = _Loop()
    set_step_index(0)
    try:
        with dit_cache(net, EVERY_OTHER, verify=False) as cache:
            net(torch.ones(2, 3), 4)
            assert [reuse for *_, reuse, _ in reuses(cache)] == [False, True, False, True]
    finally:
        set_step_index(None)


@torch.no_grad()
def test_a_request_that_an_exception_ended_goes_with_the_last_reference_to_it():
    net = Net()
    pipe, x = Pipe(net), latents()
    scheduler = pipe.scheduler
    scheduler.set_timesteps(4)

    def break_off(*_):
        raise KeyboardInterrupt

    def step():
        net(x, scheduler.timesteps[scheduler.step_index or 0])
        scheduler.step()

    with dit_cache(pipe, EVERY_OTHER) as cache:
        request = cache.request()
        session = weakref.ref(request._session)
        with request:
            step()
        net.proj.register_forward_pre_hook(break_off)
        with pytest.raises(KeyboardInterrupt), request:
            step()
        net.proj._forward_pre_hooks.clear()
        del request
        gc.collect()
        assert session() is None
        scheduler.step_index = None  # once more, with the same schedule, in another thread

        @torch.no_grad()
        def again():
            with cache.request():
                for _ in range(4):
                    step()

        thread = threading.Thread(target=again)
        thread.start()
        thread.join()
        assert [reuse for *_, reuse, _ in reuses(cache)[-4:]] == [False, True, False, True]


class _WritesBeside(nn.Module):
    """Its stream is a part of a tensor, into the rest of which it writes between the blocks."""

    def __init__(self):
        super().__init__()
        self.blocks = Ladder().blocks

    def forward(self, h, timestep):
        whole = torch.cat([h, torch.zeros_like(h)], 1)
        h, rest = whole.chunk(2, 1)
        for block in self.blocks:
            h = block(h, timestep)
            rest.add_(1)
        return h + rest


@torch.no_grad()
def test_writes_beside_what_the_range_was_given_do_not_matter():
    net, h = _WritesBeside(), torch.randn(2, 3)
    full = net(h, torch.tensor(1.0))
    with dit_cache(net, EVERY_OTHER) as cache:
        for step in range(4):
            with timestep_scope(step):
                torch.testing.assert_close(net(h, torch.tensor(1.0)), full)
        assert cache.stats.reused_calls == 2


@torch.no_grad()
def test_conditioning_by_swapped_names_is_another_branch():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = Ladder().blocks

        def forward(self, h, timestep, *, add, subtract):
            for block in self.blocks:
                h = block(h, add - subtract)
            return h

    net, one, other = Two(), torch.ones(2, 3), torch.full((2, 3), 0.5)
    with dit_cache(net, EVERY_OTHER) as cache:
        for step in range(4):
            names = ("add", "subtract") if step % 2 == 0 else ("subtract", "add")
            net(torch.ones(2, 3), 1 - step / 4, **dict(zip(names, (one, other), strict=True)))
        assert [branch for _, branch, *_ in reuses(cache)] == [0, 1, 0, 1]


def test_a_timestep_that_comes_first_is_neither_latents_nor_conditioning():
    t, x = torch.tensor(1.0), torch.ones(2, 3)
    given = CallArguments({"timestep": t, "x": x}, frozenset({"timestep"}))
    assert (given.latents, list(given.conditioning)) == ({}, ["x"])
