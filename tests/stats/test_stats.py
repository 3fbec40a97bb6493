"""Statistics of a cache: counts by run and branch, times, the table, the callback, logging, and the progress bar."""

import json
import logging
import math
import sys
import time
import types

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from toys import Net, latents, loop, prompt

from dithooks import CacheStats, CallRecord, DitCacheConfig, Quantiles, RunStats, Threshold, dit_cache, timestep_scope
from dithooks.integrations.tqdm_bar import find_bar
from dithooks.policies.history import Decision
from dithooks.stats.byte_count import size
from dithooks.stats.log import MAX_RUNS, DecisionLog
from dithooks.stats.table import summary
from dithooks.stats.timing import is_ready, mark, seconds_between
from dithooks.stats.types import BranchStats, branch_stats, total

CONFIG = DitCacheConfig(2, 2, 0, 3)  # steps 0, 1 computed, then every other: 0 1 2 . 4 . 6 .


class Slow(nn.Module):
    """Blocks that take a known time each, and something beside them that does, too."""

    BLOCK, REST = 0.008, 0.004

    class Block(nn.Module):
        def forward(self, x):
            time.sleep(Slow.BLOCK)
            return x + 1

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Slow.Block() for _ in range(3))

    def forward(self, x, timestep):
        time.sleep(Slow.REST)
        for block in self.blocks:
            x = block(x)
        return x


def sampled(net, config, runs=1, branches=1, steps=8, **kwargs):
    x, e = latents(), prompt()
    with dit_cache(net, config, **kwargs) as cache:
        for _ in range(runs):
            for step in range(steps):
                with torch.no_grad(), timestep_scope(step, steps=steps):
                    for _ in range(branches):
                        net(x, encoder_hidden_states=e, timestep=torch.ones(1))
    return cache


def test_counts_by_run_and_branch():
    """By hand: of eight steps, five are computed and three reused; three of Net's five blocks are the range."""
    net = Net("two_lists", 2)
    blocks = len(net.blocks) + len(net.singles)
    cache = sampled(net, CONFIG, runs=2, branches=2)
    assert [run.run for run in cache.stats.runs] == [0, 1]
    for run in cache.stats.runs:
        assert [branch.branch for branch in run.branches] == [0, 1]
        for branch in run.branches:
            assert (branch.steps, branch.computed, branch.reused) == (8, 5, 3)
            assert sum(branch.reasons.values()) == 8
            assert branch.reasons["reuse"] == 3
            assert (branch.blocks_run, branch.blocks_total) == (8 * blocks - 3 * 3, 8 * blocks)
            assert branch.differences is None
            assert branch.bytes_peak == 2 * (6 + 3) * 8 * 4  # samples, tokens of both streams, channels, float32
        assert (run.computed, run.reused) == (10, 6)
        assert run.bytes_peak == 2 * run.branches[0].bytes_peak
    whole = cache.stats
    assert whole.blocks_run == sum(run.blocks_run for run in whole.runs)
    assert whole.blocks_total == sum(run.blocks_total for run in whole.runs)


def test_differences_are_those_of_the_decisions():
    cache = sampled(Net("two_lists", 2), DitCacheConfig(cache_block_start=1, policy=Threshold(0.4, max_warmup_steps=2)))
    values = [each.value for each in cache.decisions if each.value is not None]
    found = cache.stats.runs[0].branches[0].differences
    assert values
    assert found is not None
    assert [found.min, found.p50, found.max] == pytest.approx([min(values), np.median(values), max(values)], rel=1e-5)


@given(st.lists(st.floats(0, 1e6) | st.just(math.nan) | st.just(math.inf), max_size=30))
def test_quantiles_are_numpys(values):
    finite = [value for value in values if math.isfinite(value)]
    found = Quantiles.of(values)
    if not finite:
        assert found is None
        return
    told = [found.min, found.p25, found.p50, found.p75, found.p95, found.max]
    assert told == pytest.approx(np.percentile(finite, [0, 25, 50, 75, 95, 100]), rel=1e-5)
    assert told == sorted(told)


def test_times_are_those_of_blocks_that_take_a_known_time():
    """4 ms beside three blocks of 8 ms, two of them the range: 28 ms computed, 12 ms reused."""
    net, x = Slow(), torch.zeros(1, 4)
    with torch.no_grad(), dit_cache(net, DitCacheConfig(1, 2, 1, 2)) as cache:
        for step in range(12):
            with timestep_scope(step, steps=12):
                net(x, torch.ones(1))
    (run,) = cache.stats.runs
    computed, reused = run.computed, run.reused
    whole, left = Slow.REST + 3 * Slow.BLOCK, Slow.REST + Slow.BLOCK
    expected = 12 * whole / (computed * whole + reused * left)
    assert run.estimated_speedup == pytest.approx(expected, rel=0.25)
    assert run.measured_speedup == pytest.approx(expected, rel=0.25)
    assert run.call_seconds >= computed * whole + reused * left
    assert run.seconds >= run.call_seconds * 0.99


def test_no_figure_where_nothing_was_reused_or_timed():
    cache = sampled(Net("two_lists", 2), CONFIG, steps=2)
    (run,) = cache.stats.runs
    assert (run.reused, run.estimated_speedup, run.measured_speedup) == (0, None, None)
    assert run.call_seconds > 0


def test_only_the_latest_runs_are_kept_and_all_are_counted():
    cache = sampled(Net("two_lists", 2), CONFIG, runs=MAX_RUNS + 3)
    assert [run.run for run in cache.stats.runs] == list(range(3, MAX_RUNS + 3))
    assert cache.stats.calls == 8 * (MAX_RUNS + 3)


def test_a_reset_forgets_the_runs():
    net = Net("two_lists", 2)
    with torch.no_grad(), dit_cache(net, CONFIG) as cache:
        loop(net, latents(), steps=4, scoped=True, encoder_hidden_states=prompt())
        assert len(cache.stats.runs) == 1
        cache.reset()
        assert cache.stats.runs == ()
        assert cache.stats.calls == 0


def test_json_and_back():
    """Nothing but dicts, lists, numbers and names; every number in it is the dataclasses'."""
    stats = sampled(Net("two_lists", 2), DitCacheConfig(cache_block_start=1, policy=Threshold(0.4, 2)), runs=2).stats
    read = json.loads(stats.to_json(indent=2))
    assert read == stats.to_dict()
    runs = []
    for run in read.pop("runs"):
        branches = []
        for branch in run.pop("branches"):
            differences = branch.pop("differences")
            branches.append(
                BranchStats(**branch, differences=None if differences is None else Quantiles(**differences))
            )
        runs.append(RunStats(**run, branches=tuple(branches)))
    assert CacheStats(**read, runs=tuple(runs)) == stats


def test_a_difference_that_is_not_finite_is_json_too():
    log = DecisionLog("net", 4, 2)
    number = log.begin_run()
    log.record(number, 0, 0, Decision(False, "non-finite", math.nan))
    assert json.loads(log.stats(0).to_json())["runs"][0]["branches"][0]["differences"] is None


def test_a_call_that_turned_out_otherwise_counts_as_that():
    told = []
    log = DecisionLog("net", 4, 2, told.append)
    number = log.begin_run()
    log.record(number, 3, 1, Decision(True, "reuse"))
    log.correct(number, 3, 1, Decision(False, "shape"))
    (branch,) = log.stats(0).runs[0].branches
    assert (branch.computed, branch.reused, branch.reasons) == (1, 0, {"shape": 1})
    assert [(each.reuse, each.reason) for each in told] == [(True, "reuse"), (False, "shape")]


def test_the_table_is_at_most_100_columns_and_holds_the_counts():
    net, policy = Net("two_lists", 2), Threshold(0.4, max_warmup_steps=2)
    cache = sampled(net, DitCacheConfig(cache_block_start=1, policy=policy), runs=2, branches=2)
    text = str(cache)
    assert text == cache.summary()
    assert max(map(len, text.splitlines())) <= 100
    assert "p95" in text
    stats = cache.stats
    assert f"{stats.reused_calls} of {stats.calls} calls reused" in text
    for run in stats.runs:
        for branch in run.branches:
            assert f"{branch.blocks_run}/{branch.blocks_total}" in text
    assert repr(cache) == "<CacheHandle removed>"


def test_a_table_of_large_numbers_and_long_names():
    branch = BranchStats(15, 1000, 900, 100, {"reuse": 100, "x" * 30: 900}, Quantiles(*[0.123456] * 6), 10**7, 10**8)
    run = RunStats("transformer." + "blocks." * 20, 1234, (branch,) * 3, 1e5, 1e4, 3.0, 2.5)
    lines = summary(CacheStats(1, 1, 0, 1, 1, 2**40, 2**50, {}, (run,))).splitlines()
    assert max(map(len, lines)) <= 100


def test_a_handle_that_has_seen_nothing_can_be_printed():
    net = Net("two_lists", 2)
    with dit_cache(net, CONFIG) as cache:
        assert "0 of 0 calls reused" in str(cache)
        assert "blocks" in str(cache)


def test_sizes():
    assert [size(n) for n in (0, 1023, 1024, 1536, 2**20, 3 * 2**30, 2**50)] == [
        *("0 B", "1023 B", "1.0 KiB", "1.5 KiB", "1.0 MiB", "3.0 GiB"),
        "1024.0 TiB",
    ]


def test_on_decision_is_called_for_each_call_in_order():
    told = []
    cache = sampled(Net("two_lists", 2), CONFIG, runs=2, branches=2, on_decision=told.append)
    assert all(isinstance(each, CallRecord) for each in told)
    assert tuple(told) == cache.decisions


def test_on_decision_that_raises_ends_the_call_and_harms_nothing():
    """The next run is as if there had been none."""

    def refuse(record):
        if armed and record.step == 3:
            raise RuntimeError("enough")

    net, x, e, armed = Net("two_lists", 2), latents(), prompt(), True
    with dit_cache(net, CONFIG) as cache:
        expected = loop(net, x, steps=6, scoped=True, encoder_hidden_states=e)
    with dit_cache(net, CONFIG, on_decision=refuse) as cache:
        with pytest.raises(RuntimeError, match="enough"):
            loop(net, x, steps=6, scoped=True, encoder_hidden_states=e)
        armed = False
        assert torch.equal(loop(net, x, steps=6, scoped=True, encoder_hidden_states=e), expected)
        assert cache.stats.runs[-1].reused == 2


def test_on_decision_has_to_be_callable():
    net = Net("two_lists", 2)
    with pytest.raises(TypeError, match="on_decision"):
        dit_cache(net, CONFIG, on_decision="print")
    assert not any(module._forward_pre_hooks and type(module) is Net for module in [net])


def test_the_log_is_quiet_unless_asked(caplog):
    with caplog.at_level(logging.WARNING):
        sampled(Net("two_lists", 2), CONFIG)
    assert not [record for record in caplog.records if record.name == "dithooks"]
    with caplog.at_level(logging.DEBUG, logger="dithooks"):
        cache = sampled(Net("two_lists", 2), CONFIG)
    said = [record.getMessage() for record in caplog.records if record.name == "dithooks"]
    assert sum("step" in line and "branch" in line for line in said) == cache.stats.calls
    assert sum("reused (reuse)" in line for line in said) == 3
    assert [line for line in said if "run 0 over: 3 of 8 calls reused" in line]
    assert "attached" in said[0]
    assert "removed" in said[-1]


class Bar:
    """As much of a tqdm as is looked at."""

    def __init__(self, total, n=0, disable=False):
        self.total, self.n, self.disable, self.said = total, n, disable, []

    def set_postfix_str(self, text, refresh):
        assert refresh is False
        self.said.append(text)


@pytest.mark.parametrize(
    ("bars", "found"),
    [([Bar(8)], 0), ([Bar(7), Bar(8)], 1), ([Bar(8), Bar(8)], None), ([Bar(8, disable=True)], None), ([], None)],
)
def test_the_one_bar_that_counts_the_steps(monkeypatch, bars, found):
    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=types.SimpleNamespace(_instances=bars)))
    bar = find_bar(8, 0)
    assert (bar is None) == (found is None)
    if bar is not None:
        bar.show(2, 5)
    assert [each.said for each in bars] == [["reused 2 of 5"] if k == found else [] for k in range(len(bars))]


def test_a_pipelines_bar_tells_what_was_reused(capsys):
    """diffusers' own bar, in a loop as its pipelines have it; gone, it is not written to."""
    from tqdm.auto import tqdm

    net, scheduler, x = Net("two_lists", 2), FlowMatchEulerDiscreteScheduler(), latents()
    scheduler.set_timesteps(8)
    with torch.no_grad(), dit_cache(net, CONFIG, scheduler=scheduler), tqdm(total=8) as bar:
        for t in scheduler.timesteps:
            x = scheduler.step(net(x, encoder_hidden_states=prompt(), timestep=t.reshape(1)), t, x, return_dict=False)[
                0
            ]
            bar.update()
        assert bar.postfix == "reused 3 of 8"
    assert "reused 3 of 8" in capsys.readouterr().err


def test_marks_of_the_clock_and_of_what_cannot_be_timed():
    since = mark(torch.device("cpu"))
    assert is_ready(since)
    assert seconds_between(since, mark(None)) >= 0
    assert seconds_between(since, None) is None
    assert seconds_between(None, None) is None
    assert is_ready(None)


def test_events_are_read_when_the_device_has_come_to_them():
    """An accelerator's, played: nothing is waited for, and what is not over yet counts later."""

    class Event:
        done = False

        def __init__(self, at):
            self.at = at

        def query(self):
            return Event.done

        def elapsed_time(self, other):
            return other.at - self.at

    log = DecisionLog("net", 4, 2)
    number = log.begin_run()
    for step, (reuse, times) in enumerate([(False, (0, 1, 9, 10)), (False, (10, 11, 19, 20)), (True, (20, 22))]):
        log.record(number, step, 0, Decision(reuse, "reuse" if reuse else "mask"))
        log.time_call(number, reuse, [Event(at) for at in times])
    assert log.stats(0).runs[0].call_seconds is None
    Event.done = True
    (run,) = log.stats(0).runs
    assert run.call_seconds == pytest.approx(0.022)
    assert run.estimated_speedup == pytest.approx(3 * 10 / (2 * 10 + 2))
    assert run.measured_speedup == pytest.approx(2 * 10 / (10 + 2))


def test_several_ranges_are_told_apart_and_summed():
    stats = branch_stats(
        [CallRecord("a", 0, 0, 0, False, "mask", None), CallRecord("a", 0, 1, 0, True, "reuse", 0.5)], 4, 2
    )
    assert (stats.blocks_run, stats.blocks_total, stats.differences.max) == (6, 8, 0.5)
    one = CacheStats(2, 1, 1, 6, 8, 1, 2, {"mask": 1, "reuse": 1}, (RunStats("a", 0, (stats,), 1.0),))
    two = CacheStats(1, 1, 0, 4, 4, 0, 3, {"mask": 1}, (RunStats("b", 0, (), 1.0),))
    both = total([one, two])
    assert (both.calls, both.blocks_run, both.bytes_peak, both.reasons) == (3, 10, 5, {"mask": 2, "reuse": 1})
    assert [run.range for run in both.runs] == ["a", "b"]
