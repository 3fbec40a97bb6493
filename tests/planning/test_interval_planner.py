"""Plans that four numbers can say: the cheapest against every one there is, and what they do when they are run."""

import itertools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning.test_planner import Drawn, check, mixed, recording_of, total_of
from planning.test_planner_proposals import ENOUGH, drive
from toys import Net, Pipe, latents, prompt
from tuning.test_search import DEPTH, STEPS, Toy
from tuning.test_search_runs import Experts, Late

from dithooks import CachePlan, DitCacheConfig, Interval, dit_cache, plan, search
from dithooks.cli.main import main
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.planning.candidate import Variant
from dithooks.planning.interval_planner import IntervalPlanner, interval_config, interval_schedule

pytestmark = pytest.mark.filterwarnings("error")


# --- by hand --------------------------------------------------------------------------------------------------------


def bits_of(start, interval, steps):
    return tuple(int(step < start or (step - start) % interval == 0) for step in steps)


class Plain(Drawn):
    """What plans with an interval cost, by the residuals themselves."""

    def forecast(self, residuals, bits, step, anchors):
        return residuals[max(b for b in range(step) if bits[b])]

    def spaced(self, interval, late, cost, ends=True):
        """(saved, price, pair, bits) of every range and start; and that of doing nothing."""
        each = self.ms if cost == "time" else np.ones(len(self.ms))
        found = [(0.0, 0.0, None, None)]
        for pair, start in itertools.product(self.ranges, self.at[:-1]):
            bits = bits_of(start, interval, self.at)
            saved = bits.count(0) * each[pair[0] : pair[1] + 1].sum() * self.branches
            found.append((saved, self.price(pair, bits, Variant(1, late), ends), pair, bits))
        return found


def smallest(interval, longest, ways_of, needed):
    """The least interval of those that reach, and its ways; else the largest."""
    for each in range(min(interval, longest), longest + 1):
        ways = ways_of(each)
        if max(way[0] for way in ways) >= needed * (1 - 1e-9):
            break
    return each, ways


class TestNumbers:
    def test_every_schedule_of_nine_steps(self):
        """The interval is told by the mask, or, with one refresh, the least that is asked for and gives it."""
        for start, interval in itertools.product(range(8), range(2, 12)):
            bits = bits_of(start, interval, range(9))
            assert interval_schedule(start, interval, range(9)) == bits
            piece = TransformerPlan("", 1, 2, 4, bits, tuple(None if bit else (1.0,) for bit in bits), None)
            for asked in range(2, interval + 1):
                found = interval_config(piece, asked)
                alone = start + interval >= 9
                wanted = max(asked, 9 - start) if alone else interval
                assert found == DitCacheConfig(start, wanted, 1, 2)
                assert bits_of(found.cache_step_start, found.cache_step_interval, range(9)) == bits

    def test_of_a_transformer_that_is_called_for_a_part(self):
        steps = (1, 1, 1, 1, 1, 0, 1, 0, 1, 1)  # called from the fourth to the eighth
        weights = tuple(None if bit else (1.0,) for bit in steps)
        piece = TransformerPlan("", 0, 3, 4, steps, weights, None, called=(3, 8))
        assert interval_config(piece) == DitCacheConfig(4, 2, 0, 3)
        piece = TransformerPlan("", 0, 3, 4, steps, weights, None, called=(3, 9))
        assert interval_config(piece) == DitCacheConfig(4, 2, 0, 3)
        with pytest.raises(ValueError, match="no four numbers say this"):
            interval_config(TransformerPlan("", 0, 3, 4, steps, weights, None, called=(3, 10)))

    @pytest.mark.parametrize(
        ("bits", "weight", "asked"),
        [
            ((1, 0, 1, 0, 0), 1.0, 2),
            ((1, 0, 1, 1, 0), 1.0, 2),
            ((1, 0, 0, 1, 0), 0.99, 2),
            ((1, 0, 1, 0, 1), 1.0, 3),
            ((1, 1, 1, 1, 1), 1.0, 2),
        ],
    )
    def test_what_they_cannot_say(self, bits, weight, asked):
        piece = TransformerPlan("", 0, 1, 1, bits, tuple(None if bit else (weight,) for bit in bits), None)
        with pytest.raises(ValueError, match=f"with an interval of {asked} or more"):
            interval_config(piece, asked)


class TestOneTransformer:
    @settings(deadline=None, max_examples=40)
    @given(
        seed=st.integers(0, 2**20),
        blocks=st.integers(1, 3),
        steps=st.integers(2, 8),
        cost=st.sampled_from(["time", "blocks"]),
        late=st.sampled_from([1.0, 10.0, 30.0]),
        interval=st.integers(2, 9),
        branches=st.sampled_from([1.0, 2.0]),
    )
    def test_the_cheapest_of_all(self, seed, blocks, steps, cost, late, interval, branches):
        model = Plain(seed, blocks, steps, branches=branches)
        recording = recording_of(model)
        planner = IntervalPlanner(recording, cost, interval=interval)
        for target in (1.05, 1.3, 1.6, 2.0, 3.0, 10.0):
            needed = total_of(recording, cost) * (1 - 1 / target)
            each, ways = smallest(interval, steps, lambda k: model.spaced(k, late, cost), needed)
            candidate = planner.candidate(target, Variant(2, late))
            check(candidate, ways, recording, cost, target, small=1e-6)
            (choice,) = candidate.choices
            start = choice.computed.index(0) - 1
            assert choice.computed == bits_of(start, each, range(steps))
            (piece,) = planner.pieces(candidate)
            found = interval_config(piece, interval)
            assert bits_of(found.cache_step_start, found.cache_step_interval, range(steps)) == choice.computed

    def test_the_interval_that_was_asked_for_if_it_will_do(self):
        recording = recording_of(Plain(1, 3, 12))
        for asked, target, wanted in ((2, 1.5, 2), (2, 2.0, 2), (3, 1.5, 3), (2, 2.5, 3), (2, 4.0, 4), (5, 1.2, 5)):
            candidate = IntervalPlanner(recording, "blocks", interval=asked).candidate(target)
            (piece,) = IntervalPlanner(recording, "blocks", interval=asked).pieces(candidate)
            assert (candidate.reaches, interval_config(piece, asked).cache_step_interval) == (True, wanted)

    @pytest.mark.parametrize("interval", [2, 3, 100])
    def test_a_target_that_cannot_be_reached(self, interval):
        """What saves most, as among all schedules: everything, at all steps but the first."""
        found = plan(recording_of(Plain(0, 2, 4)), 50.0, cost="blocks", interval=interval)
        assert (found.provenance.reached, found.pieces[0].picture) == (False, "●○○○")
        assert found.speedup == pytest.approx(4.0)
        assert interval_config(found.pieces[0], interval) == DitCacheConfig(0, max(interval, 4), 0, 2)

    def test_a_run_that_begins_late(self):
        model = Plain(0, 2, 6, at=[3, 4, 5, 6, 7, 8])
        recording = recording_of(model)
        candidate = IntervalPlanner(recording, "blocks", interval=2).candidate(1.4, Variant(2, 10.0))
        check(candidate, model.spaced(2, 10.0, "blocks"), recording, "blocks", 1.4)
        (piece,) = plan(recording, 1.4, cost="blocks", interval=2).pieces
        assert (piece.called, piece.steps[:4]) == ((3, 9), (1, 1, 1, 1))
        start = interval_config(piece).cache_step_start
        assert piece.steps[3:] == bits_of(start, 2, range(3, 9))

    def test_the_frontier_is_of_the_interval(self):
        for seed, cost in itertools.product(range(4), ("time", "blocks")):
            model = Plain(seed, 3, 7)
            recording = recording_of(model)
            total, wanted, least = total_of(recording, cost), [], math.inf
            for saved, price, *_ in sorted(model.spaced(3, 10.0, cost), key=lambda way: (-round(way[0], 9), way[1])):
                if price < least:
                    wanted, least = [(total / (total - saved), math.sqrt(price)), *wanted], price
            found = IntervalPlanner(recording, cost, interval=3).frontier()
            np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)

    def test_ranges_to_avoid(self):
        model = Plain(2, 20, 4)
        recording = recording_of(model)
        planner, avoid, ways = IntervalPlanner(recording, "blocks", interval=2), [], model.spaced(2, 10.0, "blocks")
        for _ in range(4):
            candidate = planner.candidate(1.3, Variant(), avoid)
            far = [w for w in ways[1:] if all(abs(w[2][0] - c.first) + abs(w[2][1] - c.last) >= 2 for c in avoid)]
            check(candidate, far, recording, "blocks", 1.3)
            avoid += candidate.choices
        assert len({choice[1:3] for choice in avoid}) == 4

    def test_neighbours_start_a_step_from_it_and_are_as_fast(self):
        model = Plain(5, 2, 9)
        planner = IntervalPlanner(recording_of(model), "blocks", interval=3)
        total = total_of(planner.recording, "blocks")
        ways = {way[2:]: way for way in model.spaced(3, 10.0, "blocks")[1:]}
        met = 0
        for target in np.linspace(1.05, 2.9, 30):
            candidate = planner.candidate(target)
            pair, bits = candidate.choices[0][1:3], candidate.choices[0].computed
            start = bits.index(0) - 1
            near = [ways[pair, bits_of(each, 3, range(9))] for each in (start - 1, start + 1) if 0 <= each < 8]
            wanted = [way for way in near if way[0] >= ways[pair, bits][0]]
            found = list(planner.neighbours(candidate))
            met += len(found)
            assert {each.choices[0].computed for each in found} == {way[3] for way in wanted}
            for each in found:
                saved, price, *_ = ways[pair, each.choices[0].computed]
                assert each.error == pytest.approx(math.sqrt(price), rel=1e-6)
                assert each.speedup == pytest.approx(total / (total - saved))
            assert [each.error for each in found] == sorted(each.error for each in found)
        assert met

    def test_a_large_model_is_planned_in_a_second_or_so(self):
        recording = recording_of(Plain(0, 57, 50))
        assert len(recording.traces[0].ranges) == 1653
        begun = time.perf_counter()
        candidate = IntervalPlanner(recording, "blocks", interval=2).candidate(1.5)
        assert time.perf_counter() - begun < 5  # 0.1 s on a machine that has nothing else to do
        assert candidate.reaches


class TestSeveralTransformers:
    @pytest.mark.parametrize("cost", ["time", "blocks"])
    def test_the_cheapest_of_all_mixtures(self, cost):
        """One interval for both, a range and a start for each."""
        for seed, interval in itertools.product(range(4), (2, 3)):
            one = Plain(seed, 2, 5, path="transformer")
            two = Plain(seed + 50, 2, 4, path="transformer_2", at=[5, 6, 7, 8])
            recording = recording_of(one, two)
            planner = IntervalPlanner(recording, cost, interval=interval)

            def ways_of(k, one=one, two=two):
                return mixed([one.spaced(k, 10.0, cost, ends=False), two.spaced(k, 10.0, cost)])

            for target in (1.1, 1.4, 1.8, 2.5, 6.0):
                needed = total_of(recording, cost) * (1 - 1 / target)
                each, ways = smallest(interval, 5, ways_of, needed)
                candidate = planner.candidate(target)
                check(candidate, ways, recording, cost, target)
                for piece in planner.pieces(candidate):
                    begin, end = piece.called
                    start = interval_config(piece, interval).cache_step_start
                    assert piece.steps[begin:end] == bits_of(start, each, range(begin, end))

    def test_what_else_is_proposed(self):
        one, two = Plain(3, 2, 5, path="transformer"), Plain(4, 2, 5, path="transformer_2", at=[5, 6, 7, 8, 9])
        planner = IntervalPlanner(recording_of(one, two), "blocks", interval=2)
        found = drive(planner, lambda candidate: -candidate.error, ENOUGH, 3, 1.3)
        assert len(found) > 8
        assert all(candidate.speedup >= 1.3 for candidate, _ in found)


class TestProposals:
    @pytest.mark.parametrize("target", [1.1, 1.5, 1.8, 2.4])
    @pytest.mark.parametrize("interval", [2, 3])
    def test_as_many_as_are_wanted(self, target, interval):
        """If there are; none twice (``drive`` sees to it), and all with the one interval."""
        model = Plain(3, 5, 14)
        planner = IntervalPlanner(recording_of(model), "blocks", interval=interval)
        found = drive(planner, lambda candidate: -candidate.error, 4, 0, target)
        needed = total_of(planner.recording, "blocks") * (1 - 1 / target)
        _, ways = smallest(interval, 14, lambda k: model.spaced(k, 10.0, "blocks"), needed)
        assert len(found) == min(4, sum(way[0] >= needed - 1e-9 for way in ways))
        pieces = [planner.pieces(candidate)[0] for candidate, _ in found]
        assert len({interval_config(piece, interval).cache_step_interval for piece in pieces}) == 1
        for candidate, _ in found:
            assert candidate.speedup >= target * (1 - 1e-9)

    def test_next_to_the_cheapest_those_that_no_block_comes_behind(self):
        """The cheapest of the whole stack, then the cheapest up to the last block."""
        model = Plain(5, 6, 9)
        planner = IntervalPlanner(recording_of(model), "blocks", interval=2)
        found = [candidate for candidate, _ in drive(planner, lambda candidate: -candidate.error, 3, 0, 1.2)]
        needed = total_of(planner.recording, "blocks") * (1 - 1 / 1.2)
        ways = [way for way in model.spaced(2, 10.0, "blocks") if way[0] >= needed - 1e-9]
        kinds = (lambda pair: True, lambda pair: pair == (0, 5), lambda pair: pair[1] == 5)
        best = [min((way for way in ways if kind(way[2])), key=lambda way: way[1]) for kind in kinds]
        assert len({way[2:] for way in best}) == 3
        assert [(c.choices[0][1:3], c.choices[0].computed) for c in found] == [way[2:] for way in best]

    def test_in_the_end_all_there_are(self):
        model = Plain(3, 3, 8)
        planner = IntervalPlanner(recording_of(model), "blocks", interval=2)
        needed = total_of(planner.recording, "blocks") * (1 - 1 / 1.3)
        wanted = {way[2:] for way in model.spaced(2, 10.0, "blocks") if way[0] >= needed - 1e-9}
        found = [candidate.choices[0] for candidate, _ in drive(planner, lambda candidate: 0.0, ENOUGH, 0, 1.3)]
        assert {(choice[1:3], choice.computed) for choice in found} == wanted
        assert len(found) == len(wanted) > 10

    def test_a_range_that_fails_is_left_alone(self):
        planner = IntervalPlanner(recording_of(Plain(3, 4, 9)), "blocks", interval=2)
        broken = {planner.candidate(1.4).choices[0][1:3], (1, 3)}
        found = drive(planner, lambda c: None if c.choices[0][1:3] in broken else 1.0, ENOUGH, 0, 1.4)
        failed = [candidate.choices[0][1:3] for candidate, score in found if score is None]
        assert sorted(failed) == sorted(broken)

    @pytest.mark.parametrize("kind", ["one step", "no reuse"])
    def test_nothing_to_propose(self, kind):
        """In the second, the transformer is called at every other step only."""
        model = Plain(0, 2, 1) if kind == "one step" else Plain(0, 2, 3, at=[0, 2, 4])
        planner = IntervalPlanner(recording_of(model), "blocks", interval=2)
        found = drive(planner, lambda candidate: 1.0)
        assert [planner.pieces(candidate)[0].saved > 0 for candidate, _ in found] == [True] * (kind == "no reuse")

    def test_a_local_move_moves_the_start(self):
        planner = IntervalPlanner(recording_of(Plain(3, 3, 12)), "blocks", interval=3)
        found = drive(planner, lambda candidate: 0.0, 1, ENOUGH, 1.3)
        assert [candidate for candidate, _ in found[1:]] == list(planner.neighbours(found[0][0]))


class TestPlans:
    def test_what_it_says(self):
        recording = recording_of(Plain(2, 3, 8))
        found = plan(recording, 1.5, cost="blocks", interval=2)
        (piece,) = found.pieces
        assert {weights for weights in piece.coefficients if weights is not None} == {(1.0,)}
        assert (found.provenance.reached, found.speedup >= 1.5) == (True, True)
        assert CachePlan.from_json(found.to_json()) == found
        for anchors in (1, 3):
            assert plan(recording, 1.5, cost="blocks", interval=2, anchors=anchors).pieces == found.pieces
        assert plan(recording, 1.5, cost="blocks", interval=None) == plan(recording, 1.5, cost="blocks")

    @pytest.mark.parametrize(
        ("interval", "error", "message"),
        [(1, ValueError, "interval=1"), (0, ValueError, "interval=0"), (2.5, TypeError, "interval"),
         ("2", TypeError, "interval"), (True, TypeError, "interval")],
    )  # fmt: skip
    def test_what_it_refuses(self, interval, error, message):
        with pytest.raises(error, match=message):
            plan(recording_of(Plain(0)), 2.0, interval=interval)
        with pytest.raises(error, match=message):
            Toy().search(interval=interval)


# --- run ------------------------------------------------------------------------------------------------------------


def did(target, config, run):
    """What was drawn, and how each call was settled."""
    with dit_cache(target, config) as cache:
        drawn = run(target)
    return drawn, [(each.step, each.branch, each.reuse) for each in cache.decisions]


class TestRuns:
    @pytest.mark.parametrize("kind", ["single", "in_place", "swapped", "two_lists"])
    @pytest.mark.parametrize("guidance", [1, 2])
    def test_a_plan_does_what_its_four_numbers_do(self, kind, guidance):
        toy = Toy(kind, prompts=tuple(prompt() if kind != "single" else None for _ in range(guidance)))
        found = toy.search(1.4, interval=2)
        assert len(found.evaluations) == 4
        for each in found.evaluations:
            (piece,) = each.plan.pieces
            drawn, settled = did(toy.pipe, each.plan, toy.run)
            again, as_settled = did(toy.pipe, interval_config(piece), toy.run)
            assert torch.equal(drawn, again)
            assert settled == as_settled
            assert sum(reuse for *_, reuse in settled) == piece.steps.count(0) * guidance
        assert toy.untouched()

    def test_with_a_larger_interval_where_it_takes_one(self):
        toy = Toy()
        found = toy.search(2.5, interval=2)
        (piece,) = found.plan.pieces
        assert (found.reached, interval_config(piece).cache_step_interval) == (True, 3)
        assert all(interval_config(each.plan.pieces[0]).cache_step_interval == 3 for each in found.evaluations)

    def test_a_target_that_cannot_be_reached(self):
        found = Toy().search(50.0, interval=2)
        (piece,) = found.plan.pieces
        assert (found.reached, piece.picture, len(found.evaluations)) == (False, "●" + "○" * (STEPS - 1), 1)
        assert interval_config(piece, 2) == DitCacheConfig(0, STEPS, 0, DEPTH)

    def test_by_time(self):
        found = Toy().search(1.05, interval=3, cost="time", max_evals=2)
        assert all(interval_config(each.plan.pieces[0], 3).cache_step_interval >= 3 for each in found.evaluations)

    def test_two_experts(self):
        pipe, x = Experts(), latents()
        run = lambda pipe: pipe(x, 10)  # noqa: E731
        found = search(pipe, run, 1.6, cost="blocks", interval=2, verbose=False)
        assert len(found.evaluations) == 4
        one, two = (interval_config(piece) for piece in found.plan.pieces)
        names = "cache_block_start", "cache_num_blocks"
        second = {name: getattr(two, name) for name in names} | {"policy": two.when}
        both = DitCacheConfig(
            policy=one.when, **{name: getattr(one, name) for name in names}, overrides={"transformer_2": second}
        )
        assert {one.when.interval, two.when.interval} == {2}
        assert isinstance(one.when, Interval)
        drawn, settled = did(pipe, found.plan, run)
        again, as_settled = did(pipe, both, run)
        assert torch.equal(drawn, again)
        assert settled == as_settled

    def test_a_run_that_begins_late(self):
        pipe, x = Late(Net("single", DEPTH)), latents()
        run = lambda pipe: pipe(x)  # noqa: E731
        found = search(pipe, run, 1.5, cost="blocks", interval=2, verbose=False)
        (piece,) = found.plan.pieces
        assert (piece.called, found.reached) == ((3, 8), True)
        drawn, settled = did(pipe, found.plan, run)
        again, as_settled = did(pipe, interval_config(piece), run)
        assert torch.equal(drawn, again)
        assert settled == as_settled

    def test_a_journal_is_of_use_to_both_kinds(self, tmp_path):
        toy = Toy()
        toy.search(1.6, journal=tmp_path / "journal")
        first = toy.search(1.6, interval=2, journal=tmp_path / "journal")
        calls = toy.run.calls
        again = toy.search(1.6, interval=2, journal=tmp_path / "journal")
        assert (again.plan, toy.run.calls) == (first.plan, calls + 1)

    @pytest.mark.parametrize("interval", [None, 2])
    def test_videos_in_eight_bits(self, interval):
        """A list of (frames, height, width, channels), each of which is a sample."""
        pipe, x = Pipe(Net("single", DEPTH)), torch.randn(2, 5 * 8 * 9, 4)

        def run(pipe):
            drawn = pipe(x, STEPS)[..., :3].reshape(2, 5, 8, 9, 3).sigmoid()
            return [(video.numpy() * 255).astype(np.uint8) for video in drawn]

        found = search(pipe, run, 1.5, cost="blocks", interval=interval, verbose=False)
        scores = [each.score for each in found.evaluations]
        assert (found.reached, len(scores)) == (True, 4)
        assert all(20 < score.psnr < 100 for score in scores)

    def test_the_shipped_pipeline(self):
        pytest.importorskip("diffusers")
        from dithooks.demo import load_pipeline

        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)

        def run(pipe):
            noise = torch.Generator().manual_seed(1)
            return pipe(["cat face"], num_inference_steps=6, generator=noise, output_type="pt").images

        found = search(pipe, run, 1.4, cost="blocks", interval=2, max_evals=2, verbose=False)
        (piece,) = found.plan.pieces
        drawn, settled = did(pipe, found.plan, run)
        again, as_settled = did(pipe, interval_config(piece), run)
        assert torch.equal(torch.as_tensor(drawn), torch.as_tensor(again))
        assert (settled == as_settled, found.reached, len(found.evaluations)) == (True, True, 2)


class TestCommand:
    FACTORY = """
import torch
from toys import Net, Pipe
def make():
    return Pipe(Net("single", 4)), {"x": torch.ones(2, 6, 4)}
"""

    def test_it_takes_an_interval(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        Path("mine.py").write_text(self.FACTORY)
        options = SimpleNamespace(target="1.4", evals="2")
        command = ["search", "mine.py:make", "--target", options.target, "--max-evals", options.evals, "--quiet"]
        assert main([*command, "--cost", "blocks", "--interval", "2"]) == 0
        (piece,) = CachePlan.load("plan.json").pieces
        assert interval_config(piece).cache_step_interval == 2
        assert main([*command, "--interval", "1"]) == 2
        assert "--interval is 1: it must be 2 or more" in capsys.readouterr().err


# --- together -------------------------------------------------------------------------------------------------------

TOGETHER = """
import json, os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from toys import Net, Pipe, latents
from dithooks import search
from dithooks.planning.interval_planner import interval_config

folder, rank = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
pipe, x = Pipe(Net("single", 4)), latents()
told = {}
for name, nothing in (("none", None), ("empty", []), ("array", torch.zeros(0))):
    for cost, interval in (("blocks", 2), ("time", None)):
        def run(pipe):
            drawn = pipe(x, 8)
            return drawn if rank == 0 else nothing
        found = search(pipe, run, 1.3, cost=cost, interval=interval, max_evals=2, journal=f"{folder}/{name}-{cost}")
        again = search(pipe, run, 1.3, cost=cost, interval=interval, max_evals=2, journal=f"{folder}/{name}-{cost}")
        told[f"{name} {cost}"] = [
            found.plan.to_json(), found.reached, [each.score.psnr for each in found.evaluations],
            again.plan.to_json(), interval and str(interval_config(found.plan.pieces[0], interval)),
        ]
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(told, file)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo now and then aborts while it is taken down
"""


def test_only_the_first_process_returns_what_was_drawn(tmp_path):
    """The others draw with it, and return nothing."""
    command = [sys.executable, "-c", TOGETHER, str(Path(__file__).parents[1]), str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, said, strict=True):
        assert process.returncode == 0, err
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert len(first) == 6
    for name, (_, _, scores, *_) in first.items():
        assert len(scores) == 2 or name.endswith("time")  # where a block's time is mostly chance, so are plans
        assert scores
        assert all(math.isfinite(score) for score in scores)
