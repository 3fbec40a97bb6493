"""The clock on diffusers' own schedulers, and on pipelines with two transformers."""

import diffusers
import pytest
import torch
from toys import Net, Pipe, latents

from dithooks import DitCacheConfig, dit_cache

CONFIG = DitCacheConfig(2, 3, 0, 5)
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers with NumPy 2
NAMES = [
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "UniPCMultistepScheduler",
    "DEISMultistepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "LCMScheduler",
]


@pytest.fixture(params=NAMES)
def scheduler(request):
    return getattr(diffusers, request.param)()


def sample(net, scheduler, x, steps=9, begin=0, stop=None, calls=1):
    """As pipelines do, also image-to-image ones, which skip the first timesteps; returns the evaluations made."""
    scheduler.set_timesteps(steps)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    generator = torch.Generator().manual_seed(0)
    noise = {"generator": generator} if "Ancestral" in type(scheduler).__name__ else {}
    times = scheduler.timesteps[begin:]
    for index, t in enumerate(times):
        if index == stop:
            raise KeyboardInterrupt
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        for _ in range(calls):
            out = net(scaled / scaled.std(), timestep=t / 1000)
        x = scheduler.step(out, t, x, **noise).prev_sample
    return x, range(begin, begin + len(times))


class Scaled(Pipe):
    """A pipeline that hands its model the scheduler's timesteps divided by 1000."""

    def __init__(self, net, scheduler):
        super().__init__(net)
        self.scheduler = scheduler


def schedule(indices):
    """Reasons of one run, by hand."""
    reasons, anchored = [], None
    for t in indices:
        if t < 2 or (t - 2) % 3 == 0:
            reasons.append("warm-up" if t < 2 else "refresh")
            anchored = t
        elif anchored is None or anchored < t - (t - 2) % 3:
            reasons.append("no anchor" if anchored is None else "missed refresh")
            anchored = t
        else:
            reasons.append("reuse")
    return {reason: reasons.count(reason) for reason in set(reasons)}


def test_steps_runs_interruptions_and_branches(scheduler):
    net = Net()
    pipe = Scaled(net, scheduler)
    torch.manual_seed(0)
    x = latents()
    with dit_cache(pipe, CONFIG) as cache:
        torch.manual_seed(1)
        first, indices = sample(net, scheduler, x)
        assert cache.stats.reasons == schedule(indices)
        for stop in (0, 1, 4):
            with pytest.raises(KeyboardInterrupt):
                sample(net, scheduler, latents(), stop=stop)
            before = cache.stats.reasons
            torch.manual_seed(1)
            again, _ = sample(net, scheduler, x)
            assert torch.equal(again, first)
            after = cache.stats.reasons
            assert {k: after[k] - before.get(k, 0) for k in after if after[k] != before.get(k, 0)} == schedule(indices)
        cache.reset()
        sample(net, scheduler, x, steps=6, calls=2)
        _, indices = sample(net, scheduler, x, steps=6, calls=2)
        assert cache.stats.reasons == {key: 4 * count for key, count in schedule(indices).items()}


def test_image_to_image_enters_in_the_middle(scheduler):
    net, begin = Net(), 4 if "Singlestep" not in type(scheduler).__name__ else 0  # which has to start at the start
    pipe = Scaled(net, scheduler)
    with dit_cache(pipe, CONFIG) as cache:
        _, indices = sample(net, scheduler, latents(), steps=12, begin=begin)
        first = cache.stats.reasons
        assert first.get("reuse", 0) > 0
        if hasattr(scheduler, "set_begin_index"):
            assert first == schedule(indices)
        sample(net, scheduler, latents(), steps=12, begin=begin)
        assert cache.stats.reasons == {key: 2 * count for key, count in first.items()}


def test_two_experts_share_a_run():
    """As in Wan 2.2: one transformer for the noisy steps, another for the rest."""

    class Experts(Pipe):
        def __init__(self):
            super().__init__(Net())
            self.transformer_2 = Net()

        def __call__(self, x, steps=8, boundary=4):
            self.scheduler.set_timesteps(steps)
            for step, t in enumerate(self.scheduler.timesteps):
                expert = self.transformer if step < boundary else self.transformer_2
                x = x - expert(x, timestep=t / 1000) / steps
                self.scheduler.step()
            return x

    pipe, x = Experts(), latents()
    plain = pipe(x)
    with dit_cache(pipe, DitCacheConfig(1, 4, 0, 5)) as cache:
        first = pipe(x)
        # 0 warm-up, 1 refresh, 2 and 3 reused; the second expert's first step is its own to compute, 5 a refresh
        assert cache.stats.reasons == {"warm-up": 1, "refresh": 2, "reuse": 4, "no anchor": 1}
        assert torch.equal(pipe(x), first)
        assert cache.stats.reasons == {"warm-up": 2, "refresh": 4, "reuse": 8, "no anchor": 2}
    assert torch.equal(pipe(x), plain)
    with dit_cache(pipe, DitCacheConfig(1, 4, 0, 5), blocks="transformer_2.blocks") as cache:
        pipe(x)
        assert cache.stats.calls == 4
