"""Policies that look at a call before they settle it: what they see, what that costs, and what is kept for it."""

import copy
import threading
import weakref
from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Counter as CountingScheduler
from toys import InPlace, Net, Pipe, latents, loop, prompt

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Fitted,
    Interval,
    Linear,
    MagnitudeRatio,
    Mask,
    Taylor,
    Threshold,
    dit_cache,
    timestep_scope,
)
from dithooks.demo import load_pipeline
from dithooks.engine import decider
from dithooks.engine.anchor import weighted_sum

SYNC = torch.ops.aten._local_scalar_dense.default
LOOKING = {
    "threshold": Threshold(0.3, max_warmup_steps=2),
    "sample": Threshold(0.3, max_warmup_steps=2, reduce="max"),
    "shared": Threshold(0.3, max_warmup_steps=2, separate_branches=False),
    "easy": EasyCache(0.4, max_warmup_steps=2),
    "budget": Budget(2.0),
    "mask": Mask("slow", dynamic=Threshold(0.3, max_warmup_steps=0)),
}
KNOWING = {
    "interval": Interval(2, 2),
    "mask": Mask("medium"),
    "magnitude": MagnitudeRatio((1.0, *[0.97] * 27), threshold=0.1),
}


def configs(policies):
    return [
        pytest.param(DitCacheConfig(cache_block_start=first, policy=policy, predictor=predictor), id=f"{name}-F{first}")
        for first, predictor in ((0, Linear()), (1, Taylor(2)))
        for name, policy in policies.items()
    ]


class Ops(TorchDispatchMode):
    """Counts what is called, and notes what it returns."""

    def __init__(self):
        super().__init__()
        self.calls, self.dtypes = Counter(), set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[func] += 1
        self.dtypes |= {
            each.dtype for each in (out if isinstance(out, (tuple, list)) else [out]) if torch.is_tensor(each)
        }
        return out


@pytest.fixture(scope="module")
def demo():
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def watch_calls(transformer):
    """The operations of each call of a transformer, from its first hook to its last."""
    seen = []

    def begin(*_):
        seen.append(Ops())
        seen[-1].__enter__()

    handles = [
        transformer.register_forward_pre_hook(begin, prepend=True),
        transformer.register_forward_hook(lambda *_: seen[-1].__exit__(None, None, None)),
    ]
    return seen, handles


def draw(pipe, **extra):
    return pipe(["penguin"], generator=torch.Generator().manual_seed(0), output_type="pt", **extra).images


@pytest.mark.parametrize("config", configs(LOOKING) + configs(KNOWING))
def test_what_a_decision_costs(demo, config):
    """No wait for the device where it is known beforehand, at most one a call where it is not; nothing in float64."""
    plain, handles = watch_calls(demo.transformer)
    draw(demo, num_inference_steps=12)
    for handle in handles:
        handle.remove()
    theirs = set.union(*(ops.dtypes for ops in plain))
    assert sum(ops.calls[SYNC] for ops in plain) == 0
    with dit_cache(demo, config) as cache:
        draw(demo, num_inference_steps=12)  # the first call of all learns
        cache.reset()
        seen, handles = watch_calls(demo.transformer)
        draw(demo, num_inference_steps=12)
        decisions, stats = cache.decisions, cache.stats
    for handle in handles:
        handle.remove()
    assert len(seen) == stats.calls == 24
    assert stats.reused_calls > 0
    waits = [ops.calls[SYNC] for ops in seen]
    looked = sum(each.value is not None for each in decisions)
    if config.when.metric is None:
        assert waits == [0] * 24
    else:
        assert max(waits) == 1
        assert sum(waits) == looked <= 24
    beforehand = ("warm-up", "mask", "budget", "cap", "end", "forced")
    assert not any(wait for wait, each in zip(waits, decisions, strict=True) if each.reason in beforehand)
    assert not (set.union(*(ops.dtypes for ops in seen)) - theirs) & {torch.float64, torch.complex64, torch.complex128}


@pytest.mark.parametrize("config", configs(LOOKING))
@pytest.mark.parametrize("kind", ["single", "in_place", "swapped", "positional", "two_lists"])
def test_the_first_run_decides_as_the_next(kind, config):
    """The first call does not know the wiring yet, and is looked at all the same."""
    pipe, x = Pipe(Net(kind)), latents()
    prompts = [None] if kind in ("single", "in_place") else [prompt(), prompt()]
    with dit_cache(pipe, config) as cache:
        first, made = pipe(x, steps=12, prompts=prompts), cache.decisions
        again, both = pipe(x, steps=12, prompts=prompts), cache.decisions
    assert torch.equal(first, again)
    assert [each[2:] for each in both[len(made) :]] == [each[2:] for each in made]
    assert {each.reuse for each in made} == {True, False}


def test_a_value_is_the_change_of_what_the_blocks_before_the_range_did():
    """By hand: hooks of our own on the first two blocks, whose work is compared with that of the last computed step."""
    net, x, work = Net("swapped"), latents(), []
    e, given = prompt(), {}
    net.blocks[0].register_forward_pre_hook(lambda _, args: given.update(h=args[0].clone()))
    net.blocks[1].register_forward_hook(lambda _, __, out: work.append(out[1] - given["h"]))
    with dit_cache(net, DitCacheConfig(cache_block_start=2, policy=Threshold(0.15, max_warmup_steps=1))) as cache:
        loop(net, x, steps=10, scoped=True, encoder_hidden_states=e)
        decisions = cache.decisions
    work = work[:1] + work[2:]  # the first call was made once more, to test its residual
    assert len(work) == len(decisions) == 10
    reference = None
    for now, each in zip(work, decisions, strict=True):
        if each.step:
            change = (now - reference).abs().mean() / reference.abs().mean()
            assert each.value == pytest.approx(float(change), rel=1e-4)
            assert each.reuse == (change < 0.15)
        if not each.reuse:
            reference = now
    assert {each.reuse for each in decisions} == {True, False}


def test_what_enters_the_range_is_kept_by_value():
    """Blocks that write into their input do not change what the next step is compared with."""
    net, x = Net("in_place"), latents()
    assert isinstance(net.blocks[0], InPlace)
    entering = []
    net.embed.register_forward_hook(lambda _, __, out: entering.append(out.clone()))
    with dit_cache(net, DitCacheConfig(policy=Threshold(10.0, max_warmup_steps=1))) as cache:
        loop(net, x, steps=3, scoped=True)
        values = [each.value for each in cache.decisions]
    entering = entering[:1] + entering[2:]
    for now, value in zip(entering[1:], values[1:], strict=True):
        assert value == pytest.approx(float((now - entering[0]).abs().mean() / entering[0].abs().mean()), rel=1e-4)


def test_blocks_that_run_in_another_order_than_listed():
    """The range, and the blocks before it, go over to where they belong when the first call has shown it."""

    class Backwards(Net):
        def forward(self, hidden_states, timestep):
            h = self.embed(hidden_states)
            temb = self.time(timestep.reshape(-1, 1)).expand(h.shape[0], -1)
            for block in reversed(self.blocks):
                h = block(h, temb)
            return self.proj(h)

    torch.manual_seed(0)
    net = Backwards()
    there = copy.deepcopy(net)
    there.blocks = nn.ModuleList(reversed(there.blocks))
    there.__class__ = Net
    config = DitCacheConfig(cache_block_start=2, policy=Threshold(0.15, max_warmup_steps=1), predictor=Linear())
    x, made = latents(), []
    for each in (net, there):
        with dit_cache(each, config) as cache:
            made.append((loop(each, x, steps=8, scoped=True), [d[2:] for d in cache.decisions], cache.stats.blocks_run))
    torch.testing.assert_close(made[0][0], made[1][0])
    assert made[0][2] == made[1][2]
    for here, other in zip(made[0][1], made[1][1], strict=True):
        assert here[:4] == other[:4]
        assert (here[4] or 0.0) == pytest.approx(other[4] or 0.0, rel=1e-4)


def test_threads_do_not_see_each_other():
    net, xs = Net("swapped"), [latents(), latents()]
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.2, max_warmup_steps=1), predictor=Linear())
    given = {"encoder_hidden_states": prompt()}

    def alone(x):
        with dit_cache(net, config):
            return loop(net, x, steps=10, scoped=True, **given)

    expected, got = [alone(x) for x in xs], [None, None]
    with dit_cache(net, config):

        def work(number):
            with torch.no_grad():
                for _ in range(3):
                    got[number] = loop(net, xs[number], steps=10, scoped=True, **given)

        threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


class TestMemory:
    STREAMS = (2 * 6 * 8 + 2 * 3 * 8) * 4  # bytes of image (2, 6, 8) and text (2, 3, 8) in float32

    @pytest.mark.parametrize(("predictor", "anchors"), [(Linear(), 2), (Taylor(2), 3), (Taylor(0), 1)])
    @pytest.mark.parametrize("branches", [1, 2])
    @pytest.mark.parametrize("depth", [3, 9])
    def test_anchors_times_streams_times_branches_whatever_the_blocks(self, predictor, anchors, branches, depth):
        pipe = Pipe(Net("swapped", depth))
        with dit_cache(pipe, DitCacheConfig(2, 2, predictor=predictor)) as cache:
            pipe(latents(), steps=12, prompts=[prompt() for _ in range(branches)])
            assert cache.stats.bytes_peak == anchors * branches * self.STREAMS
            assert cache.stats.bytes_held == 0

    def test_what_is_looked_at_counts(self):
        pipe = Pipe(Net("swapped"))
        with dit_cache(pipe, DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=2))) as cache:
            pipe(latents(), steps=12, prompts=[prompt()])
            assert cache.stats.bytes_peak == self.STREAMS + 2 * 6 * 8 * 4

    @pytest.mark.parametrize(("dtype", "share"), [("bfloat16", 0.5), ("float32", 1)])
    def test_in_another_dtype(self, dtype, share):
        pipe, x, e = Pipe(Net("swapped")), latents(), [prompt()]
        with dit_cache(pipe, DitCacheConfig(2, 2, predictor=Linear())):
            expected = pipe(x, steps=12, prompts=e)
        with dit_cache(pipe, DitCacheConfig(2, 2, predictor=Linear(), cache_dtype=dtype)) as cache:
            got = pipe(x, steps=12, prompts=e)
            assert cache.stats.bytes_peak == share * 2 * self.STREAMS
        assert got.dtype == x.dtype
        torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
        assert torch.equal(got, expected) == (dtype == "float32")

    def test_what_was_added_does_not_stay(self, monkeypatch):
        made = []

        def noted(*given):
            result = weighted_sum(*given)
            made.extend(weakref.ref(each) for each in result)
            return result

        monkeypatch.setattr(decider, "weighted_sum", noted)
        pipe = Pipe(Net("swapped"))
        with dit_cache(pipe, DitCacheConfig(2, 2, predictor=Linear())):
            left = []
            pipe(
                latents(),
                steps=12,
                prompts=[prompt()],
                at=lambda _: left.append(sum(ref() is not None for ref in made)),
            )
        assert len(made) == 10
        assert left == [0] * 12

    def test_kept_until_the_next_run_if_wanted(self):
        pipe = Pipe(Net("swapped"))
        with dit_cache(pipe, DitCacheConfig(2, 2, free_at_end=False)) as cache:
            pipe(latents(), prompts=[prompt()])
            assert cache.stats.bytes_held == self.STREAMS

    def test_freed_when_the_other_expert_ends_the_run(self):
        class Experts(Pipe):
            def __init__(self):
                super().__init__(Net())
                self.transformer_2 = Net()

            def __call__(self, x, steps=8):
                self.scheduler.set_timesteps(steps)
                for step, t in enumerate(self.scheduler.timesteps):
                    x = x - (self.transformer if step < 4 else self.transformer_2)(x, timestep=t / 1000) / steps
                    self.scheduler.step()

        pipe = Experts()
        with dit_cache(pipe, DitCacheConfig(0, 2)) as cache:
            pipe(latents())
            assert cache.stats.reused_calls == 4
            assert cache.stats.bytes_held == 0


class TestSaid:
    def said(self, recwarn):
        return [str(each.message) for each in recwarn if "transformer" in str(each.message)]

    def test_the_smallest_difference_seen(self, recwarn):
        pipe = Pipe(Net())
        with dit_cache(pipe, DitCacheConfig(cache_block_start=1, policy=Threshold(1e-4, max_warmup_steps=2))) as cache:
            pipe(latents())
            smallest = min(each.value for each in cache.decisions if each.value is not None)
            pipe(latents())
        (message,) = self.said(recwarn)
        assert "a run of 8 steps reused nothing" in message
        assert f"the smallest difference seen was {smallest:.3g}, residual_diff_threshold is 0.0001" in message

    def test_all_of_it_warm_up(self, recwarn):
        pipe = Pipe(Net())
        with dit_cache(pipe, DitCacheConfig(policy=Threshold(0.1))):
            pipe(latents())
        (message,) = self.said(recwarn)
        why = "warm-up: 8, max_warmup_steps is 8 (Threshold(residual_diff_threshold=0.1))"
        assert f"nothing will be reused in a run of 8 steps: {why}" in message

    def test_a_target_out_of_reach(self, recwarn):
        pipe, x = Pipe(Net()), latents()
        plain = pipe(x)
        with dit_cache(pipe, DitCacheConfig(cache_block_start=3, policy=Budget(3.0))) as cache:
            pipe(x)
            pipe(x)
            pipe(x, steps=9)  # the same cause, with other numbers
            assert [each.reuse for each in cache.decisions] == [False, *[True] * 7] * 2 + [False, *[True] * 8]
        (message,) = self.said(recwarn)
        assert "target_speedup=3 cannot be reached: with 2 of 5 blocks left out in at most 7 of 8 steps" in message
        assert "it is 1.54. Choose a longer range" in message  # 40 blocks over 40 − 2·7 of them
        assert torch.equal(pipe(x), plain)

    def test_each_cause_is_said_once(self, recwarn):
        """Over all transformers of a handle: they have one policy."""

        class Both:
            def __init__(self):
                self.transformer, self.transformer_2, self.scheduler = Net(), Net(), CountingScheduler()

            def __call__(self, x, steps):
                self.scheduler.set_timesteps(steps)
                made = []
                for t in self.scheduler.timesteps:
                    for net in (self.transformer, self.transformer_2):
                        made.append(net(x, t / 1000))
                    x = made[-1]
                    self.scheduler.step()
                return made

        pipe, x = Both(), latents()
        plain = pipe(x, 1)
        with torch.no_grad(), dit_cache(pipe, DitCacheConfig(policy=Budget(2.0))) as cache:
            made = pipe(x, 1)
            pipe(x, 1)
            assert cache.stats.reused_calls == 0
            pipe.transformer(latents(), torch.tensor(0.5))  # the scheduler is at its end
            pipe.transformer(latents(), torch.tensor(0.5))
        assert all(map(torch.equal, made, plain))
        short, over = self.said(recwarn)
        assert "the run's steps are 1, and max_warmup_steps is 1, so that none is left to reuse" in short
        assert "needs the number of steps, which is not known" in over  # that of the schedule that is over is another's

    def test_a_budget_without_a_number_of_steps(self, recwarn):
        net, x = Net(), latents()
        plain = net(x, torch.tensor(1.0))
        with dit_cache(net, DitCacheConfig(policy=Budget(2.0))) as cache:
            for value in (1.0, 0.75, 0.5):
                made = net(x, torch.tensor(value))
                assert value < 1 or torch.equal(made, plain)
            assert cache.stats.reused_calls == 0
            for step in range(12):
                with timestep_scope(step, steps=12):
                    net(x + step, torch.tensor(1 - step / 12))
            assert cache.stats.reused_calls == 6
        (message,) = [str(each.message) for each in recwarn if "Net" in str(each.message)]
        assert message.startswith("Net: Budget(2) needs the number of steps")
        assert "timestep_scope(step, steps=...)" in message

    def test_coefficients_of_another_schedule(self, recwarn):
        pipe = Pipe(Net())
        plan = Fitted((None, None, (1.5, -0.5), None, (1.5, -0.5), None, (1.5, -0.5), None))
        for steps, count in ((8, 0), (9, 1)):
            with dit_cache(pipe, DitCacheConfig(policy=Interval(1, 2), predictor=plan)):
                pipe(latents(), steps=steps)
            assert len([each for each in self.said(recwarn) if "coefficients" in each]) == count

    def test_numbers_that_are_none(self):
        """NaN in a run is computed, counted, and does not stay."""
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(cache_block_start=1, policy=Threshold(0.5, max_warmup_steps=1))) as cache:
            for step in range(8):
                with timestep_scope(step):
                    net(x * float("nan") if step == 3 else x + 0.01 * step, torch.tensor(1 - step / 8))
            reasons = [each.reason for each in cache.decisions]
        # Nothing of step 3 is kept, so step 4 is computed, too; from 5 on all is well again.
        assert reasons == ["warm-up", "reuse", "reuse", "non-finite", "no anchor", "reuse", "reuse", "reuse"]

    def test_a_call_that_leaves_the_range_out(self):
        """It is counted, and nothing of before is taken for its own."""

        class Leaving(Net):
            leave = False

            def forward(self, hidden_states, timestep):
                h = self.embed(hidden_states)
                temb = self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks[:1] if self.leave else self.blocks:
                    h = block(h, temb)
                return self.proj(h)

        net, x = Leaving(), latents()
        with dit_cache(net, DitCacheConfig(cache_block_start=1, policy=Threshold(9.0, max_warmup_steps=1))) as cache:
            for step in range(5):
                net.leave = step == 2
                with timestep_scope(step):
                    net(x, torch.tensor(1 - step / 5))
            assert [each.reason for each in cache.decisions] == [
                "warm-up",
                "reuse",
                "not reached",
                "no anchor",
                "reuse",
            ]
            assert cache.stats.calls == 5
