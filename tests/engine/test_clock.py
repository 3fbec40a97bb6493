"""Who tells the step: scope, scheduler, timestep; and whose state it is: threads and tasks."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from toys import Counter, Net, Pipe, latents, prompt

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = pytest.mark.core

CONFIG = DitCacheConfig(2, 2, 1, 3)
EXPECTED = {"warm-up": 2, "refresh": 3, "reuse": 3}


def test_nothing_to_tell_the_step_is_an_error_that_says_what_to_do():
    class Timeless(Net):
        def forward(self, hidden_states):
            return super().forward(hidden_states, torch.tensor(0.5))

    net = Timeless()
    with dit_cache(net, CONFIG):
        with pytest.raises(
            ValueError, match=r"Timeless: which sampling step is this\?.*dithooks\.steps\(timesteps\).*calls_per_step"
        ):
            net(latents())
        with timestep_scope(3):
            net(latents())
    net(latents())


@pytest.mark.parametrize(
    "times", [torch.linspace(1, 0.1, 8), torch.arange(8.0), torch.tensor([9, 8, 7, 4, 3, 2, 1, 0])]
)
@pytest.mark.parametrize("form", [lambda t: t, lambda t: t.expand(2), lambda t: float(t), lambda t: t.reshape(1)])
def test_the_timestep_argument(times, form):
    class Any(Net):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, torch.as_tensor(timestep).float().reshape(-1)[:1])

    net, x = Any(), latents()
    with dit_cache(net, CONFIG) as cache:
        for runs in (1, 2, 3):
            for t in times:
                net(x, form(t)) if runs == 2 else net(x, timestep=form(t))
            assert cache.stats.reasons == {key: runs * count for key, count in EXPECTED.items()}


def test_one_timestep_per_token_counts_by_the_largest():
    class PerToken(Net):
        def forward(self, hidden_states, timestep):
            return super().forward(hidden_states, timestep.max())

    net, x = PerToken(), latents()
    with dit_cache(net, CONFIG) as cache:
        for t in torch.linspace(1, 0.1, 8):
            net(x, timestep=torch.stack([torch.zeros(()), t, t]))
        assert cache.stats.reasons == EXPECTED


def test_a_scheduler_without_step_index_is_asked_for_its_timesteps():
    """As DDIM and DDPM; img2img enters in the middle of the list, and the steps keep their places in it."""

    class Plain:
        timesteps = torch.arange(700, -1, -100)

    net, x = Net(), latents()
    scheduler = Plain()
    with dit_cache(net, CONFIG, scheduler=scheduler) as cache:
        for t in scheduler.timesteps[4:]:
            net(x, timestep=t)
        assert cache.stats.reasons == {"refresh": 2, "reuse": 2}


def test_the_schedulers_step_index_counts_steps_not_calls():
    net, x = Net(), latents()
    scheduler = Counter()
    scheduler.set_timesteps(8)
    with dit_cache(net, CONFIG, scheduler=scheduler) as cache:
        for step in range(8):
            for _ in range(1 + step % 3):
                net(x, timestep=torch.tensor(0.5))
            scheduler.step()
        assert cache.stats.calls == 1 + 2 + 3 + 1 + 2 + 3 + 1 + 2
        # Refreshes at 2, 4, 6 see 3, 2 and 1 calls: the third call of step 5 and the second of step 7 were not there.
        assert cache.stats.reasons == {"warm-up": 3, "refresh": 3 + 2 + 1, "reuse": 1 + 2 + 1, "missed refresh": 2}


def test_a_new_scheduler_on_the_pipeline_is_seen():
    pipe = Pipe(Net())
    with dit_cache(pipe, CONFIG) as cache:
        pipe(latents())
        pipe.scheduler = Counter()
        pipe(latents())
        assert cache.stats.reasons == {key: 2 * count for key, count in EXPECTED.items()}


class TestScope:
    @pytest.mark.parametrize(
        ("step", "error"), [(-1, ValueError), (1.0, TypeError), ("1", TypeError), (True, TypeError)]
    )
    def test_bad_steps(self, step, error):
        with pytest.raises(error, match="step"), timestep_scope(step):
            pass

    @pytest.mark.parametrize(
        ("extra", "error"),
        [
            ({"branch": -1}, ValueError),
            ({"branch": 1.5}, TypeError),
            ({"sigma": "x"}, TypeError),
            ({"sigma": -1.0}, ValueError),
            ({"sigma": float("nan")}, ValueError),
        ],
    )
    def test_bad_extras(self, extra, error):
        with pytest.raises(error, match=next(iter(extra))), timestep_scope(0, **extra):
            pass

    def test_integers_of_other_libraries(self):
        import numpy as np

        for step in (np.int64(3), torch.tensor(3)):
            with timestep_scope(step):
                pass

    def test_scope_wins_over_scheduler_and_timestep(self):
        net = Net()
        scheduler = Counter()
        scheduler.set_timesteps(8)
        with dit_cache(net, CONFIG, scheduler=scheduler) as cache:
            for step in range(8):
                with timestep_scope(step):
                    net(latents(), timestep=torch.tensor(0.5))
            assert cache.stats.reasons == EXPECTED

    def test_nested_the_innermost_counts_and_the_outer_returns(self):
        net, x, t = Net(), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            with timestep_scope(0):
                net(x, t)
                with timestep_scope(1):
                    net(x, t)
                    with timestep_scope(2, branch=0):
                        net(x, t)
                with timestep_scope(2, branch=1):
                    net(x, t)
            assert cache.stats.reasons == {"refresh": 1, "reuse": 2, "no anchor": 1}

    def test_sigma_is_kept_with_the_residual(self):
        net, x, t = Net(), latents(), torch.tensor(0.5)
        with dit_cache(net, DitCacheConfig(0, 3, 0, 5)) as cache:
            with timestep_scope(0, sigma=0.75):
                net(x, t)
            (run,) = cache._attached[0].cache.decider._runs.values()
            assert run.branches[0].anchors[0].moment == (0, 0.75, "sigma")


def sample(net, x, e, steps=8, meet=lambda: None):
    for k in range(steps):
        with timestep_scope(k):
            meet()
            x = x - net(x, timestep=torch.tensor(1 - k / steps), encoder_hidden_states=e) / steps
    return x


class TestTogether:
    """Several requests on one model at once equal the same requests one after another, bit for bit."""

    COUNT = 4

    @pytest.fixture
    def requests(self):
        return [(latents(1 + n % 2, 4 + n), prompt(1 + n % 2)) for n in range(self.COUNT)]

    @pytest.fixture
    def net(self):
        return Net("swapped")

    @pytest.fixture
    def expected(self, net, requests):
        outs = []
        for x, e in requests:
            with dit_cache(net, CONFIG):
                outs.append(sample(net, x, e))
        return outs

    def test_threads_with_scopes_on_one_model(self, net, requests, expected):
        barrier = threading.Barrier(self.COUNT)

        def work(request):
            with torch.no_grad():
                return sample(net, *request, meet=barrier.wait)

        with dit_cache(net, CONFIG) as cache, ThreadPoolExecutor(self.COUNT) as pool:
            outs = list(pool.map(work, requests))
            assert cache.stats.reasons == {key: self.COUNT * count for key, count in EXPECTED.items()}
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

    def test_threads_with_a_handle_each(self, requests):
        barrier = threading.Barrier(2)
        nets = [Net("swapped") for _ in range(2)]
        alone = []
        for net, (x, e) in zip(nets, requests, strict=False):
            with dit_cache(Pipe(net), CONFIG):
                alone.append(Pipe(net)(x, prompts=[e]))

        def work(net, request):
            pipe = Pipe(net)
            with torch.no_grad(), dit_cache(pipe, CONFIG) as cache:
                out = pipe(request[0], prompts=[request[1]], at=lambda _: barrier.wait())
                return out, cache.stats.reasons

        with ThreadPoolExecutor(2) as pool:
            results = list(pool.map(work, nets, requests[:2]))
        assert all(torch.equal(out, want) for (out, _), want in zip(results, alone, strict=True))
        assert all(reasons == EXPECTED for _, reasons in results)

    def test_threads_without_scopes_keep_apart(self, net, requests, expected):
        barrier = threading.Barrier(self.COUNT)

        def work(request):
            x, e = request
            with torch.no_grad():
                for k in range(8):
                    barrier.wait()
                    x = x - net(x, timestep=torch.tensor(1 - k / 8), encoder_hidden_states=e) / 8
            return x

        with dit_cache(net, CONFIG), ThreadPoolExecutor(self.COUNT) as pool:
            outs = list(pool.map(work, requests))
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

    @pytest.mark.parametrize("in_threads", [False, True])
    def test_asyncio_tasks(self, net, requests, expected, in_threads):
        async def one(x, e):
            for k in range(8):
                with timestep_scope(k):
                    await asyncio.sleep(0)
                    call = {"timestep": torch.tensor(1 - k / 8), "encoder_hidden_states": e}
                    out = await asyncio.to_thread(quiet, x, **call) if in_threads else net(x, **call)
                    x = x - out / 8
            return x

        def quiet(*args, **kwargs):
            with torch.no_grad():
                return net(*args, **kwargs)

        async def everything():
            return await asyncio.gather(*(one(x, e) for x, e in requests))

        with dit_cache(net, CONFIG) as cache:
            sample(net, *requests[0])  # the tasks inherit the context of a run that is over
            cache.reset()
            outs = asyncio.run(everything())
            assert cache.stats.reasons == {key: self.COUNT * count for key, count in EXPECTED.items()}
        assert all(torch.equal(a, b) for a, b in zip(outs, expected, strict=True))

    def test_state_of_a_thread_that_ended_is_freed(self, net, requests):
        with dit_cache(net, CONFIG) as cache:

            def work():
                with torch.no_grad():
                    sample(net, *requests[0])

            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            del thread
            import gc

            gc.collect()
            assert cache.stats.bytes_held == 0
            assert cache.stats.calls == 8
