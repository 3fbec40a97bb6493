"""Searches for a quality: the fastest plan that reaches it, the least that is taken, and what plans are chosen by."""

import numpy as np
import pytest
import torch
from solvers import Solved
from torch import nn
from toys import Net, latents

from dithooks import dit_cache, record, search
from dithooks.recording.image_metrics import compare, samples_of
from dithooks.recording.model_recorder import ModelRecorder
from dithooks.tuning.evaluation import Fit
from dithooks.tuning.proposals import SPEEDUPS

STEPS = 10


def pipeline(net=None):
    torch.manual_seed(6)
    pipe, x = Solved(net or Net("single", 3)), latents(4)
    return pipe, lambda pipe: [each[None] for each in pipe(x, STEPS)]


@pytest.fixture(scope="module")
def brute():
    """The pipeline, its run and recording, and by brute force what the first plan of each speed-up draws at."""
    pipe, run = pipeline()
    recording = record(pipe, run)
    assert recording.solver is not None
    given = {"recording": recording, "cost": "blocks", "verbose": False, "max_runs": None}
    known = {}
    for speedup in SPEEDUPS:
        (only,) = search(pipe, run, speedup, max_evals=1, objective="mean", **given).evaluations
        known[speedup] = only
    return pipe, run, given, known


class TestTargetPSNR:
    @pytest.mark.parametrize("at", [1.6, 2.25, 3.0])
    def test_the_fastest_that_reaches_it(self, brute, at):
        """A level that the plans up to a speed-up reach, but none beyond."""
        pipe, run, given, known = brute
        merits = {speedup: each.merit("mean") for speedup, each in known.items()}
        level = min(merits[each] for each in SPEEDUPS if each <= at) - 0.01
        wanted = max(known[each].plan.speedup for each in SPEEDUPS if merits[each] >= level)
        found = search(pipe, run, target_psnr=level, objective="mean", max_evals=10, local_moves=0, **given)
        assert found.reached
        assert len(found.evaluations) <= 10
        good = [each for each in found.evaluations if each.merit("mean") >= level]
        assert found.plan.provenance.predicted_speedup == max(each.plan.provenance.predicted_speedup for each in good)
        if all(merits[each] < level for each in SPEEDUPS if each > at):  # halving finds it, and may find better
            assert found.plan.speedup >= wanted - 1e-9
        with dit_cache(pipe, found.plan):
            drawn = compare(samples_of(run(pipe)), samples_of(given["recording"].results))
        assert drawn.psnr >= level - 1.0  # the last fit is by all pictures

    def test_one_that_no_plan_reaches(self, brute):
        """The one that draws best is returned, and said not to have reached it."""
        pipe, run, given, _ = brute
        found = search(pipe, run, target_psnr=400.0, objective="mean", max_evals=4, local_moves=0, **given)
        best = max(found.evaluations, key=lambda each: each.merit("mean"))
        assert not found.reached
        assert found.plan.pieces[0].steps == best.plan.pieces[0].steps
        assert len(found.evaluations) <= 4

    def test_no_plan_is_run_twice(self):
        """Four steps have two plans that save anything, whatever speed-ups are asked for."""
        torch.manual_seed(6)
        pipe, x = Solved(Net("single", 3)), latents(4)
        found = search(
            pipe,
            lambda pipe: [each[None] for each in pipe(x, 4)],
            target_psnr=400.0,
            cost="blocks",
            verbose=False,
            max_runs=None,
            local_moves=0,
        )
        run = [each.plan.pieces[0].steps for each in found.evaluations if each.fit is Fit.ALL]
        own = [(steps, each.plan.pieces[0].payload) for steps, each in zip(run, found.evaluations, strict=True)]
        assert len(set(own)) == len(own) > 1


class TestLeastPSNR:
    def test_below_it(self, brute):
        """The message has the figures, and what to do."""
        pipe, run, given, known = brute
        given = {**given, "max_evals": 1, "objective": "mean"}
        merit, speedup = known[2.0].merit("mean"), known[2.0].speedup
        with pytest.raises(RuntimeError) as raised:
            search(pipe, run, 2.0, min_psnr=merit + 1, **given)
        said = str(raised.value)
        assert f"no plan draws at {merit + 1:g} dB or better: the best of 1, {speedup:.2f}× as fast" in said
        assert f"has {merit:.1f} dB (mean). Ask for a lower speed-up or min_psnr, or take more steps" in said
        assert len(said) <= 300
        assert "step" not in vars(pipe.scheduler)
        assert search(pipe, run, 2.0, min_psnr=merit - 1, **given).reached

    @pytest.mark.parametrize("name", ["min_psnr", "target_psnr"])
    @pytest.mark.parametrize("level", [-1.0, float("nan"), "40"])
    def test_what_is_no_level(self, brute, name, level):
        pipe, run, given, _ = brute
        with pytest.raises((ValueError, TypeError), match=name):
            search(pipe, run, **{name: level}, **given)


class TestObjective:
    @pytest.mark.parametrize("objective", ["mean", "worst", "both"])
    def test_what_plans_are_chosen_by(self, brute, objective):
        """The best by the errors of all pictures, drawn anew with each plan and worked out by hand.

        An error is a picture's mean square, over the square of its range of values. In the mean, their geometric mean
        counts, and of "both", the power mean with power 0.1.
        """
        pipe, run, given, _ = brute
        found = search(pipe, run, 1.8, objective=objective, max_evals=4, local_moves=0, **given)
        reference = torch.cat(given["recording"].results).double().numpy()
        peaks = reference.max((1, 2)) - reference.min((1, 2))
        merits = []
        for each in found.evaluations:
            with dit_cache(pipe, each.plan):
                drawn = torch.cat(run(pipe)).double().numpy()
            errors = ((drawn - reference) ** 2).mean((1, 2)) / peaks**2
            error = {
                "mean": np.exp(np.log(errors).mean()),
                "worst": errors.max(),
                "both": (errors**0.1).mean() ** 10,
            }
            merits.append(-10 * np.log10(error[objective]))
            assert each.merit(objective) == pytest.approx(merits[-1], abs=0.05)
            assert each.plan.provenance.reached
        best = found.evaluations[int(np.argmax(merits))]
        assert len(merits) > 1
        for one in ("payload", "steps", "first", "blocks"):
            assert getattr(found.plan.pieces[0], one) == getattr(best.plan.pieces[0], one)

    def test_another(self, brute):
        pipe, run, given, _ = brute
        with pytest.raises(ValueError, match="objective"):
            search(pipe, run, objective="median", **given)


class UShaped(nn.Module):
    """A model without lists of like blocks: down, middle, up, with a skip."""

    def __init__(self):
        super().__init__()
        self.down, self.middle, self.up = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(12, 4)
        self.time, self.calls = nn.Linear(1, 6), 0

    def forward(self, sample, timestep):
        self.calls += 1
        down = torch.tanh(self.down(sample) + self.time(timestep.reshape(1).to(sample.dtype)))
        return self.up(torch.cat([torch.tanh(self.middle(down)), down], -1))


class UPipe:
    """A pipeline of a U-shaped model, which it calls ``unet``."""

    def __init__(self, unet, scheduler):
        self.unet, self.scheduler = unet, scheduler

    @torch.no_grad()
    def __call__(self, x, steps):
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t / 1000), t, x)[0]
        return x


class TestModelsWithoutBlocks:
    def made(self):
        torch.manual_seed(1)
        pipe, x = UPipe(UShaped(), Solved(None).scheduler), latents(4)
        return pipe, lambda pipe: [each[None] for each in pipe(x, STEPS)]

    def test_the_recording(self):
        """One block, the model; no range; and the solver's steps."""
        pipe, run = self.made()
        recording = record(pipe, run)
        (trace,) = recording.traces
        assert (trace.blocks, trace.ranges.shape, trace.grams.shape) == (("unet",), (0, 2), (0, STEPS, STEPS))
        assert (trace.steps.tolist(), trace.calls, trace.branches) == (list(range(STEPS)), STEPS, 1.0)
        assert trace.block_ms[0] == trace.call_ms > 0
        np.testing.assert_allclose(trace.times, np.linspace(1, 0, STEPS + 1)[:-1], atol=1e-6)
        assert recording.solver.outputs.shape == (STEPS, 4, 24)
        assert ModelRecorder.driven(None) is False

    def test_the_search(self):
        """Calls of the model that the plan leaves out are not made."""
        pipe, run = self.made()
        found = search(pipe, run, 2.0, cost="blocks", verbose=False)
        (piece,) = found.plan.pieces
        assert (piece.payload, piece.path, piece.blocks, piece.total) == ("output", "unet", 1, 1)
        assert found.reached
        assert sum(piece.steps) == 5  # of 10
        plain = samples_of(run(pipe))
        pipe.unet.calls = 0
        with dit_cache(pipe, found.plan):
            score = compare(samples_of(run(pipe)), plain)
        assert pipe.unet.calls == 5
        merits = [each.merit("both") for each in found.evaluations]
        assert score.psnr > min(merits) - 3
        assert not pipe.unet._forward_hooks
        assert not pipe.unet._forward_pre_hooks


class TestNothingRun:
    """A search whose limits allow no run beside the recorded one knows no PSNR."""

    def test_a_target_psnr_is_not_reached(self, brute):
        pipe, run, given, _ = brute
        found = search(pipe, run, target_psnr=1.0, **{**given, "max_runs": 0.1})
        assert found.evaluations == ()
        assert not found.reached
        assert not found.plan.provenance.reached

    def test_a_least_psnr_is_not_taken_for_granted(self, brute):
        pipe, run, given, _ = brute
        with pytest.raises(RuntimeError, match=r"no plan was run, .* at 1 dB or better: raise max_runs"):
            search(pipe, run, min_psnr=1.0, **{**given, "max_runs": 0.1})


def test_a_scheduler_that_a_run_replaces(brute):
    """Its steps are not seen: plans are run with the recording's weights."""
    pipe, run, given, _ = brute

    def replaced(pipe):
        pipe.scheduler = type(pipe.scheduler)()
        return run(pipe)

    found = search(pipe, replaced, 2.0, max_evals=1, **given)
    (only,) = found.evaluations
    assert (only.fit, found.reached) == (Fit.NONE, True)
    with dit_cache(pipe, found.plan):
        drawn = compare(samples_of(run(pipe)), samples_of(given["recording"].results))
    assert drawn.psnr == pytest.approx(found.plan.provenance.psnr)
