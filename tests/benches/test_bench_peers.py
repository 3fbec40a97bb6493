"""The peers that need no library: which steps they compute, and what they return at the others."""

import copy
import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from bench.compare.subject import Case, counting
from bench.peers import dpcache, spectrum
from bench.peers.left_out import PLACES, leaving_out, line


class Toy(nn.Module):
    """Returns twice what two blocks add up to: 1000 for a timestep of 1, whatever it is given."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), nn.Sequential(nn.Linear(1, 1))])
        nn.init.ones_(self.blocks[1][0].weight)
        nn.init.zeros_(self.blocks[1][0].bias)
        self.seen = []

    def forward(self, x, timestep, curve):
        self.seen.append(float(timestep))
        x = torch.full_like(x, float(curve(float(timestep))))
        for block in self.blocks:
            x = block(x)
        return (2 * x,)


class Subject:
    """Ten steps of two branches, which say t and t³ for a time t = 1, 0.9, … 0.1, and all that was said."""

    name, steps, calls = "toy", 10, 2
    calibration = (Case("a", 1),)

    def __init__(self):
        self.pipe = SimpleNamespace(transformer=Toy())

    def draw(self, cases, steps=None):
        said = []
        for step in range(self.steps):
            timestep = torch.tensor([1 - step / self.steps])
            for curve in (lambda t: t, lambda t: t**3):
                said.append(self.pipe.transformer(torch.zeros(len(cases), 1), timestep=timestep, curve=curve)[0][0, 0])
        return torch.stack(said).reshape(self.steps, 2)


@contextmanager
def plain_and(subject):
    """What is said with everything computed; then a copy of the transformer, as the sweep gives it."""
    with torch.no_grad():
        plain = subject.draw(subject.calibration)
        subject.pipe.transformer = copy.deepcopy(subject.pipe.transformer)
        yield plain


@pytest.mark.parametrize("place", PLACES)
def test_a_step_left_out_is_on_the_line_of_its_branch(place):
    """Steps 0, 1, 3 and 6 of 10 are computed; the others continue each branch's own line; so in a second run too."""
    computed = (0, 1, 3, 6)
    with plain_and(subject := Subject()) as plain, leaving_out(subject, place, computed, line, most=2):
        wanted = plain.clone()
        for before, last, steps in ((0, 1, [2]), (1, 3, [4, 5]), (3, 6, [7, 8, 9])):
            for step in steps:
                slope = (plain[last] - plain[before]) / (last - before)
                wanted[step] = plain[last] + slope * (step - last)
        with counting(subject.pipe.transformer) as work:
            for _ in range(2):
                torch.testing.assert_close(subject.draw(subject.calibration), wanted)
    assert work.done == {1: 2 * 2 * len(computed)}
    outside = len(computed) if place == "output" else subject.steps
    assert len(subject.pipe.transformer.seen) == 2 * (subject.steps + 2 * outside)


def test_before_there_are_two_values_the_one_is_held():
    """Of one value all; of three only the last two, 2 steps apart, for a step 3 behind."""
    assert line([4], 6) == [1]
    assert line([0, 1, 3], 6) == [0, -1.5, 2.5]


@pytest.mark.parametrize(
    ("window", "flex", "computed"),
    [
        (2, 0, (0, 1, 2, 3, 5, 7, 9, 11)),
        (1.5, 0, (0, 1, 2, 3, 4, 6, 7, 9, 10)),
        (2, 0.75, (0, 1, 2, 3, 5, 7, 11)),
        (1, 0, range(12)),
    ],
)
def test_spectrum_windows_by_hand(window, flex, computed):
    """Four steps to warm up, then 3 + 2, + 2 …, rounded down; with α, 3 + 2, + 2.75, + 3.5."""
    assert spectrum.schedule(12, window, flex) == frozenset(computed)


def test_spectrum_continues_a_polynomial():
    """Without a ridge a cubic is continued, and with one a constant is drawn to 0: n / (n + λ) of it is left."""
    steps = [0, 1, 2, 4, 7]
    weights = spectrum.weights(steps, 9, total=20, degree=3, ridge=1e-10)
    assert np.dot(weights, [each**3 - each for each in steps]) == pytest.approx(9**3 - 9, rel=1e-4)
    assert spectrum.weights(steps, 9, total=20, degree=0, ridge=0.5) == pytest.approx([1 / 5.5] * 5)
    half = spectrum.weights(steps, 9, total=20, degree=0, ridge=0.5, share=0.5)
    assert half == pytest.approx([0.5 / 5.5] * 3 + [0.5 / 5.5 - 0.5 * 2 / 3, 0.5 / 5.5 + 0.5 * 5 / 3])


def test_the_cost_of_a_gap_by_hand():
    """Of 1, 2, 4, 8 and of a constant: held from 1, then on the line 1, 2, 3, 4; the mean of the two branches."""
    costs = dpcache.gap_costs([torch.tensor([[1.0], [2], [4], [8]]), torch.full((4, 1), 5.0)])
    assert costs.shape == (4, 4, 5)
    assert costs[0, 0, 1:].tolist() == pytest.approx([0, 0.25, 0.25 + 0.375, 0.25 + 0.375 + 0.4375])
    assert costs[0, 1, 2:].tolist() == pytest.approx([0, 0.125, 0.125 + 0.25])
    assert costs[1, 2, 3:].tolist() == pytest.approx([0, 0.125])
    assert np.isinf(costs[2, 1]).all()
    assert np.isinf(costs[1, 2, :3]).all()


@pytest.mark.parametrize("count", range(1, 9))
def test_the_cheapest_path_is_that_of_all_paths(count):
    """Of random costs, against every choice of steps."""
    steps = 8
    costs = np.random.default_rng(count).random((steps, steps, steps + 1))
    costs[:, np.arange(steps)[:, None] >= np.arange(steps + 1)] = np.inf  # no way back

    def total(path):
        known = (0, *path, steps)  # the first has none before it
        return sum(costs[known[at], known[at + 1], known[at + 2]] for at in range(len(path)))

    paths = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
    assert dpcache.cheapest(costs, count) == min(paths, key=total)


@pytest.mark.parametrize("place", PLACES)
def test_a_schedule_that_is_calibrated(place):
    """Where a curve bends only at its beginning, steps there are computed, and all is as without a cache."""
    with plain_and(subject := Subject()) as plain, dpcache.attached(subject, 9, place=place) as attached:
        apart = (subject.draw(subject.calibration) - plain).abs().max(1).values
    marks = attached.shown
    assert (marks.count("●"), len(marks)) == (9, 10)
    (left_out,) = [step for step, mark in enumerate(marks) if mark == "○"]
    t = 1 - np.arange(10) / 10
    errors = {step: abs(2 * t[step - 1] ** 3 - t[step - 2] ** 3 - t[step] ** 3) / t[step] ** 3 for step in range(2, 10)}
    errors[1] = 0.1 / 0.9 + (1 - 0.9**3) / 0.9**3  # held, in both branches
    assert left_out == min(errors, key=errors.get)
    assert torch.nonzero(apart > 1e-5).flatten().tolist() == [left_out]
    assert (attached.spent.run_equivalents, attached.spent.runs) == (1, 1)
