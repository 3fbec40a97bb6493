"""Several runs share one transformer, each with prompts and state of its own: in threads, in asyncio tasks, by turns in
one thread, and from thread to thread. Every result has to be, bit for bit, what the run gives alone.
"""

import asyncio
import random
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toys import Net, latents, prompt

from dithooks import Budget, DitCacheConfig, Linear, Mask, Threshold, dit_cache, timestep_scope
from dithooks.compat.msmodelslim.step_index import set_step_index
from dithooks.demo import load_pipeline

pytestmark = [pytest.mark.line("Concurrency"), pytest.mark.on("a small two-stream model")]

STEPS = 8
CONFIGS = {
    "Interval": DitCacheConfig(2, 2, 1, 3),
    "Mask, Linear": DitCacheConfig(
        cache_block_start=1, cache_num_blocks=3, policy=Mask((1, 1, 0, 0, 1, 0, 0, 1)), predictor=Linear()
    ),
    "Threshold, F=0": DitCacheConfig(policy=Threshold(0.35, max_warmup_steps=1)),
    "Threshold, F=1": DitCacheConfig(cache_block_start=1, policy=Threshold(0.35, max_warmup_steps=1)),
    "Budget": DitCacheConfig(cache_block_start=1, policy=Budget(1.6)),
}


class Job:
    """A run in steps of two calls: with its prompt, and without."""

    def __init__(self, seed: int, steps: int = STEPS) -> None:
        self.x = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
        self.prompts = [torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(100 + seed + k)) for k in (0, 50)]
        self.steps, self.at, self.outputs, self.calls = steps, 0, [], []

    @property
    def over(self) -> bool:
        return self.at == self.steps

    @torch.no_grad()
    def step(self, net) -> None:
        t = torch.tensor(1 - self.at / self.steps)
        with timestep_scope(self.at, steps=self.steps):
            pair = [net(self.x, t, encoder_hidden_states=text) for text in self.prompts]
        self.x = self.x - (2 * pair[0] - pair[1]) / self.steps
        self.calls += pair
        self.outputs.append(self.x)
        self.at += 1

    def run(self, net, rest=lambda: None):
        while not self.over:
            self.step(net)
            rest()
        return self.outputs


class Untold(Job):
    """The same, with nothing but the timestep argument to tell the step."""

    @torch.no_grad()
    def step(self, net) -> None:
        t = torch.tensor(1 - self.at / self.steps)
        pair = [net(self.x, t, encoder_hidden_states=text) for text in self.prompts]
        self.x = self.x - (2 * pair[0] - pair[1]) / self.steps
        self.calls += pair
        self.outputs.append(self.x)
        self.at += 1


@pytest.fixture
def net():
    return Net("swapped")


KINDS = [(config, kind) for config in CONFIGS.values() for kind in (Job, Untold)]
KINDS.remove((CONFIGS["Budget"], Untold))  # a budget has to be told how many steps there are
by_kind = pytest.mark.parametrize(("config", "kind"), KINDS)


def alone(net, config, jobs):
    """What each job gives by itself, and in how many calls it reuses; that has to be some."""
    found, reused = [], 0
    for job in jobs:
        with dit_cache(net, config) as cache:
            found.append(job.run(net))
        assert cache.stats.reused_calls, "nothing is reused, so nothing is shown"
        reused += cache.stats.reused_calls
    return found, reused


def same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(a, b)


@by_kind
def test_threads(net, config, kind):
    """Six threads at once, from the very first call on: each gives what it gives alone, with as much reused."""
    expected, reused = alone(net, config, [kind(seed) for seed in range(6)])
    for _ in range(3):
        with dit_cache(net, config) as cache, ThreadPoolExecutor(6) as pool:
            barrier = threading.Barrier(6)

            def serve(seed, barrier=barrier):
                job = kind(seed)
                barrier.wait()
                return job.run(net, rest=lambda: time.sleep(0.0005 * random.Random(seed).random()))

            same(list(pool.map(serve, range(6))), expected)
            assert cache.stats.reused_calls == reused


@by_kind
def test_asyncio_tasks(net, config, kind):
    """Six asyncio tasks that take turns after every step: each gives what it gives alone, with as much reused."""
    expected, reused = alone(net, config, [kind(seed) for seed in range(6)])

    async def serve(seed):
        job = kind(seed)
        while not job.over:
            job.step(net)
            await asyncio.sleep(0)
        return job.outputs

    async def all_of_them():
        return await asyncio.gather(*map(serve, range(6)))

    with dit_cache(net, config) as cache:
        same(asyncio.run(all_of_them()), expected)
        assert cache.stats.reused_calls == reused


@by_kind
def test_one_thread_that_takes_turns(net, config, kind):
    """A server makes a step of whichever run it likes, within its request: each run gives what it gives alone."""
    expected, reused = alone(net, config, [kind(seed, steps=STEPS - seed % 2) for seed in range(5)])
    turns = random.Random(0)
    with dit_cache(net, config) as cache:
        jobs = [kind(seed, steps=STEPS - seed % 2) for seed in range(5)]
        requests = {job: cache.request() for job in jobs}
        waiting = jobs[:2]  # further ones come while these are under way
        while waiting:
            job = turns.choice(waiting)
            with requests[job]:
                job.step(net)
            waiting = [each for each in waiting if not each.over]
            arriving = [each for each in jobs if each.at == 0 and each not in waiting]
            if not waiting or (arriving and turns.random() < 0.3):
                waiting += arriving[:1]
        same([job.outputs for job in jobs], expected)
        assert cache.stats.reused_calls == reused


@by_kind
def test_from_thread_to_thread(net, config, kind):
    """Each step of a run is made in whichever thread is free: its request carries what is cached along."""
    expected, reused = alone(net, config, [kind(seed) for seed in range(4)])

    async def serve(cache, seed):
        job = kind(seed)
        with cache.request():
            while not job.over:
                await asyncio.to_thread(job.step, net)
        return job.outputs

    async def all_of_them(cache):
        return await asyncio.gather(*(serve(cache, seed) for seed in range(4)))

    with dit_cache(net, config) as cache:
        same(asyncio.run(all_of_them(cache)), expected)
        assert cache.stats.reused_calls == reused


def test_steps_that_are_told_belong_to_the_request(net):
    """A step given in one request is not taken for another's, nor for the thread's."""
    config = CONFIGS["Interval"]

    class Told(Untold):
        def step(self, net):
            set_step_index(self.at)
            super().step(net)

    expected, reused = alone(net, config, [Told(seed) for seed in range(2)])
    set_step_index(None)
    with dit_cache(net, config) as cache:
        jobs = [Told(seed) for seed in range(2)]
        requests = [cache.request() for _ in jobs]
        for job, request in [(jobs[0], requests[0])] * 3 + list(zip(jobs, requests, strict=True)) * 5:
            with request:
                job.step(net)
        with requests[1]:
            jobs[1].step(net), jobs[1].step(net), jobs[1].step(net)
        same([job.outputs for job in jobs], expected)
        assert cache.stats.reused_calls == reused


class TestRequests:
    """What a request is, apart from the runs in it."""

    def test_what_was_cached_is_freed(self, net):
        """An unfinished run's residuals go with its request, when that is closed or no longer referred to."""
        with dit_cache(net, CONFIGS["Interval"]) as cache:
            for close in (True, False):
                job, request = Untold(0), cache.request()
                with request:
                    for _ in range(4):
                        job.step(net)
                assert cache.stats.bytes_held
                if close:
                    request.close()
                del request
                assert cache.stats.bytes_held == 0

    def test_wrongly_used(self, net):
        """Entered twice, here or elsewhere, entered when closed, closed when entered, of a removed cache: errors."""
        with dit_cache(net, CONFIGS["Interval"]) as cache, ThreadPoolExecutor(1) as pool:
            request = cache.request()
            with request:
                for again in (request.__enter__, lambda: pool.submit(request.__enter__).result()):
                    with pytest.raises(RuntimeError, match=r"entered already.*handle\.request\(\)"):
                        again()
                with pytest.raises(RuntimeError, match="leave it before"):
                    request.close()
            with request:  # none of that has harmed it
                pass
            request.close()
            with pytest.raises(RuntimeError, match=r"was closed.*handle\.request\(\)"), request:
                pass
            with pytest.raises(TypeError, match="no timesteps"):
                cache.request(scheduler=object())
        with pytest.raises(RuntimeError, match="was removed"):
            cache.request()

    def test_left_by_an_exception(self, net):
        """What a request had cached when an exception left it is not reused; the next step begins a run."""
        config = CONFIGS["Interval"]
        with dit_cache(net, config) as cache:
            job, request = Job(0), cache.request()
            for _ in range(3):
                with request:
                    job.step(net)
            with pytest.raises(RuntimeError), request:
                raise RuntimeError
            before = cache.stats.reused_calls
            with request:
                job.step(net)  # step 3: reused, if nothing had happened
            assert (before, cache.stats.reused_calls) == (0, 0)
            assert cache.decisions[-1].reason == "no anchor"

    def test_inside_of_a_scope(self, net):
        """A request entered under an open timestep_scope counts: the scope gives the step, the request its owner."""
        config = CONFIGS["Interval"]
        expected, reused = alone(net, config, [Job(seed) for seed in range(3)])
        with dit_cache(net, config) as cache:
            jobs = [Job(seed) for seed in range(3)]
            requests = [cache.request() for _ in jobs]
            for step in range(STEPS):
                with timestep_scope(step):
                    for job, request in zip(jobs, requests, strict=True):
                        with request:
                            t = torch.tensor(1 - step / STEPS)
                            pair = [net(job.x, t, encoder_hidden_states=text) for text in job.prompts]
                            job.x = job.x - (2 * pair[0] - pair[1]) / STEPS
                            job.outputs.append(job.x)
            same([job.outputs for job in jobs], expected)
            assert cache.stats.reused_calls == reused


@pytest.mark.on("the pipeline that ships")
class TestPipelines:
    """Pipelines that share a transformer, each with a scheduler of its own."""

    CONFIG = DitCacheConfig(2, 2, 0, 12)
    CAPTIONS = ("panda face", "taxi", "watermelon")

    @pytest.fixture
    def pipes(self):
        first = load_pipeline()
        pipes = [first, *(type(first)(**{**first.components, "scheduler": self.anew(first)}) for _ in range(2))]
        for pipe in pipes:
            pipe.set_progress_bar_config(disable=True)
        assert len({id(pipe.scheduler) for pipe in pipes}) == 3
        assert len({id(pipe.transformer) for pipe in pipes}) == 1
        return pipes

    @staticmethod
    def anew(pipe):
        return type(pipe.scheduler).from_config(pipe.scheduler.config)

    @staticmethod
    def draw(pipe, caption):
        noise = torch.Generator().manual_seed(0)
        return pipe([caption], num_inference_steps=6, generator=noise, output_type="latent").images

    def test_each_with_its_request(self, pipes):
        """Three pipelines in three threads over one transformer, in requests that name their schedulers."""
        expected = []
        for caption in self.CAPTIONS:
            with dit_cache(pipes[0], self.CONFIG) as cache:
                expected.append(self.draw(pipes[0], caption))
            assert cache.stats.reused_calls
        with dit_cache(pipes[0], self.CONFIG) as cache, ThreadPoolExecutor(3) as pool:

            def serve(pipe, caption):
                with cache.request(scheduler=pipe.scheduler):
                    return self.draw(pipe, caption)

            found = list(pool.map(serve, pipes, self.CAPTIONS))
            assert cache.stats.reused_calls == 3 * 2 * 2
        assert all(map(torch.equal, found, expected))

    def test_without(self, pipes):
        """Without requests, the scheduler of one gives the steps of all, with a warning: others are computed until it
        is seen not to move as their timesteps do, and then known by these."""
        plain = self.draw(pipes[1], "taxi")
        cache, others = dit_cache(pipes[0], self.CONFIG), []

        def meanwhile(pipe, step, timestep, given):
            if step == 3:
                with ThreadPoolExecutor(1) as pool:
                    others.append(pool.submit(self.draw, pipes[1], "taxi").result())

        with cache:
            alone = self.draw(pipes[0], "panda face")
            noise = torch.Generator().manual_seed(0)
            with pytest.warns(UserWarning, match=r"one scheduler gives the steps of all.*handle\.request\(scheduler"):
                found = pipes[0](
                    ["panda face"],
                    num_inference_steps=6,
                    generator=noise,
                    output_type="latent",
                    callback_on_step_end=meanwhile,
                ).images
            assert cache.stats.reasons["shared scheduler"] == 2  # both calls of the first step
        assert 0 < float((others[0] - plain).norm() / plain.norm()) < 0.2  # it is cached as well
        assert torch.equal(found, alone)


class TestChangesMeanwhile:
    """The cache is attached, changed and taken off while other threads are in the middle of a call."""

    @pytest.mark.parametrize("change", ["reset", "remove", "update"])
    @pytest.mark.parametrize("at", [1, 2])
    def test_in_the_middle_of_a_reused_call(self, net, change, at):
        """Whatever another thread does between two passed-over blocks, the call ends as it began: with Δ̂ added."""
        config = DitCacheConfig(2, 2, 1, 3)
        before = Job(0)
        alone(net, config, [before])
        job, halted, go_on = Job(0), threading.Event(), threading.Event()
        cache = dit_cache(net, config)

        def pause(index, h):  # between blocks, in the parent's own code
            if index == at and job.at == 3 and not halted.is_set():
                halted.set()
                waited = go_on.wait(20 if change == "reset" else 0.2)
                assert waited is (change == "reset")  # the others wait until this call is through
            return h

        plain = net._controlled

        class Pausing(type(net)):
            def _controlled(self, h, control):
                self.count = getattr(self, "count", 0) + 1
                return pause((self.count - 1) % len(self.blocks), plain(h, control))

        net.__class__ = Pausing
        actions = {
            "reset": cache.reset,
            "remove": cache.remove,
            "update": lambda: cache.update(CONFIGS["Threshold, F=1"]),
        }

        def act():
            assert halted.wait(20)
            actions[change]()
            go_on.set()

        with ThreadPoolExecutor(1) as pool:
            acting = pool.submit(act)
            for _ in range(4):
                job.step(net)
            acting.result()
        same([job.calls[:7]], [before.calls[:7]])  # to the one of step 3 that was halted
        cache.remove()
        net.__class__ = Net
        assert torch.equal(Job(1).run(net)[-1], Job(1).run(twin(net))[-1])

    def test_a_call_that_never_ends_is_not_waited_for_forever(self, net):
        """A thread that is still in the range after a second: the cache is taken off all the same, with a warning."""
        job, halted, go_on = Job(0), threading.Event(), threading.Event()

        class Stuck(Net):
            def _controlled(self, h, control):
                if job.at == 3 and not halted.is_set() and cache.stats.reused_calls:
                    halted.set()
                    go_on.wait(20)
                return h

        net.__class__ = Stuck
        with ThreadPoolExecutor(1) as pool:
            cache = dit_cache(net, DitCacheConfig(2, 2, 0, 3))
            running = pool.submit(lambda: [job.step(net) for _ in range(4)])
            assert halted.wait(20)
            with pytest.warns(UserWarning, match=r"had not come from blocks\.0 to blocks\.2 within 1 s"):
                cache.remove()
            go_on.set()
            running.result()

    def test_attached_and_removed_while_others_run(self, net):
        """A thread attaches, resets and removes without pause: every call of the others gives one of two outputs."""
        config, given = DitCacheConfig(1, 8, 0, 5), (latents(1), torch.tensor(0.5), prompt(1))
        full = net(*given)  # one input throughout: reused or computed, the output is the same but for rounding
        stop, worst = threading.Event(), []

        def serve():
            with torch.no_grad():
                while not stop.is_set():
                    for step in range(9):
                        with timestep_scope(step):
                            worst.append(float((net(*given) - full).abs().max()))

        reused = 0
        with ThreadPoolExecutor(3) as pool:
            threads = [pool.submit(serve) for _ in range(3)]
            until = time.monotonic() + 60
            while (reused < 200 or len(worst) < 1000) and time.monotonic() < until:
                with dit_cache(net, config) as cache:
                    time.sleep(0.004)
                    cache.reset()
                    time.sleep(0.004)
                    reused += cache.stats.reused_calls
            stop.set()
            for thread in threads:
                thread.result()
        assert reused >= 200
        assert len(worst) >= 1000
        assert max(worst) < 1e-5

    @pytest.fixture
    def hasty(self):
        """Threads take turns after every few instructions."""
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        yield
        sys.setswitchinterval(before)

    def test_two_threads_attach_at_once(self, net, hasty):
        """Of two handles for the same blocks one is attached, and the other gets an error that says so."""
        config, won, lost = DitCacheConfig(2, 2, 1, 3), [], []
        blocks = list(net.blocks)
        for _ in range(30):
            barrier = threading.Barrier(4)

            def attach(barrier=barrier):
                barrier.wait()
                try:
                    won.append(dit_cache(net, config))
                except ValueError as error:
                    lost.append(str(error))

            threads = [threading.Thread(target=attach) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            assert (len(won), len(lost)) == (1, 3)
            assert all("is cached already: remove that cache first" in text for text in lost)
            won.pop().remove()
            lost.clear()
            assert all(a is b for a, b in zip(net.blocks, blocks, strict=True))


def twin(net):
    """A plain model with the same weights."""
    other = Net("swapped")
    other.load_state_dict(net.state_dict())
    return other
