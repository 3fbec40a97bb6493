"""Plans for several targets that leave out the same blocks: against all plans of these, priced anew."""

import pytest
from planning.test_planned_outputs import recorded
from planning.test_planner import Drawn, check, mixed, recording_of
from planning.test_planner_proposals import ENOUGH, by_price, drive, ranges

from dithooks.planning.candidate import Variant
from dithooks.planning.interval_planner import IntervalPlanner
from dithooks.planning.planner import Planner

pytestmark = pytest.mark.filterwarnings("error")
HARD, EASY = 2.2, (1.1, 1.3, 1.6, 2.2)


def only(ways, candidate, trace):
    """The ways that cache the range that a candidate caches of a transformer; if it caches none, to do nothing."""
    own = [(each.first, each.last) for each in candidate.choices if each.trace == trace]
    return [way for way in ways if way[2] in (own or [None])]


@pytest.mark.parametrize("cost", ["time", "blocks"])
@pytest.mark.parametrize("anchors", [2, 3])
def test_easier_targets_have_the_best_schedules_of_the_range_of_the_hardest(cost, anchors):
    variant, others = Variant(anchors), 0
    for seed in range(12):
        model = Drawn(seed, 3, 5)
        recording, ways = recording_of(model), model.ways(variant, cost)
        planner = Planner(recording, cost)
        hardest = planner.candidate(HARD, variant)
        like = planner.like(planner.pieces(hardest))
        for target in EASY:
            found = like.candidate(target, variant)
            assert ranges(found) == ranges(hardest)
            check(found, only(ways, hardest, 0), recording, cost, target)
            others += ranges(planner.candidate(target, variant)) != ranges(hardest)
        assert like.candidate(HARD, variant).choices == hardest.choices
    assert others  # by itself, another range would be cheaper


def test_each_of_two_transformers_has_the_range_it_has_for_the_hardest():
    """One that is cached there is cached for the easier ones, too, if only at one step; and no other."""
    variant, counts = Variant(), set()
    for seed in range(12):
        one, two = Drawn(seed, 2, 4), Drawn(seed + 50, 2, 3, path="transformer_2", at=[4, 5, 6])
        recording = recording_of(one, two)
        planner = Planner(recording, "blocks")
        ways = [one.ways(variant, "blocks", ends=False), two.ways(variant, "blocks")]
        for hard in (1.3, 1.8, 2.5):
            hardest = planner.candidate(hard, variant)
            allowed = mixed([only(of_one, hardest, trace) for trace, of_one in enumerate(ways)])
            like = planner.like(planner.pieces(hardest))
            for target in (1.1, 1.3):
                found = like.candidate(target, variant)
                assert ranges(found) == ranges(hardest)
                check(found, allowed, recording, "blocks", target)
            counts.add(tuple(choice.trace for choice in hardest.choices))
    assert counts > {(0, 1)}


@pytest.mark.parametrize("kind", [Planner, lambda *given: IntervalPlanner(*given, interval=2)])
def test_everything_that_is_proposed_has_that_range(kind):
    planner = kind(recording_of(Drawn(3, 4, 9)), "blocks")
    hardest = planner.candidate(HARD)
    like = planner.like(planner.pieces(hardest))
    found = drive(like, by_price(planner), local_moves=ENOUGH, target=1.4)
    assert len(found) > 3
    assert {ranges(candidate) for candidate, _ in found} == {ranges(hardest)}
    others = drive(planner, by_price(planner), local_moves=ENOUGH, target=1.4)
    assert len({ranges(candidate) for candidate, _ in others}) > 1


def test_what_is_forecast_is_shared_as_well():
    """Residuals of all blocks and outputs leave out the same, and are two things all the same."""
    planner = Planner(recorded(), "blocks", payloads=("residual", "output"), fits=True)
    outputs, residuals = Variant(3, 5.0, payload="output"), Variant(2)
    for own, other in ((outputs, residuals), (residuals, outputs)):
        like = planner.like(planner.pieces(planner.candidate(1.9, own)))
        assert like.candidate(1.5, own).choices[0].payload == own.payload
        assert not like.candidate(1.5, other).choices
        found = drive(like, lambda candidate: 1.0, evals=6, local_moves=3, target=1.5)
        assert {choice.payload for candidate, _ in found for choice in candidate.choices} == {own.payload}
