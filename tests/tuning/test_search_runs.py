"""Searches with all kinds of runs and models: late, two experts, compiled, the shipped pipeline; in a fresh process."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from config.test_overrides import Seen
from toys import Net, Pipe, latents, prompt
from tuning.test_search import DEPTH, STEPS, Drawing, Toy, block_range

from dithooks import dit_cache, search
from dithooks.demo import load_pipeline
from dithooks.recording.image_metrics import compare, samples_of


class Late(Pipe):
    """A picture that is drawn over: the first steps are left out."""

    def __call__(self, x, steps=8, at=None, begin=3):
        self.scheduler.set_timesteps(steps)
        self.scheduler.begin_index = begin
        for t in self.scheduler.timesteps[begin:]:
            x = x - self.transformer(x, timestep=t / 1000) / steps
            self.scheduler.step()
        return x


class Experts(Pipe):
    """Two transformers, one after another."""

    def __init__(self, depths=(3, 4), boundary=4):
        super().__init__(Net("single", depths[0]))
        self.transformer_2, self.boundary = Net("in_place", depths[1]), boundary

    def __call__(self, x, steps=10, at=None):
        self.scheduler.set_timesteps(steps)
        for step, t in enumerate(self.scheduler.timesteps):
            model = self.transformer if step < self.boundary else self.transformer_2
            x = x - model(x, timestep=t / 1000) / steps
            self.scheduler.step()
        return x


class TestShapesOfRuns:
    def test_a_run_that_begins_late(self):
        pipe, run = Late(Net("single", DEPTH)), Drawing(latents())
        found = search(pipe, run, 1.6, cost="blocks", verbose=False)
        (piece,) = found.plan.pieces
        assert (piece.called, piece.steps[:4], len(piece.steps)) == ((3, 8), (1, 1, 1, 1), 8)
        assert piece.picture[:4] == "···●"
        assert (found.plan.speedup >= 1.6, found.reached) == (True, True)
        assert all(each.blocks == pytest.approx(1 / each.plan.speedup) for each in found.evaluations)

    def test_two_experts(self):
        pipe, run = Experts(), Drawing(latents(), 10)
        seen = Seen(transformer=pipe.transformer, transformer_2=pipe.transformer_2)
        found = search(pipe, run, 1.6, cost="blocks", verbose=False)
        assert seen.untouched()
        assert found.recording.made.blocks == 7
        executions = pipe.transformer.executions + pipe.transformer_2.executions
        beyond = 7
        for each in found.evaluations:
            for piece in each.plan.pieces:
                beyond += piece.total - piece.blocks
        assert executions == pytest.approx(found.run_equivalents * (3 * 4 + 4 * 6) + beyond)
        assert found.plan.provenance.predicted_speedup >= 1.6
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dit_cache(pipe, found.plan) as cache:
                run(pipe)
        left_out = cache.stats.blocks_total - cache.stats.blocks_run
        assert 36 / (36 - left_out) == pytest.approx(found.plan.provenance.predicted_speedup)
        assert {piece.called for piece in found.plan.pieces} <= {(0, 4), (4, 10)}
        assert "●" in str(found)

    @pytest.mark.parametrize("boundary", [1, 9])
    def test_an_expert_that_is_called_once(self, boundary):
        """The other is cached, and what share of all blocks that leaves is told of all."""
        pipe, run = Experts(boundary=boundary), Drawing(latents(), 10)
        found = search(pipe, run, 1.3, cost="blocks", verbose=False)
        cached = "transformer_2" if boundary == 1 else "transformer"
        total = 3 * boundary + 4 * (10 - boundary)
        for each in found.evaluations:
            (piece,) = each.plan.pieces
            assert piece.path == cached
            assert each.blocks == pytest.approx(1 - piece.executions[1] / total)
            assert each.blocks == pytest.approx(1 / each.plan.provenance.predicted_speedup)
        assert found.reached

    def test_a_bare_model_told_by_timesteps(self):
        net, x = Net("single", DEPTH), latents()

        def run(model):
            h = x
            for step in range(6):
                h = h - model(h, torch.tensor(1 - step / 6)) / 6
            return [h]

        found = search(net, run, 1.5, cost="blocks", num_inference_steps=6, verbose=False)
        (piece,) = found.plan.pieces
        assert (piece.path, piece.axis, found.plan.made.scheduler) == ("", "timestep", None)
        assert (found.reached, len(piece.steps)) == (True, 6)

    def test_several_runs(self):
        toy, x = Toy(), [latents() for _ in range(3)]

        def run(pipe):
            return [pipe(each, STEPS) for each in x]

        found = search(toy.pipe, run, 1.6, cost="blocks", verbose=False)
        assert (found.recording.runs, found.plan.provenance.samples) == (3, 6)
        assert all(each.blocks == pytest.approx(1 / each.plan.speedup) for each in found.evaluations)
        beyond = DEPTH + sum(DEPTH - len(block_range(each)) for each in found.evaluations)
        assert toy.net.executions == pytest.approx(found.run_equivalents * DEPTH * STEPS * 3 + beyond)

    @pytest.mark.parametrize("whole", [True, False])
    def test_compiled(self, whole):
        """In one graph: what a search adds does not break it."""
        toy = Toy("swapped", 3, 6)
        wanted = toy.search(1.5, max_evals=2)
        torch._dynamo.reset()
        for block in toy.net.blocks:
            block._forward_hooks.clear()  # those that count break graphs
        if whole:
            toy.pipe.transformer = torch.compile(toy.net, backend="eager", fullgraph=True)
        else:
            for block in toy.net.blocks:
                block.compile(backend="eager", fullgraph=True)
        with pytest.warns(UserWarning, match=r"the model is compiled: .* search first, compile then"):
            found = toy.search(1.5, max_evals=2)
        steps = [[each.plan.pieces[0].steps for each in which.evaluations] for which in (found, wanted)]
        assert steps[0] == steps[1]
        assert found.plan.provenance.psnr == pytest.approx(wanted.plan.provenance.psnr, abs=0.5)


FRESH = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from toys import Net, Pipe, latents, prompt
from dithooks import CachePlan, dit_cache
torch.set_num_threads(int(sys.argv[4]))
torch.manual_seed(11)
pipe, x, e = Pipe(Net("two_lists", 4)), latents(), prompt()
with torch.no_grad(), dit_cache(pipe, CachePlan.load(sys.argv[2])) as cache:
    drawn = pipe(x, 8, prompts=(e,))
torch.save(drawn, sys.argv[3])
print(cache.stats.blocks_run, cache.stats.blocks_total)
"""


def test_the_plan_in_a_fresh_process(tmp_path):
    """Attached to the same model, it draws the same, bit for bit."""
    torch.manual_seed(11)
    pipe, x, e = Pipe(Net("two_lists", 4)), latents(), prompt()
    found = search(pipe, Drawing(x, 8, prompts=(e,)), 1.7, cost="blocks", max_evals=2, verbose=False)
    found.plan.save(tmp_path / "plan.json")
    with dit_cache(pipe, found.plan) as cache:
        here = pipe(x, 8, prompts=(e,))
    here_too = compare(samples_of(here), samples_of(pipe(x, 8, prompts=(e,))))
    assert here_too.psnr == found.plan.provenance.psnr
    arguments = [str(Path(__file__).parents[1]), str(tmp_path / "plan.json"), str(tmp_path / "drawn.pt")]
    command = [sys.executable, "-c", FRESH, *arguments, str(torch.get_num_threads())]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(cache.stats.blocks_run), str(cache.stats.blocks_total)]
    assert torch.equal(torch.load(tmp_path / "drawn.pt"), here)


def test_the_shipped_pipeline():
    pipe, steps = load_pipeline(), 5
    pipe.set_progress_bar_config(disable=True)
    runs = []

    def run(pipe):
        runs.append(pipe)
        generator = torch.Generator().manual_seed(3)
        return pipe("red apple", num_inference_steps=steps, generator=generator, output_type="pt").images

    modules = [(name, id(module)) for name, module in pipe.transformer.named_modules()]
    found = search(pipe, run, 1.4, cost="blocks", max_evals=2, verbose=False)
    assert [(name, id(module)) for name, module in pipe.transformer.named_modules()] == modules
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in pipe.transformer.modules())
    assert len(runs) == 3  # recorded, and two plans: of one picture, none is left out of a fit
    assert (found.reached, found.plan.made.steps, found.plan.made.blocks) == (True, steps, 12)
    told = found.plan.provenance
    assert told.psnr == max(each.score.psnr for each in found.evaluations)
    assert told.psnr > 25
    assert told.measured_speedup > 0
    assert found.plan.made.scheduler == "FlowMatchEulerDiscreteScheduler"
    plain = samples_of(run(pipe))
    with dit_cache(pipe, found.plan) as cache:
        score = compare(samples_of(run(pipe)), plain)
    assert score.psnr == pytest.approx(told.psnr)
    assert cache.stats.blocks_total / cache.stats.blocks_run == pytest.approx(found.plan.speedup)
