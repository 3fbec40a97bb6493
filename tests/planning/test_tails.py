"""Plans whose last blocks may run alone: against all schedules of all pairs of ranges."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planning.test_planner import Drawn, cheapest, recording_of, total_of

from dithooks import plan
from dithooks.errors import InvalidSetting
from dithooks.planning.candidate import Variant
from dithooks.planning.partial_planner import PartialPlanner

pytestmark = pytest.mark.filterwarnings("error")


def ways_in_two(model, variant, cost):
    """(saved, price) of all pairs of schedules of all blocks parted in two, both of which reuse; and of nothing."""
    last, found = len(model.ms) - 1, [(0.0, 0.0)]
    each = model.ms if cost == "time" else np.ones(last + 1)
    schedules = [(1, *rest) for rest in itertools.product((0, 1), repeat=len(model.at) - 1) if not all(rest)]
    for at in range(1, last + 1):
        parts = []
        for pair in ((0, at - 1), (at, last)):
            saved = each[pair[0] : pair[1] + 1].sum() * model.branches
            parts.append([(bits.count(0) * saved, model.price(pair, bits, variant)) for bits in schedules])
        found += [(a + b, c + d) for (a, c), (b, d) in itertools.product(*parts)]
    return found


@settings(deadline=None, max_examples=20)
@example(seed=438, blocks=4, steps=2, cost="time", anchors=1)  # all save as much, but for the rounding of sums
@given(
    seed=st.integers(0, 2**20),
    blocks=st.integers(2, 4),
    steps=st.integers(2, 4),
    cost=st.sampled_from(["time", "blocks"]),
    anchors=st.integers(1, 3),
)
def test_the_cheapest_of_all(seed, blocks, steps, cost, anchors):
    model, variant = Drawn(seed, blocks, steps), Variant(anchors, 3.0, mode="tail")
    recording, ways = recording_of(model), ways_in_two(model, variant, cost)
    planner, total = PartialPlanner(recording, cost), total_of(recording, cost)
    for target in (1.2, 1.5, 2.0, 10.0):
        candidate, needed = planner.candidate(target, variant), total * (1 - 1 / target)
        saved, price = cheapest(ways, needed)
        assert candidate.error == pytest.approx(math.sqrt(price), rel=1e-6, abs=1e-12)
        assert candidate.reaches == (saved >= needed * (1 - 1e-9))
        (piece,) = planner.pieces(candidate)
        (tail,) = piece.more_ranges
        assert (piece.first, tail.first, tail.first + tail.blocks) == (0, piece.blocks, blocks)
        each = model.ms if cost == "time" else np.ones(blocks)
        own = sum(each[r.first : r.first + r.blocks].sum() * r.steps.count(0) for r in piece.ranges)
        assert candidate.speedup == pytest.approx(total / (total - own))


def test_of_many_places_to_part_the_most_promising_are_solved_with_three_anchors():
    """It is the same, or next to it: of 11 places, eight are looked at."""
    model = Drawn(3, 12, 6)
    recording = recording_of(model)
    found = PartialPlanner(recording, "blocks").candidate(2.0, Variant(3, 3.0, mode="tail"))
    all_of_them = PartialPlanner(recording, "blocks")
    options = all_of_them._of_parts(
        0,
        [(model.ranges.index((0, at - 1)), model.ranges.index((at, 11))) for at in range(1, 12)],
        Variant(3, 3.0, mode="tail"),
    )
    least = min(each.cost for each in options if each.saved >= 36 - 1e-9)
    assert math.sqrt(least) <= found.error <= 1.1 * math.sqrt(least)


def test_by_plan():
    model = Drawn(5, 4, 6)
    found = plan(recording_of(model), 1.8, cost="blocks", mode="tail")
    (piece,) = found.pieces
    assert found.speedup >= 1.8
    assert found.speedup == pytest.approx(24 / (24 - sum(r.blocks * r.steps.count(0) for r in piece.ranges)))
    assert set(str(piece).split("  ")[1]) <= set("●○◒◑")
    assert type(found).from_json(found.to_json()) == found
    assert '"schema": 2' in found.to_json()
    for more, match in (
        ({"interval": 2}, "mode='tail' and interval exclude each other"),
        ({"payload": "output"}, "leaves all of them out|no steps of a scheduler"),
    ):
        with pytest.raises(InvalidSetting, match=match):
            plan(recording_of(model), 1.8, mode="tail", **more)
    with pytest.raises(ValueError, match="mode='head': there are 'whole', 'tail'"):
        plan(recording_of(model), 1.8, mode="head")


@pytest.mark.parametrize("paths", [("a.0", "b.0", "a.1", "b.1"), ("a.1", "a.0", "b.0", "b.1"), ("a", "b", "c", "d")])
def test_blocks_that_are_called_in_another_order_are_not_parted(paths):
    """The cache refuses several ranges of them, so none are planned."""
    recording = recording_of(Drawn(5, 4, 6))
    recording = replace(recording, traces=(replace(recording.traces[0], blocks=paths),))
    with pytest.raises(InvalidSetting, match="cannot be parted in two ranges"):
        plan(recording, 1.8, cost="blocks", mode="tail")
    assert plan(recording, 1.8, cost="blocks").pieces
    listed = replace(recording, traces=(replace(recording.traces[0], blocks=("a.0", "a.1", "b.0", "b.1")),))
    assert plan(listed, 1.8, cost="blocks", mode="tail").pieces[0].more_ranges
