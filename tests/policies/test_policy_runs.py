"""Policies in whole runs: what is decided against plain loops over what hooks of the test's own have seen."""

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from policies_by_hand import (
    assert_alike,
    budget_by_hand,
    computed,
    drive,
    easy_by_hand,
    is_tie,
    magnitude_by_hand,
    nearest_by_hand,
    ratios_of,
    threshold_by_hand,
)
from toys import Net, Pipe, latents, prompt

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Interval,
    MagnitudeRatio,
    Mask,
    Threshold,
    dit_cache,
    timestep_scope,
)
from dithooks.policies.history import Schedule

pytestmark = pytest.mark.core


class Watched:
    """Runs a model by a walk of its inputs and sees what its blocks see, with hooks of its own.

    ``first`` is the first block of the range, which goes on to the end: a policy looks at ``effect``, what the blocks
    before it did (or ``input``, what enters block 0); ``output`` is the range's.
    """

    def __init__(self, kind="single", first=1, steps=16, batch=2, seed=0, pace=0.08):
        torch.manual_seed(seed)
        self.net, self.first, self.steps = Net(kind, depth=4), first, steps
        self.pipe, self.seen, self.key = Pipe(self.net), {}, None
        self.prompts = [prompt(batch), prompt(batch)] if kind == "swapped" else [None]
        walk = torch.cumsum(torch.randn(steps, batch, 6, 4) * pace * (1 + 3 * torch.rand(steps, 1, 1, 1)), 0)
        self.inputs = latents(batch) + walk
        self.net.embed.register_forward_hook(lambda _, args, out: self.note("input", out))
        if first:
            self.net.blocks[0].register_forward_pre_hook(self._before, with_kwargs=True)
            self.net.blocks[first - 1].register_forward_hook(self._after, with_kwargs=True)
        self.net.proj.register_forward_pre_hook(lambda _, args: self.note("output", args[0]))

    def note(self, what, value):
        self.seen[(what, *self.key)] = value.double().numpy().copy()

    def _before(self, _, args, kwargs):
        self.entered = (args[0] if args else kwargs["hidden_states"]).double()

    def _after(self, _, args, kwargs, output):
        picture = output[1] if isinstance(output, tuple) else output
        self.note("arrived", picture)
        self.note("effect", picture.double() - self.entered)

    def __call__(self, begin=0, absent=()):
        self.pipe.scheduler.set_timesteps(self.steps)
        self.pipe.scheduler.begin_index = begin
        self.seen.clear()
        for step in range(begin, self.steps):
            for number, e in enumerate(self.prompts):
                self.key = step, number
                if self.key not in absent:
                    given = {} if e is None else {"encoder_hidden_states": e}
                    self.net(self.inputs[step], timestep=self.pipe.scheduler.timesteps[step] / 1000, **given)
            self.pipe.scheduler.step()

    def told(self, policy, **call):
        """Decisions by branch, of the range from ``first`` on."""
        with dit_cache(self.pipe, DitCacheConfig(cache_block_start=self.first, policy=policy), verify=False) as cache:
            self(**call)
            told = {}
            for each in cache.decisions:
                told.setdefault(each.branch, {})[each.step] = (each.reuse, each.reason, each.value)
            assert cache.stats.reused_calls == sum(each.reuse for each in cache.decisions)
            assert cache.stats.reasons == {
                reason: sum(each.reason == reason for each in cache.decisions)
                for reason in {each.reason for each in cache.decisions}
            }
        return told

    def change(self, number=0, how="mean"):
        """What is to be seen at a step after a refresh at another."""
        what = "effect" if self.first else "input"

        def see(step, refreshed):
            now, before = self.seen[what, step, number], self.seen[what, refreshed, number]
            if how == "mean":
                return float(np.abs(now - before).mean() / np.abs(before).mean())
            return float(max(np.abs(a - b).mean() / np.abs(b).mean() for a, b in zip(now, before, strict=True)))

        return see

    def rate(self, number=0, how="mean"):
        """Expected change of a step, given the last two computed ones."""
        what = "arrived" if self.first else "input"

        def see(step, computed):
            s, r = computed[-1], computed[-2]
            x, y = (lambda t: self.seen[what, t, number]), (lambda t: self.seen["output", t, number])
            samples = [slice(None)] if how == "mean" else range(len(x(s)))
            return float(
                max(
                    np.abs(y(s)[n] - y(r)[n]).mean()
                    / np.abs(x(s)[n] - x(r)[n]).mean()
                    * np.abs(x(step)[n] - x(step - 1)[n]).mean()
                    / np.abs(y(s)[n]).mean()
                    for n in samples
                )
            )

        return see


def mixed(told, *reasons):
    """Nothing is shown by a run in which all went one way."""
    assert {"reuse", *reasons} <= {why for _, why, _ in told.values()}


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("how", ["mean", "max"])
class TestRunsThatLook:
    """Recomputed from what the model's blocks gave; in float32, a residual of 0.3 beside 1 has 1e-6 or so of noise."""

    LIMITS = {0: 0.25, 1: 0.16, 2: 0.16}  # noqa: RUF012

    def test_threshold(self, first, how):
        watched, limit = Watched(first=first), self.LIMITS[first]
        told = watched.told(Threshold(limit, 3, max_continuous_cached_steps=3, reduce=how))
        wanted = threshold_by_hand(limit, 16, watched.change(how=how), warm=3, row=3)
        mixed(wanted, "threshold", "warm-up")
        assert_alike(told[0], wanted, rel=1e-4)

    def test_threshold_with_branches_of_their_own(self, first, how):
        watched, limit = Watched("swapped", first), self.LIMITS[first]
        told = watched.told(Threshold(limit, 2, max_accumulated_diff=2.5 * limit, reduce=how))
        for number in (0, 1):
            wanted = threshold_by_hand(limit, 16, watched.change(number, how), warm=2, total=2.5 * limit)
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_budget(self, first, how):
        watched = Watched("swapped", first)
        told = watched.told(Budget(1.4, 2, reduce=how))
        see = [watched.change(number, how) for number in (0, 1)]
        here = {"blocks": 4, "skipped": 4 - first, "branches": 2}
        by_hand = budget_by_hand(1.4, 16, lambda n, t, s: see[n](t, s), warm=2, **here)
        for number, wanted in enumerate(by_hand):
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_easycache(self, first, how):
        watched = Watched("swapped", first)
        told = watched.told(EasyCache(0.5, 3, max_continuous_cached_steps=4, reduce=how))
        for number in (0, 1):
            wanted = easy_by_hand(0.5, 16, watched.rate(number, how), warm=3, row=4)
            mixed(wanted, "threshold")
            assert_alike(told[number], wanted, rel=1e-4)

    def test_mask_with_a_threshold(self, first, how):
        watched, limit = Watched(first=first), self.LIMITS[first]
        bits = (1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0)
        told = watched.told(Mask(bits, dynamic=Threshold(limit, 0, reduce=how)))[0]
        see, refreshed, wanted = watched.change(how=how), None, {}
        for t, bit in enumerate(bits):
            value = None if bit else see(t, refreshed)
            why = "mask" if bit else "reuse" if value < limit else "threshold"
            refreshed = refreshed if why == "reuse" else t
            wanted[t] = (why == "reuse", why, value)
        mixed(wanted, "threshold", "mask")
        assert_alike(told, wanted, rel=1e-4)


class TestSharedDecisions:
    @pytest.mark.parametrize(
        "policy",
        [
            Threshold(0.1, 2, max_continuous_cached_steps=3, separate_branches=False),
            Threshold(0.1, 2, max_accumulated_diff=0.15, last_steps_computed=2, separate_branches=False),
            Threshold(0.1, 2, max_cached_steps=4, separate_branches=False),
            Budget(1.5, 2, separate_branches=False),
            EasyCache(0.5, 3, separate_branches=False),
            Mask((1, 1, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 1, 0, 0), dynamic=Threshold(0.1, 0, separate_branches=False)),
        ],
        ids=str,
    )
    def test_the_first_branch_decides_for_both(self, policy):
        watched = Watched("swapped")
        told = watched.told(policy)
        mixed(told[0])
        assert {t: each[:2] for t, each in told[0].items()} == {t: each[:2] for t, each in told[1].items()}
        assert {value for _, _, value in told[1].values()} == {None}

        def alone(policy):
            watched = Watched("swapped")
            watched.prompts = watched.prompts[:1]
            return watched.told(policy)[0]

        assert_alike(told[0], alone(policy), rel=1e-6)

    def test_branches_of_their_own_differ_here(self):
        """… so that the test above can fail."""
        told = Watched("swapped").told(Threshold(0.1, 2, max_continuous_cached_steps=3))
        assert computed(told[0]) != computed(told[1])

    def test_lands_on_the_budget_in_both(self):
        told = Watched("swapped", steps=20).told(Budget(1.5, 2, separate_branches=False))
        assert [computed(each).count("0") for each in told.values()] == [9, 9]  # 20·(1 − 1/1.5)·4/3 = 8.9


class TestSteppedRuns:
    def test_budget_of_a_run_that_begins_later(self):
        watched = Watched("swapped", steps=20)
        told = watched.told(Budget(1.5, 2), begin=6)
        see = [watched.change(number) for number in (0, 1)]
        here = {"warm": 2, "first": 6, "blocks": 4, "skipped": 3, "branches": 2}
        by_hand = budget_by_hand(1.5, 20, lambda n, t, s: see[n](t, s), **here)
        for number, wanted in enumerate(by_hand):
            assert list(wanted) == list(range(6, 20))
            mixed(wanted, "threshold", "warm-up")
            assert_alike(told[number], wanted, rel=1e-4)
        assert sum(computed(each).count("0") for each in told.values()) == 12  # 28·(1 − 1/1.5)·4/3 = 12.4

    @settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(
        steps=st.integers(6, 20),
        begin=st.integers(0, 4),
        target=st.floats(1.1, 8.0),
        seed=st.integers(0, 99),
        kind=st.sampled_from(["single", "swapped"]),
    )
    @pytest.mark.filterwarnings("ignore:.*was not met.*", "ignore:.*reused nothing.*")
    @pytest.mark.filterwarnings("ignore:.*nothing will be reused.*", "ignore:.*cannot be reached.*")
    def test_budget_by_block_executions(self, steps, begin, target, seed, kind):
        watched = Watched(kind, first=0, steps=steps, seed=seed, pace=0.3)
        total, calls = steps - begin, len(watched.prompts)
        wanted = total * (1 - 1 / target)
        assume(not any(is_tie(wanted + n / 4) for n in range(4)))
        with torch.no_grad():
            told = watched.told(Budget(target), begin=begin)
        assert len(told) == calls
        reused = sum(computed(each).count("0") for each in told.values())
        assert reused == min(nearest_by_hand(total * calls, target, 4, 4), (total - 1) * calls)

    def test_other_policies_of_a_run_that_begins_later(self):
        watched = Watched(steps=16)
        told = watched.told(Threshold(0.1, 2), begin=8)[0]
        wanted = threshold_by_hand(0.1, 16, watched.change(), warm=2, first=8)
        mixed(wanted, "warm-up", "threshold")
        assert_alike(told, wanted, rel=1e-4)
        ratios = ratios_of(3, 16)
        told = watched.told(MagnitudeRatio(ratios, 0.2), begin=8)[0]
        wanted = magnitude_by_hand(ratios, 0.2, 4, 0.2, first=8)
        mixed(wanted, "no anchor")
        assert_alike(told, wanted)

    def test_schedules_and_masks(self):
        watched = Watched("swapped", first=0, steps=12)
        for policy in (Interval(2, 3), Mask("medium"), Mask((1, 0, 0, 1, 0, 0)), MagnitudeRatio(ratios_of(4, 8), 0.2)):
            told = watched.told(policy)
            mixed(told[0])
            for number in (0, 1):
                assert_alike(told[number], drive(policy, Schedule(12), number=number))

    def test_a_mask_is_resampled_by_the_schedulers_noise_levels(self):
        """The toy's σ fall evenly from 1, a step 1/12; the mask was made for 4 steps at σ = 1, 0.9, 0.8, 0.4."""
        watched = Watched(first=0, steps=12)
        told = watched.told(Mask((1, 1, 1, 0), (1.0, 0.9, 0.8, 0.4)))[0]
        # K' = 9: j·3/9 → q = 0, ⅓, ⅔, 1, 1⅓, 1⅔, 2, 2⅔, 3⅓; the 12 steps' places: 0, .83, 1.67, 2.13, 2.33, 2.54, 2.75,
        # 2.96, 3.17, 3.38, 3.58, 3.79. Nearest: 0, 0→1, 1→2, 1→3, 2→4, 2→5, 3→6, 6→7, 9 (3.38)
        assert computed(told) == "111111110100"

    def test_two_runs_are_judged_alike(self):
        watched = Watched()
        policy = Threshold(0.1, 3, max_cached_steps=5)
        with dit_cache(watched.pipe, DitCacheConfig(cache_block_start=1, policy=policy)) as cache:
            watched(), watched()
            runs = [[each[2:] for each in cache.decisions if each.run == number] for number in (0, 1)]
        assert runs[0] == runs[1]
        assert any(each.reuse for each in cache.decisions)


class TestNoNumbers:
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize(
        "policy",
        [Threshold(5.0, 2), EasyCache(50.0, 2), Budget(1.2, 2), Mask((1, 1, *[0] * 10), dynamic=Threshold(5.0, 0))],
        ids=lambda policy: type(policy).__name__,
    )
    def test_in_the_input_mean_compute(self, policy, first, bad):
        """At step 5 alone: it is computed, and nothing of it is kept, so that the next is computed, too."""
        watched = Watched(first=first, steps=12)
        if isinstance(policy, Threshold | Mask | EasyCache):
            assert watched.told(policy)[0][5][:2] == (True, "reuse")
        watched.inputs[5, 0, 2, 1] = bad
        told = watched.told(policy)[0]
        assert told[5][:2] == (False, "non-finite")
        assert not math.isfinite(told[5][2])
        assert told[6][:2] == (False, "no anchor")
        later = [told[t][1] for t in range(7, 12)]
        assert "non-finite" not in later
        assert "reuse" in later

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_one_sample_of_a_batch_is_enough(self, bad):
        for how in ("mean", "max"):
            watched = Watched(first=0, steps=12, batch=3)
            watched.inputs[6, 2] = bad
            assert watched.told(Threshold(5.0, 2, reduce=how))[0][6][:2] == (False, "non-finite")


class TestReduce:
    def test_one_sample_that_moves_counts_for_the_batch_only_by_max(self):
        watched = Watched(first=0, steps=10, batch=8, pace=0.01)
        watched.inputs[5:, 3] += 1.0
        by = {how: watched.told(Threshold(0.35, 2, reduce=how))[0] for how in ("mean", "max")}
        assert by["max"][5][:2] == (False, "threshold")
        assert by["mean"][5][:2] == (True, "reuse")
        assert by["max"][5][2] > 3 * by["mean"][5][2]


class TestWhatIsSaid:
    def test_a_threshold_never_reached_is_named_with_numbers(self):
        watched = Watched(steps=8)
        with pytest.warns(UserWarning, match="reused nothing") as said:
            told = watched.told(Threshold(1e-6, 2))[0]
        least = min(value for _, _, value in told.values() if value is not None)
        text = str(said[0].message)
        assert f"the smallest difference seen was {least:.3g}, residual_diff_threshold is 1e-06" in text
        assert "(calls computed for warm-up: 2, threshold: 6)" in text

    def test_warm_up_to_the_end(self):
        with pytest.warns(UserWarning, match="nothing will be reused in a run of 8 steps: warm-up: 8"):
            Watched(steps=8).told(Threshold(0.5, 8))

    def test_without_the_number_of_steps(self):
        net, x = Net(), latents()
        plain = net(x, torch.tensor(0.5))
        for policy in (Budget(2.0), Mask("fast")):
            with (
                dit_cache(net, DitCacheConfig(policy=policy)),
                pytest.warns(UserWarning, match=r"or write timestep_scope\(step, steps=...\)"),
            ):
                assert torch.equal(net(x, torch.tensor(0.5)), plain)
        with (
            pytest.warns(UserWarning, match="the number of steps is not known"),
            dit_cache(net, DitCacheConfig(policy=Mask((1, 0, 1)))),
        ):
            net(x, torch.tensor(0.5))

    def test_scopes_tell_it(self):
        net, x = Net(), latents()
        with dit_cache(net, DitCacheConfig(policy=Budget(2.0, 1))) as cache:
            for step in range(10):
                with timestep_scope(step, steps=10):
                    x = x - 0.1 * net(x, torch.tensor(1 - step / 10))
            assert cache.stats.reused_calls == 5
