"""Several targets of one search, and promises: how often is run what, and what is said of it."""

import re

import numpy as np
import pytest
import torch
from solvers import Solved
from toys import Net, latents

from dithooks import PlanTiers, TargetMissed, dit_cache, promise, search
from dithooks.errors import MissingPackage
from dithooks.recording.image_metrics import compare, samples_of
from dithooks.tuning.evaluation import Evaluation
from dithooks.tuning.trial_driver import TrialDriver

STEPS = 10


class Drawing:
    """A run that draws four latents, counts how often it did, and what it took."""

    def __init__(self):
        torch.manual_seed(6)
        self.net, self.x, self.calls = Net("single", 3), latents(4), 0
        self.pipe = Solved(self.net)

    def __call__(self, pipe):
        self.calls += 1
        return [each[None] for each in pipe(self.x, STEPS)]

    def search(self, **given):
        return search(self.pipe, self, **{"cost": "blocks", "max_evals": 2, "verbose": False, **given})


class TestTargets:
    def test_one_recorded_run_serves_all(self):
        """Runs beside it are those of plans alone; block executions are counted once."""
        run = Drawing()
        found = run.search(targets=(3, 1.5, 2))
        assert list(found.tiers) == ["3x", "1.5x", "2x"]
        assert list(found.plans.plans) == ["1.5x", "2x", "3x"]
        plans = sum(len(each.evaluations) for each in found.tiers.values())
        assert run.calls == 1 + plans + 3  # each best plan once more, fitted on every second picture
        assert len(found.evaluations) == plans
        drawn = [1 / each.plan.speedup for each in found.evaluations]
        last = [1 / each.plan.speedup for each in found.tiers.values()]
        assert found.run_equivalents == pytest.approx(1 + sum(drawn) + sum(last))
        assert found.plan == found.tiers["3x"].plan
        for name, goal in (("3x", 3.0), ("1.5x", 1.5), ("2x", 2.0)):
            assert found.plans.select(name).provenance.target == goal
            assert found.plans.select(name).speedup >= goal
        assert found.reached

    def test_the_fastest_is_what_it_would_be_by_itself(self):
        run = Drawing()
        found = run.search(targets={"high": 1.6, "fast": 2.6})
        alone = run.search(target_speedup=2.6, recording=found.recording)
        assert alone.plan.pieces == found.plans.select("fast").pieces
        assert alone.plan.provenance.psnr == pytest.approx(found.plans.select("fast").provenance.psnr, abs=1e-6)

    @pytest.mark.parametrize("payload", ["residual", "output"])
    def test_the_others_leave_out_the_same_as_the_fastest(self, monkeypatch, payload):
        """Whatever it forecasts, and whatever they would by themselves: their requests share batches."""
        merit = Evaluation.merit

        def preferred(self, objective):  # by itself, each target takes what the fastest does not
            is_preferred = (self.plan.pieces[0].payload == payload) == (self.plan.provenance.target > 3)
            return merit(self, objective) + 100 * is_preferred

        monkeypatch.setattr(Evaluation, "merit", preferred)
        run = Drawing()
        found = run.search(targets=(1.5, 3.5, 2), max_evals=4)
        assert run.search(target_speedup=2, max_evals=4, recording=found.recording).plan.pieces[0].payload != payload
        pieces = [each.plan.pieces[0] for each in found.evaluations if each.plan.provenance.target < 3]
        pieces += [each.plan.pieces[0] for each in found.tiers.values()]
        assert {(each.payload, each.first, each.blocks) for each in pieces} == {(payload, 0, 3)}
        for name, goal in (("1.5x", 1.5), ("2x", 2.0), ("3.5x", 3.5)):
            assert found.plans.select(name).speedup >= goal
        with dit_cache(run.pipe, found.plans, tier="2x") as cache:
            for name in found.tiers:
                cache.request(name, tier=name, steps=STEPS)
                computed = found.plans.select(name).pieces[0].steps
                assert [cost == 1.0 for cost in cache.forecast(name)] == [bit == 1 for bit in computed]

    def test_the_next_fastest_is_taken_after_where_the_fastest_is_left_out(self, monkeypatch):
        calls, drive = [], TrialDriver.drive

        def driven(self):
            calls.append((self.target, self.planner.shared))
            return drive(self)

        monkeypatch.setattr(TrialDriver, "drive", driven)
        run = Drawing()
        merits = {n: run.search(target_speedup=n).evaluations[0].merit("both") for n in (2.0, 5.0)}
        calls.clear()
        with pytest.warns(UserWarning, match="tier 5x is left out"):
            run.search(targets=(1.5, 2, 5), min_psnr=sum(merits.values()) / 2)
        assert [goal for goal, _ in calls] == [5.0, 2.0, 1.5]
        assert [len(shared) for _, shared in calls] == [0, 0, 1]

    def test_the_worst_picture_is_promised(self):
        """Of those that were left out of the fit, whatever they are: it is not above the mean."""
        found = Drawing().search(targets=(2,))
        told = found.plans.select("2x").provenance
        assert told.worst <= told.psnr
        assert "worst" in str(found.plans)
        # Of four, two are left out. The standard error of a mean of two is half of their distance.
        assert told.psnr_error == pytest.approx(told.psnr - told.worst) != 0
        assert f"± {told.psnr_error:.1f} dB" in str(found.plans)

    def test_one_target_is_one_tier(self):
        found = Drawing().search(target_speedup=2)
        assert found.plans == PlanTiers({"2x": found.plan})
        assert not found.tiers

    def test_the_limit_is_of_each(self):
        """After the recorded run, which is made once."""
        found = Drawing().search(targets=(2, 3), max_runs=2.0, max_evals=None)
        for each in found.tiers.values():
            assert 1 < each.run_equivalents <= 2.0
        assert 2.0 < found.run_equivalents <= 3.0

    def test_a_tier_that_is_not_good_enough(self):
        run = Drawing()
        merits = {n: run.search(target_speedup=n).evaluations[0].merit("both") for n in (1.5, 5.0)}
        between = (merits[1.5] + merits[5.0]) / 2
        with pytest.warns(UserWarning, match="tier 5x is left out: no plan draws at"):
            found = run.search(targets=(1.5, 5), min_psnr=between)
        assert (list(found.plans.plans), found.reached) == (["1.5x"], False)
        with pytest.raises(TargetMissed, match="no plan draws at 500 dB"):
            run.search(targets=(5,), min_psnr=500)

    def test_a_journal_that_has_no_standard_errors(self, tmp_path):
        """As earlier versions have written it: nothing is run again, and the mean is what is promised."""
        run = Drawing()
        run.search(targets=(2,), journal=tmp_path)
        lines = tmp_path / "evaluations.jsonl"
        assert '"psnr_error": ' in lines.read_text()
        lines.write_text(re.sub(r', "psnr_error": [^,}]*', "", lines.read_text()))
        run.calls = 0
        told = run.search(targets=(2,), journal=tmp_path).plans.select("2x").provenance
        assert run.calls == 1
        assert (told.psnr_error, told.promised) == (None, told.psnr)

    def test_a_journal_goes_on(self, tmp_path):
        """Plans that were run for one target or another are not run again."""
        run = Drawing()
        first = run.search(targets=(2, 3), journal=tmp_path)
        run.calls = 0
        again = run.search(targets=(2, 3), journal=tmp_path)
        assert run.calls == 1
        assert again.plans.select("3x").pieces == first.plans.select("3x").pieces

    @pytest.mark.parametrize(
        ("targets", "said"),
        [
            ((), "0 speed-ups"),
            ((2, 2.0), "twice"),
            ((1.0,), "target_speedup"),
            ("2", "targets must be"),
            (2.0, "targets must be"),
            ({"a|b": 2.0}, "cannot name a tier"),
            ({"": 2.0}, "empty"),
        ],
    )
    def test_what_are_none(self, targets, said):
        run = Drawing()
        with pytest.raises((ValueError, TypeError), match=said):
            run.search(targets=targets)
        assert run.calls == 0

    def test_a_psnr_beside_them(self):
        with pytest.raises(ValueError, match="target_psnr goes without targets"):
            Drawing().search(targets=(2,), target_psnr=40)


class TestPromise:
    @pytest.fixture
    def made(self):
        run = Drawing()
        return run, run.search(targets=(1.6, 3)).plans

    def test_by_hand(self, made):
        """PSNR of other pictures, drawn and worked out here: the peak is a picture's range of values."""
        run, plans = made
        torch.manual_seed(99)
        other = Drawing()
        other.pipe, other.x = run.pipe, latents(6)
        promised = promise(run.pipe, plans, other)
        assert other.calls == 1 + 2
        plain = torch.cat(other(run.pipe)).double().numpy()
        for name, plan in promised.plans.items():
            with dit_cache(run.pipe, plan):
                drawn = torch.cat(other(run.pipe)).double().numpy()
            peaks = plain.max((1, 2)) - plain.min((1, 2))
            levels = 10 * np.log10(peaks**2 / ((drawn - plain) ** 2).mean((1, 2)))
            assert plan.provenance.psnr == pytest.approx(levels.mean(), abs=1e-3)
            assert plan.provenance.worst == pytest.approx(levels.min(), abs=1e-3)
            error = np.sqrt(((levels - levels.mean()) ** 2).sum() / 5 / 6)  # of six: the spread, over their root
            assert plan.provenance.psnr_error == pytest.approx(error, abs=1e-3)
            assert plan.provenance.promised == pytest.approx(levels.mean() - error, abs=1e-3)
            before = plans.plans[name]
            assert plan.pieces == before.pieces
            assert plan.provenance.measured_speedup == before.provenance.measured_speedup
            assert plan.provenance.psnr != before.provenance.psnr

    def test_of_one_plan(self, made):
        run, plans = made
        plan = promise(run.pipe, plans.select("3x"), run)
        with dit_cache(run.pipe, plan):
            drawn = samples_of(run(run.pipe))
        assert plan.provenance.psnr == pytest.approx(compare(drawn, samples_of(run(run.pipe))).psnr)

    def test_what_cannot_be_promised(self, made, monkeypatch):
        """It is said before anything is run, where that can be known."""
        run, plans = made
        run.calls = 0
        with pytest.raises(TypeError, match="plans must be"):
            promise(run.pipe, "plans.json", run)
        with pytest.raises(TypeError, match="run must be"):
            promise(run.pipe, plans, None)
        with pytest.raises(ValueError, match="another model"):
            promise(Solved(Net("single", 4)), plans, run)
        monkeypatch.setitem(__import__("sys").modules, "stlpips_pytorch", None)
        with pytest.raises(MissingPackage):
            promise(run.pipe, plans, run, metrics=("lpips",))
        assert run.calls == 0
        with pytest.raises(ValueError, match="no step of the target"):
            promise(run.pipe, plans, lambda _: [torch.zeros(3, 4, 4)])
