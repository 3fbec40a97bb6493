"""A step index that is set without an end: at each step, or once for a whole run."""

import asyncio
import threading
from contextvars import copy_context

import pytest
import torch
from toys import Counter, Net, Pipe, latents

from dithooks import DitCacheConfig, Linear, Mask, dit_cache, timestep_scope
from dithooks.compat.msmodelslim.step_index import set_step_index

CONFIG = DitCacheConfig(2, 2, 1, 3)
EXPECTED = {"warm-up": 2, "refresh": 3, "reuse": 3}
STILL = torch.tensor(0.5)  # a timestep argument that tells nothing


@pytest.mark.parametrize(("step", "error"), [(-1, ValueError), (1.0, TypeError), (True, TypeError)])
def test_bad_steps_leave_what_was_told(step, error):
    net = Net()
    with dit_cache(net, CONFIG) as cache:
        set_step_index(3)
        with pytest.raises(error, match="step"):
            set_step_index(step)
        net(latents(), STILL)
        assert cache.decisions[-1].step == 3


@pytest.mark.parametrize("calls", [1, 2])
def test_told_at_each_step_over_several_runs(calls):
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        for _run in range(3):
            for step in range(8):
                set_step_index(step)
                for _ in range(calls):
                    net(x, STILL)
        assert cache.stats.reasons == {key: 3 * calls * count for key, count in EXPECTED.items()}


def test_told_at_each_step_it_outdoes_a_scheduler_and_the_timestep_argument():
    """A sampler that asks the model twice a step, at two times, under a scheduler that it does not use."""
    pipe, x = Pipe(Net()), latents()
    pipe.scheduler.set_timesteps(100)
    with dit_cache(pipe, CONFIG) as cache:
        for step in range(8):
            set_step_index(step)
            pipe.transformer(x, torch.tensor(1 - 0.1 * step))
            pipe.transformer(x, torch.tensor(0.95 - 0.1 * step))
        assert [each.step for each in cache.decisions] == [step for step in range(8) for _ in range(2)]


def test_told_once_the_scheduler_goes_on_from_there():
    pipe = Pipe(Net())
    set_step_index(0)
    with dit_cache(pipe, CONFIG) as cache:
        for _run in range(3):
            pipe(latents())
        assert cache.stats.reasons == {key: 3 * count for key, count in EXPECTED.items()}
        assert [each.run for each in cache.decisions] == [0] * 8 + [1] * 8 + [2] * 8


def test_what_was_told_to_another_loop_is_not_for_this_one():
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe.transformer, CONFIG):
        for step in range(8):
            set_step_index(step)
            pipe.transformer(x, STILL)
    for target in (pipe, pipe.transformer):  # by its scheduler; by the timestep argument
        with dit_cache(target, CONFIG) as cache:
            pipe(x)
            assert cache.stats.reasons == EXPECTED


def test_a_loop_that_tells_and_then_one_that_does_not():
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe, CONFIG) as cache:
        for step in range(8):
            set_step_index(step)
            pipe.transformer(x, STILL)
        pipe(x)
        set_step_index(0)
        pipe(x)
        assert cache.stats.reasons == {key: 3 * count for key, count in EXPECTED.items()}


def test_told_before_each_run_the_timestep_argument_goes_on_from_there():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        for _run in range(2):
            set_step_index(0)
            for t in torch.linspace(1, 0.1, 8):
                net(x, t)
        assert cache.stats.reasons == {key: 2 * count for key, count in EXPECTED.items()}


def test_told_once_and_nothing_goes_on_is_said():
    net, x = Net(), latents()
    set_step_index(0)
    with dit_cache(net, CONFIG), pytest.warns(UserWarning, match=r"called 64 times at step 0 .*timestep_scope"):
        [net(x, STILL) for _ in range(65)]


def test_an_open_scope_goes_first_and_ends_before_it():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        set_step_index(1)
        with timestep_scope(2):
            net(x, STILL)
        net(x, STILL)
        set_step_index(None)
        set_step_index(None)
        with timestep_scope(4):
            set_step_index(None)  # a scope is not its to end
            net(x, STILL)
        assert [each.step for each in cache.decisions] == [2, 1, 4]


def test_not_told_to_other_threads_and_tasks():
    net, x = Net(), latents()
    scheduler = Counter()
    scheduler.set_timesteps(8)

    async def task(step):
        set_step_index(step)
        await asyncio.sleep(0)
        net(x, STILL)

    async def tasks():
        await asyncio.gather(task(6), task(7))

    with dit_cache(net, CONFIG, scheduler=scheduler) as cache:
        set_step_index(5)
        thread = threading.Thread(target=torch.no_grad()(net), args=(x, STILL))
        thread.start()
        thread.join()
        copy_context().run(asyncio.run, tasks())
        net(x, STILL)
        assert [each.step for each in cache.decisions] == [0, 6, 7, 5]


def test_told_for_each_request_in_a_task_of_its_own():
    """What the main task was told before is not theirs: neither the step, nor what is cached."""
    net, x = Net(), [latents(), latents()]
    set_step_index(0)

    async def request(x, tells):
        outs = []
        for step, t in enumerate(torch.linspace(1, 0.1, 8)):
            if tells:
                set_step_index(step)
            outs.append(net(x, t))
            await asyncio.sleep(0)
        return torch.stack(outs)

    async def requests(tells):
        return await asyncio.gather(*(request(each, tells) for each in x))

    for tells in (True, False):
        with dit_cache(net, CONFIG):
            alone = [asyncio.run(request(each, tells)) for each in x]
        with dit_cache(net, CONFIG) as cache:
            together = asyncio.run(requests(tells))
            assert cache.stats.reused_calls == 6
        assert all(torch.equal(one, other) for one, other in zip(alone, together, strict=True))


def test_told_inside_of_the_call_it_is_too_late():
    class Tells(Net):
        def forward(self, hidden_states, timestep, step):
            set_step_index(step)
            return super().forward(hidden_states, timestep)

    net, x = Tells(), latents()
    with dit_cache(net, CONFIG) as cache:
        set_step_index(0)
        net(x, STILL, 0)  # once more the same: nothing new
        with pytest.raises(
            ValueError,
            match=r"a step index was set between the transformer's call and that of blocks\.1.*before the transformer",
        ):
            net(x, STILL, 1)
        set_step_index(0)
        net(x, STILL, 0)
        assert cache.stats.calls == 3


@pytest.mark.parametrize("stop", [(step, block) for step in range(3) for block in range(6)])
def test_a_run_that_is_broken_off_leaves_nothing_to_the_next(stop):
    """A loop over the blocks alone, told each step; it ends after so many blocks of a step."""
    net, config = Net(), DitCacheConfig(0, 2, 1, 3)

    def drive(x, stop=None):
        outs = []
        for step in range(4):
            set_step_index(step)
            h = net.embed(x)
            temb = net.time(torch.tensor([[1 - step / 4]])).expand(len(x), -1)
            for number, block in enumerate(net.blocks):
                if (step, number) == stop:
                    return outs
                h = block(h, temb)
            if (step, len(net.blocks)) == stop:
                return outs
            outs.append(h)
        return outs

    x = latents(), latents()
    with dit_cache(net, config, blocks="blocks") as cache:
        alone = drive(x[1])
        assert cache.stats.reused_calls == 2
    set_step_index(None)
    with dit_cache(net, config, blocks="blocks"):
        drive(x[0], stop)
        after = drive(x[1])
    assert all(torch.equal(one, other) for one, other in zip(alone, after, strict=True))


def test_several_calls_a_step_however_the_scheduler_goes_on():
    """A second-order sampler, that asks the model twice and moves the scheduler twice."""
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe, CONFIG) as cache:
        for _run in range(2):
            pipe.scheduler.set_timesteps(16)
            for step in range(8):
                set_step_index(step)
                for _ in range(2):
                    pipe.transformer(x, STILL)
                    pipe.scheduler.step()
        assert [each.step for each in cache.decisions if each.step > 1] == [
            s for s in range(2, 8) for _ in range(2)
        ] * 2


def test_told_once_runs_begin_there_and_go_on():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        for begin in (5, 5, 0, 3):
            set_step_index(begin)
            for t in torch.linspace(1, 0.1, 4):
                net(x, t)
        assert [each.step for each in cache.decisions] == [b + k for b in (5, 5, 0, 3) for k in range(4)]


@pytest.mark.parametrize("once", [True, False])
def test_what_the_scheduler_knows_besides_is_known_still(once):
    """How many steps there are, which ends a run and frees what it kept, and their noise levels."""
    pipe, masked = Pipe(Net()), DitCacheConfig(policy=Mask((1, 0, 0, 1, 0, 0)), predictor=Linear())
    with dit_cache(pipe, masked) as cache:
        for _run in range(2):
            set_step_index(0)
            pipe(latents(), steps=12, at=None if once else set_step_index)
            assert cache.stats.bytes_held == 0
        reused = [each.step for each in cache.decisions if each.reuse]
    with dit_cache(pipe, masked) as cache:
        set_step_index(None)
        pipe(latents(), steps=12)
        assert reused == [each.step for each in cache.decisions if each.reuse] * 2


def test_an_open_scope_is_not_a_telling_s_to_change():
    net, x = Net(), latents()
    with dit_cache(net, CONFIG) as cache:
        with timestep_scope(4, branch=1, steps=8):
            set_step_index(2)
            net(x, STILL)
            set_step_index(None)
            net(x, STILL)
        assert [each[2:4] for each in cache.decisions] == [(4, 1), (4, 1)]
