"""The time of a fit is none of the plan's: a run's seconds are those that the plan takes by itself."""

import gc
import time

import pytest
import torch
from solvers import Solved
from toys import Net, latents

from dithooks import search
from dithooks.tuning.closed_loop import ClosedLoop
from dithooks.tuning.fit_timer import FitTimer
from dithooks.tuning.timed_run import TimedRun

STEPS, PAUSE, WORK = 8, 0.03, 0.01


class Slow:
    """A watcher that takes its time."""

    def before(self, call):
        time.sleep(PAUSE)

    def after(self, call, following):
        time.sleep(2 * PAUSE)

    def fails(self, error):
        self.failed = error


def test_what_the_watcher_takes():
    timer = FitTimer(Slow())
    timer.before(None)
    timer.after(None, torch.zeros(1))
    timer.fails(error := ValueError("of the watcher"))
    assert timer.seconds == pytest.approx(3 * PAUSE, rel=0.5)
    assert timer.watcher.failed is error


def test_an_error_of_the_watcher_passes():
    class Failing(Slow):
        def before(self, call):
            raise KeyboardInterrupt

    timer = FitTimer(Failing())
    with pytest.raises(KeyboardInterrupt):
        timer.before(None)


def test_a_slow_fit_does_not_slow_the_plan(monkeypatch):
    """The model takes 10 ms a call, so that 8 steps are 80 ms; a fit that takes 30 ms a step would make them 320."""

    class Working(Net):
        def forward(self, *args, **options):
            time.sleep(WORK)
            return super().forward(*args, **options)

    fitted = ClosedLoop.before

    def before(self, call):
        time.sleep(PAUSE)
        fitted(self, call)

    monkeypatch.setattr(ClosedLoop, "before", before)
    torch.manual_seed(0)
    pipe, start = Solved(Working()), latents()

    @torch.no_grad()
    def run(pipe):
        return list(pipe(start.clone(), steps=STEPS))

    found = search(pipe, run, 1.5, max_evals=1, verbose=False)
    (tried,) = found.evaluations
    assert tried.fit.name == "ALL"
    assert tried.seconds < STEPS * (WORK + PAUSE) - 0.5 * STEPS * PAUSE


def test_garbage_is_collected_before_a_run_is_timed():
    """So that no collection of all objects, which takes a third of a second, falls due within it."""
    due = []
    timed = TimedRun(lambda target: due.append(gc.get_count()[1:]), None, "", None, 0, 0)
    gc.collect(1)
    gc.collect(1)
    assert gc.get_count()[2] >= 2
    timed(object())
    assert due == [(0, 0)]
