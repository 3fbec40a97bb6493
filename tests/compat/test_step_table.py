"""Which steps were reused and by which differences, counted over lists and branches by hand."""

import math

from dithooks.compat.cache_dit.step_table import Steps, steps_of, steps_table
from dithooks.compat.cache_dit.summary import _stats
from dithooks.stats.types import CallRecord


def settled(path, run, step, branch, reuse, value=None):
    return CallRecord(path, run, step, branch, reuse, "reuse" if reuse else "threshold", value)


def row_of(table, number=0):
    return [cell.strip() for cell in table.splitlines()[2 + number].strip("|").split("|")]


def test_the_last_run_of_each_list():
    """The second list is in its second run, the first still in its first."""
    told = [settled("a", 0, 0, 0, False), settled("b", 0, 0, 0, False), settled("a", 0, 1, 0, True, 0.1)]
    told += [settled("b", 1, 0, 0, False), settled("b", 1, 1, 1, True, 0.2)]
    assert steps_of(told) == [
        Steps("a", 0, (0, 1), (1,), {1: 0.1}),
        Steps("b", 0, (0,), (), {}),
        Steps("b", 1, (1,), (1,), {1: 0.2}),
    ]


def test_a_step_counts_where_no_call_of_it_was_computed():
    rows = [
        Steps("a", 0, (0, 1, 2, 3), (1, 2, 3), {}),
        Steps("a", 1, (0, 1, 2), (1,), {}),
        Steps("b", 0, (0, 1), (1,), {}),
    ]
    assert row_of(steps_table(rows))[0] == "2"  # 1 and 3; at 2 the second call was computed
    assert [row_of(steps_table(rows, details=True), number)[:3] for number in range(3)] == [
        ["a", "0", "3"],
        ["a", "1", "1"],
        ["b", "0", "1"],
    ]


def test_percentiles_are_of_all_that_is_finite():
    diffs = dict(enumerate([0.0, 0.1, 0.2, 0.3, 0.4, math.nan, math.inf]))
    assert row_of(steps_table([Steps("a", 0, (), (), diffs)]))[1:] == [
        "0.000",
        "0.100",
        "0.200",
        "0.300",
        "0.380",
        "0.400",
    ]
    assert row_of(steps_table([Steps("a", 0, (), (), {1: math.nan})]))[1:] == ["–"] * 6


def test_steps_and_calls_of_a_run_whose_guidance_ends():
    first, second = Steps("a", 0, (0, 1, 2, 3), (2, 3), {2: 0.1}), Steps("a", 1, (0, 1), (1,), {1: 0.2})
    for branches in ([first, second], [second, first]):
        stats = _stats(branches, {})
        assert (stats.accumulated_executed_steps, stats.accumulated_transformer_executed_steps) == (4, 6)
        assert (stats.cached_steps, stats.cfg_cached_steps) == ([2, 3], [1])
        assert (stats.residual_diffs, stats.cfg_residual_diffs) == ({"2": 0.1}, {"1": 0.2})
