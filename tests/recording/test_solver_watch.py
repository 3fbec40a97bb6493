"""Watched schedulers: what a call would return is asked of a copy, and the run, and the scheduler, stay as they are."""

import copy
import pickle

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from dithooks.recording.solver_watch import WatchedStep, can_be_watched, watched_solver

SHAPE, STEPS = (2, 3, 4, 4), 6
KINDS = {
    "euler": (FlowMatchEulerDiscreteScheduler, {}),
    "ddim": (DDIMScheduler, {"clip_sample": False}),
    "noisy ddim": (DDIMScheduler, {"clip_sample": False}),
    "unipc": (UniPCMultistepScheduler, {}),
    "dpm": (DPMSolverMultistepScheduler, {}),
    "dpm sde": (DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "heun": (HeunDiscreteScheduler, {}),
}
NOISY = ("noisy ddim", "dpm sde")


def made(kind):
    one, given = KINDS[kind]
    scheduler = one(**given)
    scheduler.set_timesteps(STEPS)
    return scheduler


def state(scheduler):
    """All that a scheduler holds, as it can be compared."""
    return {name: repr(value) for name, value in vars(scheduler).items() if name != "step"}


class Looking:
    """Asks for dry calls, and keeps what they return and what follows."""

    def __init__(self, also=lambda call: None):
        self.dry, self.following, self.errors, self.also = [], [], [], also

    def before(self, call):
        self.also(call)
        zero, one, two = (call.dry(scale * call.output) for scale in (0.0, 1.0, 2.0))
        self.dry.append((zero, one, two))

    def after(self, call, following):
        self.following.append(following.clone())

    def fails(self, error):
        self.errors.append(error)


def sampled(scheduler, generator=None, keywords=False):
    """The latents of a run of a model that is a sum of sines."""
    x = torch.linspace(-1, 1, int(np.prod(SHAPE))).reshape(SHAPE).clone()
    found = []
    for t in scheduler.timesteps:
        out = torch.sin(3 * x + t / 500) - 0.1 * x
        more = {} if generator is None else {"generator": generator}
        if isinstance(scheduler, DDIMScheduler) and generator is not None:
            more["eta"] = 0.8
        if keywords:
            x = scheduler.step(model_output=out, sample=x, timestep=t, return_dict=True, **more).prev_sample
        else:
            x = scheduler.step(out, t, x, **more, return_dict=False)[0]
        found.append(x)
    return found


def seeded(kind):
    return torch.Generator().manual_seed(5) if kind in NOISY else None


@pytest.mark.parametrize("keywords", [False, True])
@pytest.mark.parametrize("kind", KINDS)
class TestDryCalls:
    def test_what_the_scheduler_returns(self, kind, keywords):
        """And A + B·y, for any other output: what follows on 2·y is as far from that on y as this from that on 0."""
        looking, scheduler = Looking(), made(kind)
        with watched_solver(scheduler, looking):
            latents = sampled(scheduler, seeded(kind), keywords)
        assert looking.errors == []
        assert len(looking.dry) == len(latents) == len(scheduler.timesteps)
        for (zero, one, two), following, x in zip(looking.dry, looking.following, latents, strict=True):
            assert torch.equal(following, x)
            torch.testing.assert_close(one, x, rtol=0, atol=1e-6 * float(x.abs().max()))
            torch.testing.assert_close(two - one, one - zero, rtol=0, atol=2e-5 * float(x.abs().max()))

    def test_nothing_is_changed(self, kind, keywords):
        plain, watched, looking = made(kind), made(kind), Looking()
        wanted = sampled(plain, own := seeded(kind), keywords)
        torch.manual_seed(9)
        rng = torch.get_rng_state()
        with watched_solver(watched, looking):
            found = sampled(watched, other := seeded(kind), keywords)
        assert torch.equal(torch.get_rng_state(), rng)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert "step" not in vars(watched)
        assert state(watched) == state(plain)
        if own is not None:
            assert torch.equal(own.get_state(), other.get_state())


class TestEuler:
    def test_the_gain_by_hand(self):
        """x + (σ' − σ)·y."""
        scheduler, looking = made("euler"), Looking()
        with watched_solver(scheduler, looking):
            latents = sampled(scheduler)
        start = torch.linspace(-1, 1, int(np.prod(SHAPE))).reshape(SHAPE)
        sigmas = scheduler.sigmas.double().numpy()
        for step, (zero, one, _) in enumerate(looking.dry):
            x = (latents[step - 1] if step else start).double().numpy()
            t = float(scheduler.timesteps[step])
            y = np.sin(3 * x + t / 500) - 0.1 * x
            np.testing.assert_allclose(zero.numpy(), x, atol=1e-6)
            np.testing.assert_allclose(one.numpy(), x + (sigmas[step + 1] - sigmas[step]) * y, atol=1e-6)

    def test_noise_of_the_global_generator(self):
        """A scheduler that draws from it: the dry call has the noise of the real one, which is that of a plain run."""

        class Noisy:
            def step(self, model_output, timestep, sample):
                return (sample - model_output / 4 + torch.randn(sample.shape),)

        x, y = torch.ones(2, 3), torch.full((2, 3), 2.0)
        torch.manual_seed(3)
        wanted = 1.0 - 0.5 + torch.randn(2, 3)
        torch.manual_seed(3)
        noisy, looking = Noisy(), Looking()
        with watched_solver(noisy, looking):
            (found,) = noisy.step(y, 0, x)
        assert torch.equal(found, wanted)
        assert torch.equal(looking.dry[0][1], wanted)

    def test_a_scheduler_that_writes_into_what_it_is_given(self):
        class Overwriting:
            def step(self, model_output, timestep, sample):
                return (sample.sub_(model_output.mul_(0.5)),)

        scheduler, looking, x = Overwriting(), Looking(), torch.ones(2, 3)
        with watched_solver(scheduler, looking):
            (found,) = scheduler.step(torch.full((2, 3), 0.5), 0, x)
        assert torch.equal(found, torch.full((2, 3), 0.75))
        assert found is x

    @pytest.mark.parametrize("kind", ["static", "object"])
    def test_steps_that_are_no_methods(self, kind):
        class Step:
            def __call__(self, model_output, timestep, sample):
                return (sample - model_output,)

        class Static:
            step = staticmethod(lambda model_output, timestep, sample: (sample - model_output,))

        class Object:
            step = Step()

        scheduler, looking = {"static": Static, "object": Object}[kind](), Looking()
        assert can_be_watched(scheduler)
        with watched_solver(scheduler, looking):
            (found,) = scheduler.step(torch.ones(1, 2), 0, torch.full((1, 2), 3.0))
        assert torch.equal(found, torch.full((1, 2), 2.0))
        assert (looking.errors, len(looking.following)) == ([], 1)

    def test_half_precision(self):
        """The dry call is in float32, what the scheduler is given in its own."""
        scheduler, given = made("euler"), []
        x, y = torch.ones(SHAPE, dtype=torch.bfloat16), torch.full(SHAPE, 0.3, dtype=torch.bfloat16)
        looking = Looking(lambda call: given.append(call.replace(torch.full(SHAPE, 0.7))))
        with watched_solver(scheduler, looking):
            (found,) = scheduler.step(y, scheduler.timesteps[0], x, return_dict=False)
        wanted = 1 + (scheduler.sigmas[1] - scheduler.sigmas[0]) * torch.tensor(0.7).bfloat16().float()
        assert found.dtype == torch.bfloat16
        assert looking.dry[0][1].dtype == torch.float32
        torch.testing.assert_close(found.float(), wanted.expand(SHAPE).bfloat16().float(), rtol=0, atol=0)


class TestCopies:
    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_they_are_plain(self, copied):
        scheduler, looking = made("unipc"), Looking()
        wanted = sampled(made("unipc"))
        with watched_solver(scheduler, looking):
            twin = copied(scheduler)
            assert not isinstance(twin.step, WatchedStep)
            assert twin.step.__self__ is twin
            found = sampled(twin)
            assert looking.dry == []
            assert scheduler.step_index is None
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    def test_a_step_of_the_instance_comes_back(self):
        scheduler = made("euler")
        scheduler.step = own = scheduler.step
        looking = Looking()
        with watched_solver(scheduler, looking):
            sampled(scheduler)
        assert vars(scheduler)["step"] is own
        assert len(looking.following) == STEPS

    def test_it_comes_off_after_an_interrupt(self):
        scheduler = made("euler")

        def interrupt(call):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), watched_solver(scheduler, Looking(interrupt)):
            sampled(scheduler)
        assert "step" not in vars(scheduler)


class TestFailures:
    def test_a_copy_that_cannot_be_made(self):
        class Uncopied(FlowMatchEulerDiscreteScheduler):
            def __deepcopy__(self, memo):
                raise ArithmeticError("no copy")

        scheduler, looking = Uncopied(), Looking()
        scheduler.set_timesteps(STEPS)
        with watched_solver(scheduler, looking):
            found = sampled(scheduler)
        wanted = sampled(made("euler"))
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        assert [str(each) for each in looking.errors] == ["no copy"] * STEPS

    def test_an_error_of_the_scheduler_itself(self):
        """It is raised once, as without a watcher."""
        calls = []

        class Broken:
            def step(self, model_output, timestep, sample):
                calls.append(timestep)
                raise ArithmeticError("broken")

        scheduler = Broken()
        with pytest.raises(ArithmeticError, match="broken"), watched_solver(scheduler, Looking()):
            scheduler.step(torch.ones(1, 2), 4, torch.ones(1, 2))
        assert calls == [4, 4]  # the copy's, and its own
        assert vars(scheduler) == {}

    @pytest.mark.parametrize("sample", [None, torch.ones(1, 5)])
    def test_what_is_no_sample(self, sample):
        class Any:
            def step(self, model_output, timestep=0, sample=None):
                return (model_output,)

        scheduler, looking = Any(), Looking()
        with watched_solver(scheduler, looking):
            (found,) = scheduler.step(torch.ones(1, 2), sample=sample)
        assert torch.equal(found, torch.ones(1, 2))
        assert "is not given an output and a sample of one shape, but (1, 2) and" in str(looking.errors[0])

    def test_what_cannot_be_watched(self):
        class Counting:
            def step(self): ...

        class Slotted:
            __slots__ = ()

            def step(self, model_output, timestep, sample): ...

        for scheduler in (Counting(), Slotted(), object(), None):
            assert not can_be_watched(scheduler)
        assert can_be_watched(made("euler"))
