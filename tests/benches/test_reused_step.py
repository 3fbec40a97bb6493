"""What one call of a cached transformer executes stays within bounds, and counting it gives the same numbers twice."""

import sys

import pytest
import torch

from bench.costs_peers import flux
from bench.peers.closures import Closures, first_stream
from bench.reused_step import (
    CACHES,
    CLOSURES,
    COMPUTED,
    MODELS,
    REUSED,
    STEPS,
    Counts,
    Subject,
    compiled_counts,
    count,
    counted,
    own_counts,
    place,
    profiled,
    ratio_row,
    table,
    traced,
    uncached,
)

# Upper bounds: Python calls, bytecodes, and files of dithooks entered, beyond the model without a cache.
REUSED_STEP = {
    ("toy", "interval"): (143, 5_044, 13),
    ("toy", "plan"): (152, 5_450, 15),
    ("toy", "threshold"): (225, 6_889, 21),
    ("FLUX", "interval"): (139, 5_999, 12),
    ("FLUX", "plan"): (150, 6_520, 14),
    ("FLUX", "threshold"): (226, 7_973, 21),
}
COMPUTED_STEP = {
    ("toy", "interval"): (199, 5_608, 21),
    ("toy", "plan"): (201, 5_689, 21),
    ("toy", "threshold"): (241, 6_490, 24),
    ("FLUX", "interval"): (209, 6_065, 21),
    ("FLUX", "plan"): (211, 6_158, 21),
    ("FLUX", "threshold"): (256, 7_084, 24),
}
STORED_WHEN_COMPILED = 0  # tensors that the graph of a whole model returns on a reused step, beside its output

# Bytecodes are of one release of Python; what it calls differs less (comprehensions are no calls from 3.12 on).
BYTECODES_COUNT = sys.version_info[:2] == (3, 11)


@pytest.fixture(scope="module")
def measured():
    return {key: own_counts(*key) for key in REUSED_STEP}


def within(counts, bounds):
    got = (counts.calls, counts.bytecodes if BYTECODES_COUNT else 0, counts.files)
    excess = [mine > most for mine, most in zip(got, bounds, strict=True)]
    assert not any(excess), f"calls, bytecodes, files: {got}, at most {bounds}; by file: {counts.by_file()}"


@pytest.mark.parametrize("key", REUSED_STEP, ids=" ".join)
def test_a_reused_step_stays_within_bounds(measured, key):
    within(measured[key][1], REUSED_STEP[key])


@pytest.mark.parametrize("key", COMPUTED_STEP, ids=" ".join)
def test_a_computed_step_stays_within_bounds(measured, key):
    within(measured[key][0], COMPUTED_STEP[key])


def test_closures_are_a_lower_bound_on_computed_steps():
    computed, reused = own_counts("toy", CLOSURES)
    assert 57 <= computed.calls <= 60
    assert computed.files == reused.files == 0


@pytest.mark.parametrize("name", MODELS)
def test_counting_twice_gives_the_same(measured, name):
    uncached.cache_clear()
    again = own_counts(name, "plan")
    assert again == measured[name, "plan"]  # function by function


def test_a_subject_can_be_counted_again():
    subject = Subject("toy", "interval")
    first = count(subject)
    assert first == count(subject)
    assert set(first) == {COMPUTED, REUSED}
    assert [each.reuse for each in subject.handle.decisions][:4] == [False, True, False, True]


def test_calls_and_bytecodes_of_a_function_known_by_heart():
    def inner(x):
        return len(x)

    def outer():
        inner([])
        inner([])

    calls, c_calls = profiled(outer)
    assert (calls[outer.__code__], calls[inner.__code__]) == (1, 2)
    assert c_calls >= 2
    codes = traced(outer)
    assert codes[inner.__code__] % 2 == 0 < codes[inner.__code__]
    found = counted(calls, c_calls, codes)
    assert found.calls == sum(calls.values())
    assert found.files == 0
    assert found.functions[place(inner.__code__)] == (2, codes[inner.__code__])
    assert sys.getprofile() is None or sys.getprofile() is not inner


def test_a_difference_leaves_out_what_is_alike():
    file, torchs = ("folder/one.py", "f"), ("(torch)", "module.py: g")
    mine = Counts(5, 2, 50, {file: (2, 20), torchs: (3, 30)})
    theirs = Counts(3, 1, 30, {torchs: (3, 30)})
    over = mine.over(theirs)
    assert (over.calls, over.c_calls, over.bytecodes, over.files) == (2, 1, 20, 1)
    assert over.functions == {file: (2, 20)}
    assert theirs.over(mine).functions == {file: (-2, -20)}
    assert over.as_dict() == {
        "calls": 2,
        "c_calls": 1,
        "bytecodes": 20,
        "files": 1,
        "functions": 1,
        "by_file": {"folder/one.py": [2, 20]},
    }


@pytest.mark.parametrize("name", MODELS)
def test_closures_reuse_as_an_interval_does(name):
    """From the same state, both give the same latents, which differ from the plain run's."""
    subjects = [Subject(name, cache) for cache in ("interval", CLOSURES, None)]
    with torch.inference_mode():
        outputs = []
        for subject in subjects:
            for _ in range(STEPS - 1):
                subject.turn()
            outputs.append(subject.loop.latents)
    torch.testing.assert_close(outputs[0], outputs[1])
    assert (outputs[0] - outputs[2]).abs().max() > 1e-4


def test_closures_know_nothing_but_the_step():
    blocks = MODELS["toy"].blocks(MODELS["toy"].make())[:3]
    closures = Closures(blocks, first_stream, interval=3)
    x, t = torch.zeros(1), torch.ones(1)

    def call(step):
        closures.set_step(step)
        h = x
        for block in blocks:
            h = block(h, t)
        return h

    computed = call(0)
    t = torch.full((1,), 9.0)
    torch.testing.assert_close(call(1), computed)
    torch.testing.assert_close(call(2), computed)
    assert (call(3) - computed).abs().max() > 0.1


@pytest.mark.slow
def test_what_compiled_code_returns():
    base = flux(1, 1)
    plain = compiled_counts(None, "whole, fullgraph", base)
    assert (plain["graphs"], plain["breaks"], plain["outputs"]) == (1, 0, {"computed": 1, "reused": 1})
    cached = compiled_counts("interval", "whole, fullgraph", base)
    assert (cached["graphs"], cached["breaks"], cached["entries"]) == (2, 0, {"computed": 1, "reused": 1})
    assert cached["outputs"]["reused"] - 1 <= STORED_WHEN_COMPILED
    refused = compiled_counts("threshold", "whole, fullgraph", base)
    assert refused["error"].startswith("Unsupported")


def test_the_table():
    taken = {"plan": [2.0, 4.0, 6.0], "0 blocks": [1.0, 2.0, 2.0]}
    line = ratio_row("reused", "plan", "0 blocks", taken)
    assert line["us"] == [4.0, 2.0]
    assert line["ratio"]["median"] == 2.0
    counts = Counts(1, 1, 1234, {("folder/one.py", "f"): (1, 1234)}).as_dict()
    rows = [{"model": "FLUX", "cache": "plan", "computed": counts, "reused": counts}]
    pair = {"computed": 1, "reused": 2}
    graphs = [
        {"cache": "plan", "way": "whole, fullgraph", "graphs": 2, "breaks": 0, "entries": pair, "outputs": pair},
        {"cache": "threshold", "way": "whole, fullgraph", "error": "Unsupported: this"},
    ]
    shown = table({"about": "here", "rows": rows, "compiled": graphs, "times": [line]})
    assert "| FLUX | plan | reused | 1 | 1 | 1,234 | 1 | 1 |" in shown
    assert "| folder/one.py | 1 / 1,234 |" in shown
    assert "| plan | 2 | 0 | 1 | 2 | 1 | 2 |" in shown
    assert "| threshold | fails: Unsupported: this ||||||" in shown
    assert "| reused | plan | 4 | 0 blocks | 2 | 2.00 (2.00 … 3.00) |" in shown


def test_every_cache_is_bounded():
    assert {cache for _, cache in REUSED_STEP} == set(CACHES)
    assert REUSED_STEP.keys() == COMPUTED_STEP.keys()
