"""Searches that go wrong: plans that cannot be run, runs that draw something else; the model is as before."""

import math

import pytest
import torch
from toys import Net, Pipe, Single, latents
from tuning.test_search import STEPS, Toy, block_range

from dithooks import record, search, timestep_scope
from dithooks.engine.replay import replaying


class Restless(Single):
    """Adds noise to a call that is made again: a range without it cannot be tried out on its own call."""

    def forward(self, hidden_states, temb):
        return super().forward(hidden_states, temb) + 0.3 * replaying.get() * torch.randn_like(hidden_states)


class Noisy(Toy):
    """Of two blocks the second is restless."""

    def __init__(self, *restless):
        net = Net("single", 2)
        for block in restless or (1,):
            net.blocks[block] = Restless()
        super().__init__(net=net)
        draw = self.run

        def run(pipe):
            torch.manual_seed(1)
            run.calls += 1
            return draw(pipe)

        run.calls, self.run = 0, run


class TestFailures:
    def test_a_range_that_cannot_be_followed(self):
        """Block 0 alone fails; the others go on."""
        toy = Noisy()
        found = toy.search(1.3)
        assert toy.untouched()
        failed = [each for each in found.evaluations if each.failure]
        assert [block_range(each) for each in failed] == [range(0, 1)]
        assert "WiringError" in failed[0].failure
        assert (failed[0].score, failed[0].psnr, failed[0].speedup) == (None, None, 0.0)
        assert len(found.evaluations) > 2
        assert all(1 in block_range(each) for each in found.evaluations if not each.failure)
        assert 1 in range(found.plan.pieces[0].first, 2)
        row = str(found).splitlines()[1 + found.evaluations.index(failed[0])]
        assert "failed" in row
        assert "WiringError" in row

    def test_none_can_be_run(self):
        """Outside of the blocks it is restless too."""
        toy = Toy()
        toy.net.proj.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
        hooks = toy.seen.hooks_of(toy.net)
        with pytest.raises(RuntimeError, match=r"none of \d plans could be run: WiringError"):
            toy.search(1.3, max_evals=2)
        assert toy.seen.hooks_of(toy.net) == hooks

    @pytest.mark.parametrize("broken", [{2}, {3}, {2, 3}])
    def test_pictures_that_are_not_finite(self, broken):
        """Such a plan is not the best, and the table says so."""
        toy = Toy(steps=12)
        draw = toy.run
        run = lambda pipe: draw(pipe) * (math.nan if draw.calls in broken else 1)  # noqa: E731
        found = search(toy.pipe, run, 1.6, cost="blocks", verbose=False)
        scores = [each.score.psnr for each in found.evaluations]
        assert [score == -math.inf for score in scores] == [call in broken for call in range(2, 2 + len(scores))]
        assert found.plan.provenance.psnr == max(scores) > 0
        assert "-inf dB" in str(found)
        assert toy.untouched()

    def test_no_pictures_that_are_finite(self):
        toy = Toy()
        draw = toy.run
        run = lambda pipe: draw(pipe) * (math.nan if draw.calls > 1 else 1)  # noqa: E731
        with pytest.raises(RuntimeError, match=r"none of \d plans could be run: its pictures are not finite$"):
            search(toy.pipe, run, 1.6, cost="blocks", verbose=False)
        assert toy.untouched()

    def test_pictures_of_another_shape(self):
        toy = Toy()
        draw = toy.run
        with pytest.raises(ValueError, match=r"shape \(2, 5, 4\) with the cache and \(2, 6, 4\) without"):
            search(toy.pipe, lambda pipe: draw(pipe)[:, : 6 - (draw.calls > 1)], 1.6, cost="blocks", verbose=False)
        assert toy.untouched()

    def test_more_pictures(self):
        toy = Toy()
        draw = toy.run
        with pytest.raises(ValueError, match="returned 2 samples with the cache and 1 without"):
            search(toy.pipe, lambda pipe: [draw(pipe)] * min(draw.calls, 2), 1.6, cost="blocks", verbose=False)
        assert toy.untouched()

    def test_no_pictures(self):
        toy, drawn = Toy(), []
        for run in (lambda pipe: drawn.append(toy.run(pipe)), lambda pipe: [toy.run(pipe)][1:]):
            with pytest.raises(ValueError, match=r"run returned (None|nothing)"):
                search(toy.pipe, run, 1.6, cost="blocks", verbose=False)
            assert toy.untouched()

    def test_a_run_that_draws_something_else_each_time(self):
        toy = Toy()
        with pytest.raises(ValueError, match="run does not draw what was recorded"):
            search(toy.pipe, lambda pipe: pipe(latents(), STEPS), 1.6, cost="blocks", verbose=False)
        assert toy.untouched()

    def test_a_run_that_calls_nothing(self):
        toy = Toy()
        with pytest.raises(ValueError, match="run made no step of the target"):
            search(toy.pipe, lambda pipe: [torch.zeros(3)], 1.6, verbose=False)
        assert toy.untouched()


class TestAnotherRun:
    """What is not the recorded run is told, whatever makes the difference."""

    def test_with_other_steps(self):
        toy = Toy()
        recording = record(toy.pipe, toy.run)
        toy.run.steps = STEPS + 3
        with pytest.raises(ValueError, match="run does not draw what was recorded"):
            toy.search(recording=recording)
        assert toy.untouched()

    def test_called_more_often(self):
        toy = Toy()
        recording, draw = record(toy.pipe, toy.run), toy.run
        with pytest.raises(ValueError, match=f"calls Net {2 * STEPS} times, and the recorded one {STEPS} times"):
            search(toy.pipe, lambda pipe: (draw(pipe), draw(pipe))[0], 1.6, recording=recording, cost="blocks")
        assert toy.untouched()

    def test_noise_that_is_not_seeded(self):
        """The first call is the same; what it leads to is not."""

        class Restive(Pipe):
            def __call__(self, x, steps=STEPS, at=None):
                for step in range(steps):
                    with timestep_scope(step, sigma=1 - step / steps, steps=steps):
                        x = x - self.transformer(x, timestep=torch.tensor(1.0)) / steps + 0.1 * torch.randn_like(x)
                return x

        toy = Toy()
        toy.pipe = Restive(toy.net)
        with pytest.raises(ValueError, match=r"Net is given another .* at its second step"):
            toy.search()

    def test_noise_outside_of_the_sampler(self):
        toy = Toy()
        draw = toy.run
        with pytest.raises(ValueError, match="dB from one time to the other"):
            search(toy.pipe, lambda pipe: draw(pipe) + torch.randn(2, 1, 1), 1.6, verbose=False)

    def test_a_journal_of_other_weights(self, tmp_path):
        toy = Toy()
        toy.search(journal=tmp_path)
        with torch.no_grad():
            for parameter in toy.net.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        with pytest.raises(ValueError, match="run does not draw what was recorded"):
            toy.search(journal=tmp_path)

    def test_a_target_of_which_all_fall_short(self):
        """The fastest of them, not the best."""
        found = Toy(steps=4).search(1000.0)
        assert not found.reached
        assert found.plan.speedup == max(each.plan.speedup for each in found.evaluations) == 4.0
