"""The progress of a search: the time that is left of all of it, bars of others, and what a journal has saved."""

import sys
from dataclasses import replace

import pytest
import torch
from solvers import Solved
from toys import Net, Pipe, latents

from dithooks import search
from dithooks.integrations.diffusers_bars import hidden_bars, hidden_loading_bars
from dithooks.tuning.search_progress import SearchProgress
from dithooks.tuning.trial_driver import Limits

START = torch.randn(latents().shape, generator=torch.Generator().manual_seed(13))


class Shown:
    """What a display is given, at times of a clock that the test sets."""

    def __init__(self, runs_ahead):
        self.now, self.left = 100.0, []
        self.report = SearchProgress(self, runs_ahead, clock=lambda: self.now)

    def __call__(self, stage, done, total, note="", seconds_left=None):
        self.left.append((stage, done, seconds_left))


def test_the_first_recorded_step_gives_the_time_of_the_whole_search():
    """A step took 6 s, 10 make a run of 60 s, and 2.5 runs follow: 9 steps and 150 s are left."""
    shown = Shown(2.5)
    shown.now += 6
    shown.report("record", 1, 10)
    assert shown.left == [("record", 1, 9 * 6 + 150)]


def test_the_first_step_is_left_out_once_there_are_others():
    """It took 20 s, being slower; each other one takes 5 s."""
    shown = Shown(2.0)
    shown.now += 20
    shown.report("record", 1, 10)
    for step in (2, 3):
        shown.now += 5
        shown.report("record", step, 10)
    assert shown.left[-1] == ("record", 3, 7 * 5 + 2 * 50)


def test_a_timed_run_corrects_it_and_the_time_runs_down():
    shown = Shown(3.0)
    shown.now += 20
    shown.report("record", 1, 10)  # 200 s a run, while it is recorded
    shown.report.expect(2.0, run_seconds=80)
    shown.now += 30
    shown.report("Gram matrices", 1, 50)
    assert shown.left[-1] == ("Gram matrices", 1, 2 * 80 - 30)


def test_trials_add_what_follows_for_other_targets():
    """40 s for this target, and another one that takes 1.5 runs of 80 s; plans in between are not shown."""
    shown = Shown(3.0)
    shown.report.expect(2.0, run_seconds=80)
    shown.report.begin_trials(1.5)
    shown.report("plan", 1, 1)
    shown.report("run plans", 0, 14, "", 40.0)
    shown.report("plan", 1, 1)
    assert [stage for stage, _, _ in shown.left] == ["plan", "run plans"]
    assert shown.left[-1] == ("run plans", 0, 40 + 120)


def test_without_a_number_of_steps_nothing_is_guessed():
    shown = Shown(2.0)
    shown.report("record", 3, None)
    assert shown.left == [("record", 3, None)]


@pytest.mark.parametrize("done", [0, 3])
def test_what_is_ahead_is_bounded_by_max_runs(done):
    """1.95 runs are left, which is three plans at 2×: one to try, and two runs to check the best."""
    assert Limits(6, 8, 3.95, None).runs_ahead(2.0, 2.0, done) == pytest.approx(3 / 2)
    assert Limits(6, 8, None, None).runs_ahead(2.0, 2.0, done) == pytest.approx((14 - done + 2) / 2)


class BarredPipe(Pipe):
    """A pipeline with a bar, as those of diffusers have."""

    def __init__(self, model):
        super().__init__(model)
        self.seen = []

    def set_progress_bar_config(self, **options):
        self._progress_bar_config = options

    def __call__(self, *args, **options):
        self.seen.append(getattr(self, "_progress_bar_config", {}).get("disable", False))
        return super().__call__(*args, **options)


@pytest.mark.parametrize("own", [None, {"desc": "mine"}, {"disable": True}])
def test_the_bars_of_a_pipeline_are_hidden_meanwhile(own):
    pipe = BarredPipe(Net())
    if own is not None:
        pipe.set_progress_bar_config(**own)
    for error in (None, KeyboardInterrupt):
        try:
            with hidden_bars(pipe):
                assert pipe._progress_bar_config["disable"] is True
                if error is not None:
                    raise error
        except KeyboardInterrupt:
            pass
        assert vars(pipe).get("_progress_bar_config") == own
        assert ("_progress_bar_config" in vars(pipe)) == (own is not None)


@pytest.mark.parametrize("verbose", [True, False])
def test_a_search_hides_them_where_it_shows_its_own(verbose, capsys):
    pipe = BarredPipe(Net())

    @torch.no_grad()
    def run(pipe):
        return [pipe(START.clone(), steps=5)]

    search(pipe, run, 1.3, cost="blocks", max_evals=1, verbose=verbose)
    assert set(pipe.seen) == {verbose}
    assert "_progress_bar_config" not in vars(pipe)
    assert bool(capsys.readouterr().err) == verbose


WHY = "weights are those of the recording, not fitted to the scheduler: "
NONE_STEPS = WHY + "there is none whose step() takes an output and a sample"  # what the Counter of a Pipe shows


@torch.no_grad()
def run_of(pipe):
    return [pipe(START.clone(), steps=6)]


@pytest.mark.parametrize("verbose", [True, False])
def test_a_search_that_cannot_fit_weights_says_so_once_it_is_recorded(verbose, capsys):
    torch.manual_seed(7)
    found = search(Pipe(Net()), run_of, 1.5, cost="blocks", max_evals=1, verbose=verbose)
    lines = capsys.readouterr().err.splitlines()
    assert lines.count(NONE_STEPS) == verbose
    if verbose:
        assert lines[lines.index(NONE_STEPS) - 1].startswith("Gram matrices")
        assert "run plans" in "".join(lines[lines.index(NONE_STEPS) :])
    assert str(found).splitlines()[-1] == NONE_STEPS
    assert repr(found).endswith("; weights are not fitted to the scheduler>")
    assert NONE_STEPS in found._repr_html_()


def test_several_tiers_say_so_once():
    torch.manual_seed(7)
    found = search(Pipe(Net()), run_of, targets=(1.5, 1.25), cost="blocks", max_evals=1, max_runs=None, verbose=False)
    assert (str(found).count(WHY), str(found).splitlines()[-1]) == (1, NONE_STEPS)
    assert all(str(each).splitlines()[-1] == NONE_STEPS for each in found.tiers.values())


def test_a_long_reason_is_one_line():
    torch.manual_seed(7)
    found = search(Pipe(Net()), run_of, 1.5, cost="blocks", max_evals=1, verbose=False)
    failed = replace(found, recording=replace(found.recording, unsolved="RuntimeError: a\n" + 400 * "b"))
    assert str(failed).splitlines()[-1] == WHY + "RuntimeError: a " + 184 * "b"
    earlier = replace(found, recording=replace(found.recording, unsolved=""))
    assert str(earlier).splitlines()[-1] == WHY + "an earlier version made the recording"


def test_others_say_nothing(capsys):
    """A search that fits weights, and one of intervals, which have none."""
    torch.manual_seed(7)
    for pipe, given in ((Solved(Net()), {}), (Pipe(Net()), {"interval": 2})):
        found = search(pipe, run_of, 1.5, cost="blocks", max_evals=1, **given)
        assert (found.recording.solver is None) == bool(given)
        assert not any(
            "to the scheduler" in said
            for said in (str(found), repr(found), found._repr_html_(), capsys.readouterr().err)
        )


def test_loading_bars_are_as_they_were():
    logging = pytest.importorskip("diffusers.utils.logging")
    for enable in (logging.enable_progress_bar, logging.disable_progress_bar):
        enable()
        before = logging.is_progress_bar_enabled()
        with hidden_loading_bars():
            assert not logging.is_progress_bar_enabled()
        assert logging.is_progress_bar_enabled() == before
    logging.enable_progress_bar()
    assert "diffusers" in sys.modules


def test_a_resumed_search_says_what_the_journal_saved(tmp_path):
    """Two plans were run before, and the recording: what they saved is counted by hand from the first search."""

    @torch.no_grad()
    def run(pipe):
        return [pipe(START.clone(), steps=6)]

    def searched(most):
        torch.manual_seed(7)
        return search(pipe, run, 1.5, cost="blocks", max_evals=most, max_runs=None, journal=tmp_path, verbose=False)

    torch.manual_seed(7)
    pipe = Pipe(Net())
    first = searched(2)
    assert first.reused_runs == 0
    assert not any(each.is_reused for each in first.evaluations)
    assert "journal" not in str(first)
    again = searched(3)
    before = len(first.evaluations)
    assert [each.is_reused for each in again.evaluations][:before] == [True] * before
    saved = 1.0 + sum(each.blocks for each in first.evaluations)
    assert again.reused_runs == pytest.approx(saved)
    assert f"the journal saved {saved:.1f} runs; {before} plan" in str(again)
    *table, _, _ = str(again).splitlines()
    assert ["reused" in line for line in table] == [False, *(each.is_reused for each in again.evaluations)]
