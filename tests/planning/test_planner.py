"""The planner: the cheapest plan against every plan there is, of recordings that are drawn."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks import frontier, plan
from dithooks.config.provenance import PlanTarget
from dithooks.planning.candidate import Variant
from dithooks.planning.planner import Planner
from dithooks.recording.recording import Recording, Trace

pytestmark = pytest.mark.filterwarnings("error")

# --- recordings of nothing, and what they cost, worked out anew -----------------------------------------------------


class Drawn:
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
            counts = abs(self.times[step] - after[step]) / (variant.late_error_weight or 10.0) ** self.times[step]
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
    made = PlanTarget("Net", "0123456789abcdef", blocks, "float32", steps, "Counter", (6, 4))
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
        model, variant = Drawn(seed, blocks, steps, branches=branches), Variant(anchors, late)
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
            model, variant = Drawn(seed, 3, 5), Variant(anchors)
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
        """Of many ranges three anchors are tried with a few: some that save much, and some that save little."""
        recording = recording_of(Drawn(5, 14, 5))
        fastest = 5  # all blocks are left out at all steps but the first
        for anchors in (2, 3):
            found = Planner(recording, "blocks").frontier(Variant(anchors))
            assert found[-1][0] == pytest.approx(fastest)
            assert found[1][0] < 1.1
            assert len(found) > 6

    def test_fewer_refreshes_if_they_cost_less(self):
        """Errors of +1 and −1 cancel: to reuse steps 1 and 2 costs nothing, to reuse one of them does."""
        model = Drawn(0, 1, 3)
        model.added = np.array([[[1.0, 0], [1, 1], [1, -1]]])
        model.h, model.times = np.ones((1, 3, 2)), np.array([3.0, 2, 1]) / 3
        recording = recording_of(model)
        candidate = Planner(recording, "blocks").candidate(1.4, Variant(1, 1.0))
        assert candidate.choices[0].computed == (1, 0, 0)
        assert (candidate.speedup, candidate.reaches) == (pytest.approx(3.0), True)
        assert candidate.error < 1e-3 < Planner(recording, "blocks").candidate(1.4, Variant(1, 1e-9)).error

    def test_a_range_of_cheap_blocks_is_worth_less(self):
        """Block 1 always adds the same, and takes a tenth of the time: by time it is of little use."""
        model = Drawn(3, 2, 4, block_ms=[9.0, 1.0])
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
        recording = recording_of(Drawn(3, 2, 4, block_ms=[9.0, 1.0]), run_ms=80.0)
        planner = Planner(recording)
        for target in (1.7, 2.0, 100.0):
            candidate = planner.candidate(target)
            assert (candidate.speedup, candidate.reaches) == (pytest.approx(80 / 50), False)
            assert candidate.choices[0][1:5] == (0, 1, (1, 0, 0, 0), "residual")
        assert planner.candidate(1.6).reaches

    def test_ties(self):
        """Blocks that do and cost the same: one of the plans, and one that can be run."""
        model = Drawn(0, 2, 4, block_ms=[1.0, 1.0])
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
        model = Drawn(0, 2, 5, block_ms=[1.0, 1.0])
        model.added[:] = 0.0
        candidate = Planner(recording_of(model), "blocks").candidate(1.5)
        assert (candidate.error, candidate.reaches) == (0.0, True)
        assert candidate.speedup >= 1.5

    def test_ranges_to_avoid(self):
        """Of 20 blocks, also those that differ by one block at one end."""
        model, variant = Drawn(2, 20, 3), Variant()
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
        model = Drawn(7, 3, 6)
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
        planner = Planner(recording_of(Drawn(0, 12, 2)), "blocks", lambda *told: said.append(told))
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
            one = Drawn(seed, 2, 4, path="transformer")
            two = Drawn(seed + 50, 2, 3, path="transformer_2", at=[4, 5, 6])
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
        one, two = Drawn(0, 14, 4), Drawn(1, 14, 4, path="transformer_2", at=[4, 5, 6, 7])
        planner = Planner(recording_of(one, two), "blocks")
        for target in (1.2, 1.5, 2.0, 3.0, 4.0):  # 112 block executions, of which 28 are left at the least
            for anchors in (2, 3):
                assert planner.candidate(target, Variant(anchors)).reaches, (target, anchors)

    @pytest.mark.parametrize("anchors", [1, 2, 3])
    def test_one_that_is_called_once(self, anchors):
        """Nothing of it can be reused; of the other it can."""
        one, two = Drawn(0, 2, 1), Drawn(1, 2, 4, path="transformer_2", at=[1, 2, 3, 4])
        recording = recording_of(one, two)
        found = plan(recording, 1.5, cost="blocks", anchors=anchors)
        assert [piece.path for piece in found.pieces] == ["transformer_2"]
        assert (found.pieces[0].called, found.provenance.reached) == ((1, 5), True)
        assert frontier(recording, cost="blocks", anchors=anchors)[-1][0] == pytest.approx(10 / 4)

    def test_to_avoid_a_range_of_one(self):
        """The same blocks of the other may be cached all the same."""
        variant = Variant()
        for seed in range(6):
            one, two = Drawn(seed, 2, 4), Drawn(seed + 50, 2, 4, path="transformer_2", at=[4, 5, 6, 7])
            recording = recording_of(one, two)
            planner = Planner(recording, "blocks")
            avoid = planner.candidate(2.0, variant).choices[:1]
            assert avoid[0].trace == 0
            left = [way for way in one.ways(variant, "blocks", ends=False) if way[2] != avoid[0][1:3]]
            ways = mixed([left, two.ways(variant, "blocks")])
            check(planner.candidate(2.0, variant, avoid), ways, recording, "blocks", 2.0)
