"""Plans of outputs from a recording alone: NumPy says what the best schedule and its weights are."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from solvers import Solved

from dithooks import dit_cache, plan, record
from dithooks.config.provenance import PlanTarget
from dithooks.recording.recording import Recording, Trace
from dithooks.recording.solver_trace import SolverTrace

STEPS = 6


def recorded(**changes):
    """A model of two blocks and one range, whose solver was given three pictures of five numbers at six steps."""
    draws = np.random.default_rng(3)
    outputs = draws.normal(size=(STEPS, 3, 5)).cumsum(0).astype(np.float32)
    grams = np.eye(STEPS)[None]
    times = np.linspace(1.0, 1 / STEPS, STEPS)
    arrays = {"norms": np.ones((2, STEPS)), "steps": np.arange(STEPS), "times": times, "block_ms": np.ones(2)}
    trace = Trace(
        "model", ("a", "b"), np.array([[0, 1]]), grams, axis="sigma", branches=1.0, call_ms=3.0, share=1.0, inputs={},
        calls=STEPS, **arrays,
    )  # fmt: skip
    solver = SolverTrace(outputs, outputs, -np.full(STEPS, 1 / STEPS), np.arange(5))
    made = PlanTarget("M", "f", 2, "float32", STEPS, None, (5,))
    return Recording((trace,), made, tuple(times), 3, 1, 20.0, 20.0, solver=solver, **changes)


def test_weights_are_least_squares_on_what_the_solver_was_given():
    recording = recorded()
    found = plan(recording, 1.9, cost="blocks", payload="output").pieces[0]
    assert (found.payload, found.first, found.blocks, found.corrections) == ("output", 0, 2, None)
    assert sum(found.steps) == 3
    flat = recording.solver.outputs.reshape(STEPS, -1).astype(np.float64)
    for step in range(STEPS):
        if found.steps[step]:
            continue
        known = [earlier for earlier in range(step - 1, -1, -1) if found.steps[earlier]][:2]
        pull = 1e-3 * np.mean([flat[each] @ flat[each] for each in known])
        line = np.zeros(len(known))
        line[0] = 1.0
        if len(known) > 1:
            ratio = (step - known[0]) / (known[0] - known[1])
            line[:] = 1 + ratio, -ratio
        matrix = flat[known] @ flat[known].T + pull * np.eye(len(known))
        wanted = np.linalg.solve(matrix, flat[known] @ flat[step] + pull * line)
        np.testing.assert_allclose(found.coefficients[step], wanted, rtol=1e-6)


def test_a_call_that_is_left_out_saves_all_of_it():
    """By time, the range's two blocks are 2 of 3 ms of a call: with outputs, fewer steps have to be reused."""
    recording = recorded()
    by_residuals, by_outputs = (plan(recording, 1.5, payload=each).pieces[0] for each in ("residual", "output"))
    assert sum(by_outputs.steps) > sum(by_residuals.steps)


def test_where_nothing_was_recorded():
    lacking = recorded()
    lacking = Recording(**{**vars(lacking), "solver": None, "unsolved": "its step() is not called"})
    with pytest.raises(ValueError, match=r"its step\(\) is not called"):
        plan(lacking, 1.5, payload="output")
    with pytest.raises(ValueError, match="exclude each other"):
        plan(recorded(), 1.5, payload="output", interval=2)


def test_a_model_without_ranges_is_priced_by_how_far_the_latents_move():
    """One output of a stretch of two is off by what one anchor leaves: the schedule avoids the larger move."""
    recording = recorded()
    outputs = np.zeros((STEPS, 3, 5), dtype=np.float32)
    outputs[:] = np.array([1.0, 1.0, 1.0, 9.0, 9.0, 9.0])[:, None, None]  # it changes at step 3, and nowhere else
    trace = Trace(
        **{
            **vars(recording.traces[0]),
            "ranges": np.zeros((0, 2), dtype=np.int64),
            "grams": np.zeros((0, STEPS, STEPS)),
        }
    )
    solver = SolverTrace(outputs, outputs, recording.solver.gains, recording.solver.places)
    bare = Recording(**{**vars(recording), "traces": (trace,), "solver": solver})
    found = plan(bare, 3.0, cost="blocks", payload="output", anchors=1).pieces[0]
    assert found.steps == (1, 0, 0, 1, 0, 0)
    assert found.coefficients[4] == pytest.approx((1.0,))


class Bare(torch.nn.Module):
    """Without blocks."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 4)

    def forward(self, sample, timestep):
        return self.layer(sample) * (1 + timestep)


def test_one_of_two_models_without_blocks():
    """Where a plan leaves one uncached, all its calls are made, and those of the other as planned."""
    torch.manual_seed(2)
    pipe, x = Solved(Bare(), second=Bare(), boundary=4), torch.randn(2, 6, 4)
    both = plan(record(pipe, lambda pipe: pipe(x, 8)), 1.5, cost="blocks", payload="output")
    (piece,) = (each for each in both.pieces if each.path == "transformer_2")
    calls = []
    for name in ("transformer", "transformer_2"):
        getattr(pipe, name).register_forward_hook(lambda *_, name=name: calls.append(name))
    with dit_cache(pipe, replace(both, pieces=(piece,))):
        pipe(x, 8)
    assert calls == ["transformer"] * 4 + ["transformer_2"] * sum(piece.steps[4:])
    assert 0 in piece.steps
