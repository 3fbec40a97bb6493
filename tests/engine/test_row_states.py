"""What is the same for all rows of a batch is found out once; memory is that of all plans together."""

import sys
import threading

import pytest
import torch
from test_rows import PLANS, WIDTH, Loop, Small, by_hand, latents, warm_up

from dithooks import DitCacheConfig, Mask, dit_cache
from dithooks.engine.weights_version import BatchWeightsVersion, WeightsVersion
from dithooks.integrations.peft_adapters import PeftAdapters

pytestmark = pytest.mark.core

CALLS_OF_A_ROW = 47  # Python calls at most that one more row of a batch costs, where all are reused


@pytest.fixture
def reads(monkeypatch):
    """Whether each reading of the weights' version walked through the model."""
    seen, version = [], WeightsVersion.version

    def noted(self, walk):
        seen.append(walk)
        return version(self, walk)

    monkeypatch.setattr(WeightsVersion, "version", noted)
    return seen


def test_weights_are_looked_at_once_for_a_batch_whatever_the_plans(reads):
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        for number in range(6):
            loop.add(number, number, plan=PLANS["bc"[number % 2]])
        warm_up(model, cache)
        reads.clear()
        loop.tick(*range(6))
        assert reads == [True]  # all are new: the model is walked through
        loop.tick(0, 3)  # planned to reuse
        assert reads == [True, False]
        loop.add("new", 9, plan=PLANS["b"])
        loop.tick(0, "new", 1, 2)
        assert reads == [True, False, False, True]  # once without a walk, and once for the row whose run is new


def test_weights_that_change_between_two_batches_are_noticed_for_every_row():
    """Rows that were planned to be reused are computed after the change, and reused from then on."""
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        loop = Loop(model, cache)
        for number, name in enumerate("ab"):
            loop.add(name, number, plan=DitCacheConfig(policy=Mask((1, 1, 0, 0, 0, 0))))
        warm_up(model, cache)
        loop.tick("a", "b")
        loop.tick("a", "b")
        model.passed()
        loop.tick("a", "b")
        assert model.passed() == []
        with torch.no_grad():
            for block in model.blocks:
                block.gain.mul_(2.0)
        loop.tick("a", "b")
        assert model.passed() == [2]
        assert [each.reason for each in cache.decisions[-2:]] == ["weights"] * 2
        loop.tick("a", "b")
        assert model.passed() == []  # and goes on with what was computed then


def test_each_thread_reads_the_weights_of_its_own_batch():
    net = Small()
    weights = BatchWeightsVersion(WeightsVersion(net, PeftAdapters()))
    weights.begin()
    assert weights.version(walk=False) == 0
    with torch.no_grad():
        net.blocks[0].gain.mul_(2.0)
    found = []
    other = threading.Thread(target=lambda: (weights.begin(), found.append(weights.version(walk=False))))
    other.start()
    other.join()
    assert (weights.version(walk=False), found) == (0, [1])  # as read for this batch, which is under way
    weights.begin()
    assert weights.version(walk=False) == 1


def test_the_most_memory_is_that_of_all_plans_together():
    model = Small()
    with dit_cache(model, PLANS["a"]) as cache:
        warm_up(model, cache)
        cache.reset()
        loop = Loop(model, cache)
        for number in range(6):
            loop.add(number, number, plan=PLANS["bc"[number % 2]])
        loop.tick(*range(6))
        residual = 5 * WIDTH * 4  # tokens, numbers, bytes of float32
        assert cache.stats.bytes_held == 6 * residual
        for number in range(6):
            cache.forget(number)
        assert (cache.stats.bytes_held, cache.stats.bytes_peak) == (0, 6 * residual)


def calls_of_a_batch(rows):
    """Python calls within dithooks of one batch of rows that are all reused; checks what they are drawn as."""
    model, mask, calls = Small(), (1, 1, 0, 0, 0, 0), 0
    plan = DitCacheConfig(policy=Mask(mask))

    def note(frame, event, arg):
        nonlocal calls
        calls += event == "call" and "/dithooks/" in frame.f_code.co_filename

    with dit_cache(model, plan) as cache:
        loop = Loop(model, cache)
        for number in range(rows):
            loop.add(number, number, plan=plan)
        warm_up(model, cache)
        for _ in range(3):
            loop.tick(*range(rows))
        sys.setprofile(note)
        try:
            loop.tick(*range(rows))
        finally:
            sys.setprofile(None)
        for number in range(rows):
            assert torch.equal(loop.x[number], by_hand(model, latents(number), mask)[3])
        assert [each.reuse for each in cache.decisions[-rows:]] == [True] * rows
    return calls


def test_another_row_of_a_batch_costs_few_calls():
    one, eight = calls_of_a_batch(1), calls_of_a_batch(8)
    assert 20 < (eight - one) / 7 <= CALLS_OF_A_ROW, (one, eight)
