"""A step that is told without an end: at each step, or once for a whole run."""

import asyncio
import threading
from contextvars import copy_context

import pytest
import torch
from toys import Counter, Net, Pipe, latents

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.clock import tell_step

CONFIG = DitCacheConfig(2, 2, 1, 3)
EXPECTED = {"warm-up": 2, "refresh": 3, "reuse": 3}
STILL = torch.tensor(0.5)  # a timestep argument that tells nothing


@pytest.fixture(autouse=True)
def untold():
    yield
    tell_step(None)


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_steps_leave_what_was_told(step, error):
    net = Net()
    with dit_cache(net, CONFIG) as cache:
        tell_step(3)
        with pytest.raises(error, match="step"):
            tell_step(step)
        net(latents(), STILL)
        assert cache.decisions[-1].step == 3


@pytest.mark.parametrize("calls", [1, 2])
def test_told_at_each_step_over_several_runs(calls):
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        for _run in range(3):
            for step in range(8):
                tell_step(step)
                for _ in range(calls):
                    net(x, STILL)
        assert cache.stats.reasons == {key: 3 * calls * count for key, count in EXPECTED.items()}


def test_told_at_each_step_it_outdoes_a_scheduler_and_the_timestep_argument():
    """A sampler that asks the model twice a step, at two times, under a scheduler that it does not use."""
    pipe, x = Pipe(Net()), latents()
    pipe.scheduler.set_timesteps(100)
    with dit_cache(pipe, CONFIG) as cache:
        for step in range(8):
            tell_step(step)
            pipe.transformer(x, torch.tensor(1 - 0.1 * step))
            pipe.transformer(x, torch.tensor(0.95 - 0.1 * step))
        assert [each.step for each in cache.decisions] == [step for step in range(8) for _ in range(2)]


def test_told_once_the_scheduler_goes_on_from_there():
    pipe = Pipe(Net())
    tell_step(0)
    with dit_cache(pipe, CONFIG) as cache:
        for _run in range(3):
            pipe(latents())
        assert cache.stats.reasons == {key: 3 * count for key, count in EXPECTED.items()}
        assert [each.run for each in cache.decisions] == [0] * 8 + [1] * 8 + [2] * 8


def test_what_was_told_to_another_loop_is_not_for_this_one():
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe.transformer, CONFIG):
        for step in range(8):
            tell_step(step)
            pipe.transformer(x, STILL)
    for target in (pipe, pipe.transformer):  # by its scheduler; by the timestep argument
        with dit_cache(target, CONFIG) as cache:
            pipe(x)
            assert cache.stats.reasons == EXPECTED


def test_a_loop_that_tells_and_then_one_that_does_not():
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe, CONFIG) as cache:
        for step in range(8):
            tell_step(step)
            pipe.transformer(x, STILL)
        pipe(x)
        tell_step(0)
        pipe(x)
        assert cache.stats.reasons == {key: 3 * count for key, count in EXPECTED.items()}


def test_told_before_each_run_the_timestep_argument_goes_on_from_there():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        for _run in range(2):
            tell_step(0)
            for t in torch.linspace(1, 0.1, 8):
                net(x, t)
        assert cache.stats.reasons == {key: 2 * count for key, count in EXPECTED.items()}


def test_told_once_and_nothing_goes_on_is_said():
    net, x = Net(), latents()
    tell_step(0)
    with dit_cache(net, CONFIG), pytest.warns(UserWarning, match=r"called 16 times at step 0 .*timestep_scope"):
        [net(x, STILL) for _ in range(17)]


def test_an_open_scope_goes_first_and_ends_before_it():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        tell_step(1)
        with timestep_scope(2):
            net(x, STILL)
        net(x, STILL)
        tell_step(None)
        tell_step(None)
        with timestep_scope(4):
            tell_step(None)  # a scope is not its to end
            net(x, STILL)
        assert [each.step for each in cache.decisions] == [2, 1, 4]


def test_not_told_to_other_threads_and_tasks():
    net, x = Net(), latents()
    scheduler = Counter()
    scheduler.set_timesteps(8)

    async def task(step):
        tell_step(step)
        await asyncio.sleep(0)
        net(x, STILL)

    async def tasks():
        await asyncio.gather(task(6), task(7))

    with dit_cache(net, CONFIG, scheduler=scheduler) as cache:
        tell_step(5)
        thread = threading.Thread(target=torch.no_grad()(net), args=(x, STILL))
        thread.start()
        thread.join()
        copy_context().run(asyncio.run, tasks())
        net(x, STILL)
        assert [each.step for each in cache.decisions] == [0, 6, 7, 5]
