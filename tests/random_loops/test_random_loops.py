"""Random sampling loops: no call is given the residual of another branch or run, and few calls are computed in vain.

A loop that fails here is replayed alone by ``python -m bench.checks.loops --loop NUMBER``.
"""

import pytest

from random_loops.drawing import Loop, RunPlan, Spec, grouped
from random_loops.judging import fault_of, judge, reusable_calls
from random_loops.playing import Outcome, Played, play
from random_loops.tally import LEAST, page, run_loops

LOOPS = 300
FOUND = {  # small loops that went wrong once, and what it was in them that did it
    900: "a scope names a branch for the second time at one step",
    4896: "the prompt is in a dataclass, and the first branch comes later",
    1688: "the prompt is in a dataclass, and guidance begins later, its negative first",
    2053: "another pipeline begins while this one's scheduler stands where its run was broken off",
    4580: "the same, with two evaluations a step",
    3909: "a branch that comes and goes moves the others' evaluations",
    1421: "guidance begins later, its negative first, with two evaluations a step",
    975: "the first branch is left out at a step, with two evaluations each",
    249: "guidance begins between windows, and one timestep has two evaluations",
    1324: "guidance begins between windows, with Heun's method",
    2363: "windows of two prompts in another order at each step",
    3197: "an outer module adds the time to prompts that come and go",
    928: "a run is broken off at its first call, and another one begins at the same step",
    3580: "the same, with a timestep for all that tells the time",
    4292: "two threads end before the cache is removed",
    5908: "a scheduler that stands still, where guidance begins later",
    2964: "pairs of evaluations at each step, by the number of calls",
    563: "pairs of evaluations at each timestep",
    1681: "the second timestep is evaluated twice",
    14882: "a switch is thrown beside a call of the same prompt",
    6019: "guidance with drifting prompts begins later, with two evaluations",
    9141: "a scope tells another number of steps for the next run",
    368: "a scheduler of one step stands still while another makes the steps",
    52557: "another pipeline begins when a scheduler has moved on to a step that no call came for",
    34327: "a scheduler of one step stands still after a run that was broken off at that step",
    68596: "the same, with windows: each is taken for a picture of its own, which is said",
    5396: "an outer module adds much time to three prompts in any order",
    27151: "second evaluations of prompts with time added begin in the middle",
}


@pytest.fixture(scope="module")
def tally():
    return run_loops(0, LOOPS)


def replay(loops):
    """Return the smallest loop that failed, and how to play it alone."""
    return "".join(
        f"{len(loops)} loops; python -m bench.checks.loops --loop {number} is one of {calls} calls: {text}"
        for calls, number, text in sorted(loops)[:1]
    )


def test_every_reused_call_has_the_residual_of_its_own_branch_and_run(tally):
    assert not tally.wrong, replay(tally.wrong)


def test_no_loop_is_refused(tally):
    assert not tally.refused, replay(tally.refused)


def test_a_loop_that_reuses_nothing_is_told_what_to_do(tally):
    assert not tally.silent, replay(tally.silent)


def test_nine_tenths_of_what_can_be_reused_is_reused(tally):
    assert tally.total.due > 5 * LOOPS
    assert tally.total.ratio >= LEAST, page(tally)


@pytest.mark.parametrize("number", FOUND, ids=str)
def test_a_loop_that_went_wrong_once(number):
    tally = run_loops(number, 1)
    assert not tally.wrong, f"{FOUND[number]}: {replay(tally.wrong)}"
    assert not tally.silent, f"{FOUND[number]}: {replay(tally.silent)}"


# -- the oracle, by hand ------------------------------------------------------------------------------------------

PAIR = (Spec(0), Spec(1))


def loop_of(steps=4, computed=("interval", (1, 3)), specs=PAIR, **settings):
    values = [1 - step / steps for step in range(steps)]
    solver = settings.get("solver", "euler")
    runs = (RunPlan(grouped(solver, values, 0.0)),)
    return Loop(0, settings.pop("clock", "scope"), "guidance", specs, runs, computed, **settings)


def test_guidance_in_scopes_is_reused_as_the_interval_says():
    verdict = judge(play(loop_of()))
    assert (verdict.calls, verdict.reusable, verdict.reused, verdict.wrong) == (8, {5, 6, 7, 8}, {5, 6, 7, 8}, [])


def test_the_blocks_label_says_which_call_a_residual_was_captured_in():
    calls = play(loop_of()).calls
    assert [calls[number].source for number in range(1, 9)] == [None, None, None, None, 3, 4, 3, 4]


def played(number, step, spec=PAIR[0], source=None, run=0, order=0, evaluation=None):
    return Played(number, (0, run), step, step if evaluation is None else evaluation, spec, order, order, source)


def test_another_branchs_residual_is_wrong_and_so_is_another_runs():
    loop, calls = loop_of(), {1: played(1, 0), 2: played(2, 0, PAIR[1]), 3: played(3, 1, source=2)}
    assert fault_of(loop, calls[3], calls) == "a residual of another branch: run 0, step 0, guidance 1"
    calls[3] = played(3, 1, source=1)
    assert fault_of(loop, calls[3], calls) is None
    calls[3] = played(3, 1, source=1, run=1)
    assert fault_of(loop, calls[3], calls) == "a residual of another run: run 0, step 0, guidance 0"


def test_the_evaluation_before_serves_at_the_second_step_only():
    loop = loop_of(solver="heun", clock="t")
    places = [(0, 0), (1, 0), (1, 1), (2, 0), (2, 1)]  # the step of each evaluation, and its order there
    calls = {n: played(n, step, order=order, evaluation=n - 1) for n, (step, order) in enumerate(places, 1)}
    calls[3].source = 2
    assert fault_of(loop, calls[3], calls) is None
    calls[5].source = 4
    assert fault_of(loop, calls[5], calls) == "a residual of another branch: run 0, step 2, guidance 0"
    calls[5].source = 3
    assert fault_of(loop, calls[5], calls) == "a residual of call 3, which computed none"
    calls[3].source = None
    assert fault_of(loop, calls[5], calls) is None


def test_what_can_be_reused_ends_at_a_refresh_that_the_branch_missed():
    loop = loop_of(computed=("mask", (1, 0, 1, 0, 0)))
    calls = [played(1, 0), played(2, 0, PAIR[1]), played(3, 1), played(4, 2), played(5, 3), played(6, 3, PAIR[1])]
    assert reusable_calls(loop, calls) == {3, 5}
    assert reusable_calls(loop, [*calls, played(7, 4, PAIR[1])]) == {3, 5, 7}


def test_silence_is_noticed():
    outcome = Outcome(loop_of(), {1: played(1, 1), 2: played(2, 2)})
    assert judge(outcome).silent
    outcome.warnings.append("transformer: wrap each step in `with timestep_scope(step): ...`")
    assert not judge(outcome).silent
