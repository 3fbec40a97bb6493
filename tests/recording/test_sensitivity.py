"""What is left of an error at each step: the curve by hand, the hooks on a model whose errors are known."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dithooks import plan, record, search
from dithooks.planning.candidate import Variant
from dithooks.planning.planner import DEFAULT_LATE_ERROR_WEIGHT, Planner
from dithooks.recording.recording import Recording
from dithooks.recording.sensitivity import (
    MIN_SAMPLES,
    CallPosition,
    disturb,
    disturbed_steps,
    final_errors,
    smooth_curve,
)
from dithooks.tuning.proposals import proposals

pytestmark = pytest.mark.filterwarnings("error")


class Net(nn.Module):
    """What its blocks add depends on the step, and on nothing that it is given."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

    def forward(self, x, timestep, prompt=0.0):
        x = x + prompt
        for block in self.blocks:
            x = block(x * timestep)
        return x


class Sampler:
    """Each step's output goes into the picture with a factor of its own: that is all that is left of an error."""

    def __init__(self, steps=8, halves=1, calls=1, runs=1):
        torch.manual_seed(0)
        self.net = self.transformer = Net()
        self.steps, self.halves, self.calls, self.runs = steps, halves, calls, runs
        self.factors = [math.exp(-2 * (1 - step / (steps - 1))) for step in range(steps)]
        self.made, self.shift = 0, 0.0

    @torch.no_grad()
    def __call__(self, samples):
        self.made += 1
        pictures = []
        for run in range(self.runs):
            x = torch.randn(samples, 3, 4, generator=torch.Generator().manual_seed(run)) + self.shift
            picture, prompts = torch.zeros_like(x), torch.arange(2.0)[:, None]
            for step in range(self.steps):
                t = 1 - step / self.steps
                for call in range(self.calls):
                    given = torch.cat([x] * self.halves)
                    found = sum(self.net(given, t, prompts[call]).chunk(self.halves)) / self.halves / self.calls
                    picture = picture + self.factors[step] / self.steps * found
            pictures += list(picture)
        return pictures


def drawn(samples):
    return lambda sampler: sampler(samples)


@pytest.mark.parametrize("made", [{}, {"halves": 2}, {"calls": 2}, {"runs": 4}], ids=str)
def test_the_curve_of_a_sampler_that_is_known(made):
    """Factors that rise by e² from the first step to the last, with guidance in one batch, in two calls, in runs."""
    sampler = Sampler(**made)
    samples = 16 // made.get("runs", 1)
    found = record(sampler, drawn(samples), probe=True)
    assert sampler.made == 2
    curve = np.log(found.sensitivity)
    assert len(curve) == 8
    assert abs(curve.mean()) < 1e-9
    size = np.log(found.traces[0].norms[-1])  # an error that is as large a part of more does more
    steps = np.array(list(disturbed_steps([[CallPosition(0, step, 0) for step in range(8)]], 16).values()))
    wanted = smooth_curve(steps / 7, (np.log(sampler.factors) + size)[steps], np.linspace(0, 1, 8))
    np.testing.assert_allclose(curve, wanted - wanted.mean(), atol=0.15)
    assert not sampler.net._forward_hooks
    assert not sampler.net._forward_pre_hooks


def test_single_samples_err_at_one_step_each():
    """By hand: three samples, of which two err at the second step and one at the third."""
    net, calls = Net(), [CallPosition(0, step, 0) for step in range(3)]
    inputs = [torch.full((3, 4), float(step)) for step in range(3)]
    with torch.no_grad():
        plain = [net(x, 1.0) for x in inputs]
        with disturb(net, calls, 3, {0: 1, 1: 2, 2: 1}) as squares:
            found = [net(x, 1.0) for x in inputs]
    assert torch.equal(found[0], plain[0])
    assert torch.equal(found[1], torch.stack([plain[0][0], plain[1][1], plain[0][2]]))
    assert torch.equal(found[2], torch.stack([plain[2][0], plain[1][1], plain[2][2]]))
    for number, (then, now) in {0: (0, 1), 1: (1, 2), 2: (0, 1)}.items():
        error = (plain[then][number] - plain[now][number]).square().sum()
        (pair,) = squares[number]
        assert pair.tolist() == pytest.approx([float(error), float(plain[now][number].square().sum())])


@pytest.mark.parametrize("rows", [3, 6, 16])
def test_a_batch_of_something_else_does_not_err(rows):
    """Four samples in three rows, in six, or in sixteen, which may be frames."""
    net, calls = Net(), [CallPosition(0, step, 0) for step in range(2)]
    with torch.no_grad(), disturb(net, calls, 4, dict.fromkeys(range(4), 1)) as squares:
        first, second = (net(torch.full((rows, 4), float(step)), 1.0) for step in range(2))
    assert not torch.equal(first, second)
    assert squares == {}


@pytest.mark.parametrize("samples", [1, MIN_SAMPLES - 1])
def test_few_samples_tell_nothing_and_cost_nothing(samples):
    sampler = Sampler()
    assert record(sampler, drawn(samples), probe=True).sensitivity is None
    assert sampler.made == 1


def test_results_that_are_not_one_for_each_sample():
    """Pictures in one array, which count as one: no run is made for them."""
    sampler = Sampler()
    assert record(sampler, lambda it: torch.stack(it(8))[:, 0, :], probe=True).sensitivity is None
    assert sampler.made == 1


@settings(deadline=None, max_examples=50)
@given(calls=st.lists(st.integers(0, 12), min_size=1, max_size=13, unique=True), samples=st.integers(1, 40))
def test_disturbances_have_a_step_before_them(calls, samples):
    steps = sorted(calls)
    found = disturbed_steps([[CallPosition(0, step, 0) for step in steps]], samples)
    if len(steps) == 1:
        assert found == {}
        return
    assert sorted(found) == list(range(samples))
    assert set(found.values()) <= set(steps[1:])
    assert list(found.values()) == sorted(found.values())
    if samples >= 2:
        assert (found[0], found[samples - 1]) == (steps[1], steps[-1])
    if samples >= len(steps) - 1:
        assert set(found.values()) == set(steps[1:])


def test_of_two_transformers_the_second_has_its_own_first_step():
    one, two = ([CallPosition(0, step, 0) for step in steps] for steps in (range(3), range(3, 6)))
    assert set(disturbed_steps([one, two], 20).values()) == {1, 2, 4, 5}


class TestDepartures:
    def test_of_fractions(self):
        assert final_errors([np.array([0.5, 0.1])], [np.array([0.1, 0.4])]) == pytest.approx([math.sqrt(0.125)])

    @pytest.mark.parametrize("size", [0.01, 0.05, 0.2, 0.4, 0.6, 1.0, 3.0, 20.0])
    def test_of_whole_numbers(self, size):
        """What was added before rounding is found again."""
        draw = np.random.default_rng(0)
        exact = draw.uniform(10, 240, 100_000)
        rounded = np.rint(exact), np.rint(exact + draw.normal(0, size, exact.shape))
        assert final_errors([rounded[1]], [rounded[0]]) == pytest.approx([size], rel=0.06)

    def test_of_bytes(self):
        ours, theirs = np.array([0, 255], np.uint8), np.array([255, 255], np.uint8)
        assert final_errors([ours], [theirs]) == pytest.approx([math.sqrt(255**2 / 2 - 1 / 6)])


class TestSmooth:
    def test_a_constant_is_kept(self):
        at = np.linspace(0, 1, 5)
        np.testing.assert_allclose(smooth_curve(at[1:3], np.full(2, -3.0), at), -3.0, rtol=1e-9)

    def test_against_the_textbook(self):
        """With an unknown level as a prior of huge variance, in one go."""
        draw = np.random.default_rng(1)
        places, values, at = draw.uniform(0, 1, 9), draw.normal(0, 1, 9), np.linspace(0, 1, 7)

        def kernel(a, b):
            return 1.5**2 * np.exp(-((a[:, None] - b) ** 2) / (2 * 0.4**2)) + 1e7

        wanted = kernel(at, places) @ np.linalg.inv(kernel(places, places) + 0.36 * np.eye(9)) @ values
        np.testing.assert_allclose(smooth_curve(places, values, at), wanted, atol=1e-4)

    @pytest.mark.parametrize("samples", [4, 8, 32])
    def test_noise_is_taken_out(self, samples):
        """A curve like that of a video model, told by samples that differ by a factor."""
        draw, at = np.random.default_rng(2), np.linspace(0, 1, 30)
        misses = []
        for _ in range(50):
            places = np.linspace(0.05, 1, samples)
            values = 6 * (places - 0.7) ** 2 + draw.normal(0, 0.5, samples)
            error = smooth_curve(places, values, at) - 6 * (at - 0.7) ** 2
            misses.append(np.std(error))
        assert np.mean(misses) < {4: 0.65, 8: 0.5, 32: 0.3}[samples]


@pytest.fixture(scope="module")
def recording():
    return record(Sampler(), drawn(16), probe=True)


class TestPlans:
    def test_the_weights_are_those_measured(self, recording):
        planner = Planner(recording, "blocks")
        (trace,) = recording.traces
        flat = dataclasses.replace(recording, sensitivity=(1.0,) * 8)
        found = planner.error_weights(trace, Variant(2)) / Planner(flat, "blocks").error_weights(trace, Variant(2))
        np.testing.assert_allclose(found, np.broadcast_to(recording.sensitivity, found.shape), rtol=1e-12)

    def test_a_guess_can_still_be_asked_for(self, recording):
        unknown = dataclasses.replace(recording, sensitivity=None)
        guessed = plan(unknown, 1.5, cost="blocks")
        assert guessed.pieces == plan(recording, 1.5, cost="blocks", late_error_weight=DEFAULT_LATE_ERROR_WEIGHT).pieces
        assert guessed.pieces == plan(unknown, 1.5, cost="blocks", late_error_weight=DEFAULT_LATE_ERROR_WEIGHT).pieces

    def test_what_is_measured_is_tried_first(self, recording):
        planner = Planner(recording, "blocks")
        first = next(proposals(planner, 1.5, 4))
        assert first.variant == Variant(2, None)
        guessed = next(proposals(Planner(dataclasses.replace(recording, sensitivity=None), "blocks"), 1.5, 4))
        assert guessed.variant == Variant(2, DEFAULT_LATE_ERROR_WEIGHT)

    def test_it_is_saved(self, recording, tmp_path):
        recording.save(tmp_path / "run.npz")
        assert Recording.load(tmp_path / "run.npz").sensitivity == recording.sensitivity
        assert plan(Recording.load(tmp_path / "run.npz"), 1.5).pieces == plan(recording, 1.5).pieces

    @pytest.mark.parametrize("wrong", [(1.0,) * 7, (1.0,) * 7 + (0.0,), (1.0,) * 7 + (-1.0,), ("1",) * 8])
    def test_a_file_that_is_wrong(self, recording, tmp_path, wrong):
        dataclasses.replace(recording, sensitivity=wrong).save(tmp_path / "run.npz")
        with pytest.raises(ValueError, match="sensitivity"):
            Recording.load(tmp_path / "run.npz")

    def test_a_search_makes_one_run_more(self):
        sampler = Sampler()
        found = search(sampler, drawn(8), 1.5, cost="blocks", verbose=False, probe=True)
        assert found.recording.sensitivity is not None
        assert sampler.made == 2 + len(found.evaluations)
        assert found.run_equivalents == pytest.approx(2 + sum(each.blocks for each in found.evaluations))

    @pytest.mark.parametrize("options", [{"probe": False}, {"max_runs": 2.0}, {"interval": 2}])
    def test_a_search_that_makes_none(self, options):
        sampler = Sampler()
        found = search(sampler, drawn(8), 1.5, cost="blocks", verbose=False, **{"probe": True, **options})
        assert found.recording.sensitivity is None
        assert sampler.made == 1 + len(found.evaluations)

    def test_a_search_that_goes_on_from_its_journal_does_not_measure_again(self, tmp_path):
        first = search(Sampler(), drawn(8), 1.5, cost="blocks", verbose=False, journal=tmp_path, probe=True)
        sampler = Sampler()
        again = search(sampler, drawn(8), 1.5, cost="blocks", verbose=False, journal=tmp_path, probe=True)
        assert again.recording.sensitivity == first.recording.sensitivity
        assert sampler.made == 1

    def test_another_run_is_told_apart(self):
        """Noise that is not seeded: what is drawn the second time is no answer to anything."""
        sampler = Sampler()

        def run(it):
            it.shift = 0.5 * it.made
            return it(8)

        with pytest.raises(ValueError, match="does not draw what was recorded"):
            record(sampler, run, probe=True)
        assert not sampler.net._forward_hooks
