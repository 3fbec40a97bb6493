"""Which plans are proposed, one after another, driven by scores that are made up."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from planning.test_planner import Drawn, recording_of

from dithooks.planning.candidate import Variant
from dithooks.planning.planner import DEFAULT_LATE_ERROR_WEIGHT, Planner
from dithooks.tuning.proposals import MIN_GAIN, proposals

pytestmark = pytest.mark.filterwarnings("error")
ENOUGH = 1000


@pytest.fixture(scope="module")
def planner():
    return Planner(recording_of(Drawn(3, 4, 14)), "blocks")


@pytest.fixture(scope="module")
def pair():
    return Planner(recording_of(Drawn(3, 2, 5), Drawn(4, 2, 5, path="transformer_2", at=[5, 6, 7, 8, 9])), "blocks")


def drive(planner, score, evals=ENOUGH, local_moves=0, target=1.6):
    """Everything that is proposed, with its score."""
    proposed, found, answer = proposals(planner, target, evals, local_moves), [], None
    while True:
        try:
            candidate = proposed.send(answer)
        except StopIteration:
            break
        answer = score(candidate)
        found.append((candidate, answer))
        assert len(found) <= evals + local_moves
    plans = [planner.pieces(candidate) for candidate, _ in found]
    assert len(set(plans)) == len(plans)
    if found and found[0][1] is not None:
        assert all(candidate.reaches for candidate, _ in found)
    return found


def by_price(planner, late=30.0):
    """The truth is priced so: the score of a plan is what it would cost, in dB below 1."""
    model = Variant(2, late)

    def score(candidate):
        total = 0.0
        for choice in candidate.choices:
            schedules = planner._schedules(choice.trace, [planner._range(choice)], model)
            total += float(schedules.cost(choice.computed)[0])
        return -10 * math.log10(total)

    return score


def ranges(candidate):
    return tuple(choice[:3] for choice in candidate.choices)


def variants(planner):
    """The first candidates, those of the same choices once."""
    found = {}
    for late in (10.0, 3.0, 30.0):
        candidate = planner.candidate(1.6, Variant(2, late))
        found.setdefault(candidate.choices, candidate)
    return list(found.values())


def apart(one, other):
    """How many refreshes of one schedule another has not, and how far it is to them; ``None``: of other ranges."""
    if ranges(one) != ranges(other):
        return None
    moved = []
    for a, b in zip(one.choices, other.choices, strict=True):
        here, there = ({step for step, bit in enumerate(each.computed) if bit} for each in (a, b))
        moved += [abs(x - y) for x, y in zip(sorted(here - there), sorted(there - here), strict=True)]
    return moved


class TestOrder:
    def test_first_the_guesses_then_three_anchors(self, planner):
        """Each with the score of its number: the last of the guesses is best, and gone on from."""
        numbers = itertools.count()
        found = [candidate for candidate, _ in drive(planner, lambda candidate: next(numbers), 6)]
        distinct = variants(planner)
        assert len(distinct) > 1
        assert found[: len(distinct)] == distinct
        late = distinct[-1].variant.late_error_weight
        assert found[len(distinct)] == planner.candidate(1.6, Variant(3, late))
        assert {candidate.variant.anchors for candidate in found[len(distinct) :]} == {3}

    def test_it_goes_on_from_the_best(self, planner):
        distinct = variants(planner)
        for best in distinct:
            found = drive(planner, lambda candidate, best=best: float(candidate == best), len(distinct) + 1)
            assert found[-1][0] == planner.candidate(1.6, Variant(3, best.variant.late_error_weight))

    def test_another_range_is_tried(self, planner):
        found = drive(planner, lambda candidate: 0.0, ENOUGH)
        assert len({ranges(candidate) for candidate, _ in found}) > 1

    @pytest.mark.parametrize("evals", [1, 2, 3, 5])
    def test_no_more_than_were_asked_for(self, planner, pair, evals):
        for each, local_moves in itertools.product((planner, pair), (0, 1, 5)):
            assert len(drive(each, by_price(each), evals, local_moves)) <= evals + local_moves

    def test_as_many_as_were_asked_for_if_there_are(self, planner):
        for evals, local_moves in ((1, 0), (2, 0), (4, 3)):
            assert len(drive(planner, by_price(planner, 3.0), evals, local_moves)) == evals + local_moves

    def test_whatever_the_scores(self, planner, pair):
        """No plan twice (``drive`` sees to it), and it ends, though there is no limit."""
        for seed, each in itertools.product(range(6), (planner, pair)):
            rng = np.random.default_rng(seed)
            evals, local_moves = int(rng.integers(1, 12)), int(rng.integers(0, 12))
            some = lambda candidate, rng=rng: None if rng.random() < 0.3 else float(rng.normal())  # noqa: E731
            drive(each, some, *((evals, local_moves) if seed % 3 else (ENOUGH, ENOUGH)))

    def test_two_residuals_at_most_are_no_other_plan_with_three(self):
        """Three refreshes of which the last is the last step: a third anchor is nowhere to be had."""
        planner = Planner(recording_of(Drawn(1, 1, 4)), "blocks")
        found = drive(planner, lambda candidate: 1.0, target=1.9)
        assert {sum(candidate.choices[0].computed) for candidate, _ in found} <= {1, 2}
        assert {candidate.variant.anchors for candidate, _ in found} == {2}

    def test_nothing_to_propose(self):
        assert drive(Planner(recording_of(Drawn(0, 2, 1)), "blocks"), lambda candidate: 1.0) == []


class TestFailures:
    def test_a_range_that_fails_is_left_alone(self, planner):
        """Whatever its schedule: neither the next guess nor what follows is of it again."""
        broken = ranges(planner.candidate(1.6))
        found = drive(planner, lambda candidate: None if ranges(candidate) == broken else 1.0)
        assert [score for _, score in found].count(None) == 1
        assert found[0][1] is None
        assert len(found) > 3

    def test_some_fail(self, planner):
        numbers = itertools.count()
        found = drive(planner, lambda candidate: None if (n := next(numbers)) in (0, 2, 3) else float(n), 12)
        assert len(found) == 12
        failed = [ranges(candidate) for candidate, score in found[:4] if score is None]
        assert not [candidate for candidate, _ in found[4:] if ranges(candidate) in failed]

    def test_all_of_the_first_fail(self, planner):
        """It goes on through other ranges, until one can be run."""
        wanted, broken = (0, 1, 2), set()
        assert ranges(planner.candidate(1.6)) != (wanted,)

        def score(candidate):
            if ranges(candidate) == (wanted,):
                return 1.0
            broken.add(ranges(candidate))
            return None

        found = drive(planner, score)
        assert (wanted,) in [ranges(candidate) for candidate, score in found if score]
        assert len(broken) > 2

    def test_all_fail(self, planner, pair):
        """Each range once; no more than are allowed, and it ends."""
        for each in (planner, pair):
            found = [ranges(candidate) for candidate, _ in drive(each, lambda candidate: None)]
            assert len(set(found)) == len(found) > 1
            assert len(drive(each, lambda candidate: None, 2, 5)) == 2

    def test_the_only_range_fails(self):
        planner = Planner(recording_of(Drawn(1, 1, 6)), "blocks")
        assert len(drive(planner, lambda candidate: None)) == 1


def best_so_far(found):
    """After each of those found, the one that is gone on from: another has to be clearly better."""
    best = [found[0]]
    for each in found[1:]:
        best.append(each if each[1] > best[-1][1] + MIN_GAIN else best[-1])
    return best


class TestClimbing:
    def test_each_is_a_step_from_the_best(self, planner):
        """The later refreshes are, the better: in the end all but the first stand at the end."""
        found = drive(planner, lambda candidate: float(np.flatnonzero(candidate.choices[0].computed).sum()), 1, ENOUGH)
        refreshes = sum(found[0][0].choices[0].computed)
        packed = (1, *[0] * (14 - refreshes), *[1] * (refreshes - 1))
        assert best_so_far(found)[-1][0].choices[0].computed == packed != found[0][0].choices[0].computed
        for each, best in zip(found[1:], best_so_far(found), strict=False):
            assert apart(best[0], each[0]) == [1]
            assert each[0].variant == best[0].variant

    def test_those_first_that_cost_least(self, planner):
        found = [candidate for candidate, _ in drive(planner, lambda candidate: 0.0, 1, ENOUGH)]
        assert found[1:] == list(planner.neighbours(found[0]))

    @pytest.mark.parametrize("late", [1.0, 100.0, 1000.0])
    def test_until_no_neighbour_is_better(self, planner, pair, late):
        for each in (planner, pair):
            score = by_price(each, late)
            found = drive(each, score, 1, ENOUGH)
            best = best_so_far(found)[-1]
            known = [each.pieces(candidate) for candidate, _ in found]
            for neighbour in each.neighbours(best[0]):
                assert score(neighbour) <= best[1] + MIN_GAIN
                assert each.pieces(neighbour) in known

    def test_a_failure_on_the_way(self, planner):
        numbers = itertools.count()
        found = drive(planner, lambda candidate: None if (n := next(numbers)) in (1, 2) else float(-n), 1, 6)
        assert [score is None for _, score in found] == [False, True, True, False, False, False, False]

    def test_not_before_the_others(self, planner):
        """With both, the general ones come first."""
        score = by_price(planner)
        plain = drive(planner, score, 4)
        both = drive(planner, score, 4, 3)
        assert both[:4] == plain
        best = max(plain, key=lambda one: one[1])[0]
        assert apart(best, both[4][0]) == [1]


def test_what_it_says_of_a_plan_is_of_that_plan(planner):
    """A neighbour keeps the target, and has a price of its own."""
    for candidate, _ in drive(planner, by_price(planner, 100.0), 2, 20):
        bits = candidate.choices[0].computed
        assert (bits[0], len(bits)) == (1, 14)
        assert candidate.speedup >= 1.6
        mine = by_price(planner, candidate.variant.late_error_weight)
        if candidate.variant.anchors == 2:
            assert candidate.error**2 == pytest.approx(10 ** (-mine(candidate) / 10), rel=1e-6)


@pytest.fixture(scope="module")
def measured():
    recording = recording_of(Drawn(7, 4, 20))
    return Planner(dataclasses.replace(recording, sensitivity=tuple(np.exp(np.linspace(5, -5, 20)))), "blocks")


class TestMeasured:
    """Where it is known what is left of an error at each step."""

    @pytest.mark.parametrize("best", [0, 1])
    def test_as_it_is_then_less_of_it_then_three_anchors_then_between(self, measured, best):
        found = drive(measured, lambda candidate: float(candidate.variant.power == (1.0, 0.5)[best]), 4)
        variants = [candidate.variant for candidate, _ in found]
        assert variants[:2] == [Variant(2, None, 1.0), Variant(2, None, 0.5)]
        assert variants[2] == Variant(3, None, (1.0, 0.5)[best])
        assert variants[3] == Variant(variants[3].anchors, None, 0.75)

    def test_a_power_of_nothing_is_flat(self, measured):
        flat = dataclasses.replace(measured.recording, sensitivity=(1.0,) * 20)
        (trace,) = measured.recording.traces
        wanted = Planner(flat, "blocks").error_weights(trace, Variant(2))
        np.testing.assert_allclose(measured.error_weights(trace, Variant(2, None, 0.0)), wanted, rtol=1e-12)

    def test_it_matters(self, measured):
        """Early errors count most here, and least by the guess: more of the early steps are computed."""
        mine, guessed = (
            measured.candidate(1.6, Variant(2, late)).choices[0].computed for late in (None, DEFAULT_LATE_ERROR_WEIGHT)
        )
        assert sum(mine) == sum(guessed)
        assert np.flatnonzero(mine).mean() < np.flatnonzero(guessed).mean() - 1
