"""What becomes of a planner's choices: their neighbours, plans, and what a plan refuses."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from planning.test_planner import Drawn, recording_of

from dithooks import CachePlan, frontier, plan
from dithooks.planning.candidate import Candidate, Choice, Variant
from dithooks.planning.planner import Planner
from dithooks.planning.weight_fit import fit
from dithooks.predictors.predictor import Moment

pytestmark = pytest.mark.filterwarnings("error")


class TestChanged:
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_every_neighbour_once_and_the_cheapest_first(self, anchors):
        variant = Variant(anchors)
        one = Drawn(3, 2, 7, path="transformer")
        two = Drawn(4, 2, 4, path="transformer_2", at=[7, 8, 9, 10])
        planner = Planner(recording_of(one, two), "blocks")
        choices = Choice(0, 0, 1, (1, 0, 1, 1, 0, 0, 1)), Choice(1, 1, 1, (1, 0, 1, 0))

        def error(choices):
            pairs = [((choice.first, choice.last), choice.computed) for choice in choices]
            return math.sqrt(one.price(*pairs[0], variant, ends=False) + two.price(*pairs[1], variant))

        candidate = Candidate(choices, variant, 1.6, error(choices))
        found = list(planner.neighbours(candidate))
        wanted = set()
        for place, choice in enumerate(candidate.choices):
            for bits in itertools.product((0, 1), repeat=len(choice.computed)):
                apart = np.flatnonzero(np.array(bits) != choice.computed)
                if bits[0] and sum(bits) == sum(choice.computed) and len(apart) == 2 and apart[1] - apart[0] == 1:
                    others = list(candidate.choices)
                    others[place] = choice._replace(computed=bits)
                    wanted.add(tuple(others))
        assert len(found) == len(wanted) == 3 + 2
        assert {each.choices for each in found} == wanted
        errors = [each.error for each in found]
        assert errors == sorted(errors)
        for each in found:
            assert each.error == pytest.approx(error(each.choices), rel=1e-6)
            assert (each.speedup, each.reaches, each.variant) == (1.6, True, variant)

    def test_nothing_to_move(self):
        candidate = Planner(recording_of(Drawn(0, 1, 3)), "blocks").candidate(2.9)
        assert candidate.choices[0].computed == (1, 0, 0)
        assert list(Planner(recording_of(Drawn(0, 1, 3)), "blocks").neighbours(candidate)) == []


class TestPlans:
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_what_it_says(self, anchors):
        model, sigmas = Drawn(2, 3, 8), tuple(np.linspace(1, 0.125, 8).tolist())
        model.times = np.array(sigmas)
        recording = recording_of(model, sigmas=sigmas)
        candidate = Planner(recording).candidate(1.5, Variant(anchors, 3.0))
        found = plan(recording, 1.5, anchors=anchors, late_error_weight=3.0)
        (piece,), (choice,) = found.pieces, candidate.choices
        assert (piece.path, piece.first, piece.first + piece.blocks - 1) == ("transformer", choice.first, choice.last)
        assert (piece.total, piece.steps, piece.sigmas, piece.axis) == (3, choice.computed, sigmas, "sigma")
        residuals = model.residual(choice.first, choice.last)
        moments = [Moment(step, sigma) for step, sigma in enumerate(sigmas)]
        assert piece.coefficients == fit(residuals @ residuals.T, moments, piece.steps, anchors).coefficients
        assert max(len(weights or ()) for weights in piece.coefficients) == min(anchors, sum(piece.steps[:-1]))
        for step, weights in enumerate(piece.coefficients):
            if weights is not None:
                last = [b for b in range(step - 1, -1, -1) if piece.steps[b]][:anchors]
                ours = model.forecast(residuals, piece.steps, step, anchors)
                np.testing.assert_allclose(np.array(weights) @ residuals[last], ours, rtol=1e-7, atol=1e-9)
        told = found.provenance
        assert piece.called is None
        assert (told.target, told.samples, told.reached, told.measured_speedup) == (1.5, 2, True, None)
        assert (told.predicted_speedup, told.predicted_error) == (candidate.speedup, candidate.error)
        assert {"torch", "numpy"} <= set(told.versions)
        assert found.made == recording.made
        assert CachePlan.from_json(found.to_json()) == found

    @pytest.mark.parametrize("known", [True, False])
    def test_of_transformers_that_are_called_for_a_part(self, known):
        """In the run's own steps; σ of the steps in between are the schedule's, where it is known."""
        one, two = Drawn(0, 2, 4), Drawn(1, 2, 3, path="transformer_2", at=[4, 5, 6])
        sigmas = (*one.times.tolist(), *(0.04, 0.03, 0.02))
        two.times = np.array(sigmas[4:])
        found = plan(recording_of(one, two, sigmas=sigmas if known else None), 1.9, cost="blocks")
        first, second = found.pieces
        assert (first.called, second.called) == ((0, 4), (4, 7))
        assert first.steps[4:] == (1, 1, 1)
        assert second.steps[:5] == (1,) * 5
        assert {len(piece.steps) for piece in found.pieces} == {7}
        assert (0 in first.steps, 0 in second.steps) == (True, True)
        assert first.sigmas[:4] == sigmas[:4]
        assert second.sigmas[4:] == sigmas[4:]
        assert (first.sigmas == second.sigmas == sigmas) == known
        for piece in found.pieces:
            assert [weights is None for weights in piece.coefficients] == [bit == 1 for bit in piece.steps]

    def test_of_a_run_that_begins_late(self):
        model = Drawn(0, 2, 4, at=[3, 4, 5, 6])
        sigmas = (1.0, 0.99, 0.98, *model.times.tolist())
        found = plan(recording_of(model, sigmas=sigmas), 1.5, cost="blocks")
        (piece,) = found.pieces
        assert (piece.called, piece.steps[:4], piece.sigmas) == ((3, 7), (1, 1, 1, 1), sigmas)
        assert found.speedup >= 1.5

    def test_a_target_that_cannot_be_reached(self):
        found = plan(recording_of(Drawn(0, 2, 4)), 50.0, cost="blocks")
        assert not found.provenance.reached
        assert found.speedup == pytest.approx(4.0)
        assert found.provenance.predicted_speedup == pytest.approx(4.0)
        assert found.pieces[0].picture == "●○○○"

    @pytest.mark.parametrize("nothing", ["one step", "no range", "blocks that take no time"])
    @pytest.mark.parametrize("anchors", [2, 3])
    def test_nothing_to_reuse(self, nothing, anchors):
        model = Drawn(0, 2, 1 if nothing == "one step" else 4)
        if nothing == "no range":
            model.ranges = []
        if nothing == "blocks that take no time":
            model.ms = np.zeros(2)
        recording = recording_of(model, run_ms=10.0)
        if nothing == "no range":
            empty = dataclasses.replace(model.trace, ranges=np.zeros((0, 2), np.int64), grams=np.zeros((0, 4, 4)))
            recording = dataclasses.replace(recording, traces=(empty,))
        with pytest.raises(ValueError, match="nothing of this run can be reused"):
            plan(recording, 2.0, anchors=anchors)
        assert frontier(recording, anchors=anchors) == [(1.0, 0.0)]

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"target_speedup": 1}, ValueError, "target_speedup=1: a run as fast as that needs no cache"),
            ({"target_speedup": 0.5}, ValueError, "needs no cache"),
            ({"target_speedup": -2}, ValueError, "target_speedup=-2 is out of range"),
            ({"target_speedup": math.nan}, ValueError, "target_speedup"),
            ({"target_speedup": math.inf}, ValueError, "target_speedup"),
            ({"target_speedup": "2"}, TypeError, "target_speedup must be a number"),
            ({"target_speedup": True}, TypeError, "target_speedup must be a number"),
            ({"cost": "money"}, ValueError, "there are 'time', as it was measured, and 'blocks'"),
            ({"anchors": 0}, ValueError, "anchors=0"),
            ({"anchors": 4}, ValueError, "anchors=4"),
            ({"late_error_weight": 0}, ValueError, "late_error_weight=0 is out of range"),
            ({"late_error_weight": "10"}, TypeError, "late_error_weight must be a number"),
            ({"recording": "recording.npz"}, TypeError, "recording must be a Recording"),
        ],
    )
    def test_what_it_refuses(self, change, error, message):
        with pytest.raises(error, match=message):
            plan(**{"recording": recording_of(Drawn(0)), "target_speedup": 2.0, **change})
