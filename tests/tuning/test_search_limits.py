"""Searches that are limited, broken off and taken up again: what is kept, and that the model is as before."""

import math
import warnings

import pytest
from tuning.test_search import STEPS, Toy
from tuning.test_search_failures import Noisy

from dithooks import DitCacheConfig, Recording, dit_cache, record, search
from dithooks.planning.planner import Planner


class TestLimits:
    @pytest.mark.parametrize("evals", [1, 2, 3])
    def test_plans(self, evals):
        toy = Toy(steps=12)
        found = toy.search(1.6, max_evals=evals)
        assert (len(found.evaluations), toy.run.calls) == (evals, 1 + evals)

    @pytest.mark.parametrize("most", [1.1, 2.3, 3.0, 4.5])
    def test_max_runs(self, most):
        """Another plan is run only if it stays below."""
        toy = Toy(steps=12)
        given = {"max_evals": 20, "local_moves": 20}
        found = toy.search(1.6, max_runs=most, **given)
        everything = toy.search(1.6, max_runs=None, **given)
        wanted, spent = 0, 1.0
        for each in everything.evaluations:
            if spent + each.blocks > most:
                break
            wanted, spent = wanted + 1, spent + each.blocks
        assert wanted < len(everything.evaluations)
        assert len(found.evaluations) == wanted
        assert found.run_equivalents == pytest.approx(spent)

    def test_max_runs_of_a_loaded_recording(self, tmp_path):
        """The run that draws its pictures again counts too."""
        toy = Toy(steps=12)
        recording = record(toy.pipe, toy.run)
        recording.save(tmp_path / "recording.npz")
        counts = [
            len(toy.search(1.6, recording=each, max_runs=3.0).evaluations)
            for each in (recording, Recording.load(tmp_path / "recording.npz"))
        ]
        assert counts == [4, 3]

    def test_seconds(self):
        toy = Toy()
        found = toy.search(max_seconds=1e-9)
        assert (found.evaluations, found.interrupted) == ((), False)
        assert found.plan.provenance.measured_speedup is None
        assert len(toy.search(max_seconds=1e9).evaluations) > 1

    @pytest.mark.parametrize(
        ("change", "error", "message"),
        [
            ({"target_speedup": 1.0}, ValueError, "a run as fast as that needs no cache"),
            ({"target_speedup": 0}, ValueError, "target_speedup"),
            ({"target_speedup": "2x"}, TypeError, "target_speedup must be a number"),
            ({"target_speedup": None}, TypeError, "target_speedup must be a number"),
            ({"max_evals": 0}, ValueError, "max_evals=0 is out of range"),
            ({"max_evals": 1.5}, TypeError, "max_evals must be an int"),
            ({"local_moves": -1}, ValueError, "local_moves=-1 is out of range"),
            ({"max_runs": 0}, ValueError, "max_runs=0 is out of range"),
            ({"max_runs": "6"}, TypeError, "max_runs must be a number"),
            ({"max_seconds": 0.0}, ValueError, "max_seconds=0 is out of range"),
            ({"max_seconds": math.nan}, ValueError, "max_seconds"),
            ({"cost": "x"}, ValueError, "cost='x': there are 'time'"),
            ({"recording": "recording.npz"}, TypeError, "recording must be a Recording"),
            ({"memory": 0}, ValueError, "memory=0 is out of range"),
            ({"share": 2.0}, ValueError, "share=2.0: of the tokens"),
            ({"blocks": "nowhere"}, ValueError, "nowhere"),
        ],
    )
    def test_what_it_refuses(self, change, error, message):
        """Before anything is run."""
        toy = Toy()
        given = {"target_speedup": 2.0, "cost": "blocks", "verbose": False, **change}
        with pytest.raises(error, match=message):
            search(toy.pipe, toy.run, **given)
        assert (toy.run.calls, toy.untouched()) == (0, True)

    @pytest.mark.parametrize("run", [None, 3, "pipe()"])
    def test_a_run_that_is_none(self, run):
        toy = Toy()
        recording = record(toy.pipe, toy.run)
        for given in ({}, {"recording": recording}):
            with pytest.raises(TypeError, match="run must be a function"):
                search(toy.pipe, run, 2.0, verbose=False, **given)

    def test_what_is_cached_already(self):
        toy = Toy()
        with dit_cache(toy.pipe, DitCacheConfig(0, 2)), pytest.raises(ValueError, match="cached already"):
            toy.search()
        assert (toy.run.calls, toy.untouched()) == (0, True)

    def test_a_run_of_one_step(self):
        toy = Toy(steps=1)
        with pytest.raises(ValueError, match="nothing of this run can be reused"):
            toy.search()
        assert toy.untouched()


class TestShown:
    def test_silent(self, capfd):
        Toy().search()
        assert capfd.readouterr() == ("", "")

    def test_not_silent(self, capfd):
        Toy().search(verbose=True)
        out, err = capfd.readouterr()
        assert out == ""
        stages = [line.partition(":")[0] for line in err.splitlines()]
        assert [stage for stage in stages if stage in ("record", "plan", "run plans")][:3] == [
            "record",
            "plan",
            "run plans",
        ]
        assert "run plans: 0 of 4" in err

    def test_no_warnings(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            Toy("two_lists", 3).search()


def breaking(call, step, error=KeyboardInterrupt):
    """Raises in the middle of a certain call of a run."""

    def at(calls, steps):
        if (calls, steps) == (call, step):
            raise error

    return at


class TestBrokenOff:
    @pytest.mark.parametrize("step", [0, 3, STEPS - 1])
    @pytest.mark.parametrize("call", [2, 3, 4])
    def test_in_a_plan(self, call, step):
        """Call 1 is recorded; what was found before counts."""
        toy = Toy("swapped", at=breaking(call, step))
        found = toy.search(1.6)
        assert (found.interrupted, len(found.evaluations), toy.run.calls) == (True, call - 2, call)
        assert toy.untouched()
        told = found.plan.provenance
        if call == 2:
            assert (told.psnr, told.measured_speedup, told.method) == (None, None, "by planning from a recording")
        else:
            assert told.psnr == max(each.score.psnr for each in found.evaluations)
        assert str(found).splitlines()[-2].endswith("; interrupted")
        toy.run.at = None
        whole = search(toy.pipe, toy.run, 1.6, cost="blocks", verbose=False, max_evals=max(call - 2, 1))
        assert found.plan.pieces == whole.plan.pieces
        with dit_cache(toy.pipe, found.plan) as cache:
            toy.run(toy.pipe)
        assert cache.stats.reused_calls > 0

    def test_in_between(self, monkeypatch):
        """While the next plan is looked for."""
        toy, asked = Toy(), []
        original = Planner.candidate

        def candidate(self, *given):
            asked.append(given)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return original(self, *given)

        monkeypatch.setattr(Planner, "candidate", candidate)
        found = toy.search()
        assert (found.interrupted, len(found.evaluations), toy.untouched()) == (True, 1, True)
        assert found.plan.provenance.psnr == found.evaluations[0].score.psnr

    @pytest.mark.parametrize("step", [0, 3])
    @pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, SystemExit])
    def test_while_recording(self, step, error):
        toy = Toy(at=breaking(1, step, error))
        with pytest.raises(error):
            toy.search()
        assert toy.untouched()
        toy.run.at = None
        assert toy.search().reached

    @pytest.mark.parametrize("call", [2, 4])
    @pytest.mark.parametrize("error", [ZeroDivisionError, SystemExit, ValueError])
    def test_an_error_of_the_run(self, call, error):
        toy = Toy("swapped", at=breaking(call, 3, error))
        with pytest.raises(error):
            toy.search()
        assert toy.untouched()

    def test_in_the_uncached_run_of_a_loaded_recording(self, tmp_path):
        toy = Toy()
        record(toy.pipe, toy.run).save(tmp_path / "recording.npz")
        toy.run.at, toy.run.calls = breaking(1, 3), 0
        with pytest.raises(KeyboardInterrupt):
            toy.search(recording=Recording.load(tmp_path / "recording.npz"))
        assert toy.untouched()


class TestTakenUp:
    @pytest.mark.parametrize("call", [2, 3, 5])
    def test_after_an_interrupt(self, tmp_path, call):
        """Nothing is recorded or run twice, and what comes out is what would have."""
        toy, given = Toy("swapped", steps=12), {"max_evals": 5, "max_runs": 6.0, "journal": tmp_path / "kept"}
        whole = toy.search(1.6, max_evals=5, max_runs=6.0)
        toy.run.at, toy.run.calls = breaking(call, 3), 0
        first = toy.search(1.6, **given)
        assert (first.interrupted, len(first.evaluations)) == (True, call - 2)
        toy.run.at, toy.run.calls = None, 0
        second = toy.search(1.6, **given)
        assert toy.run.calls == 1 + len(second.evaluations) - (call - 2)  # one without a cache, to compare with
        assert len(second.evaluations) == len(whole.evaluations) == 5
        assert second.plan.pieces == whole.plan.pieces
        assert second.plan.provenance.psnr == whole.plan.provenance.psnr
        assert second.run_equivalents == pytest.approx(1 + sum(each.blocks for each in second.evaluations[call - 2 :]))
        assert [each.seconds for each in first.evaluations] == [each.seconds for each in second.evaluations[: call - 2]]
        toy.run.calls = 0
        third = toy.search(1.6, **given)
        assert (toy.run.calls, third.run_equivalents) == (1, 1.0)
        assert third.plan.to_json() == second.plan.to_json()
        assert [each.score for each in third.evaluations] == [each.score for each in second.evaluations]

    def test_for_another_target(self, tmp_path):
        """The recording is the same; plans that were run for the other are not run again, if they come up."""
        toy = Toy()
        toy.search(1.6, journal=tmp_path)
        toy.run.calls = 0
        found = toy.search(2.5, journal=tmp_path)
        assert toy.run.calls == 1 + len(found.evaluations)
        fresh = toy.search(2.5)
        assert found.plan.pieces == fresh.plan.pieces

    def test_of_another_search(self, tmp_path):
        toy, other = Toy(), Toy("swapped")
        toy.search(journal=tmp_path)
        for searching in (lambda: other.search(journal=tmp_path), lambda: toy.search(journal=tmp_path, cost="time")):
            with pytest.raises(ValueError, match="has the journal of another search"):
                searching()
        other.pipe = toy.pipe
        with pytest.raises(ValueError, match="run does not draw what was recorded"):
            Toy.search(other, 2.1, journal=tmp_path)

    def test_failures_are_kept(self, tmp_path):
        toy = Noisy()
        first = toy.search(1.3, journal=tmp_path)
        toy.run.calls = 0
        second = toy.search(1.3, journal=tmp_path)
        assert toy.run.calls == 1
        assert [each.failure for each in second.evaluations] == [each.failure for each in first.evaluations]
        assert second.plan.to_json() == first.plan.to_json()
        assert any(each.failure for each in second.evaluations)

    def test_nothing_is_made_where_an_argument_is_wrong(self, tmp_path):
        with pytest.raises(ValueError, match="cost"):
            Toy().search(cost="x", journal=tmp_path / "kept")
        assert not (tmp_path / "kept").exists()
