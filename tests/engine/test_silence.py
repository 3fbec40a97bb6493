"""A cache that does nothing says why, once, at the user's line; what was cancelled is not held on to."""

import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toys import Counter, Net, Pipe, latents

import dithooks
from dithooks import DitCacheConfig, DitHooksWarning, dit_cache, timestep_scope

pytestmark = pytest.mark.core

EVERY_OTHER = DitCacheConfig(1, 2, 0, 5)


@pytest.fixture
def said():
    """Collect the warnings of a test, and show them to it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def only(said):
    """Return the one warning, which has to be ours and to point at this file."""
    (one,) = said
    assert issubclass(one.category, DitHooksWarning)
    assert one.filename == __file__
    assert len(str(one.message)) <= 400
    return str(one.message)


class TestSaid:
    def test_a_scope_that_says_the_same_step_for_ever(self, said):
        net, x = Net(), latents()
        with dit_cache(net, EVERY_OTHER), torch.no_grad():
            for k in range(6):
                with timestep_scope(0):
                    net(x, torch.tensor(1 - k / 6))
        message = only(said)
        assert "6 calls reused nothing. The timestep_scope showed step 0 at every call" in message
        assert "for t in dithooks.steps(timesteps):" in message

    def test_a_scheduler_that_never_moves_where_nothing_else_tells_the_step(self, said):
        class Timeless(Net):
            def forward(self, hidden_states):
                return super().forward(hidden_states, torch.tensor(0.5))

        pipe, x = Pipe(Timeless()), latents()
        pipe.scheduler.set_timesteps(8)
        with dit_cache(pipe, EVERY_OTHER), torch.no_grad():
            for k in range(6):
                pipe.transformer(x + k)
        message = only(said)
        assert "The scheduler's step_index showed step 0 at every call" in message
        assert "scheduler=" in message

    def test_no_call_at_all(self, said):
        with dit_cache(Net(), EVERY_OTHER):
            Net()(latents(), torch.tensor(0.5))  # another model
        assert "no call of blocks was seen while the cache was attached" in only(said)

    def test_timesteps_that_go_back_all_the_time(self, said):
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(2, 2, 0, 5)), torch.no_grad():
            for value in (1.0, 0.9, 1.0, 0.9, 1.0, 0.9):
                net(x, torch.tensor(value))
        assert any("reused nothing" in str(each.message) for each in said)

    def test_a_run_that_an_exception_ends_is_not_blamed(self, said):
        net, x = Net(), latents()

        def broken():
            with dit_cache(net, EVERY_OTHER), torch.no_grad():
                for _ in range(6):
                    net(x, torch.tensor(0.5))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            broken()
        assert not said

    def test_nothing_is_said_where_something_was_reused(self, said):
        pipe = Pipe(Net())
        with dit_cache(pipe, EVERY_OTHER) as cache, torch.no_grad():
            pipe(latents())
        assert cache.stats.reused_calls > 0
        assert not said


class TestStandingStill:
    def sample(self, net, scheduler, x, steps):
        """Sample by a scheduler of one's own; return the result and the steps as an oracle counts them."""
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            x = x - net(x, t / 1000) / steps
            scheduler.step()
        return x

    @torch.no_grad()
    def test_a_second_pipeline_with_a_scheduler_of_its_own_is_told_by_its_timesteps(self, said):
        net, x = Net(), latents()
        with dit_cache(net, EVERY_OTHER) as cache:
            wanted, reasons = self.sample(net, Counter(), x, 7), cache.stats.reasons
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_OTHER) as cache:
            pipe(latents(), 6)  # its own run, to the end of its scheduler
            before = cache.stats.reasons
            got = self.sample(net, Counter(), x, 7)
            assert {key: count - before.get(key, 0) for key, count in cache.stats.reasons.items()} == reasons
        assert torch.equal(got, wanted)

    @torch.no_grad()
    def test_a_scheduler_whose_copy_makes_the_steps(self, said):
        net, x = Net(), latents()
        with dit_cache(net, EVERY_OTHER) as cache:
            wanted, reasons = self.sample(net, Counter(), x, 8), cache.stats.reasons
        pipe = Pipe(net)
        pipe.scheduler.set_timesteps(8)
        with dit_cache(pipe, EVERY_OTHER) as cache:
            assert torch.equal(self.sample(net, Counter(), x, 8), wanted)
            assert cache.stats.reasons == reasons
            self.sample(net, Counter(), x, 8)
        assert "step_index stayed at 0 while timestep went from 1 to 0.75" in only(said)  # once for both runs

    @torch.no_grad()
    def test_one_that_moves_after_all_is_asked_again(self, said):
        """Two timesteps at one step had looked like two steps."""
        net, scheduler = Net(), Counter()
        scheduler.set_timesteps(6)
        with dit_cache(net, DitCacheConfig(1, 2, 0, 5), scheduler=scheduler) as cache:
            for t in scheduler.timesteps:
                for shift in (0.0, 1e-3):
                    net(latents(), t / 1000 - shift)
                scheduler.step()
            assert [each.step for each in cache.decisions][2:] == [k for k in range(1, 6) for _ in range(2)]
            assert cache.stats.reused_calls > 0
        assert not said


class TestCancelled:
    @torch.no_grad()
    def test_what_a_cancelled_run_held_is_freed_when_the_pipeline_draws_again(self):
        pipe = Pipe(Net())

        def cancel(step):
            if step == 4:
                raise TimeoutError

        def request(_):
            with torch.no_grad(), pytest.raises(TimeoutError):
                pipe(latents(), at=cancel)
            return cache.stats.bytes_held

        one = latents().numel() // 4 * 8 * 4  # a residual of 8 channels
        with dit_cache(pipe, DitCacheConfig(0, 2, 0, 5)) as cache, ThreadPoolExecutor(4) as pool:
            meet = threading.Barrier(4)
            pool.map(lambda _: meet.wait(), range(4))  # a thread for each
            held = [pool.submit(request, k).result() for k in range(8)]
            assert max(held) == one  # that of the latest alone
            pipe(latents())
            assert cache.stats.bytes_held == 0

    @torch.no_grad()
    def test_a_loop_left_by_an_exception_in_another_thread_is_freed_too(self):
        net = Net()

        def broken():
            with torch.no_grad():
                for t in dithooks.steps([1.0, 0.5, 0.25]):
                    net(latents(), torch.tensor(t))
                    if t == 0.5:
                        break

        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache, ThreadPoolExecutor(1) as pool:
            pool.submit(broken).result()
            assert cache.stats.bytes_held > 0
            for t in dithooks.steps([1.0, 0.5]):
                net(latents(), torch.tensor(t))
            assert cache.stats.bytes_held == 0  # this run is over, and the other one was freed when it began
