"""Whole transformers whose output is forecast: ``payload="output"``, on toys whose numbers are made by hand."""

import copy
import dataclasses
import gc
import io
import pickle
import threading
import warnings
import weakref
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from outputs_by_hand import OutputsByHand, counted, last, line
from torch import nn
from toys import Net, Pipe, latents, prompt

from dithooks import (
    BlockAdapter,
    DitCacheConfig,
    EasyCache,
    Fitted,
    Interval,
    Linear,
    Mask,
    Reuse,
    Threshold,
    detach,
    dit_cache,
    handle_of,
    timestep_scope,
)
from dithooks.errors import InvalidSetting, WrongType

pytestmark = pytest.mark.core

STEPS = 8
COMPUTED = (0, 1, 2, 4, 6)
EVERY_SECOND = DitCacheConfig(policy=Interval(2, 2), predictor=Linear(), payload="output")


def by_hand(net, x, prompts=(None,), weights=line, computed=COMPUTED, **given):
    """A run without dithooks, and the number of calls of the transformer."""
    pipe = Pipe(net)
    pipe.transformer = OutputsByHand(net, counted(pipe.scheduler), computed, weights)
    return pipe(x, STEPS, prompts, **given), pipe.transformer.calls


class TestTheCallIsLeftOut:
    @pytest.mark.parametrize("predictor", [Reuse(), Linear()], ids=["last", "line"])
    @pytest.mark.parametrize("calls", [1, 2], ids=["one call", "guided by two"])
    def test_outputs_are_combined_as_by_hand(self, predictor, calls):
        net, x = Net("swapped"), latents()
        prompts = [prompt() for _ in range(calls)]
        expected, number = by_hand(net, x, prompts, last if predictor == Reuse() else line)
        pipe, net.executions = Pipe(net), 0
        with dit_cache(pipe, dataclasses.replace(EVERY_SECOND, predictor=predictor)) as cache:
            for _ in range(2):  # a second run begins anew
                torch.testing.assert_close(pipe(x, STEPS, prompts), expected, rtol=0, atol=2e-6)
            stats = cache.stats
            assert (stats.computed_calls, stats.reused_calls) == (2 * number, 2 * 3 * calls)
            assert (stats.blocks_run, stats.blocks_total) == (net.executions, 2 * 5 * STEPS * calls)
            assert stats.bytes_held == 0
            assert stats.bytes_peak == predictor.anchors * calls * x.nbytes
        assert net.executions == 2 * 5 * number

    def test_a_batch_is_one_call(self):
        net, x = Net("swapped"), latents(4)
        both = prompt(4)
        wanted, _ = by_hand(net, x, [both])
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_SECOND):
            torch.testing.assert_close(pipe(x, STEPS, [both]), wanted, rtol=0, atol=2e-6)

    def test_numbers_of_a_plan(self):
        """y = 1.7·b − 0.6·a, with a the older one; no line has such weights."""
        weights = [None, None, (1.7, -0.6), (1.7, -0.6), None, (1.7, -0.6), None, (1.7, -0.6)]
        net, x = Net(), latents()
        computed = [step for step, each in enumerate(weights) if each is None]
        expected, _ = by_hand(net, x, weights=lambda *_: (1.7, -0.6), computed=computed)
        config = DitCacheConfig(
            policy=Mask([int(each is None) for each in weights]), predictor=Fitted(weights), payload="output"
        )
        pipe = Pipe(net)
        with dit_cache(pipe, config):
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)

    def test_computed_steps_are_corrected(self):
        """At steps 4 and 7 the pipeline is given 1.2·y − 0.3·(the one before), at 7 + 0.1·(the one before that)."""
        steps = [None, None, (1.7, -0.6), (1.7, -0.6), None, (1.7, -0.6), None, None]
        corrections = [None] * STEPS
        corrections[4] = corrections[7] = (1.2, -0.3, 0.1)
        net, x = Net(), latents()
        pipe, raw, expected = Pipe(net), [], x
        for step, weights in enumerate(steps):
            if weights is None:
                raw.insert(0, net(expected, torch.tensor(1 - step / STEPS)))
                y = raw[0]
            else:
                y = 1.7 * raw[0] - 0.6 * raw[1]
            if corrections[step] is not None:
                y = 1.2 * raw[0] - 0.3 * raw[1] + (0.1 * raw[2] if step == 7 else 0)
            expected = expected - y / STEPS
        corrections[4] = (1.2, -0.3)
        config = DitCacheConfig(
            policy=Mask([int(each is None) for each in steps]),
            predictor=Fitted(steps, corrections=corrections),
            payload="output",
        )
        with dit_cache(pipe, config) as cache:
            for _ in range(2):
                torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
            assert cache.stats.reused_calls == 6
        wrong = dataclasses.replace(config.predictor, corrections=[None, None, (1.0,), *[None] * 5])
        with pytest.raises(InvalidSetting, match="the predictor has corrections of these"):
            dit_cache(pipe, dataclasses.replace(config, predictor=wrong))

    def test_computed_outputs_are_the_transformers_own(self):
        net = Net()
        pipe, seen = Pipe(net), []
        net.register_forward_hook(lambda *call: seen.append(call[-1]))
        with dit_cache(pipe, EVERY_SECOND), timestep_scope(0):
            assert pipe.transformer(latents(), torch.tensor(1.0)) is seen[0]

    def test_what_the_loop_writes_into_an_output_is_not_reused(self):
        net, x = Net(), latents()
        pipe, outs = Pipe(net), []
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 4), payload="output")):
            for step in range(4):
                with timestep_scope(step):
                    out = pipe.transformer(x, torch.tensor(1.0))
                outs.append(out.clone())
                out.mul_(0)
        assert all(torch.equal(out, net(x, torch.tensor(1.0))) for out in outs)

    def test_a_copy_on_the_host_in_bfloat16(self):
        net, x = Net(), latents()
        pipe = Pipe(net)
        config = dataclasses.replace(EVERY_SECOND, predictor=Reuse(), cache_dtype="bfloat16", cache_device="cpu")
        with dit_cache(pipe, config), torch.no_grad():
            for step in range(4):
                with timestep_scope(step):
                    out = pipe.transformer(x, torch.tensor(1.0))
        assert torch.equal(out, net(x, torch.tensor(1.0)).bfloat16().float())

    def test_gradients_are_never_cached(self):
        net = Net()
        pipe = Pipe(net)
        with torch.enable_grad(), dit_cache(pipe, EVERY_SECOND) as cache:
            with pytest.warns(UserWarning, match="gradients"):
                pipe(latents(), STEPS)
            assert cache.stats.reasons == {"gradients": STEPS}


class Outputs(NamedTuple):
    sample: torch.Tensor
    mask: torch.Tensor


@dataclasses.dataclass
class Sample:
    sample: torch.Tensor
    extra: object = None


class Forms(nn.Module):
    """Returns 2·x in one of many forms."""

    def __init__(self, form):
        super().__init__()
        self.form, self.lin, self.calls = form, nn.Linear(1, 1), 0

    def forward(self, x, timestep, return_dict=True):
        self.calls += 1
        return self.form(2 * x, return_dict)


FORMS = {
    "tensor": lambda y, _: y,
    "tuple": lambda y, _: (y, y + 1),
    "list": lambda y, _: [y, "text", y + 1],
    "dict": lambda y, _: {"sample": y, "number": 3, "none": None},
    "named tuple": lambda y, _: Outputs(y, y > 0),
    "dataclass": lambda y, _: Sample(y, [y + 1, {"deep": y + 2}]),
    "twice the same": lambda y, _: (y, y),
}


def flat(value):
    if isinstance(value, torch.Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        value = vars(value)
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for each in values for tensor in flat(each)]


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    def test_the_container_is_the_transformers(self, form):
        model = Forms(FORMS[form])
        pipe, x = SimpleNamespace(transformer=model), torch.randn(2, 3)
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 3), payload="output")):
            outs = []
            for step in range(3):
                with timestep_scope(step):
                    outs.append(pipe.transformer(x, 1.0))
        assert model.calls == 1
        first, *others = outs
        for other in others:
            assert type(other) is type(first)
            assert str(other) == str(first)  # names, order and all that is no tensor
            assert not {id(each) for each in flat(other)} & {id(each) for each in flat(first)}
        if form == "twice the same":
            assert others[0][0] is others[0][1]

    def test_each_call_gets_the_form_that_it_asks_for(self):
        model = Forms(lambda y, as_dict: Sample(y) if as_dict else (y,))
        pipe, x = SimpleNamespace(transformer=model), torch.randn(2, 3)
        kinds = []
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 9), payload="output")) as cache:
            for step, flag in enumerate([True, True, False, False, True]):
                with timestep_scope(step, branch="one"):
                    kinds.append(type(pipe.transformer(x, 1.0, return_dict=flag)))
            reasons = [record.reason for record in cache.decisions]
        assert kinds == [Sample, Sample, tuple, tuple, Sample]
        assert reasons == ["refresh", "reuse", "switch", "reuse", "switch"]

    def test_latents_in_a_list_of_other_shapes_are_computed(self):
        class Lists(nn.Module):
            def forward(self, x, timestep):
                return [2 * each for each in x]

        pipe = SimpleNamespace(transformer=Lists())
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 9), payload="output")) as cache:
            for step, size in enumerate([3, 3, 4, 4]):
                with timestep_scope(step, branch="one"):
                    out = pipe.transformer([torch.full((size,), step + 1.0)], 1.0)
                assert out[0].shape == (size,)
            assert [record.reason for record in cache.decisions] == ["refresh", "reuse", "shape", "reuse"]
        assert out[0].tolist() == [6.0] * 4  # of step 2, reused at step 3

    def test_what_cannot_be_made_again_is_computed(self):
        class Odd:
            def __init__(self, y):
                self.sample = y

        model = Forms(lambda y, _: Odd(y))
        pipe, x = SimpleNamespace(transformer=model), torch.randn(2, 3)
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 9), payload="output")):
            with timestep_scope(0), pytest.warns(UserWarning, match="returns Odd, and no other can be made"):
                pipe.transformer(x, 1.0)
            with timestep_scope(1):
                assert torch.equal(pipe.transformer(x + 1, 1.0).sample, 2 * x + 2)


class TestSideEffects:
    """A call that writes into what it is given does more than its output tells, and is computed."""

    class Writing(nn.Module):
        def __init__(self, steps, into):
            super().__init__()
            self.steps, self.into, self.calls = steps, into, 0

        def forward(self, x, timestep, cache=None):
            self.calls += 1
            if self.calls <= self.steps:
                if self.into == "itself":
                    x.mul_(0.5)
                else:
                    cache["keys"] = x + self.calls
            return 2 * x

    def reasons(self, steps, into):
        model = self.Writing(steps, into)
        pipe, cache = SimpleNamespace(transformer=model), {}
        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 9), payload="output")) as handle:
            for step in range(4):
                with timestep_scope(step, branch="one"):
                    pipe.transformer(torch.ones(2, 3), 1.0, cache)
            return [record.reason for record in handle.decisions]

    @pytest.mark.parametrize("into", ["itself", "a cache"])
    def test_only_those_are_computed(self, into):
        assert self.reasons(1, into) == ["refresh", "no anchor", "reuse", "reuse"]

    @pytest.mark.parametrize("into", ["itself", "a cache"])
    def test_if_all_do_that_is_said(self, into):
        path = r"\(x\)" if into == "itself" else r"\(argument 2\['keys'\]\)"
        with pytest.warns(UserWarning, match=f"writes into what it is given {path}"):
            assert self.reasons(9, into) == ["refresh", "no anchor", "no anchor", "no anchor"]


class TestWhereItIs:
    def test_the_very_same_objects_are_back(self):
        net = Net()
        pipe = Pipe(net)
        pipe.parts, pipe.around = {"dit": net}, nn.Sequential(net)
        before, own, inner = dict(vars(pipe)), dict(vars(net)), list(pipe.around._modules.items())
        cache = dit_cache(pipe, EVERY_SECOND)
        held = [pipe.transformer, pipe.parts["dit"], pipe.around[0]]
        assert all(each is held[0] and each is not net for each in held)
        pipe(latents(), STEPS)
        cache.remove()
        cache.remove()
        assert list(vars(pipe)) == list(before)
        assert all(value is before[name] for name, value in vars(pipe).items())
        assert pipe.parts["dit"] is net
        assert all(mine is his for (_, mine), (_, his) in zip(pipe.around._modules.items(), inner, strict=True))
        assert {k: v for k, v in vars(net).items() if k != "executions"} == {
            k: v for k, v in own.items() if k != "executions"
        }

    def test_it_looks_like_the_transformer(self):
        net = Net()
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_SECOND):
            stand_in = pipe.transformer
            assert isinstance(stand_in, Net)
            assert stand_in.__class__ is Net
            assert list(stand_in.state_dict()) == list(net.state_dict())
            assert list(stand_in.named_modules()) == list(net.named_modules())
            assert stand_in.blocks is net.blocks
            stand_in.note = 1
            assert net.note == 1
            del stand_in.note
            assert not hasattr(net, "note")
            stand_in.to(torch.float64)
            assert next(net.parameters()).dtype is torch.float64
            assert stand_in == net
            assert hash(stand_in) == hash(net)
            assert repr(stand_in) == repr(net)
            pipe.scheduler.set_timesteps(1)

    def test_others_may_wrap_its_forward(self):
        """As accelerate does: what is wrapped, and stays so when the cache is gone, is the transformer itself."""
        net, x, calls = Net(), latents(), []
        expected, number = by_hand(net, x)
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_SECOND):
            inner = pipe.transformer.forward
            assert inner.__self__ is net
            pipe.transformer.forward = lambda *a, **k: calls.append(1) or inner(*a, **k)
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
        assert len(calls) == number
        assert pipe.transformer is net
        assert "forward" in vars(net)

    @pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
    def test_copies_are_plain(self, how):
        net, x = Net(), latents()
        pipe = Pipe(net)
        pipe.around, pipe.note = nn.Sequential(net), net.forward
        with dit_cache(pipe, EVERY_SECOND) as cache:
            plain = net(x, torch.tensor(0.5))
            if how == "deepcopy":
                other = copy.deepcopy(pipe)
            elif how == "pickle":
                other = pickle.loads(pickle.dumps(pipe))
            else:
                stream = io.BytesIO()
                torch.save(pipe, stream)
                stream.seek(0)
                other = torch.load(stream, weights_only=False)
            assert type(other.transformer) is Net
            assert other.around[0] is other.transformer
            assert other.note.__self__ is other.transformer
            assert handle_of(other) is None
            assert torch.equal(other.transformer(x, torch.tensor(0.5)), plain)
            assert cache.stats.calls == 0
            pipe(x, STEPS)

    def test_the_handle_is_found_and_can_be_detached(self):
        net = Net()
        pipe = Pipe(net)
        cache = dit_cache(pipe, EVERY_SECOND)
        pipe(latents(), STEPS)
        assert handle_of(pipe) is cache
        assert handle_of(net) is cache
        assert repr(cache) == "<CacheHandle output of transformer (Net)>"
        assert cache.ranges[0]._asdict() == {"range": "transformer", "first": 0, "blocks": 5, "total": 5}
        detach(pipe)
        assert pipe.transformer is net
        assert handle_of(net) is None

    def test_nothing_is_kept_alive(self):
        net = Net()
        pipe = Pipe(net)
        dit_cache(pipe, EVERY_SECOND)
        left = [weakref.ref(pipe), weakref.ref(net)]
        del pipe, net
        gc.collect()
        assert [each() for each in left] == [None, None]

    def test_a_module_around_it_is_a_place(self):
        class Around(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = Net()

            def forward(self, x, timestep):
                return self.net(x, timestep) + 1

        around = Around()
        net, x = around.net, latents()
        with dit_cache(around, DitCacheConfig(policy=Interval(1, 2), payload="output")) as cache:
            outs = [around(x, torch.tensor(1.0 - step / 8)) for step in range(3)]
            assert cache.stats.reused_calls == 1
        assert torch.equal(outs[2], net(x, torch.tensor(1 - 1 / 8)) + 1)
        assert around.net is net

    @pytest.mark.parametrize("way", ["adapter", "blocks"])
    def test_an_adapter_and_named_blocks_name_their_transformer(self, way):
        net, x = Net(), latents()
        expected, _ = by_hand(net, x)
        pipe = Pipe(net)
        target = BlockAdapter(pipe=pipe, transformer=net, blocks=net.blocks, auto=False) if way == "adapter" else pipe
        named = {} if way == "adapter" else {"blocks": "transformer.blocks"}
        with dit_cache(target, EVERY_SECOND, **named) as cache:
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
            assert handle_of(target) is cache
        assert pipe.transformer is net

    def test_attached_and_removed_while_others_call(self):
        net, x, errors, over = Net(), latents(), [], threading.Event()
        pipe = Pipe(net)
        expected = net(x, torch.tensor(1.0))

        def call():
            step = 0
            try:
                while not over.is_set():
                    with torch.no_grad(), timestep_scope(step % 8):
                        assert torch.allclose(pipe.transformer(x, torch.tensor(1.0)), expected, atol=1e-5)
                    step += 1
            except BaseException as error:
                errors.append(error)
                raise

        threads = [threading.Thread(target=call) for _ in range(2)]
        [thread.start() for thread in threads]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that nothing was reused
                for _ in range(10):
                    cache = dit_cache(pipe, EVERY_SECOND)
                    cache.update(dataclasses.replace(EVERY_SECOND, payload="residual"))
                    cache.update(EVERY_SECOND)
                    cache.remove()
        finally:
            over.set()
            [thread.join() for thread in threads]
        assert not errors
        assert pipe.transformer is net

    def test_a_stand_in_that_was_moved_is_found(self):
        net = Net()
        pipe = Pipe(net)
        cache = dit_cache(pipe, EVERY_SECOND)
        pipe.other, pipe.transformer = pipe.transformer, None
        with pytest.warns(UserWarning, match="no call of transformer was seen"):
            cache.remove()
        assert pipe.other is net

    def test_a_reference_from_before_is_not_seen_and_that_is_said(self):
        net = Net()
        pipe = Pipe(net)
        with pytest.warns(UserWarning, match="a reference from before"), dit_cache(pipe, EVERY_SECOND):
            net(latents(), torch.tensor(1.0))


class TestRefused:
    @pytest.mark.parametrize("target", ["bare", "method", "list", "twice", "blocks cached", "look_at", "scripted"])
    def test_before_anything_is_touched(self, target):
        net = Net("two_lists")
        pipe = Pipe(net)
        config, kwargs, error, words = EVERY_SECOND, {}, InvalidSetting, ""
        first = None
        if target == "bare":
            pipe, words = net, "nothing that was given holds it: give the pipeline"
        elif target == "method":
            kwargs, words = {"method": "state_dict"}, "method='state_dict' and payload='output' exclude"
        elif target == "list":
            config = dataclasses.replace(config, overrides={"singles": {"policy": Interval(3, 2)}})
            words = "transformer.blocks is one of its lists"
        elif target == "twice":
            first, words = dit_cache(pipe, EVERY_SECOND), "transformer (Net) is cached already"
        elif target == "blocks cached":
            first, words = dit_cache(pipe, DitCacheConfig(2, 2)), "transformer.blocks.0 is cached already"
        elif target == "look_at":
            config = dataclasses.replace(config, policy=Threshold(0.1), look_at=("nothing",))
            words = "look_at: 'nothing' is no argument of Net"
        else:
            pipe = SimpleNamespace(transformer=torch.jit.script(nn.Sequential(nn.ModuleList([nn.Linear(1, 1)])[0])))
            error, words = WrongType, "scripted module"
        before = dict(vars(pipe))
        with pytest.raises(error) as raised:
            dit_cache(pipe, config, **kwargs)
        assert words in str(raised.value)
        assert len(str(raised.value)) <= 300
        assert vars(pipe) == before
        if first is not None:
            first.reset()
            detach(pipe)

    def test_blocks_of_a_transformer_that_is_left_out(self):
        net = Net()
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_SECOND):
            for target in (pipe, net):
                with pytest.raises(InvalidSetting, match="is cached already"):
                    dit_cache(target, DitCacheConfig(2, 2))
            pipe(latents(), STEPS)


class TestRuns:
    def test_update_changes_what_is_forecast(self):
        net, x = Net(), latents()
        pipe = Pipe(net)
        expected, _ = by_hand(net, x)
        residual = DitCacheConfig(policy=Interval(2, 2), predictor=Linear())
        with dit_cache(pipe, residual) as plain:
            by_residual = pipe(x, STEPS)
            assert plain.stats.reused_calls == 3
        with dit_cache(pipe, EVERY_SECOND) as cache:
            for config, wanted in ((EVERY_SECOND, expected), (residual, by_residual), (EVERY_SECOND, expected)):
                cache.update(config)
                assert (pipe.transformer is net) == (config is residual)
                torch.testing.assert_close(pipe(x, STEPS), wanted, rtol=0, atol=2e-6)
                assert cache.stats.reused_calls == 3
            with pytest.raises(InvalidSetting):
                cache.update(dataclasses.replace(EVERY_SECOND, fingerprint="0" * 16))
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)  # the former is in force

    def test_reset_in_the_middle(self):
        net, x = Net(), latents()
        pipe = Pipe(net)
        with dit_cache(pipe, EVERY_SECOND) as cache:
            pipe(x, STEPS, at=lambda step: cache.reset() if step == 3 else None)
            assert next(record for record in cache.decisions if record.step == 3).reason == "no anchor"

    def test_an_exception_ends_a_run(self):
        net, x = Net(), latents()
        expected, _ = by_hand(net, x)
        pipe, broken = Pipe(net), []

        def fail(*_):
            if len(broken) == 3:
                raise ZeroDivisionError
            broken.append(1)

        with dit_cache(pipe, EVERY_SECOND) as cache:
            hook = net.blocks[3].register_forward_pre_hook(fail)
            with pytest.raises(ZeroDivisionError):
                pipe(x, STEPS)
            hook.remove()
            torch.testing.assert_close(pipe(x, STEPS), expected, rtol=0, atol=2e-6)
            last_run = [record for record in cache.decisions if record.run == cache.decisions[-1].run]
            assert [record.step for record in last_run if not record.reuse] == list(COMPUTED)

    def test_two_requests_in_turn(self):
        net = Net()
        pipe = Pipe(net)
        inputs = [latents(), latents()]
        with dit_cache(pipe, EVERY_SECOND) as cache:
            requests, outs = [cache.request(), cache.request()], [[], []]
            for step in range(6):
                for number, request in enumerate(requests):
                    with request, timestep_scope(step, sigma=1 - step / 6):
                        outs[number].append(pipe.transformer(inputs[number] * (1 + step), torch.tensor(1 - step / 6)))
            assert cache.stats.reused_calls == 4
        for x, found in zip(inputs, outs, strict=True):
            one, two, four = (net(x * (1 + step), torch.tensor(1 - step / 6)) for step in (1, 2, 4))
            torch.testing.assert_close(found[3], 2 * two - one, rtol=0, atol=2e-6)
            torch.testing.assert_close(found[5], 1.5 * four - 0.5 * two, rtol=0, atol=2e-6)

    def test_threads_have_their_own(self):
        net = Net()
        pipe, found, errors = Pipe(net), {}, []
        inputs = [latents() for _ in range(4)]
        barrier = threading.Barrier(4)

        def draw(number):
            try:
                with torch.no_grad():
                    for step in range(4):
                        barrier.wait()
                        with timestep_scope(step):
                            found[number, step] = pipe.transformer(inputs[number], torch.tensor(1 - step / 4))
            except BaseException as error:
                errors.append(error)
                raise

        with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 4), payload="output")) as cache:
            threads = [threading.Thread(target=draw, args=(number,)) for number in range(4)]
            [thread.start() for thread in threads]
            [thread.join() for thread in threads]
            assert not errors
            assert (cache.stats.computed_calls, cache.stats.reused_calls) == (4, 12)
        for number, x in enumerate(inputs):
            wanted = net(x, torch.tensor(1.0))
            assert all(torch.equal(found[number, step], wanted) for step in range(4))

    def test_removed_while_the_transformer_runs(self):
        net, x = Net(), latents()
        plain = Pipe(net)(x, STEPS)
        pipe = Pipe(net)
        cache = dit_cache(pipe, EVERY_SECOND)
        net.blocks[2].register_forward_pre_hook(lambda *_: cache.remove())
        assert torch.equal(pipe(x, STEPS), plain)
        assert pipe.transformer is net

    def test_weights_that_change_are_seen(self):
        net, x = Net(), latents()
        pipe = Pipe(net)

        def change(step):
            if step == 3:
                with torch.no_grad():
                    for parameter in net.parameters():
                        parameter.mul_(1.5)

        with dit_cache(pipe, EVERY_SECOND) as cache:
            pipe(x, STEPS, at=change)
            assert next(record for record in cache.decisions if record.step == 3).reason == "weights"

    def test_not_finite_is_not_reused(self):
        net, x = Net(), latents()
        pipe, state = Pipe(net), {"step": 0}

        def spoil(*call):
            return call[-1] * float("nan") if state["step"] == 2 else None

        net.register_forward_hook(spoil)
        with dit_cache(pipe, EVERY_SECOND) as cache:
            with pytest.warns(UserWarning, match="is not finite"):
                pipe(x, STEPS, at=lambda step: state.update(step=step))
            assert next(record for record in cache.decisions if record.step == 3).reason == "residual not finite"


class TestPoliciesThatLook:
    def test_a_threshold_measures_the_latents(self):
        """Of latents 1, 1.05, 1.1, 1.2, 1.3 the last computed one is compared with: 5 %, 10 %, 20 % are over 8 %."""
        net = Net()
        pipe = Pipe(net)
        config = DitCacheConfig(policy=Threshold(0.08, max_warmup_steps=1), payload="output")
        x = torch.ones(1, 3, 4)
        scales = [1.0, 1.05, 1.1, 1.15, 1.3]
        with dit_cache(pipe, config) as cache:
            for step, scale in enumerate(scales):
                with timestep_scope(step):
                    pipe.transformer(x * scale, torch.tensor(1.0))
            found = [(record.reuse, record.value) for record in cache.decisions]
        assert [reuse for reuse, _ in found] == [False, True, False, True, False]
        expected = [None, 0.05, 0.1, 0.05 / 1.1, 0.2 / 1.1]
        assert [value for _, value in found] == [None, *(pytest.approx(each, rel=1e-4) for each in expected[1:])]

    def test_look_at_names_what_is_measured(self):
        net = Net("swapped")
        pipe = Pipe(net)
        config = DitCacheConfig(
            policy=Threshold(0.08, max_warmup_steps=1), payload="output", look_at=("encoder_hidden_states",)
        )
        x, e = torch.ones(1, 3, 4), torch.ones(1, 3, 8)
        with dit_cache(pipe, config) as cache:
            for step, scale in enumerate([1.0, 2.0]):
                with timestep_scope(step, branch="one"):
                    pipe.transformer(x * scale, torch.tensor(1.0), e * 1.01**step)
            assert cache.decisions[1].value == pytest.approx(0.01, rel=1e-3)
            assert cache.decisions[1].reuse

    def test_easycache_estimates_the_change_of_the_output(self):
        """Δy ≈ k·Δx with k = |y₁ − y₀| / |x₁ − x₀|, relative to |y₁|; written out for y = 2·x."""
        model = Forms(FORMS["tensor"])
        pipe = SimpleNamespace(transformer=model)
        config = DitCacheConfig(policy=EasyCache(0.5, max_warmup_steps=2), payload="output")
        xs = [torch.full((1, 4), value) for value in (1.0, 1.5, 2.0, 2.2)]
        with dit_cache(pipe, config) as cache:
            for step, x in enumerate(xs):
                with timestep_scope(step, steps=20):
                    pipe.transformer(x, 1.0)
            values = [record.value for record in cache.decisions]
        known = [(step, value) for step, value in enumerate(values) if value is not None]
        assert known, [record.reason for record in cache.decisions]
        for step, value in known:
            before = max(each for each in range(step) if not cache.decisions[each].reuse)
            moved = float((xs[step] - xs[step - 1]).abs().mean())
            assert value == pytest.approx(2 * moved / float((2 * xs[before]).abs().mean()), rel=1e-3)


class TestSeveral:
    def test_of_two_one_residual_and_one_output(self):
        first, second, x = Net(), Net(), latents()
        pipe = Pipe(first)
        pipe.transformer_2 = second

        def run(x):
            pipe.scheduler.set_timesteps(STEPS)
            for step, t in enumerate(pipe.scheduler.timesteps):
                net = pipe.transformer if step < 4 else pipe.transformer_2
                x = x - net(x, timestep=t / 1000) / STEPS
                pipe.scheduler.step()
            return x

        config = DitCacheConfig(policy=Interval(1, 2), overrides={"transformer_2": {"payload": "output"}})
        with dit_cache(pipe, config) as cache:
            found = run(x)
            assert pipe.transformer is first
            assert pipe.transformer_2 is not second
            reused = {(record.range, record.step) for record in cache.decisions if record.reuse}
            assert {each for each in reused if each[0] == "transformer_2"}
            assert {each for each in reused if each[0] != "transformer_2"}
            own = sorted(step for name, step in reused if name == "transformer_2")
        assert pipe.transformer_2 is second
        with dit_cache(
            pipe, DitCacheConfig(policy=Interval(1, 2), overrides={"transformer_2": {"policy": Interval(99, 2)}})
        ):
            pipe.transformer_2 = OutputsByHand(second, counted(pipe.scheduler), set(range(STEPS)) - set(own), last)
            torch.testing.assert_close(run(x), found, rtol=0, atol=2e-6)
            pipe.transformer_2 = second
