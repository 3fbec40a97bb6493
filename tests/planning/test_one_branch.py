"""Plans with steps of one branch alone, from a recording: against all schedules that are as cheap, priced by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from planning.test_conditional_schedules import cost_of, drawn, every_schedule, price
from planning.test_planned_outputs import recorded
from solvers import Solved
from toys import Net, latents
from tuning.test_closed_loop import STEPS, pictures, pipeline

from dithooks import CachePlan, dit_cache, plan, record, search
from dithooks.policies.conditional import Conditional

LATE = 3.0


def guided(seed=3, steps=6):
    """The recording of two pictures of three numbers, of which it is known what guidance adds."""
    outputs, _, _, apart = drawn(seed, steps)
    before = recorded()
    solver = replace(
        before.solver,
        outputs=outputs.reshape(steps, 2, 3).astype(np.float32),
        apart=apart.reshape(steps, 2, 3).astype(np.float32),
        conditional=0,
        in_batch=True,
        places=np.arange(3),
    )
    return replace(before, solver=solver), outputs.astype(np.float32), apart.astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
def test_the_cheapest_of_all(seed):
    recording, outputs, apart = guided(seed)
    times = recording.traces[0].times
    worth = LATE ** -(times / times.max()) / 6  # |B| is 1/6 everywhere
    outputs, apart = outputs.astype(np.float64), apart.astype(np.float64)
    for target in (1.2, 1.5, 2.0, 3.0):
        found = plan(recording, target, cost="blocks", mode="conditional", late_error_weight=LATE)
        prices = {
            kinds: price(outputs, times, worth, apart, kinds, 2, 1e-3, 2.0)
            for kinds in every_schedule(6)
            if cost_of(kinds, 0.5) <= 6 / target + 1e-9
        }
        assert found.provenance.predicted_error == pytest.approx(math.sqrt(min(prices.values())), rel=1e-5)
        (piece,) = found.pieces
        alone = piece.conditional.steps if piece.conditional else (0,) * 6
        kinds = tuple(bit + half for bit, half in zip(piece.steps, alone, strict=True))
        assert prices[kinds] == pytest.approx(min(prices.values()), rel=1e-5)
        assert found.speedup == pytest.approx(6 / cost_of(kinds, 0.5))
        assert found.speedup == pytest.approx(found.provenance.predicted_speedup)
        assert piece.conditional is None or (piece.conditional.branch, piece.conditional.in_batch) == (0, True)
        assert piece.payload == "output"


def test_guidance_that_does_not_change_is_held():
    recording, _, _ = guided()
    still = np.ones((6, 2, 3), dtype=np.float32)
    recording = replace(recording, solver=replace(recording.solver, apart=still))
    found = plan(recording, 12 / 7, cost="blocks", mode="conditional")
    assert found.pieces[0].conditional == Conditional(0, (0, 1, 1, 1, 1, 1), in_batch=True)
    assert found.provenance.predicted_error == 0.0
    assert found.pieces[0].picture == "●◐◐◐◐◐"
    assert CachePlan.from_json(found.to_json()) == found


def test_where_nothing_can_be_held():
    with pytest.raises(ValueError, match="mode='conditional': at some step"):
        plan(recorded(), 1.5, mode="conditional")
    recording, _, _ = guided()
    with pytest.raises(ValueError, match="mode='conditional' and interval exclude each other"):
        plan(recording, 1.5, mode="conditional", interval=2)


@pytest.mark.parametrize("guidance", ["calls", "batch"])
def test_recorded_planned_and_drawn(guidance):
    """Of a real run: as many calls as the plan says are made, of half the batch where that is what guidance makes."""
    pipe, x, prompts = pipeline(guidance)
    run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
    recording = record(pipe, run)
    found = plan(recording, 16 / 9, cost="blocks", mode="conditional", late_error_weight=1.0)
    piece = found.pieces[0]
    assert piece.conditional is not None
    whole = sum(piece.steps) - sum(piece.conditional.steps)
    rows = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args: rows.append(len(args[0])))
    with dit_cache(pipe, found) as cache:
        run(pipe)
        run(pipe)  # what holds rows has been found out by now
        del rows[:]
        run(pipe)
        assert cache.stats.blocks_total / cache.stats.blocks_run == pytest.approx(found.speedup, rel=0.2)
    hook.remove()
    both = [10] if guidance == "batch" else [5, 5]
    assert sum(rows) == whole * sum(both) + 5 * sum(piece.conditional.steps)


def test_a_search_tries_them_where_that_is_asked_for():
    pipe, x, prompts = pipeline("calls")
    run = lambda pipe: pictures(pipe(x, STEPS, prompts))  # noqa: E731
    found = search(pipe, run, 16 / 9, cost="blocks", modes=("conditional",), max_runs=None, verbose=False)
    halved = [each for each in found.evaluations if each.plan.pieces[0].conditional]
    assert {each.failure for each in halved} == {""}
    assert "◐" in str(found)
    without = search(pipe, run, 16 / 9, cost="blocks", max_runs=None, verbose=False)
    assert not any(each.plan.pieces[0].conditional for each in without.evaluations)


@torch.no_grad()
@pytest.mark.parametrize("modes", [("conditional",), ()])
def test_without_guidance_there_are_none(modes, capsys):
    """The search says so, if they were asked for."""
    pipe, x = Solved(Net("single", 4).double()), latents(3).double()
    found = search(pipe, lambda pipe: pictures(pipe(x, 6)), 1.5, cost="blocks", modes=modes, verbose=True, max_evals=4)
    assert not any(each.plan.pieces[0].conditional for each in found.evaluations)
    assert ("no steps of one branch alone: the recorded guidance" in capsys.readouterr().err) is bool(modes)
