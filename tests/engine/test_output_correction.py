"""Plans that correct the transformer's output: each against the sums made by hand, of models without a cache."""

import dataclasses
import gc
import math
import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from toys import Ladder, Net, latents, prompt

from dithooks import DitCacheConfig, Fitted, Mask, dit_cache, timestep_scope
from dithooks.errors import InvalidSetting
from dithooks.predictors.predictor import Moment

pytestmark = pytest.mark.core

# Steps 0, 1, 3 and 5 are computed; all outputs but those of step 0 and 4 are corrected, at step 5 by its own only.
MASK = (1, 1, 0, 1, 0, 1)
WEIGHTS = (None, None, (1.5, -0.5), None, (0.75, 0.5), None)
CORRECTIONS = (None, (1.25, -0.25), (0.875, 0.25, 0.0625), (1.5, -0.75, 0.125), None, (0.5,))
STEPS = len(MASK)


def config(corrections=CORRECTIONS, mask=MASK, weights=WEIGHTS, sigmas=None, start=1, blocks=2, **more):
    predictor = Fitted(weights, sigmas, corrections)
    policy = Mask(mask)
    return DitCacheConfig(cache_block_start=start, cache_num_blocks=blocks, policy=policy, predictor=predictor, **more)


def run(call, x, steps=STEPS, **given):
    """All outputs of a run, and the latents after each step."""
    outputs = []
    with torch.no_grad():
        for step in range(steps):
            with timestep_scope(step, steps=steps):
                out = call(x, torch.tensor(1 - step / steps, dtype=x.dtype), **given)
            x = x - out / steps
            outputs.append((out, x))
    return outputs


def same(found, expected, **tolerance):
    for (output, x), (other, y) in zip(found, expected, strict=True):
        torch.testing.assert_close(output, other, **tolerance)
        torch.testing.assert_close(x, y, **tolerance)


class ByHand:
    """One branch of a run, in numbers: what its range adds at a step, and what the model returns with that added.

    Args:
        model: a function of x, the time and the residual, or ``None`` for a computed one; returns output, residual.
    """

    def __init__(self, model, corrections=CORRECTIONS, mask=MASK, weights=WEIGHTS):
        self.model, self.corrections, self.mask, self.weights = model, corrections, mask, weights
        self.residuals, self.outputs = [], []

    def __call__(self, step, x, t):
        if self.mask[step]:
            raw, residual = self.model(x, t, None)
            self.residuals.insert(0, residual)
        else:
            terms = list(zip(self.weights[step], self.residuals, strict=False))
            raw, _ = self.model(x, t, [sum(w * r[n] for w, r in terms) for n in range(len(self.residuals[0]))])
        output, chosen = raw, self.corrections[step]
        if chosen is not None:
            output = chosen[0] * raw + sum(w * o for w, o in zip(chosen[1:], self.outputs, strict=False))
        if self.mask[step]:
            self.outputs.insert(0, raw)
        return output


def ladder(x, t, residual):
    """Blocks of rates 1 … 4, of which those of rates 2 and 3 are the range."""
    forecast = 5 * t if residual is None else residual[0]
    return x + t + forecast + 4 * t, [5 * t]


def net_by_hand(net, prompt):
    """The double blocks of a Net, of which 1 and 2 are the range."""

    def model(x, t, residual):
        h, e = net.embed(x), prompt
        temb = net.time(t.reshape(-1, 1)).expand(h.shape[0], -1)
        for index, block in enumerate(net.blocks):
            if index == 1:
                before = h, e
            if residual is None or index not in (1, 2):
                e, h = block(h, e, temb)
            if index == 2:
                if residual is not None:
                    h, e = before[0] + residual[0], before[1] + residual[1]
                found = h - before[0], e - before[1]
        return net.proj(h), found

    return model


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net("swapped", 5).double()


class TestTheSum:
    def test_a_run_by_hand(self):
        """Computed steps and a forecast one are corrected; later steps start from other latents. Twice the same."""
        x, expected, hand = np.array([[2.0, -1.0]]), [], ByHand(ladder)
        for step in range(STEPS):
            out = hand(step, x, 1 - step / STEPS)
            x = x - out / STEPS
            expected.append((torch.from_numpy(out), torch.from_numpy(x)))
        net, start = Ladder(4).double(), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
        plain = run(net, start)
        with dit_cache(net, config()) as cache:
            for _ in range(2):
                same(run(net, start), expected)
            assert cache.stats.reused_calls == 4
        assert abs(plain[-1][1] - expected[-1][1]).max() > 0.1
        same(run(net, start), plain, rtol=0, atol=0)

    def test_steps_whose_residual_nobody_takes(self):
        """After the last reused step, outputs are still kept, though no residual is."""
        corrections, mask, weights = (None, None, None, (1.5, -0.5), (0.5, 0.25, 1.0)), (1, 0, 1, 1, 1), (None, (1.0,))
        hand, x = ByHand(ladder, corrections, mask, weights), np.array([[2.0, -1.0]])
        net, start = Ladder(4).double(), torch.from_numpy(x)
        with torch.no_grad(), dit_cache(net, config(corrections, mask, (*weights, None, None, None))):
            for step in range(5):
                found = call_at(net, step, start + step, steps=5)
                torch.testing.assert_close(found, torch.from_numpy(hand(step, x + step, 1 - step / 5)))

    @pytest.mark.parametrize("interleaved", [False, True], ids=["one run", "two requests"])
    def test_branches_keep_outputs_of_their_own(self, net, interleaved):
        """Guidance by two calls a step; with requests, each step of one run is followed by that of another."""
        prompts = [prompt().double() for _ in range(2)]
        starts = [latents().double() for _ in range(1 + interleaved)]
        hands = [[ByHand(net_by_hand(net, each)) for each in prompts] for _ in starts]

        def steps_of(x, call):
            for step in range(STEPS):
                t = torch.tensor(1 - step / STEPS, dtype=torch.float64)
                x = x - sum(call(number, step, x, t) for number in range(2)) / STEPS
                yield x

        def by_model(number, step, x, t):
            with timestep_scope(step, steps=STEPS):
                return net(x, t, encoder_hidden_states=prompts[number])

        with torch.no_grad():
            expected = [
                list(steps_of(x, lambda number, step, x, t, hand=hand: hand[number](step, x, t)))
                for x, hand in zip(starts, hands, strict=True)
            ]
            with dit_cache(net, config()) as cache:
                requests = [cache.request() for _ in starts]
                runs = [steps_of(x, by_model) for x in starts]
                for step in range(STEPS):
                    for number, request in enumerate(requests):
                        with request:
                            torch.testing.assert_close(next(runs[number]), expected[number][step])
                assert cache.stats.reused_calls == 4 * len(starts)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_is_added_up_in_float32(self, dtype):
        """A hook that is there before sees the outputs before correction; large weights lose what halves have."""
        net, raw = Ladder(4).to(dtype), []
        hook = net.register_forward_hook(lambda module, args, output: raw.append(output.clone()))
        weights = (None, (300.7, -299.6), None, (150.3, -299.1, 149.9))
        x, given = torch.randn(1, 64).to(dtype), config(weights, (1, 1, 0, 1), (None, None, (1.5, -0.5), None))
        with torch.no_grad(), dit_cache(net, given, verify=False):
            found = [call_at(net, step, x + step / 7, steps=4) for step in range(4)]
        hook.remove()
        computed = [0, 1, 3]
        for step, own in enumerate(found):
            if weights[step] is None:
                torch.testing.assert_close(own, raw[step], rtol=0, atol=0)
                continue
            places = [step, *reversed([each for each in computed if each < step])]
            terms = [np.float32(w) * raw[p].float().numpy() for w, p in zip(weights[step], places, strict=False)]
            right = torch.from_numpy(sum(terms[1:], terms[0])).to(dtype)
            halves = sum(torch.tensor(w, dtype=dtype) * raw[p] for w, p in zip(weights[step], places, strict=False))
            assert own.dtype is dtype
            torch.testing.assert_close(own, right)
            assert (halves - right).abs().max() > 10 * (own - right).abs().max() + 0.1


def call_at(model, step, x, steps=STEPS, t=None, **given):
    with timestep_scope(step, steps=steps):
        return model(x, torch.tensor(1 - step / steps if t is None else t, dtype=x.dtype), **given)


Named = namedtuple("Named", "sample, count")


@dataclasses.dataclass
class Made:
    sample: torch.Tensor
    rest: tuple
    count: torch.Tensor


CONTAINERS = {
    "tensor": lambda h, n: h,
    "tuple": lambda h, n: (h, n, None),
    "list": lambda h, n: [h, n, "text"],
    "dict": lambda h, n: {"sample": h, "more": [2 * h], "count": n},
    "named tuple": lambda h, n: Named(h, n),
    "dataclass": lambda h, n: Made(h, (3 * h, {"n": 4}), n),
    "one tensor twice": lambda h, n: (h, h),
}


class Wrapping(Ladder):
    """Returns what it computes in a container, and remembers it."""

    def __init__(self, kind):
        super().__init__(4)
        self.kind, self.returned = kind, []

    def forward(self, h, timestep):
        output = CONTAINERS[self.kind](super().forward(h, timestep), torch.tensor(7))
        self.returned.append((output, flat(output)))
        return output


def flat(value):
    """Copies of the tensors, other values as they are, in order."""
    if isinstance(value, torch.Tensor):
        return [value.clone()]
    if dataclasses.is_dataclass(value):
        value = list(vars(value).values())
    if isinstance(value, dict):
        value = list(value.values())
    return [leaf for each in value for leaf in flat(each)] if isinstance(value, (tuple, list)) else [value]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_all_floating_tensors_of_a_container(kind):
    """The form stays; what the model itself has returned, and whole numbers, texts and None, are as they were."""
    net, corrections = Wrapping(kind), (None, (0.5, 0.25), (2.0, -0.5), None, None, None)
    with torch.no_grad(), dit_cache(net, config(corrections)):
        found = [call_at(net, step, torch.ones(1, 3) + step) for step in range(3)]
    raw = [net.returned[0], *net.returned[-2:]]  # in between, the first call was made again to test it
    for step, own in enumerate(found):
        weights = corrections[step] or (1.0,)
        places = [step, step - 1][: len(weights)]
        assert type(own) is type(raw[step][0])
        for values in zip(flat(own), *[raw[place][1] for place in places], strict=True):
            got, *parts = values
            if isinstance(got, torch.Tensor) and got.is_floating_point():
                torch.testing.assert_close(got, sum(w * part for w, part in zip(weights, parts, strict=True)))
            else:
                assert got == parts[0]
        for now, then in zip(flat(raw[step][0]), raw[step][1], strict=True):
            assert torch.equal(now, then) if isinstance(now, torch.Tensor) else now == then
    if kind == "one tensor twice":
        assert found[1][0] is found[1][1]


class TestWhereItDoesNotFit:
    """The output is used as it is, and one warning says so."""

    ONE = (None, None, (1.5, -0.5), None, (0.75,), None)  # step 4 takes the last residual only

    def compared(self, change, corrections=CORRECTIONS, **more):
        """The steps that differ from a run without corrections, the warnings, and that run's outputs.

        ``change(net, step)`` returns what a call is given beside.
        """
        runs = []
        for used in (corrections, None):
            net, x, told = Scaled(), torch.ones(1, 3), []
            with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                with dit_cache(net, config(used, **more)):
                    for step in range(STEPS):
                        told.append(call_at(net, step, x + step, **change(net, step)).clone())
            runs.append((told, [str(each.message) for each in caught]))
        (found, said), (plain, _) = runs
        differ = [step for step in range(STEPS) if not torch.equal(found[step], plain[step])]
        return differ, said, plain

    def test_as_planned(self):
        differ, said, _ = self.compared(lambda net, step: {})
        assert (differ, said) == ([1, 2, 3, 5], [])

    def test_other_noise_levels(self):
        """Coefficients do not fit either, and one warning is for both."""
        differ, said, _ = self.compared(lambda net, step: {}, sigmas=(1.0, 0.9, 0.8, 0.7, 0.6, 0.1))
        assert differ == []
        assert len(said) == 1
        assert "the output of step 1 is used as it is" in said[0]

    def test_weights_that_change(self):
        """Before step 3: it has no outputs of these weights; step 5 is corrected by its own only."""

        def change(net, step):
            if step == 3:
                net.blocks[0].rate.mul_(1.5)
            return {}

        differ, said, _ = self.compared(change)
        assert differ == [1, 2, 5]
        assert len(said) == 1
        assert "the output of step 3 is used as it is" in said[0]

    def test_a_forecast_that_does_not_fit(self):
        """Step 2 is computed, as its streams have another form than the first ones; nothing later is as planned."""
        differ, said, plain = self.compared(lambda net, step: {"keep": 2 if step == 2 else 3}, weights=self.ONE)
        assert plain[2].shape == (1, 2)
        assert differ == [1, 5]
        assert len(said) == 1
        assert "the output of step 2 is used as it is" in said[0]

    def test_a_step_that_was_not_to_be_computed(self):
        """Its correction is of an output with a forecast residual."""
        corrections = (None, None, (0.5,), None, None, None)
        differ, said, _ = self.compared(
            lambda net, step: {"keep": 2 if step == 2 else 3}, corrections, weights=self.ONE
        )
        assert differ == []
        assert len(said) == 1
        assert "the output of step 2 is used as it is" in said[0]

    def test_another_forecast(self):
        """Step 2 has no residual of step 0 to make its forecast of, as the weights were others; so it takes another."""

        def change(net, step):
            if step == 1:
                net.blocks[0].rate.mul_(1.5)
            return {}

        differ, said, _ = self.compared(change, (None, None, (0.5,), None, None, None))
        assert differ == []
        assert len(said) == 1
        assert "coefficients" in said[0]

    def test_an_output_of_another_shape(self):
        """Step 3 returns fewer numbers than the steps before; what tells so is a number, as others that may change."""
        differ, said, plain = self.compared(lambda net, step: {"keep": 2 if step == 3 else 3}, weights=self.ONE)
        assert plain[3].shape == (1, 2)
        assert differ == [1, 2, 5]
        assert len(said) == 1
        assert "the output of step 3 is used as it is" in said[0]

    def test_numbers_that_are_not_finite(self):
        """At step 1 the output is NaN, which the residual is not: steps 2 and 3 take none of it."""
        differ, said, plain = self.compared(lambda net, step: {"gain": math.nan if step == 1 else 1.0})
        assert plain[1].isnan().all()
        assert plain[2].isfinite().all()
        assert differ == [1, 5]  # NaN is no number that equals
        assert len(said) == 1

    def test_a_call_with_gradients(self):
        """It is a plain one, of any step."""
        net, x = Ladder(4), torch.ones(1, 3)
        with dit_cache(net, config()):
            with torch.no_grad():
                call_at(net, 0, x)
            with torch.enable_grad(), pytest.warns(UserWarning, match="gradients"):
                found = call_at(net, 1, x)
        torch.testing.assert_close(found, call_at(net, 1, x), rtol=0, atol=0)
        assert found.requires_grad

    @pytest.mark.filterwarnings("error")
    def test_blocks_without_their_model(self):
        """Only the model's call has an output."""
        net = Ladder(4)

        def drive(step):
            with torch.no_grad(), timestep_scope(step, steps=STEPS):
                return net.forward(torch.ones(1, 3), torch.tensor(1 - step / STEPS))

        with dit_cache(net, config(None)):
            expected = [drive(step) for step in range(STEPS)]
        with dit_cache(net, config()):
            first = drive(0)
            with pytest.warns(UserWarning, match="not corrected as planned, as the blocks run without"):
                second = drive(1)
            found = [first, second, *[drive(step) for step in range(2, STEPS)]]
        for own, other in zip(found, expected, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=0)


class Scaled(Ladder):
    """A ladder of 4 that uses some of its input only, and multiplies what comes out."""

    def __init__(self):
        super().__init__(4)

    def forward(self, h, timestep, keep=3, gain=1.0):
        return super().forward(h[:, :keep], timestep) * gain


class TestTheFirstCall:
    """It is made again, to test the residual: compared with what the model has returned, not with what it became."""

    FIRST = ((0.5,), (1.5, -0.5), None, None, None, None)

    def expected(self, net, x):
        with torch.no_grad():
            first, second = (call_at(net, step, x) for step in range(2))
        return [0.5 * first, 1.5 * second - 0.5 * first]

    def test_alone(self, net):
        x, e = latents().double(), prompt().double()

        def call(x, t):
            return net(x, t, encoder_hidden_states=e)

        expected = self.expected(call, x)
        with torch.no_grad(), dit_cache(net, config(self.FIRST)):
            for step in range(2):
                torch.testing.assert_close(call_at(call, step, x), expected[step])

    @pytest.mark.parametrize("first", [True, False])
    def test_beside_another_cache(self, first):
        """Its hook is called before or after that of the one that corrects."""
        torch.manual_seed(0)
        net = Net("two_lists", 3).double()
        x, e = latents().double(), prompt().double()
        blocks = ("blocks", "singles")

        def call(x, t):
            return net(x, t, encoder_hidden_states=e)

        expected = self.expected(call, x)
        plans = (self.FIRST, None) if first else (None, self.FIRST)
        one, two = (config(each, start=0, blocks=3) for each in plans)
        with torch.no_grad(), dit_cache(net, one, blocks=blocks[0]), dit_cache(net, two, blocks=blocks[1]):
            for step in range(2):
                torch.testing.assert_close(call_at(call, step, x), expected[step])


class TestTheModel:
    def test_two_corrections_are_refused(self):
        net = Net("two_lists", 3)
        hooks, blocks = len(net._forward_hooks), list(net.singles)
        with dit_cache(net, config(start=0, blocks=3), blocks="blocks") as cache:
            with_one = len(net._forward_hooks)
            with pytest.raises(InvalidSetting, match="corrected once"):
                dit_cache(net, config(start=0, blocks=3), blocks="singles")
            assert len(net._forward_hooks) == with_one
            assert all(own is block for own, block in zip(net.singles, blocks, strict=True))
            cache.update(config(start=0, blocks=2))  # its own is not another
        assert len(net._forward_hooks) == hooks

    def test_removal(self):
        """No hook is left, and outputs are the model's own objects again; so it is after an update."""
        net, x = Wrapping("dict"), torch.ones(1, 3)
        handle = dit_cache(net, config(), verify=False)

        def are_own():
            return [call_at(net, step, x) is net.returned[-1][0] for step in range(STEPS)]

        with torch.no_grad():
            assert are_own() == [True, False, False, False, True, False]
            handle.update(config(None))
            assert all(are_own())
            handle.update(config())
            assert not all(are_own())
            handle.remove()
            assert not net._forward_hooks
            assert not net._forward_pre_hooks
            assert all(are_own())

    def test_hooks_behind_see_what_the_pipeline_is_given(self):
        net, seen, x = Ladder(4), [], torch.ones(1, 3)
        with torch.no_grad(), dit_cache(net, config()):
            hook = net.register_forward_hook(lambda module, args, output: seen.append(output))
            for step in range(STEPS):
                assert call_at(net, step, x) is seen[-1]
        hook.remove()

    def test_memory(self):
        """Of float64 numbers: one of a residual and one of an output a step, two of each at most, none at the end."""
        net, x = Ladder(4).double(), torch.ones(1, 4, dtype=torch.float64)
        held = []
        with torch.no_grad(), dit_cache(net, config()) as cache:
            for step in range(STEPS):
                call_at(net, step, x)
                held.append(cache.stats.bytes_held // 32)
            assert held == [2, 4, 4, 4, 4, 0]
            assert cache.stats.bytes_peak == 4 * 32
        with torch.no_grad(), dit_cache(net, config((None, None, None, None, None, (0.5,)))) as cache:
            for step in range(4):
                call_at(net, step, x)
            assert cache.stats.bytes_held == 2 * 32  # one output is scaled, which takes no other

    def test_nothing_is_left_of_a_run(self):
        """All tensors of this shape are those that the loop has."""
        net, x = Ladder(4), torch.ones(1, 173)

        def alive():
            gc.collect()
            return sum(type(each) is torch.Tensor and each.shape == x.shape for each in gc.get_objects())

        with torch.no_grad(), dit_cache(net, config()):
            for step in range(STEPS - 1):
                call_at(net, step, x)
            assert alive() > 1
            call_at(net, STEPS - 1, x)
            assert alive() == 1

    def test_what_the_pipeline_writes_into_is_not_what_is_kept(self):
        net, x, corrections = Ladder(4), torch.ones(1, 3), (None, (1.0, 1.0), None, None, None, None)
        with torch.no_grad():
            first, second = (call_at(net, step, x) for step in range(2))
            with dit_cache(net, config(corrections)):
                call_at(net, 0, x).fill_(100.0)
                torch.testing.assert_close(call_at(net, 1, x), first + second)


class Driven(Ladder):
    """Called by a method that calls the blocks itself."""

    def __init__(self):
        super().__init__(4)

    def predict(self, h, timestep):
        return {"sample": self.forward(h, timestep)}


def test_a_method():
    """It returns the sum in place of its own output, and is itself again afterwards."""
    net, x, hand = Driven().double(), np.array([[3.0]]), ByHand(ladder)
    start, expected = torch.tensor([[3.0]], dtype=torch.float64), []
    for step in range(STEPS):
        out = hand(step, x, 1 - step / STEPS)
        x = x - out / STEPS
        expected.append((torch.from_numpy(out), torch.from_numpy(x)))
    with dit_cache(net, config(), method="predict"):
        same(run(lambda x, t: net.predict(x, t)["sample"], start), expected)
    assert "predict" not in vars(net)


def test_the_weights_of_a_plan():
    """At a step, and whether that was computed or made with a forecast; none at all where it is not as planned."""
    plan = Fitted(WEIGHTS, None, CORRECTIONS)
    assert plan.corrects == {True, False}
    assert plan.outputs == 2
    assert Fitted(WEIGHTS).corrects == frozenset()
    moments = {step: Moment(step, 1 - step / STEPS) for step in range(STEPS)}
    assert plan.output_weights([moments[1], moments[0]], moments[3]) == (1.5, -0.75, 0.125)
    assert plan.output_weights([moments[1], moments[0]], moments[3], is_forecast=True) == ()
    assert plan.output_weights([moments[2], moments[1]], moments[3]) == ()
    assert plan.output_weights([moments[1]], moments[3]) == ()
    assert plan.output_weights([], moments[0]) is None
