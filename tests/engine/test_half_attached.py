"""Calls that meet a cache half put on or half taken off."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = pytest.mark.core


class Meddled(torch.nn.Linear):
    """A block that lets another thread do something at a moment of its own: when a hook is put on, or when it runs."""

    on_hook = on_run = None

    def register_forward_hook(self, *args, **kwargs):
        if self.on_hook is not None:
            elsewhere(self.on_hook)
        return super().register_forward_hook(*args, **kwargs)

    def forward(self, x):
        if self.on_run is not None:
            elsewhere(self.on_run)
        return super().forward(x)


class Stack(torch.nn.Module):
    def __init__(self, between=None):
        super().__init__()
        torch.manual_seed(0)
        self.between = between
        self.blocks = torch.nn.ModuleList(Meddled(4, 4) for _ in range(4))

    def forward(self, x, timestep=None):
        for block in self.blocks:
            x = block(x if self.between is None else x + self.between)  # seen, but to be tried with noise
        return x


def elsewhere(do):
    """Do something in a thread of its own, to the end; what it raises is raised here."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(do).result()


class TestHalfAttached:
    """Calls that meet some of the hooks and stand-ins, as they go on or come off, are plain ones."""

    X = torch.ones(1, 4)

    @torch.no_grad()
    def test_a_call_while_hooks_are_put_on(self):
        model, outputs = Stack(), []
        full = model(self.X, 1.0)

        @torch.no_grad()
        def call():
            outputs.append(model(self.X, 1.0))

        for block in model.blocks:
            block.on_hook = call
        cache = dit_cache(model, DitCacheConfig(0, 2, 0, 4))
        assert len(outputs) >= 4
        assert all(torch.equal(each, full) for each in outputs)
        assert cache.stats.calls == 0  # nothing of them was learnt or counted
        for block in model.blocks:
            block.on_hook = None
        for t in (1.0, 0.5):
            torch.testing.assert_close(model(self.X, t), full)
        assert cache.stats.reused_calls == 1
        cache.remove()

    @pytest.mark.parametrize("at", range(4))
    @torch.no_grad()
    def test_attached_in_the_middle_of_a_call_that_tells_no_step(self, at):
        """It reaches the range though the model was not seen called: computed, and no error of a step unknown."""
        model, handles = Stack(), []
        full = model(self.X)

        def attach():
            model.blocks[at].on_run = None
            handles.append(dit_cache(model, DitCacheConfig(0, 2, 1, 3)))

        model.blocks[at].on_run = attach
        assert torch.equal(model(self.X), full)
        with timestep_scope(0):
            assert torch.equal(model(self.X), full)
        assert handles[0].stats.calls == 1
        handles[0].remove()

    @torch.no_grad()
    def test_blocks_that_are_driven_without_a_step_say_so_from_the_second_call_on(self):
        model = Stack()
        with dit_cache(model, DitCacheConfig(0, 2, 0, 4)):
            for block in model.blocks:
                block(self.X)
            with pytest.raises(ValueError, match="which sampling step is this"):
                model.blocks[0](self.X)

    @pytest.mark.parametrize("change", ["remove", "reset"])
    @pytest.mark.parametrize(("at", "time"), [(0, 1), (1, 1), (3, 1), (0, 2), (3, 2), (0, 3), (3, 3), (0, 4)])
    @torch.no_grad()
    def test_changed_while_the_residual_is_tested(self, change, at, time):
        """The verdict is of a range that is no more, and counts for nothing. ``time``: in the call, or in a replay."""
        model = Stack(between=0.5)
        full, ran = model(self.X, 1.0), []
        cache = dit_cache(model, DitCacheConfig(0, 2, 1, 2))

        def meddle():
            ran.append(at)
            if len(ran) == time:
                getattr(cache, change)()

        model.blocks[at].on_run = meddle
        assert torch.equal(model(self.X, 1.0), full)
        assert len(ran) >= time
        model.blocks[at].on_run = None
        for _ in range(2):
            torch.testing.assert_close(model(self.X, 1.0), full)
        assert cache.active == (change == "reset")
        cache.remove()
