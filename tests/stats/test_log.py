"""The log of decisions against a naive list; in bounded memory, from several threads, at a few calls a record."""

import logging
import math
import random
import sys
import threading
import tracemalloc
from collections import Counter
from contextlib import contextmanager
from functools import partial
from unittest.mock import patch

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dithooks import CallRecord
from dithooks.policies.history import BranchHistory, Decision, RunHistory
from dithooks.stats import log as log_module
from dithooks.stats.log import DecisionLog, RunCounts, fold

pytestmark = pytest.mark.core

CALLS, RUNS = 5, 2  # kept one by one, and with statistics of their own
BLOCKS, SKIPPABLE = 5, 3

DECISIONS = st.sampled_from(
    [
        Decision(True, "reuse"),
        Decision(True, "reuse", 0.25),
        Decision(False, "warm-up"),
        Decision(False, "threshold", 0.5),
        Decision(False, "non-finite", math.inf),
        Decision(False, "shape"),
    ]
)
STEP, BRANCH = st.integers(0, 2), st.integers(0, 1)
BACK = st.integers(0, 3)  # of the runs begun, or the calls recorded, how many before the latest
ACTIONS = st.lists(
    st.one_of(
        st.just(("begin",)),
        st.tuples(st.just("record"), BACK, STEP, BRANCH, DECISIONS),
        st.tuples(st.just("record"), BACK, STEP, BRANCH, DECISIONS),
        st.tuples(st.just("correct"), st.integers(0, CALLS), DECISIONS),
        st.just(("gradients",)),
        st.just(("ask",)),  # what is counted in parts comes to the same
    ),
    max_size=60,
)


class Naive:
    """All calls that there ever were, in one list, in which a correction is written over the former decision."""

    def __init__(self):
        self.calls, self.told, self.begun, self.gradients = [], [], 0, 0

    def record(self, *call):
        self.calls.append(CallRecord("net", *call[:3], *call[3]))
        self.told.append(self.calls[-1])

    def correct(self, run, step, branch, decision):
        for index in range(len(self.calls) - 1, max(len(self.calls) - CALLS, 0) - 1, -1):
            if self.calls[index][1:4] == (run, step, branch):
                self.calls[index] = CallRecord("net", run, step, branch, *decision)
                self.told.append(self.calls[index])
                return

    def of(self, run):
        return [call for call in self.calls if call.run == run]


def counted(calls):
    values = [call.value for call in calls if call.value is not None]
    return RunCounts(len(calls), sum(c.reuse for c in calls), Counter(c.reason for c in calls), values)


def check(log, naive):
    stats, calls, latest = log.stats(7), naive.calls, range(max(naive.begun - RUNS, 0), naive.begun)
    assert log.records() == calls[-CALLS:]
    reasons = Counter(call.reason for call in calls) + Counter({"gradients": naive.gradients})
    assert stats.reasons == dict(reasons)
    assert stats.calls == stats.computed_calls + stats.reused_calls == len(calls) + naive.gradients
    assert stats.reused_calls == sum(call.reuse for call in calls)
    assert stats.blocks_total - stats.blocks_run == SKIPPABLE * stats.reused_calls
    assert [run.run for run in stats.runs] == [run for run in latest if naive.of(run)]
    for run in stats.runs:
        for branch in run.branches:
            own = counted([call for call in naive.of(run.run) if call.branch == branch.branch])
            assert (branch.computed + branch.reused, branch.reused, branch.reasons) == (
                own.calls,
                own.reused,
                own.reasons,
            )
    for run in range(naive.begun):
        kept, every = log.records_of(run), naive.of(run)
        assert kept == every[len(every) - len(kept) :]
        if run in latest or every[-1:] == []:
            assert kept == every
        assert len(kept) >= sum(call.run == run for call in calls[-CALLS:])
        assert log.counts_of(run) == counted(kept)


def test_a_decision_adds_to_the_history_of_its_branch_and_run():
    run = RunHistory()
    first, second = BranchHistory(run=run), BranchHistory(run=run)
    for branch in (first, second):
        fold(branch, 0, Decision(False, "warm-up"))
        branch.refreshed = 0
    assert (run.calls, run.reused, run.step, run.called) == (2, 0, 0, 2)
    fold(first, 1, Decision(True, "reuse", 0.25))
    fold(second, 1, Decision(True, "reuse", 0.5))
    fold(first, 2, Decision(True, "reuse", 1.0))
    assert (run.calls, run.reused, run.step, run.called) == (5, 3, 2, 1)
    assert (first.reused, first.streak, first.drift, first.rates[:]) == (2, 2, 1.25, [0.25, 0.5])
    fold(first, 3, Decision(False, "non-finite", math.inf))
    assert (first.computed, first.streak, first.drift, first.rates[:]) == (2, 0, 0.0, [0.25, 0.5])
    first.refreshed = 3
    fold(first, 3, Decision(False, "threshold", 2.0))  # the same step again: no time went by in which it changed
    assert (first.rates[:], second.rates[:]) == ([0.25, 0.5], [0.5])


@given(ACTIONS)
@settings(max_examples=300, deadline=None)
def test_what_is_derived_is_what_a_naive_list_says(actions):
    told, naive = [], Naive()
    log = DecisionLog("net", BLOCKS, SKIPPABLE, told.append)
    with patch.object(log_module, "MAX_CALLS", CALLS), patch.object(log_module, "MAX_RUNS", RUNS):
        for name, *call in [("begin",), *actions]:
            if name == "begin":
                assert log.begin_run() == naive.begun
                naive.begun += 1
            elif name == "gradients":
                log.record(None, 0, 0, Decision(False, "gradients"))
                naive.gradients += 1
            elif name == "ask":
                check(log, naive)
            elif name == "correct" and call[0] < len(naive.calls):
                corrected = naive.calls[-1 - call[0]][1:4]
                log.correct(*corrected, call[1])
                naive.correct(*corrected, call[1])
            elif name == "record" and call[0] < naive.begun:
                log.record(naive.begun - 1 - call[0], *call[1:])
                naive.record(naive.begun - 1 - call[0], *call[1:])
        check(log, naive)
        assert told == naive.told
        log.clear()
        check(log, Naive())


def test_a_correction_is_of_the_last_call_of_its_kind():
    """Where all calls of a step are one branch's, several have the same run, step and branch."""
    log = DecisionLog("net", BLOCKS, SKIPPABLE)
    run = log.begin_run()
    for step in (0, 1, 1):
        log.record(run, step, 0, Decision(True, "reuse"))
    log.correct(run, 1, 0, Decision(False, "shape"))
    log.correct(run, 1, 0, Decision(False, "switch"))
    log.correct(run, 2, 0, Decision(False, "shape"))  # there is none
    assert [record.reason for record in log.records_of(run)] == ["reuse", "reuse", "switch"]
    assert log.stats(0).reasons == {"reuse": 2, "switch": 1}


def test_a_run_that_many_have_overtaken_keeps_its_records():
    log = DecisionLog("net", BLOCKS, SKIPPABLE)
    slow, late = log.begin_run(), log.begin_run()
    log.record(slow, 0, 0, Decision(False, "warm-up"))
    for _ in range(3 * log_module.MAX_RUNS):
        log.record(log.begin_run(), 0, 0, Decision(False, "warm-up"))
    log.record(slow, 1, 0, Decision(True, "reuse"))
    log.record(late, 0, 0, Decision(False, "warm-up"))
    assert [record.step for record in log.records_of(slow)] == [0, 1]
    assert (log.counts_of(slow).reused, log.counts_of(late).calls) == (1, 1)
    assert len(log.stats(0).runs) == log_module.MAX_RUNS


def test_memory_is_bounded():
    log = DecisionLog("net", BLOCKS, SKIPPABLE)

    def sample(runs):
        for _ in range(runs):
            run = log.begin_run()
            for step in range(20):
                log.record(run, step, 0, Decision(step % 2 > 0, "reuse" if step % 2 else "refresh", step / 20))
            log.correct(run, 19, 0, Decision(False, "shape"))
            log.counts_of(run)

    with patch.object(log_module, "MAX_CALLS", 400):
        tracemalloc.start()
        try:
            sample(50)
            held, _ = tracemalloc.get_traced_memory()
            sample(500)
            later, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert later < 1.1 * held
    assert log.stats(0).reasons == {"refresh": 5500, "reuse": 4950, "shape": 550}


def test_the_first_call_counts_for_no_speedup():
    """It observes and verifies: with it, a median of two would be far off."""
    log = DecisionLog("net", BLOCKS, SKIPPABLE)
    run, reuses = log.begin_run(), (False, False, True)
    for step, (reuse, marks) in enumerate(zip(reuses, ([0.0, 1, 99, 100], [0.0, 1, 9, 10], [0.0, 2]), strict=True)):
        log.record(run, step, 0, Decision(reuse, "reuse" if reuse else "mask"))
        log.time_call(run, reuse, [float(mark) for mark in marks])
    (stats,) = log.stats(0).runs
    assert stats.estimated_speedup == pytest.approx(30 / 22)
    assert stats.measured_speedup == pytest.approx(20 / 12)


def test_the_latest_runs_keep_their_statistics_though_their_calls_fall_off():
    log = DecisionLog("net", BLOCKS, SKIPPABLE)
    with patch.object(log_module, "MAX_CALLS", 2), patch.object(log_module, "MAX_RUNS", 2):
        for run in (log.begin_run(), log.begin_run()):
            for step in range(3):
                log.record(run, step, 0, Decision(False, "mask"))
        assert [run.run for run in log.stats(0).runs] == [0, 1]


def test_the_peak_outlasts_what_is_held():
    log = DecisionLog("net", BLOCKS, SKIPPABLE)
    for held in (10, 3):
        log.hold(held, log.begin_run(), 0, held)
    assert log.stats(2).bytes_peak == 10


@contextmanager
def often_switched():
    """Switch between threads every few microseconds."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)


def in_threads(works):
    workers = [threading.Thread(target=work) for work in works]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]


def test_threads_share_a_log():
    """More of them than runs have statistics of their own: each finds the whole of its run."""
    threads, calls, told, wrong = 2 * log_module.MAX_RUNS, 60, [], []
    log, start = DecisionLog("net", BLOCKS, SKIPPABLE, told.append), threading.Barrier(threads)

    def sample(seed):
        choose = random.Random(seed)
        start.wait()
        run, own = log.begin_run(), []
        for step in range(calls):
            reuse = choose.random() < 0.5
            log.record(run, step, 0, Decision(reuse, "reuse" if reuse else "mask"))
            if misfit := reuse and choose.random() < 0.2:
                log.correct(run, step, 0, Decision(False, "shape"))
            own.append("shape" if misfit else "reuse" if reuse else "mask")
            if log.counts_of(run).reused != own.count("reuse") or step % 10 == 0:
                log.stats(0)
                wrong.extend([run] * (log.counts_of(run).reasons != Counter(own)))
        wrong.extend([run] * ([record.reason for record in log.records_of(run)] != own))

    with often_switched():
        in_threads(partial(sample, seed) for seed in range(threads))
    stats = log.stats(0)
    assert wrong == []
    assert stats.calls == threads * calls == len(log.records())
    assert stats.reasons == Counter(record.reason for record in log.records())
    assert len(told) == stats.calls + stats.reasons["shape"]


def test_threads_share_totals():
    """What falls off the end is counted once, whichever thread's record pushed it off."""
    threads, calls = 8, 400
    log = DecisionLog("net", BLOCKS, SKIPPABLE)

    def sample():
        run = log.begin_run()
        for step in range(calls):
            log.record(run, step, 0, Decision(step % 4 > 0, "reuse" if step % 4 else "refresh"))
            log.record(None, 0, 0, Decision(False, "gradients"))

    with patch.object(log_module, "MAX_CALLS", 10), often_switched():
        in_threads(sample for _ in range(threads))
    assert log.stats(0).reasons == {"reuse": 300 * threads, "refresh": 100 * threads, "gradients": calls * threads}


def python_calls(work):
    """Python functions that a piece of work enters, itself left out."""
    count = -1

    def profiler(frame, event, argument):
        nonlocal count
        count += event == "call"

    sys.setprofile(profiler)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("full", [False, True])
def test_a_record_costs_four_python_calls_at_most(full):
    logging.getLogger("dithooks").isEnabledFor(logging.DEBUG)  # the answer is kept from the first time on
    log, decision = DecisionLog("net", BLOCKS, SKIPPABLE), Decision(True, "reuse", 0.1)
    run = log.begin_run()
    with patch.object(log_module, "MAX_CALLS", 3 if full else 10):
        for step in range(5):
            log.record(run, step, 0, decision)
        assert python_calls(lambda: log.record(run, 5, 0, decision)) <= 4


def test_counts_that_are_asked_for_after_each_call_are_linear():
    def sample(steps):
        log = DecisionLog("net", BLOCKS, SKIPPABLE)
        run = log.begin_run()
        for step in range(steps):
            log.record(run, step, 0, Decision(True, "reuse"))
            assert log.counts_of(run).reused == step + 1

    assert python_calls(lambda: sample(400)) <= 2.1 * python_calls(lambda: sample(200))
