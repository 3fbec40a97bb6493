"""A search for several numbers of steps: fitted at each, exact there, and said what is lost in between."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from solvers import Solved
from toys import Net, latents

from dithooks import CachePlan, dit_cache, search
from dithooks.errors import InvalidSetting, WrongType

STEPS = (8, 6, 12)
QUIETLY = {"cost": "blocks", "verbose": False}


def pipeline():
    torch.manual_seed(4)
    return Solved(Net("single", 6).double())


def noise():
    torch.manual_seed(5)
    return latents(5).double()


def run(pipe, steps):
    return [each[None] for each in pipe(noise(), steps)]


@pytest.fixture(scope="module")
def made():
    pipe = pipeline()
    return pipe, search(pipe, run, 1.6, steps=STEPS, max_evals=2, max_runs=None, **QUIETLY)


def psnr(pipe, steps, plan):
    wanted = pipe(noise(), steps)
    with dit_cache(pipe, plan) as cache, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        drawn = pipe(noise(), steps)
    assert cache.stats.reused_calls
    errors = (drawn - wanted).square().flatten(1).mean(1)
    spans = (wanted.flatten(1).amax(1) - wanted.flatten(1).amin(1)).square()
    return float((10 * torch.log10(spans / errors)).mean()), [str(each.message) for each in said]


class TestOneSearch:
    def test_the_first_number_is_the_plans_own(self, made):
        _, found = made
        (piece,) = found.plan.pieces
        assert found.plan.made.steps == len(piece.steps) == 8
        assert [len(other.steps) for other in piece.others] == [6, 12]
        assert all(other.others == () for other in piece.others)

    def test_it_says_what_is_lost(self, made):
        _, found = made
        elsewhere = found.plan.provenance.elsewhere
        assert [each.steps for each in elsewhere] == [6, 8, 12]
        assert all(each.psnr > each.left_out for each in elsewhere if each.steps != 8)
        assert [line.split(":")[0].strip() for line in str(found.plan).split("\n")[4:7]] == [
            "at 6 steps",
            "at 8 steps",
            "at 12 steps",
        ]

    @pytest.mark.parametrize("steps", [6, 12])
    def test_a_run_of_another_number_is_the_one_that_was_fitted(self, made, steps):
        """As good as the search says, whose measure is another one, and with the very schedule."""
        pipe, found = made
        (piece,) = found.plan.pieces
        own = next(each for each in piece.others if len(each.steps) == steps)
        assert psnr(pipe, steps, found.plan)[1] == []
        alone = replace(found.plan, pieces=(own,), made=replace(found.plan.made, steps=steps))
        np.testing.assert_allclose(psnr(pipe, steps, found.plan)[0], psnr(pipe, steps, alone)[0], atol=1e-9)

    def test_in_between_it_is_better_than_the_line(self, made):
        pipe, found = made
        (piece,) = found.plan.pieces
        alone = replace(found.plan, pieces=(replace(piece, others=()),))
        (carried, said), (line, warned) = psnr(pipe, 10, found.plan), psnr(pipe, 10, alone)
        assert not said
        assert warned
        assert carried > line

    def test_a_file_holds_all_of_it(self, made):
        _, found = made
        assert CachePlan.from_json(found.plan.to_json()) == found.plan

    def test_it_counts_its_runs(self, made):
        """One at each further number, and three plans or four there, each at half the speed or so."""
        _, found = made
        assert found.run_equivalents > 1 + (6 + 12) / 8

    def test_nothing_is_left_behind(self, made):
        pipe, _ = made
        assert "step" not in vars(pipe.scheduler)
        assert "forward" not in vars(pipe.transformer)


class TestWhatIsRefused:
    @pytest.mark.parametrize(
        ("steps", "error"),
        [
            ((8,), InvalidSetting),
            ((8, 8), InvalidSetting),
            ((8, 1), InvalidSetting),
            ("8", WrongType),
            (8, WrongType),
            ((8, 6.5), WrongType),
        ],
    )
    def test_numbers_that_are_none(self, steps, error):
        with pytest.raises(error):
            search(pipeline(), run, 1.6, steps=steps, **QUIETLY)

    def test_a_run_that_takes_no_number(self):
        calls = []
        with pytest.raises(WrongType, match=r"it is called as run\(pipe, num_inference_steps\)"):
            search(pipeline(), calls.append, 1.6, steps=STEPS, **QUIETLY)
        assert not calls

    def test_what_it_does_not_go_with(self):
        for others in ({"interval": 2}, {"num_inference_steps": 6}):
            with pytest.raises(InvalidSetting, match="excludes interval"):
                search(pipeline(), run, 1.6, steps=STEPS, **others, **QUIETLY)

    def test_a_run_with_steps_of_its_own(self):
        with pytest.raises(InvalidSetting, match="give the same number"):
            search(pipeline(), lambda pipe, steps: run(pipe, 8), 1.6, steps=STEPS, max_evals=1, **QUIETLY)

    def test_ctrl_c_leaves_the_plan_of_the_first(self):
        def interrupted(pipe, steps):
            if steps != 8:
                raise KeyboardInterrupt
            return run(pipe, steps)

        found = search(pipeline(), interrupted, 1.6, steps=STEPS, max_evals=1, **QUIETLY)
        assert found.interrupted
        assert found.plan.pieces[0].others == ()
        assert found.plan.provenance.psnr is not None
