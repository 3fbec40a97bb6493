"""Steps at which one branch of guidance alone is computed: against loops in plain torch that hold the difference."""

import dataclasses
import threading

import pytest
import torch
from torch import nn
from toys import Counter, Net, latents, prompt

from dithooks import DitCacheConfig, Fitted, Mask, dit_cache
from dithooks.environment.torch_api import OutOfMemoryError
from dithooks.errors import InvalidSetting
from dithooks.integrations.dispatch import BlockIntegrations
from dithooks.policies.conditional import Conditional
from dithooks.policies.history import Schedule
from dithooks.stats.step_pictures import step_pictures

pytestmark = pytest.mark.core

# ● ● ◐ ○ ◐ ● ◐ ○: at steps 2, 4 and 6 one branch alone is computed.
MASK = (1, 1, 1, 0, 1, 1, 1, 0)
ALONE = (0, 0, 1, 0, 1, 0, 1, 0)
WEIGHTS = (None, None, None, (1.5, -0.5), None, None, None, (1.25, -0.25))
PICTURE = "●●◐○◐●◐○"
STEPS = len(MASK)
SCALE = 3.0


def config(branch=0, in_batch=False, corrections=None, **more):
    predictor = Fitted(WEIGHTS, corrections=corrections)
    return DitCacheConfig(
        policy=Mask(MASK, conditional=Conditional(branch, ALONE, in_batch)),
        predictor=predictor,
        payload="output",
        **more,
    )


class Guided:
    """A pipeline that calls its transformer twice a step, or once on a batch of both, and guides."""

    def __init__(self, net, order=(0, 1), in_batch=False):
        self.transformer, self.scheduler, self.order, self.in_batch = net, Counter(), order, in_batch

    def __call__(self, x, prompts, between=None, twos=None):
        self.scheduler.set_timesteps(STEPS)
        for step, t in enumerate(self.scheduler.timesteps):
            x = x - self.guided(x, t / 1000, prompts, step, between, twos) / STEPS
            self.scheduler.step()
        return x

    def guided(self, x, t, prompts, step, between, twos):
        if self.in_batch:
            given = torch.cat([x] * len(prompts))
            made = self.transformer(given, t, encoder_hidden_states=torch.cat([*prompts])).chunk(len(prompts))
            return made[1] + SCALE * (made[0] - made[1])
        made = {}
        for number in self.order:
            if number and twos is not None and step not in twos:
                return made[0]  # without guidance
            if number != self.order[0] and between is not None:
                between(step)
            made[number] = self.transformer(x, t, encoder_hidden_states=prompts[number])
        return made[1] + SCALE * (made[0] - made[1])


class ByHand:
    """Both branches of a run, in plain torch: what each returns at a step, and what of it was computed."""

    def __init__(self, net, prompts, alone=0, corrections=None, kept=lambda each: each, forecast=lambda each: each):
        self.net, self.prompts, self.alone, self.corrections = net, prompts, alone, corrections
        self.kept, self.forecast = kept, forecast
        self.raw, self.apart, self.computed = ([], []), None, 0

    def __call__(self, x, step):
        t = torch.tensor(1 - step / STEPS)
        if not MASK[step]:
            (a, b), raw = WEIGHTS[step], self.raw
            return [self.forecast(a * each[0] + b * each[1]) for each in raw]
        one = self.computing(x, t, self.alone)
        if ALONE[step]:
            other = one + self.apart
        else:
            other = self.computing(x, t, 1 - self.alone)
            self.apart = self.kept(other - one)
        for number, each in ((self.alone, one), (1 - self.alone, other)):
            self.raw[number].insert(0, self.kept(each))
        chosen = None if self.corrections is None else self.corrections[step]
        if chosen is None:
            return [one, other] if self.alone == 0 else [other, one]
        return [sum(w * each for w, each in zip(chosen, raw, strict=False)) for raw in self.raw]

    def computing(self, x, t, number):
        self.computed += 1
        return self.net(x, t, encoder_hidden_states=self.prompts[number])

    def run(self, x):
        for step in range(STEPS):
            first, second = self(x, step)
            x = x - (second + SCALE * (first - second)) / STEPS
        return x


@pytest.fixture(autouse=True)
def _without_gradients():
    with torch.no_grad():
        yield


@pytest.fixture
def case():
    torch.manual_seed(3)
    return Net("swapped").double(), latents().double(), [prompt().double(), prompt().double()]


def by_step(cache, run=0):
    return {(each.step, each.branch): (each.reuse, each.reason) for each in cache.decisions if each.run == run}


class TestTwoCalls:
    def test_the_other_call_keeps_its_distance(self, case):
        net, x, prompts = case
        hand = ByHand(net, prompts)
        wanted, pipe = hand.run(x), Guided(net)
        plain = pipe(x, prompts)
        net.executions = 0
        with dit_cache(pipe, config()) as cache:
            for _ in range(2):  # a second run begins anew
                torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)
            stats = cache.stats
            assert step_pictures(cache.decisions) == {"transformer": PICTURE}
        assert net.executions == 2 * 5 * hand.computed == 2 * 5 * 9
        assert (stats.computed_calls, stats.reused_calls, stats.blocks_run) == (18, 14, 90)
        assert stats.reasons == {"mask": 18, "conditional only": 6, "reuse": 8}
        assert (stats.bytes_held, stats.bytes_peak) == (0, 5 * x.nbytes)  # two outputs of each branch, and δ
        assert (plain - wanted).abs().max() > 1e-3

    def test_calls_in_the_other_order(self, case):
        """The branch that is computed alone comes first, whichever its prompt is; if it comes second, both are."""
        net, x, prompts = case
        pipe = Guided(net, order=(1, 0))
        with dit_cache(pipe, config(branch=0)) as cache:  # the first call, of the second prompt
            torch.testing.assert_close(pipe(x, prompts), ByHand(net, prompts, alone=1).run(x), rtol=0, atol=1e-12)
            assert cache.stats.reused_calls == 3 + 4
        with dit_cache(pipe, config(branch=1)) as cache:
            pipe(x, prompts)
            seen = by_step(cache)
        assert [seen[step, 0] for step in (2, 4, 6)] == [(False, "no conditional output")] * 3
        assert [seen[step, 1] for step in (2, 4, 6)] == [(False, "mask")] * 3

    def test_outputs_are_corrected_whether_computed_or_made(self, case):
        net, x, prompts = case
        corrections = (None, None, (1.125, -0.125), None, (0.75, 0.25), (1.25, -0.5), (0.875, 0.25), None)
        wanted = ByHand(net, prompts, corrections=corrections).run(x)
        pipe = Guided(net)
        with dit_cache(pipe, config(corrections=corrections)):
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)

    def test_outputs_kept_in_bfloat16_on_the_host(self, case):
        """What is computed at a step is added to as it is; the difference is kept rounded."""
        net, x, prompts = case
        rounded = lambda each: each.bfloat16().double()  # noqa: E731
        wanted = ByHand(net, prompts, kept=rounded, forecast=rounded).run(x)
        pipe = Guided(net)
        with dit_cache(pipe, config(cache_dtype="bfloat16", cache_device="cpu")) as cache:
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=5e-4)  # a forecast is rounded in between
            assert cache.stats.bytes_peak == 5 * x.nbytes // 4 + x.nbytes  # the last: this step's, as it is
            assert cache.stats.bytes_held == 0

    def test_half_precision_is_summed_in_single(self):
        """In float16, v and δ are rounded, and so is their sum, once."""
        torch.manual_seed(3)
        net, x, prompts = Net("swapped").half(), latents().half(), [prompt().half(), prompt().half()]
        pipe, made = Guided(net), []
        with dit_cache(pipe, config()):
            pipe.transformer = Spy(pipe.transformer, made)
            pipe(x, prompts)
        (c, u), (now, other) = made[1], made[2]
        assert torch.equal(other, (now.float() + (u.float() - c.float()).half().float()).half())

    def test_an_exception_between_the_calls(self, case):
        """The run that follows takes nothing from the one that was cut short."""
        net, x, prompts = case
        pipe, wanted = Guided(net), ByHand(net, prompts).run(x)

        def stop(step):
            if step == 2:
                raise RuntimeError("stopped")

        with dit_cache(pipe, config()) as cache:
            with pytest.raises(RuntimeError, match="stopped"):
                pipe(x + 1, prompts, stop)
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)
            assert by_step(cache, 1)[2, 1] == (True, "conditional only")

    def test_an_exception_within_the_call_that_is_computed(self, case):
        net, x, prompts = case
        pipe, wanted = Guided(net), ByHand(net, prompts).run(x)

        def fails(*_):
            raise RuntimeError("no memory")

        with dit_cache(pipe, config()):
            net.executions = 0  # five for each call: two of each step, and of step 2 the first
            hook = net.blocks[2].register_forward_pre_hook(lambda *_: fails() if net.executions >= 20 else None)
            with pytest.raises(RuntimeError, match="no memory"):
                pipe(x + 1, prompts)
            hook.remove()
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)

    def test_two_threads(self, case):
        """Each has a run of its own, whose calls alternate with those of the other."""
        net, x, prompts = case
        starts, found, turns = [x, x.flip(0) + 1], {}, threading.Barrier(2)
        wanted = [ByHand(net, prompts).run(start) for start in starts]

        def draw(number, pipe):
            with torch.no_grad():
                found[number] = pipe(starts[number], prompts, lambda _: turns.wait(10))

        pipe = Guided(net)
        with dit_cache(pipe, config()):
            pipes = [Guided(pipe.transformer), Guided(pipe.transformer)]
            threads = [threading.Thread(target=draw, args=pair) for pair in enumerate(pipes)]
            for each in threads:
                each.start()
            for each in threads:
                each.join()
        for number in range(2):
            torch.testing.assert_close(found[number], wanted[number], rtol=0, atol=1e-12)

    def test_a_branch_that_joins_late(self, case):
        """Guidance begins at step 4, one at which it was to be left out, and is held from there on at step 6."""
        net, x, prompts = case
        pipe = Guided(net)
        with dit_cache(pipe, config()) as cache:
            pipe(x, prompts, twos=(4, 6))
            seen = by_step(cache)
        assert seen[4, 1] == (False, "no difference")
        assert seen[6, 1] == (False, "missed refresh")  # it was not called at step 5, at which both were to be computed

    def test_other_latents_are_another_evaluation(self, case):
        """Two windows of a picture, say: what one returns says nothing of the other."""
        net, x, prompts = case
        pipe = Guided(net)
        pipe.scheduler.set_timesteps(STEPS)
        with dit_cache(pipe, config()) as cache:
            for t in pipe.scheduler.timesteps:
                for given, number in ((x, 0), (x.clone(), 1)):
                    pipe.transformer(given, t / 1000, encoder_hidden_states=prompts[number])
                pipe.scheduler.step()
            same = by_step(cache)
            pipe.scheduler.set_timesteps(STEPS)
            for t in pipe.scheduler.timesteps:
                for given, number in ((x, 0), (x + 1, 1)):
                    pipe.transformer(given, t / 1000, encoder_hidden_states=prompts[number])
                pipe.scheduler.step()
            other = by_step(cache, 1)
        assert same[2, 1] == (True, "conditional only")
        assert [other[step, 1] for step in (2, 4, 6)] == [(False, "no conditional output")] * 3

    def test_one_buffer_of_latents_for_both_calls(self, case):
        """The object is the same, but what it holds is written anew before each call: two windows of a picture."""
        net, x, prompts = case
        pipe, buffer = Guided(net), torch.empty_like(x)
        pipe.scheduler.set_timesteps(STEPS)
        with dit_cache(pipe, config()) as cache:
            for step, t in enumerate(pipe.scheduler.timesteps):
                for number, given in enumerate((x, x + 1)):
                    found = pipe.transformer(buffer.copy_(given), t / 1000, encoder_hidden_states=prompts[number])
                    if MASK[step]:
                        assert torch.equal(found, net(given, t / 1000, encoder_hidden_states=prompts[number]))
                pipe.scheduler.step()
            seen = by_step(cache)
        assert [seen[step, 1] for step in (2, 4, 6)] == [(False, "no conditional output")] * 3

    def test_guidance_that_begins_at_the_last_step(self, case):
        """Nothing is held after a run, though its last step had a call more than the one before."""
        net, x, prompts = case
        pipe = Guided(net)
        conditional = Conditional(0, (0, 0, 1, 0, 0, 0, 0, 1))
        with dit_cache(pipe, dataclasses.replace(config(), policy=Mask((1,) * 8, conditional=conditional))) as cache:
            pipe(x, prompts, twos=(7,))
            assert len(cache.decisions) == 9
            assert cache.stats.bytes_held == 0

    def test_weights_that_have_changed(self, case):
        net, x, prompts = case
        pipe = Guided(net)

        def between(step):
            if step == 1:
                net.blocks[0].image.weight.mul_(1.5)  # between the two calls whose difference is taken
            if step == 4:
                net.blocks[0].image.weight.mul_(1.5)

        with dit_cache(pipe, config()) as cache:
            pipe(x, prompts, between)
            seen = by_step(cache)
        assert seen[2, 1] == (False, "no difference")
        assert seen[4, 1] == (False, "weights")
        assert seen[6, 1] == (True, "conditional only")

    def test_what_is_not_finite_is_not_added(self, case):
        net, x, prompts = case
        pipe, spoilt = Guided(net), []

        def spoil(module, args, output):
            spoilt.append(len(spoilt))
            return output * torch.nan if len(spoilt) == 4 else output  # the second call of step 1

        hook = net.register_forward_hook(spoil)
        with dit_cache(pipe, config()) as cache:
            pipe(x, prompts)
            assert by_step(cache)[2, 1] == (False, "residual not finite")
        hook.remove()

    def test_the_cache_is_taken_off_between_the_calls(self, case):
        net, x, prompts = case
        pipe = Guided(net)
        cache = dit_cache(pipe, config())
        hand, found = ByHand(net, prompts), []

        def off(step):
            if step == 2:
                cache.remove()

        found = pipe(x, prompts, off)
        for step in range(STEPS):
            if step < 2:
                first, second = hand(x, step)
            else:
                first, second = (net(x, torch.tensor(1 - step / STEPS), encoder_hidden_states=each) for each in prompts)
            x = x - (second + SCALE * (first - second)) / STEPS
        torch.testing.assert_close(found, x, rtol=0, atol=1e-12)

    def test_without_guidance_such_steps_are_computed(self, case):
        net, x, prompts = case
        pipe = Guided(net)
        with dit_cache(pipe, config()) as cache:
            pipe(x, prompts, twos=())
            assert (cache.stats.computed_calls, cache.stats.reused_calls) == (6, 2)

    def test_other_numbers_of_steps_compute_them_whole(self):
        policy = config().policy
        assert policy.for_run(Schedule(STEPS)).conditional == Conditional(0, ALONE)
        assert policy.for_run(Schedule(STEPS + 1)).conditional is None


class Spy:
    """A transformer whose outputs are noted, in pairs."""

    def __init__(self, inner, made):
        self.inner, self.made = inner, made

    def __call__(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        if not self.made or len(self.made[-1]) == 2:
            self.made.append([])
        self.made[-1].append(output.clone())
        return output


class TestABatch:
    @pytest.mark.parametrize("alone", [0, 1])
    @pytest.mark.parametrize("count", [1, 3])
    def test_half_of_it_is_computed(self, case, alone, count):
        net, _, _ = case
        x, prompts = latents(count).double(), [prompt(count).double(), prompt(count).double()]
        hand, rows = ByHand(net, prompts, alone), []
        wanted, pipe = hand.run(x), Guided(net, in_batch=True)
        net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with dit_cache(pipe, config(alone, in_batch=True)) as cache:
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)
            assert rows == [2 * count, 2 * count, count, count, 2 * count, count]
            assert cache.stats.reasons == {"mask": 3, "conditional only": 3, "reuse": 2}
            assert cache.stats.bytes_held == 0
            assert cache.stats.bytes_peak == 5 * x.nbytes
            assert step_pictures(cache.decisions) == {"transformer": PICTURE}
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)
            assert cache.stats.blocks_run == 2 * (3 * 5) + 2 * 3 * 5 // 2

    def test_two_pictures_without_guidance(self, case):
        """As large a batch as one with guidance, but its halves are of two pictures."""
        net, x, prompts = case
        pipe, rows = Guided(net), []
        net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with dit_cache(pipe, config(in_batch=True)) as cache:
            pipe(x, prompts[:1], twos=())
            assert rows == [2] * 6
            assert cache.stats.reasons == {"mask": 3, "no conditional output": 3, "reuse": 2}

    def test_two_pictures_of_one_seed_without_guidance(self, case):
        """They begin with the same latents, as the halves of a guided batch do at every step, and part at the next."""
        net, x, prompts = case
        both, x = torch.cat([each[:1] for each in prompts]), torch.cat([x[:1], x[:1]])
        conditional = Conditional(0, (0, 0, 1, 0, 0, 1, 0, 0), in_batch=True)
        given = dataclasses.replace(config(), policy=Mask((1,) * STEPS, conditional=conditional))
        pipe, wanted = Guided(net), x
        for step in range(STEPS):
            wanted = wanted - net(wanted, torch.tensor(1 - step / STEPS), both) / STEPS
        with dit_cache(pipe, given) as cache:
            torch.testing.assert_close(pipe(x, [both], twos=()), wanted, rtol=0, atol=1e-12)
            assert cache.stats.reasons == {"mask": 6, "no conditional output": 2}

    @pytest.mark.parametrize("in_batch", [False, True])
    def test_a_plan_that_reuses_no_step_saves_nevertheless(self, case, in_batch, recwarn):
        """At two of eight steps a half is left out: that is no run in which nothing is reused."""
        net, x, prompts = case
        conditional = Conditional(0, (0, 0, 1, 0, 0, 1, 0, 0), in_batch)
        given = dataclasses.replace(config(), policy=Mask((1,) * STEPS, conditional=conditional))
        pipe = Guided(net, in_batch=in_batch)
        with dit_cache(pipe, given) as cache:
            pipe(x, prompts)
            assert cache.stats.blocks_run == cache.stats.blocks_total * 7 // 8
        assert [str(each.message) for each in recwarn] == []

    def test_a_batch_whose_rows_cannot_be_taken_apart(self, case):
        """What its rows return depends on all of them: it is always called with the whole batch."""
        net, x, prompts = case
        pipe, rows = Guided(net, in_batch=True), []
        net.blocks[0].register_forward_hook(lambda *call: tuple(each + each.mean() for each in call[-1]))
        net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with dit_cache(pipe, config(in_batch=True)) as cache:
            pipe(x, prompts)
            assert rows == [4] * 6
            assert cache.stats.reasons["no conditional output"] == 3

    def test_no_memory_for_the_call_that_finds_out(self, case):
        """A run that would do without is not ended by it."""
        net, x, prompts = case
        pipe, rows = Guided(net, in_batch=True), []

        def count(module, args):
            rows.append(len(args[0]))
            if len(args[0]) < 4:
                raise OutOfMemoryError("no memory")

        net.blocks[0].register_forward_pre_hook(lambda module, args: count(module, args))
        with dit_cache(pipe, config(in_batch=True)) as cache:
            pipe(x, prompts)
            assert rows == [4, 2, *[4] * 5]
            assert cache.stats.reasons["no conditional output"] == 3

    def test_an_object_that_holds_tensors_from_a_later_step_on(self, case):
        """Which of its rows are whose is not known: all are computed, whatever was known of calls without it."""
        net, x, prompts = case

        class Holding(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks, self.inner, self.rows = net.blocks, net, []

            def forward(self, x, timestep, encoder_hidden_states, extra=None):
                self.rows.append(len(x))
                return self.inner(x, timestep, encoder_hidden_states)

        class Extra:
            def __init__(self, tensor):
                self.tensor = tensor

        pipe = Guided(Holding(), in_batch=True)
        both = torch.cat(prompts)

        def draw(extras):
            pipe.scheduler.set_timesteps(STEPS)
            for step, t in enumerate(pipe.scheduler.timesteps):
                given = torch.cat([x, x])
                made = pipe.transformer(given, t / 1000, both, extra=extras[step])
                torch.testing.assert_close(made, net(given, t / 1000, both), rtol=0, atol=1e-12)
                pipe.scheduler.step()

        conditional = Conditional(0, (0, 0, 1, 0, 0, 0, 0, 0), in_batch=True)
        given = dataclasses.replace(config(), policy=Mask((1,) * STEPS, conditional=conditional))
        with dit_cache(pipe, given) as cache:
            draw([*[Extra(None)] * 2, *[Extra(both)] * 6])
            assert pipe.transformer.rows == [4, 2, 4, *[4] * 6]  # the second to find out which arguments hold rows
            assert by_step(cache)[2, 0] == (False, "shape")

    def test_outputs_are_corrected(self, case):
        net, x, prompts = case
        corrections = (None, None, (1.125, -0.125), None, (0.75, 0.25), (1.25, -0.5), (0.875, 0.25), None)
        wanted = ByHand(net, prompts, corrections=corrections).run(x)
        pipe = Guided(net, in_batch=True)
        with dit_cache(pipe, config(in_batch=True, corrections=corrections)):
            torch.testing.assert_close(pipe(x, prompts), wanted, rtol=0, atol=1e-12)


class TestRanks:
    """Ranks that share a model decide alike without a word: by nothing that could differ between them."""

    @pytest.fixture(autouse=True)
    def _shared(self, monkeypatch):
        monkeypatch.setattr(BlockIntegrations, "ranks_sharing", lambda self, model: "tensor parallelism")

    def test_of_two_calls_one_is_left_out(self, case):
        net, x, prompts = case
        pipe = Guided(net)
        with dit_cache(pipe, config()) as cache:
            torch.testing.assert_close(pipe(x, prompts), ByHand(net, prompts).run(x), rtol=0, atol=1e-12)
            assert cache.stats.reasons["conditional only"] == 3

    def test_whether_a_difference_is_finite_is_not_asked(self, case):
        net, x, prompts = case
        pipe, calls = Guided(net), []

        def spoil(module, args, output):
            calls.append(len(calls))
            return output * torch.nan if len(calls) == 4 else output

        hook = net.register_forward_hook(spoil)
        with dit_cache(pipe, config()) as cache:
            pipe(x, prompts)
            assert by_step(cache)[2, 1] == (True, "conditional only")
        hook.remove()

    def test_a_batch_is_computed_whole(self, case):
        net, x, prompts = case
        pipe, rows = Guided(net, in_batch=True), []
        net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with dit_cache(pipe, config(in_batch=True)) as cache:
            pipe(x, prompts)
            assert rows == [4] * 6
            assert cache.stats.reasons["no conditional output"] == 3


class TestRows:
    def test_rows_of_requests_are_computed_whole(self, case):
        """Both rows of a request, at the steps of its plan at which one branch alone would be."""
        net, x, prompts = case
        pipe, rows = Guided(net), []
        net.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
        with dit_cache(pipe, config()) as cache:
            with cache.request("one", steps=STEPS):
                pass
            for step in range(STEPS):
                given = torch.cat([x[:1], x[:1]])
                t = torch.full((2,), 1 - step / STEPS, dtype=x.dtype)
                with cache.rows([("one", step), ("one", step)]):
                    made = pipe.transformer(given, t, encoder_hidden_states=torch.cat([each[:1] for each in prompts]))
                if MASK[step]:
                    own = net.forward(given, t, encoder_hidden_states=torch.cat([each[:1] for each in prompts]))
                    torch.testing.assert_close(made, own, rtol=0, atol=1e-12)
            assert cache.stats.reasons == {"mask": 12, "reuse": 4}


class TestSettings:
    def test_a_residual_has_none(self):
        with pytest.raises(InvalidSetting, match="payload='output', or leave conditional out"):
            dataclasses.replace(config(), payload="residual")

    def test_such_a_step_is_computed_and_not_the_first(self):
        for alone, why in (
            ((0, 0, 0, 1), "step 3, which is reused"),
            ((1, 0, 0, 0), "step 0, the first"),
            ((0, 0, 1), "3 entries, but there are 4"),
        ):
            with pytest.raises(InvalidSetting, match=why) as caught:
                Mask((1, 1, 1, 0), conditional=Conditional(0, alone))
            assert len(str(caught.value)) <= 300
