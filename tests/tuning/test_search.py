"""The search, on toys and on the shipped pipeline: what it returns, and what it took."""

import time
from types import SimpleNamespace

import numpy as np
import pytest
from config.test_overrides import Seen
from torch import nn
from toys import Net, Pipe, Single, latents, prompt

from dithooks import BlockAdapter, CachePlan, Recording, dit_cache, plan, record, search
from dithooks.engine.stand_in import SkipBlock
from dithooks.recording.image_metrics import compare, samples_of

STEPS, DEPTH = 8, 4


class Drawing:
    """A run that draws the same each time, and counts how often it did; ``at(call, step)`` may look, or raise."""

    def __init__(self, x, steps=STEPS, at=None, **given):
        self.x, self.steps, self.at, self.given, self.calls = x, steps, at, given, 0

    def __call__(self, pipe):
        self.calls += 1
        at = None if self.at is None else lambda step: self.at(self.calls, step)
        return pipe(self.x, self.steps, at=at, **self.given)


class Toy:
    """A pipeline with one small transformer, its run, and what it was like before."""

    def __init__(self, kind="single", depth=DEPTH, steps=STEPS, at=None, net=None, **given):
        self.net = net or Net(kind, depth)
        self.pipe = Pipe(self.net)
        if kind != "single" and "prompts" not in given:
            given["prompts"] = (prompt(),)
        self.run = Drawing(latents(), steps, at, **given)
        self.seen = Seen(net=self.net)

    def search(self, target=1.6, **given):
        return search(self.pipe, self.run, target, **{"cost": "blocks", "verbose": False, **given})

    def untouched(self):
        return self.seen.untouched() and not any(isinstance(module, SkipBlock) for module in self.net.modules())


def block_range(evaluation):
    (piece,) = evaluation.plan.pieces
    return range(piece.first, piece.first + piece.blocks)


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when a test says so."""
    told = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: told.now)
    return told


class TestResult:
    def test_what_it_says(self):
        toy = Toy()
        found = toy.search(1.6)
        assert toy.untouched()
        assert toy.run.calls == 1 + len(found.evaluations)
        assert 1 < len(found.evaluations) <= 4
        assert (found.reached, found.interrupted) == (True, False)
        assert found.plan.speedup >= 1.6
        for each in found.evaluations:
            assert each.seconds > 0 < each.speedup
            assert each.speedup == pytest.approx(1 / each.blocks)
            assert each.blocks == pytest.approx(1 / each.plan.speedup)
            assert (each.failure, each.psnr) == ("", each.score.psnr)
            assert each.plan.provenance.predicted_speedup >= 1.6 * (1 - 1e-9)
        assert len({each.plan.pieces for each in found.evaluations}) == len(found.evaluations)
        best = max(found.evaluations, key=lambda each: each.score.psnr)
        told = found.plan.provenance
        assert found.plan.pieces == best.plan.pieces
        assert (told.measured_speedup, told.psnr) == (best.speedup, best.score.psnr)
        assert (told.relative_l1, told.ssim) == (best.score.relative_l1, best.score.ssim)
        assert (told.target, told.method, told.reached, told.samples) == (
            1.6,
            "by search, in block executions,",
            True,
            2,
        )
        assert told.date == time.strftime("%Y-%m-%d")
        assert {"torch", "numpy"} <= set(told.versions)
        assert found.plan.made == found.recording.made
        assert found.run_equivalents == pytest.approx(1 + sum(1 / each.plan.speedup for each in found.evaluations))
        assert CachePlan.from_json(found.plan.to_json()) == found.plan

    def test_what_was_measured_is_what_the_plan_does(self):
        toy = Toy("swapped")
        found = toy.search(1.8)
        plain = samples_of(toy.run(toy.pipe))
        for each in found.evaluations:
            with dit_cache(toy.pipe, each.plan) as cache:
                score = compare(samples_of(toy.run(toy.pipe)), plain)
            assert score == each.score
            assert cache.stats.blocks_run / cache.stats.blocks_total == pytest.approx(each.blocks)

    @pytest.mark.parametrize("kind", ["single", "in_place", "swapped", "two_lists"])
    @pytest.mark.parametrize("guidance", [1, 2])
    def test_executions_of_blocks(self, kind, guidance):
        """Generations are what blocks do in runs. Beyond: recording calls the transformer once more for each shape of
        its inputs, and each plan's first call is made again with the range left out."""
        toy = Toy(kind, prompts=tuple(prompt() if kind != "single" else None for _ in range(guidance)))
        found = toy.search(1.6)
        blocks = len(toy.seen.blocks["net"])
        beyond = blocks + sum(blocks - len(block_range(each)) for each in found.evaluations)
        assert toy.net.executions == pytest.approx(found.run_equivalents * blocks * STEPS * guidance + beyond)
        assert len(found.evaluations) > 1

    def test_guidance_in_two_calls(self):
        toy = Toy("swapped", prompts=(prompt(), prompt(tokens=5)))
        found = toy.search(1.7)
        assert found.recording.traces[0].branches == 2
        assert (found.reached, toy.untouched()) == (True, True)
        assert found.evaluations[0].blocks == pytest.approx(1 / found.evaluations[0].plan.speedup)

    def test_a_target_that_cannot_be_reached(self):
        toy = Toy()
        found = toy.search(50.0)
        assert (found.reached, found.plan.provenance.reached) == (False, False)
        assert found.plan.speedup == pytest.approx(STEPS)  # all blocks, at all steps but the first
        assert found.plan.pieces[0].picture == "●" + "○" * (STEPS - 1)
        assert "50× was not reached" in str(found)

    def test_the_table(self):
        toy = Toy()
        found = toy.search(1.6)
        head, *rows, last, _ = str(found).splitlines()
        assert head.split() == (
            ["range", "steps", "predicted", "measured", "error", "PSNR", "worst", "rel.", "L1", "SSIM"]
        )
        assert len(rows) == len(found.evaluations)
        for row, each in zip(rows, found.evaluations, strict=True):
            (piece,) = each.plan.pieces
            assert row.startswith("best" if each.plan.pieces == found.plan.pieces else "    ")
            cells = row.removeprefix("best").split()
            predicted, measured = f"{each.plan.provenance.predicted_speedup:.2f}×", f"{each.speedup:.2f}×"
            assert cells[:4] == [f"{piece.first}–{piece.first + piece.blocks - 1}", piece.picture, predicted, measured]
            assert cells[5:8] == [f"{each.score.psnr:.2f}", "dB", f"{each.score.worst:.1f}"]
            assert len(row) <= 120
        assert last.startswith(f"{len(rows)} plans run, {found.run_equivalents:.1f} run equivalents, ")

    def test_by_time(self, clock):
        """Blocks of 1 ms, and one of 8: the target is of the time, and is kept.

        What is measured is what is predicted, but for the first call of a plan, which is made once more to test it,
        with the range left out.
        """

        class Slow(Single):
            ms = 1.0

            def forward(self, hidden_states, temb):
                clock.now += self.ms / 1e3
                return super().forward(hidden_states, temb)

        net = Net("single", 4)
        net.blocks = nn.ModuleList(Slow() for _ in range(4))
        net.blocks[1].ms = 8.0
        toy = Toy(net=net)
        found = toy.search(1.6, cost="time")
        assert found.recording.run_ms == pytest.approx(8 * 11)
        for each in found.evaluations:
            assert 1 in block_range(each)
            (piece,) = each.plan.pieces
            taken = 7 + piece.blocks  # ms, of a step of the range
            saved = piece.steps.count(0) * taken
            assert each.plan.provenance.predicted_speedup == pytest.approx(88 / (88 - saved))
            assert each.seconds == pytest.approx((88 - saved + 11 - taken) / 1e3)
            assert each.speedup == pytest.approx(88 / (88 - saved + 11 - taken))
        told = found.plan.provenance
        assert found.reached == told.reached == (told.measured_speedup >= 0.95 * 1.6)
        assert toy.untouched()

    @pytest.mark.parametrize(("ms", "reached"), [(1.2, True), (2.0, False)])
    def test_measured_too_slow(self, clock, ms, reached):
        """What was predicted may not come true: here other work takes longer with the cache than without."""

        def at(call, step):
            clock.now += (1.0 if call <= 2 else ms) / 1e3

        net = Net("single", 4)
        for block in net.blocks:
            block.register_forward_hook(lambda *_: setattr(clock, "now", clock.now + 2.5e-3))
        found = Toy(net=net, at=at).search(1.5, cost="time", max_evals=1)
        (only,) = found.evaluations
        assert only.plan.provenance.reached
        assert (only.speedup > 0.95 * 1.5) == reached
        assert found.reached == found.plan.provenance.reached == reached
        assert found.plan.provenance.measured_speedup == only.speedup

    def test_local_moves(self):
        toy = Toy(steps=12)
        plain, further = toy.search(1.7, max_evals=1), toy.search(1.7, max_evals=1, local_moves=8, max_runs=None)
        assert len(plain.evaluations) == 1
        assert 1 < len(further.evaluations) <= 9
        assert further.evaluations[0].plan.pieces == plain.evaluations[0].plan.pieces
        assert further.plan.provenance.psnr >= plain.plan.provenance.psnr
        first = plain.plan.pieces[0].steps
        assert sum(a != b for a, b in zip(further.evaluations[1].plan.pieces[0].steps, first, strict=True)) == 2

    def test_an_adapter(self):
        toy, given = Toy(), []
        adapter = BlockAdapter(pipe=toy.pipe, transformer=toy.net, blocks=toy.net.blocks)
        run = lambda pipe: given.append(pipe) or toy.run(pipe)  # noqa: E731
        found = search(adapter, run, 1.6, cost="blocks", verbose=False)
        assert set(map(id, given)) == {id(toy.pipe)}
        with dit_cache(toy.pipe, found.plan):
            toy.run(toy.pipe)

    def test_pictures(self):
        """As a pipeline returns them: what counts is each of a batch."""
        toy = Toy()
        images = lambda pipe: [np.clip(sample.numpy() / 8 + 0.5, 0, 1) for sample in toy.run(pipe)]  # noqa: E731
        found = search(toy.pipe, images, 1.6, cost="blocks", verbose=False)
        assert found.plan.provenance.samples == 2
        assert 10 < found.plan.provenance.psnr < 120


class TestRecordings:
    def test_of_the_same_session(self):
        """Nothing is recorded again for another target; the plans are those that a recording anew would give."""
        toy = Toy()
        recording = record(toy.pipe, toy.run)
        for target in (1.5, 2.2):
            toy.run.calls = 0
            found = toy.search(target, recording=recording)
            assert toy.run.calls == len(found.evaluations)
            assert found.recording.traces is recording.traces
            assert found.run_equivalents == pytest.approx(sum(each.blocks for each in found.evaluations))
        toy.run.calls = 0
        assert toy.search(2.2).plan.pieces == found.plan.pieces

    def test_of_a_file(self, tmp_path):
        """There the pictures are not kept: one run without a cache draws them, and counts."""
        toy = Toy()
        record(toy.pipe, toy.run).save(tmp_path / "recording.npz")
        recording, toy.run.calls = Recording.load(tmp_path / "recording.npz"), 0
        assert recording.results is None
        found, executions = toy.search(recording=recording), toy.net.executions
        assert toy.run.calls == 1 + len(found.evaluations)
        assert found.run_equivalents == pytest.approx(1 + sum(each.blocks for each in found.evaluations))
        assert found.plan.pieces == toy.search().plan.pieces
        assert executions < toy.net.executions
        assert toy.untouched()

    def test_of_what_plan_says(self):
        """The first that is run is what :func:`plan` gives."""
        toy = Toy()
        recording = record(toy.pipe, toy.run)
        first = plan(recording, 1.6, cost="blocks")
        assert toy.search(recording=recording).evaluations[0].plan.pieces == first.pieces

    def test_of_another_model(self):
        toy, other = Toy(), Toy("swapped")
        recording = record(other.pipe, other.run)
        with pytest.raises(ValueError, match="the recording is of another model, Net"):
            toy.search(recording=recording)
        assert (toy.run.calls, toy.untouched()) == (0, True)

    def test_of_another_run(self):
        toy, other = Toy(), Toy()
        recording = record(toy.pipe, toy.run)
        with pytest.raises(ValueError, match="run does not draw what was recorded"):
            search(toy.pipe, other.run, 1.6, recording=recording, verbose=False)
        assert toy.untouched()

    def test_with_another_number_of_steps(self):
        toy = Toy()
        recording = record(toy.pipe, toy.run)
        with pytest.raises(ValueError, match="num_inference_steps=9"):
            toy.search(recording=recording, num_inference_steps=9)
        with pytest.raises(ValueError, match="num_inference_steps=9"):
            toy.search(num_inference_steps=9)
        assert toy.search(num_inference_steps=STEPS).plan.made.steps == STEPS
        assert toy.untouched()
