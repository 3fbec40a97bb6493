"""Searches on models of which not every range can be cached: no run is spent on finding that out."""

import pytest
from recording.test_self_contained_ranges import MODELS, run, self_contained

from dithooks import search


@pytest.mark.parametrize("kind", ["u_shape", "collected"])
def test_a_search_runs_no_plan_that_the_wiring_forbids(kind):
    model = MODELS[kind]()
    wanted = self_contained(model, len(model.blocks))
    found = search(model, run, target_speedup=1.2, cost="blocks", verbose=False)
    assert found.reached
    assert [each.failure for each in found.evaluations if each.failure] == []
    ranges = {(piece.first, piece.first + piece.blocks - 1) for each in found.evaluations for piece in each.plan.pieces}
    assert len(found.evaluations) > 1
    assert all(list(pair) in wanted for pair in ranges)
