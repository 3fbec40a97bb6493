"""Plans from recordings: what errors and blocks are worth, and the cheapest plan against every plan there is."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks import CachePlan, frontier, plan
from dithooks.predictor import Moment
from dithooks.provenance import Made
from dithooks.search.fit import fit
from dithooks.search.planner import Candidate, Choice, Planner, Variant
from dithooks.search.prices import Savings, levels, worth
from dithooks.search.recording import Recording, Trace

pytestmark = pytest.mark.filterwarnings("error")

# --- recordings of nothing, and what they cost, worked out anew -----------------------------------------------------


class Made_up:
    """One transformer whose blocks add vectors that are drawn; a range adds the sum of its blocks'."""

    def __init__(self, seed, blocks=3, steps=4, *, path="transformer", at=None, block_ms=None, branches=1.0, width=6):
        rng = np.random.default_rng(seed)
        self.added = np.cumsum(rng.normal(size=(blocks, steps, width)), 1) + rng.normal(size=(blocks, 1, width))
        self.h = rng.normal(size=(steps, width)) + self.added.cumsum(0)  # (B, T, n): as it leaves each block
        self.ranges = [(i, j) for i in range(blocks) for j in range(i, blocks)]
        self.at = list(range(steps)) if at is None else at
        self.times = np.sort(rng.uniform(0.05, 1, steps))[::-1].copy()
        self.ms = np.array(block_ms if block_ms is not None else rng.uniform(0.5, 3, blocks))
        self.path, self.branches = path, branches

    def residual(self, first, last):
        return self.added[first : last + 1].sum(0)

    @property
    def trace(self):
        grams = np.array([r @ r.T for r in (self.residual(*pair) for pair in self.ranges)])
        return Trace(
            path=self.path, blocks=tuple(f"{self.path}.blocks.{k}" for k in range(len(self.ms))),
            ranges=np.array(self.ranges).reshape(-1, 2), grams=grams, norms=np.linalg.norm(self.h, axis=2),
            steps=np.array(self.at), times=self.times, axis="sigma", branches=self.branches, block_ms=self.ms,
            call_ms=float(self.ms.sum()) + 1, share=1.0, inputs={},
        )  # fmt: skip

    def forecast(self, residuals, bits, step, anchors):
        """Least squares on the vectors themselves, with the pull to the line as further rows."""
        last = [b for b in range(step - 1, -1, -1) if bits[b]][:anchors]
        line = np.zeros(len(last))
        line[0] = 1.0
        if len(last) > 1:
            r = (self.times[step] - self.times[last[0]]) / (self.times[last[0]] - self.times[last[1]])
            line[:2] = 1 + r, -r
        pull = math.sqrt(1e-3 * np.mean(np.square(residuals[last]).sum(1)))
        rows = np.vstack([residuals[last].T, pull * np.eye(len(last))])
        weights = np.linalg.lstsq(rows, np.concatenate([residuals[step], pull * line]), rcond=None)[0]
        return weights @ residuals[last]

    def price(self, pair, bits, variant, ends=True):
        residuals = self.residual(*pair)
        after = [*self.times[1:], 0.0 if ends else 2 * self.times[-1] - self.times[-2]]
        total, error = 0.0, np.zeros(residuals.shape[1])
        for step, bit in enumerate(bits):
            if bit:
                total, error = total + error @ error, 0 * error
                continue
            off = self.forecast(residuals, bits, step, variant.anchors) - residuals[step]
            counts = abs(self.times[step] - after[step]) / variant.late ** self.times[step]
            error = error + counts * off / np.linalg.norm(self.h[pair[1], step])
        return total + error @ error

    def ways(self, variant, cost, ends=True):
        """(saved, price, pair, bits) of every range and schedule; and that of doing nothing."""
        each = self.ms if cost == "time" else np.ones(len(self.ms))
        found = [(0.0, 0.0, None, None)]
        for pair, rest in itertools.product(self.ranges, itertools.product((0, 1), repeat=len(self.at) - 1)):
            if not all(rest):
                saved = rest.count(0) * each[pair[0] : pair[1] + 1].sum() * self.branches
                found.append((saved, self.price(pair, (1, *rest), variant, ends), pair, (1, *rest)))
        return found


def recording_of(*models, steps=None, run_ms=None, sigmas=None, runs=1):
    traces = tuple(model.trace for model in models)
    steps = steps or 1 + max(max(model.at) for model in models)
    blocks = sum(len(trace.blocks) for trace in traces)
    made = Made("Net", "0123456789abcdef", blocks, "float32", steps, "Counter", (6, 4))
    spent = sum(trace.block_ms.sum() * trace.branches * len(trace.steps) * runs for trace in traces)
    return Recording(traces, made, sigmas, 2, runs, float(run_ms or 1.25 * spent), 2 * float(spent))


def total_of(recording, cost):
    if cost == "time":
        return recording.run_ms
    return sum(len(trace.blocks) * trace.branches * len(trace.steps) for trace in recording.traces)


def cheapest(ways, needed):
    """(saved, price) of the cheapest that saves enough, else of that which saves most."""
    reaching = [way for way in ways if way[0] >= needed * (1 - 1e-9)]
    if reaching:
        return min(reaching, key=lambda way: way[1])
    most = max(way[0] for way in ways)
    return min((way for way in ways if way[0] >= most - 1e-9), key=lambda way: way[1])


def mixed(all_ways):
    """Ways of several transformers together: what they save, and what they cost, add up."""
    return [(sum(w[0] for w in mix), sum(w[1] for w in mix), mix) for mix in itertools.product(*all_ways)]


def check(candidate, ways, recording, cost, target, small=1e-12):
    total = total_of(recording, cost)
    needed = total * (1 - 1 / target)
    wanted = cheapest(ways, needed)
    assert candidate.error == pytest.approx(math.sqrt(wanted[1]), rel=1e-6, abs=small)
    assert candidate.reaches == (wanted[0] >= needed * (1 - 1e-9))
    if candidate.reaches:
        assert candidate.speedup >= target * (1 - 1e-8)
    else:
        assert candidate.speedup == pytest.approx(total / (total - wanted[0]))


def own_way(candidate, ways):
    """What its choices save and cost, by the list of all."""
    (choice,) = candidate.choices
    return next(way for way in ways if way[2:] == ((choice.first, choice.last), choice.computed))


# --- what errors are worth ------------------------------------------------------------------------------------------


class TestPrices:
    @pytest.mark.parametrize(
        ("axis", "times", "steps", "wanted"),
        [
            ("sigma", [1.0, 0.6, 0.1], 3, [1, 0.6, 0.1]),
            ("sigma", [0.6, 0.3], 5, [0.6, 0.3]),  # of pictures that are drawn over: part of the way is behind
            ("sigma", [80.0, 3.0, 0.25], 3, [80 / 81, 0.75, 0.2]),
            ("timestep", [1000.0, 500.0, 1.0], 3, [1, 0.5, 0.001]),
            ("timestep", [600.0, 200.0], 5, [0.6, 0.2]),
            ("timestep", [1.0, 0.75, 0.5], 4, [1, 0.75, 0.5]),
            ("step", [0.0, 1.0, 4.0], 5, [1, 0.8, 0.2]),
        ],
    )
    def test_levels(self, axis, times, steps, wanted):
        np.testing.assert_allclose(levels(np.array(times), axis, steps), wanted, rtol=1e-12)

    @staticmethod
    def trace(**fields):
        norms = np.array([[1.0, 1, 1], [2, 4, 5], [10, 10, 10]])
        made = dataclasses.replace(Made_up(0, 3, 3).trace, ranges=np.array([[0, 1], [1, 2]]), norms=norms)
        return dataclasses.replace(made, **{"times": np.array([1.0, 0.6, 0.3]), **fields})

    def test_of_a_whole_run(self):
        """σ falls by 0.4, 0.3 and, behind the last step, 0.3; the first range ends where ‖h‖ is 2, 4, 5."""
        wanted = np.array([0.4 / 10, 0.3 / 10**0.6, 0.3 / 10**0.3])
        np.testing.assert_allclose(worth(self.trace(), 3, 10.0), [wanted / [2, 4, 5], wanted / 10], rtol=1e-12)
        np.testing.assert_allclose(worth(self.trace(), 3, 1.0)[1], [0.04, 0.03, 0.03], rtol=1e-12)

    def test_where_another_transformer_goes_on(self):
        """Behind its last step the noise falls on as before, not to nothing: by 0.2, not by 0.5."""
        trace = self.trace(times=np.array([1.0, 0.7, 0.5]))
        np.testing.assert_allclose(worth(trace, 5, 1.0)[1], [0.03, 0.02, 0.02], rtol=1e-12)
        np.testing.assert_allclose(worth(trace, 3, 1.0)[1], [0.03, 0.02, 0.05], rtol=1e-12)

    def test_the_one_that_goes_on(self):
        trace = self.trace(steps=np.array([2, 3, 4]))
        np.testing.assert_allclose(worth(trace, 5, 1.0)[1], [0.04, 0.03, 0.03], rtol=1e-12)

    def test_of_steps(self):
        trace = self.trace(axis="step", times=np.array([0.0, 1.0, 2.0]))
        wanted = [0.1 / 8, 0.1 / 8 ** (2 / 3), 0.1 / 8 ** (1 / 3)]
        np.testing.assert_allclose(worth(trace, 3, 8.0)[1], wanted, rtol=1e-12)

    def test_of_timesteps(self):
        trace = self.trace(axis="timestep", times=np.array([1000.0, 600.0, 300.0]))
        np.testing.assert_allclose(worth(trace, 3, 10.0), 1000 * worth(self.trace(), 3, 10.0), rtol=1e-12)

    def test_nothing_there_is_worth_nothing(self):
        norms = np.array([[1.0, 1, 1], [2, 0, 5], [0, 0, 0]])
        found = worth(self.trace(norms=norms), 3, 1.0)
        np.testing.assert_allclose(found, [[0.2, 0, 0.06], [0, 0, 0]], rtol=1e-12)

    def test_savings(self):
        """Blocks of 1, 2 and 4 ms, with two calls a step, in three runs of four steps; one of 5 ms at two steps."""
        one, two = Made_up(0, 3, 4, block_ms=[1, 2, 4], branches=2.0), Made_up(1, 1, 2, block_ms=[5])
        recording = recording_of(one, two, run_ms=999.0, runs=3)
        time, blocks = Savings.of(recording, "time"), Savings.of(recording, "blocks")
        assert one.ranges == [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]
        np.testing.assert_allclose(time.step[0], [6, 18, 42, 12, 36, 24])
        np.testing.assert_allclose(blocks.step[0], [6, 12, 18, 6, 12, 6])
        np.testing.assert_allclose(np.concatenate([time.step[1], blocks.step[1]]), [15, 3])
        assert (time.total, blocks.total) == (999.0, 3 * 2 * 4 * 3 + 3 * 2)
        assert time.needed(3.0) == pytest.approx(666.0)
        assert (time.speedup(0.0), time.speedup(666.0)) == pytest.approx((1.0, 3.0))
        with pytest.raises(ValueError, match="cost='memory': there are 'time'"):
            Savings.of(recording, "memory")


# --- against all plans ----------------------------------------------------------------------------------------------


class TestOneTransformer:
    @settings(deadline=None, max_examples=25)
    @given(
        seed=st.integers(0, 2**20),
        blocks=st.integers(1, 3),
        steps=st.integers(2, 5),
        cost=st.sampled_from(["time", "blocks"]),
        anchors=st.integers(1, 3),
        late=st.sampled_from([1.0, 10.0, 30.0]),
        branches=st.sampled_from([1.0, 2.0]),
    )
    def test_the_cheapest_of_all(self, seed, blocks, steps, cost, anchors, late, branches):
        model, variant = Made_up(seed, blocks, steps, branches=branches), Variant(anchors, late)
        recording, ways = recording_of(model), model.ways(variant, cost)
        planner = Planner(recording, cost)
        for target in (1.05, 1.3, 1.6, 2.0, 3.0, 10.0):
            candidate = planner.candidate(target, variant)
            check(candidate, ways, recording, cost, target)
            saved, price, *_ = own_way(candidate, ways)
            assert candidate.error == pytest.approx(math.sqrt(price), rel=1e-6)
            assert candidate.speedup == pytest.approx(total_of(recording, cost) / (total_of(recording, cost) - saved))

    @pytest.mark.parametrize("cost", ["time", "blocks"])
    def test_the_frontier(self, cost):
        for seed, anchors in itertools.product(range(4), (1, 2, 3)):
            model, variant = Made_up(seed, 3, 5), Variant(anchors)
            recording, ways = recording_of(model), model.ways(variant, cost)
            total = total_of(recording, cost)
            wanted, least = [], math.inf
            for saved, price, *_ in sorted(ways, key=lambda way: (-round(way[0], 9), way[1])):
                if price < least:
                    wanted, least = [(total / (total - saved), math.sqrt(price)), *wanted], price
            planner = Planner(recording, cost)
            found = planner.frontier(variant)
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)
            assert found[0] == (1.0, 0.0)
            assert (np.diff(found, axis=0) > 0).all()
            for speedup, error in found[1:]:
                candidate = planner.candidate(speedup, variant)
                assert (candidate.speedup, candidate.error) == pytest.approx((speedup, error), rel=1e-9)

    def test_with_three_anchors_it_goes_as_far(self):
        """Of many ranges three anchors are tried with a few: among them are those that save most."""
        recording = recording_of(Made_up(5, 6, 5))
        fastest = 30 / 6  # of 6 blocks, 5 steps: the first is computed
        for anchors in (2, 3):
            found = Planner(recording, "blocks").frontier(Variant(anchors))
            assert found[-1][0] == pytest.approx(fastest)
            assert len(found) > 6

    def test_fewer_refreshes_if_they_cost_less(self):
        """Errors of +1 and −1 cancel: to reuse steps 1 and 2 costs nothing, to reuse one of them does."""
        model = Made_up(0, 1, 3)
        model.added = np.array([[[1.0, 0], [1, 1], [1, -1]]])
        model.h, model.times = np.ones((1, 3, 2)), np.array([3.0, 2, 1]) / 3
        recording = recording_of(model)
        candidate = Planner(recording, "blocks").candidate(1.4, Variant(1, 1.0))
        assert candidate.choices[0].computed == (1, 0, 0)
        assert (candidate.speedup, candidate.reaches) == (pytest.approx(3.0), True)
        assert candidate.error < 1e-3 < Planner(recording, "blocks").candidate(1.4, Variant(1, 1e-9)).error

    def test_a_range_of_cheap_blocks_is_worth_less(self):
        """Block 1 always adds the same, and takes a tenth of the time: by time it is of little use."""
        model = Made_up(3, 2, 4, block_ms=[9.0, 1.0])
        model.added[1] = model.added[1, :1]
        recording = recording_of(model, run_ms=40.0)
        by_blocks, by_time = (Planner(recording, cost).candidate(1.35) for cost in ("blocks", "time"))
        assert (by_blocks.choices[0][1:3], by_blocks.speedup) == ((1, 1), pytest.approx(8 / 5))
        assert by_blocks.error < 1e-6
        assert by_time.choices[0].first == 0  # 10.4 ms are needed: not all of block 1 would do
        assert by_time.error > 1e-3
        assert by_time.speedup in (pytest.approx(40 / 22), pytest.approx(40 / 20))  # two steps of 9 or 10 ms

    def test_other_work_cannot_be_saved(self):
        """Blocks take 40 of 80 ms: 30 of them can be left out, which is 1.6 times as fast at most."""
        recording = recording_of(Made_up(3, 2, 4, block_ms=[9.0, 1.0]), run_ms=80.0)
        planner = Planner(recording)
        for target in (1.7, 2.0, 100.0):
            candidate = planner.candidate(target)
            assert (candidate.speedup, candidate.reaches) == (pytest.approx(80 / 50), False)
            assert candidate.choices[0][1:] == (0, 1, (1, 0, 0, 0))
        assert planner.candidate(1.6).reaches

    def test_ties(self):
        """Blocks that do and cost the same: one of the plans, and one that can be run."""
        model = Made_up(0, 2, 4, block_ms=[1.0, 1.0])
        model.added[1] = model.added[0]
        model.h[:] = 1.0
        for variant, cost in itertools.product((Variant(1), Variant(2), Variant(3)), ("time", "blocks")):
            recording, ways = recording_of(model), model.ways(variant, cost)
            for target in (1.1, 1.4, 1.6):
                candidate = Planner(recording, cost).candidate(target, variant)
                check(candidate, ways, recording, cost, target)
                assert own_way(candidate, ways)

    def test_where_nothing_changes(self):
        """All plans cost nothing, in float64; the steps that are computed are as many as the target allows, or less."""
        model = Made_up(0, 2, 5, block_ms=[1.0, 1.0])
        model.added[:] = 0.0
        candidate = Planner(recording_of(model), "blocks").candidate(1.5)
        assert (candidate.error, candidate.reaches) == (0.0, True)
        assert candidate.speedup >= 1.5

    def test_ranges_to_avoid(self):
        """Of 20 blocks, also those that differ by one block at one end."""
        model, variant = Made_up(2, 20, 3), Variant()
        recording, ways = recording_of(model), model.ways(variant, "blocks")
        planner, avoid = Planner(recording, "blocks"), []
        for _ in range(4):
            candidate = planner.candidate(1.3, variant, avoid)
            far = [
                way
                for way in ways[1:]
                if all(abs(way[2][0] - choice.first) + abs(way[2][1] - choice.last) >= 2 for choice in avoid)
            ]
            check(candidate, far, recording, "blocks", 1.3)
            avoid += candidate.choices
        assert len({choice[1:3] for choice in avoid}) == 4

    def test_what_was_solved_is_kept_apart(self):
        """By variant, and for more refreshes anew: in any order, what a planner of its own would find."""
        model = Made_up(7, 3, 6)
        recording = recording_of(model)
        asked = [
            (target, Variant(anchors, late), cost)
            for target in (1.2, 1.7, 2.5, 9.0)
            for anchors in (1, 2, 3)
            for late in (1.0, 30.0)
            for cost in ("time", "blocks")
        ]
        shared = {cost: Planner(recording, cost) for cost in ("time", "blocks")}
        rng = np.random.default_rng(0)
        for number in rng.permutation(len(asked)):
            target, variant, cost = asked[number]
            assert shared[cost].candidate(target, variant) == Planner(recording, cost).candidate(target, variant)
            if number % 5 == 0:
                assert shared[cost].frontier(variant) == Planner(recording, cost).frontier(variant)

    def test_it_says_how_far_it_is(self):
        said = []
        planner = Planner(recording_of(Made_up(0, 12, 2)), "blocks", lambda *told: said.append(told))
        planner.frontier()
        assert said == [("plan", 64, 78), ("plan", 78, 78)]
        planner.candidate(1.2)
        assert len(said) == 2


class TestTwoTransformers:
    @pytest.mark.parametrize("cost", ["time", "blocks"])
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_the_cheapest_of_all_mixtures(self, cost, anchors):
        variant = Variant(anchors)
        for seed in range(4):
            one = Made_up(seed, 2, 4, path="transformer")
            two = Made_up(seed + 50, 2, 3, path="transformer_2", at=[4, 5, 6])
            recording = recording_of(one, two)
            ways = mixed([one.ways(variant, cost, ends=False), two.ways(variant, cost)])
            planner = Planner(recording, cost)
            for target in (1.1, 1.4, 1.8, 2.5, 6.0):
                candidate = planner.candidate(target, variant)
                check(candidate, ways, recording, cost, target)
                assert [choice.trace for choice in candidate.choices] in ([0], [1], [0, 1])
            total = total_of(recording, cost)
            found, wanted, least = planner.frontier(variant), [], math.inf
            for saved, price, _ in sorted(ways, key=lambda way: (-round(way[0], 9), way[1])):
                if price < least:
                    wanted, least = [(total / (total - saved), math.sqrt(price)), *wanted], price
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-12)

    def test_with_three_anchors_all_targets_can_be_reached(self):
        """Both have more ranges than are tried with three."""
        one, two = Made_up(0, 6, 4), Made_up(1, 6, 4, path="transformer_2", at=[4, 5, 6, 7])
        planner = Planner(recording_of(one, two), "blocks")
        for target in (1.2, 1.5, 2.0, 3.0, 4.0):  # 48 block executions, of which 12 are left at the most
            for anchors in (2, 3):
                assert planner.candidate(target, Variant(anchors)).reaches, (target, anchors)

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_one_that_is_called_once(self, anchors):
        """Nothing of it can be reused; of the other it can."""
        one, two = Made_up(0, 2, 1), Made_up(1, 2, 4, path="transformer_2", at=[1, 2, 3, 4])
        recording = recording_of(one, two)
        found = plan(recording, 1.5, cost="blocks", anchors=anchors)
        assert [piece.path for piece in found.pieces] == ["transformer_2"]
        assert (found.pieces[0].called, found.provenance.reached) == ((1, 5), True)
        assert frontier(recording, cost="blocks", anchors=anchors)[-1][0] == pytest.approx(10 / 4)

    def test_to_avoid_a_range_of_one(self):
        one, two = Made_up(0, 2, 4), Made_up(1, 2, 4, path="transformer_2", at=[4, 5, 6, 7])
        planner = Planner(recording_of(one, two), "blocks")
        first = planner.candidate(1.6)
        assert [choice.trace for choice in first.choices] == [0, 1]
        second = planner.candidate(1.6, avoid=first.choices[:1])
        assert first.choices[0][1:3] not in [choice[1:3] for choice in second.choices if choice.trace == 0]


class TestChanged:
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_every_neighbour_once_and_the_cheapest_first(self, anchors):
        variant = Variant(anchors)
        one = Made_up(3, 2, 7, path="transformer")
        two = Made_up(4, 2, 4, path="transformer_2", at=[7, 8, 9, 10])
        planner = Planner(recording_of(one, two), "blocks")
        choices = Choice(0, 0, 1, (1, 0, 1, 1, 0, 0, 1)), Choice(1, 1, 1, (1, 0, 1, 0))

        def error(choices):
            pairs = [((choice.first, choice.last), choice.computed) for choice in choices]
            return math.sqrt(one.price(*pairs[0], variant, ends=False) + two.price(*pairs[1], variant))

        candidate = Candidate(choices, variant, 1.6, error(choices))
        found = list(planner.changed(candidate))
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
        candidate = Planner(recording_of(Made_up(0, 1, 3)), "blocks").candidate(2.9)
        assert candidate.choices[0].computed == (1, 0, 0)
        assert list(Planner(recording_of(Made_up(0, 1, 3)), "blocks").changed(candidate)) == []


class TestPlans:
    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_what_it_says(self, anchors):
        model, sigmas = Made_up(2, 3, 8), tuple(np.linspace(1, 0.125, 8).tolist())
        model.times = np.array(sigmas)
        recording = recording_of(model, sigmas=sigmas)
        candidate = Planner(recording).candidate(1.5, Variant(anchors, 3.0))
        found = plan(recording, 1.5, anchors=anchors, late=3.0)
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
        one, two = Made_up(0, 2, 4), Made_up(1, 2, 3, path="transformer_2", at=[4, 5, 6])
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
        model = Made_up(0, 2, 4, at=[3, 4, 5, 6])
        sigmas = (1.0, 0.99, 0.98, *model.times.tolist())
        found = plan(recording_of(model, sigmas=sigmas), 1.5, cost="blocks")
        (piece,) = found.pieces
        assert (piece.called, piece.steps[:4], piece.sigmas) == ((3, 7), (1, 1, 1, 1), sigmas)
        assert found.speedup >= 1.5

    def test_a_target_that_cannot_be_reached(self):
        found = plan(recording_of(Made_up(0, 2, 4)), 50.0, cost="blocks")
        assert not found.provenance.reached
        assert found.speedup == pytest.approx(4.0)
        assert found.provenance.predicted_speedup == pytest.approx(4.0)
        assert found.pieces[0].picture == "●○○○"

    @pytest.mark.parametrize("nothing", ["one step", "no range", "blocks that take no time"])
    @pytest.mark.parametrize("anchors", [2, 3])
    def test_nothing_to_reuse(self, nothing, anchors):
        model = Made_up(0, 2, 1 if nothing == "one step" else 4)
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
            ({"late": 0}, ValueError, "late=0 is out of range"),
            ({"late": None}, TypeError, "late must be a number"),
            ({"recording": "recording.npz"}, TypeError, "recording must be a Recording"),
        ],
    )
    def test_what_it_refuses(self, change, error, message):
        with pytest.raises(error, match=message):
            plan(**{"recording": recording_of(Made_up(0)), "target_speedup": 2.0, **change})
