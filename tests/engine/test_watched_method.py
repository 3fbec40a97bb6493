"""A method that the loop calls instead of the model: ``dit_cache(..., method=...)`` watches it as the model's call."""

import copy
import inspect
import pickle
import warnings

import pytest
import torch
from driven_models import Layers
from torch import nn

from dithooks import DitCacheConfig, Threshold, dit_cache
from dithooks.errors import InvalidSetting, WiringError, WrongType

pytestmark = pytest.mark.core

STEPS = 6
EVERY_SECOND = DitCacheConfig(1, 2, 1, 2)  # of 6 steps, it computes 0, 1, 3 and 5
WAYS = {"with_cfg": 2, "calls_itself": 2, "twice": 4}  # reused calls of 6 steps


class Driven(Layers):
    """Four layers that are called by methods, too."""

    def with_cfg(self, x, timestep, scale=2.0):
        first, second = self.forward(torch.cat([x, -x]), timestep).chunk(2)
        return second + scale * (first - second)

    def calls_itself(self, x, timestep):
        return self(x, timestep)

    def twice(self, x, timestep):
        return self.forward(x + self.forward(x, timestep), timestep)

    def fails(self, x, timestep):
        self.forward(x, timestep)
        raise ZeroDivisionError


def run(call, steps=STEPS):
    """The outputs of a run whose input does not change, but for the timestep, which tells the step."""
    with torch.no_grad():
        return [call(torch.ones(1, 3, 4), torch.tensor(1.0 - step * 1e-6)) for step in range(steps)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("policy", [None, Threshold(0.9, max_warmup_steps=1)], ids=["interval", "looking"])
def test_it_is_cached_and_right(way, policy):
    model = Driven()
    plain = run(getattr(model, way))
    config = EVERY_SECOND if policy is None else DitCacheConfig(cache_block_start=1, policy=policy)
    with dit_cache(model, config, method=way) as cache:
        found = run(getattr(model, way))
        each = WAYS[way] // 2
        assert cache.stats.reused_calls == each * (2 if policy is None else 5)
        assert cache.stats.computed_calls == each * (4 if policy is None else 1)
        assert [record.step for record in cache.decisions] == [step for step in range(STEPS) for _ in range(each)]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("way", ["with_cfg", "twice"])
def test_a_range_whose_inside_is_used_later_is_refused_by_repeating_the_call(way):
    model = Driven(skip=(1, 3))
    with (
        dit_cache(model, DitCacheConfig(1, 2, 0, 3), method=way),
        pytest.raises(WiringError, match=r"residual added, the call it was taken from comes out"),
    ):
        run(getattr(model, way), 2)


def test_its_own_signature_says_which_argument_is_the_timestep():
    class Decoder(Layers):
        def decode(self, text, hidden, t):
            return self.forward(hidden, t) + text

    model = Decoder()
    with torch.no_grad(), dit_cache(model, EVERY_SECOND, method="decode") as cache:
        for step in range(STEPS):
            model.decode(torch.ones(1), torch.ones(1, 3, 4), torch.tensor(1 - step / STEPS))
        assert [record.step for record in cache.decisions] == list(range(STEPS))
        assert cache.stats.reused_calls == 2


class Calling(Layers):
    """A model whose call is that of its method, or not."""

    def forward(self, x, timestep, directly=False):
        return super().forward(x, timestep) if directly else self.decode(x, timestep)

    def decode(self, hidden_states, timestep):
        return super().forward(hidden_states, timestep)


@pytest.mark.parametrize("directly", [False, True])
class TestCallsOfTheModelItself:
    def test_each_counts_once(self, directly):
        model = Calling()
        with dit_cache(model, DitCacheConfig(1, 2, 0, 3), method="decode") as cache:
            run(lambda x, timestep: model(x, timestep, directly))
            assert [record.step for record in cache.decisions] == list(range(STEPS))
            assert (cache.stats.computed_calls, cache.stats.reused_calls) == (4, 2)

    def test_a_range_whose_inside_is_used_later_is_refused(self, directly):
        model = Calling(skip=(0, 3))
        with dit_cache(model, DitCacheConfig(1, 2, 0, 3), method="decode"), pytest.raises(WiringError):
            run(lambda x, timestep: model(x, timestep, directly), 2)


def test_the_method_of_the_target_comes_before_that_of_the_transformer_inside():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = Driven()

        def sample(self, x, timestep):
            return self.transformer.with_cfg(x, timestep)

    model = Whole()
    for way in ("sample", "with_cfg"):
        with dit_cache(model, EVERY_SECOND, method=way) as cache:
            holder = model if way == "sample" else model.transformer
            assert way in vars(holder)
            run(model.sample)
            assert cache.stats.reused_calls == 2
        assert way not in vars(holder)


class TestTheModelIsLeftAlone:
    def test_its_dictionary_is_as_it_was(self):
        model = Driven()
        mine = model.note = lambda x, timestep: model.forward(x, timestep)
        before, classes = dict(vars(model)), dict(vars(Driven))
        for way in ("with_cfg", "note"):
            with dit_cache(model, EVERY_SECOND, method=way):
                run(getattr(model, way))
            assert list(vars(model)) == list(before)
            assert all(vars(model)[name] is value for name, value in before.items())
        assert model.note is mine
        assert dict(vars(Driven)) == classes

    @pytest.mark.parametrize("first", [0, 1])
    def test_two_caches_share_a_method_and_leave_in_any_order(self, first):
        class Halves(Driven):
            def __init__(self):
                super().__init__()
                self.others = Layers(3).layers

            def forward(self, x, timestep):
                x = super().forward(x, timestep)
                for layer in self.others:
                    x = layer(x, timestep)
                return x

        model = Halves()
        config = DitCacheConfig(1, 2, 0, 3)
        caches = [dit_cache(model, config, blocks=path, method="with_cfg") for path in ("layers", "others")]
        run(model.with_cfg)
        assert [cache.stats.reused_calls for cache in caches] == [2, 2]
        caches.pop(first).remove()
        run(model.with_cfg)
        assert caches[0].stats.reused_calls == 4
        caches[0].remove()
        assert "with_cfg" not in vars(model)

    def test_what_others_have_put_over_it_stays(self):
        model = Driven()
        cache = dit_cache(model, EVERY_SECOND, method="with_cfg")
        within = model.with_cfg
        wrapper = model.with_cfg = lambda x, timestep: within(x, timestep)
        run(model.with_cfg)
        assert cache.stats.reused_calls == 2
        cache.remove()
        assert model.with_cfg is wrapper
        torch.testing.assert_close(run(model.with_cfg, 1)[0], run(Driven().with_cfg, 1)[0])

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_have_the_plain_method(self, copied):
        model = Driven()
        expected = run(model.with_cfg, 1)[0]
        with dit_cache(model, EVERY_SECOND, method="with_cfg") as cache:
            other = copied(model)
            assert other.with_cfg.__self__ is other
            assert other.with_cfg.__func__ is Driven.with_cfg
            torch.testing.assert_close(run(other.with_cfg, 1)[0], expected)
            assert not cache.decisions
            with torch.no_grad():
                other.layers[0].weight.zero_()
            assert not torch.equal(run(other.with_cfg, 1)[0], expected)
        again = copied(copied(other))
        assert again.with_cfg.__self__ is again

    def test_pickles_load_without_this_library(self):
        model = Driven()
        with dit_cache(model, EVERY_SECOND, method="with_cfg"):
            assert b"dithooks" not in pickle.dumps(model)

    def test_it_looks_like_the_method(self):
        model = Driven()
        with dit_cache(model, EVERY_SECOND, method="with_cfg"):
            assert inspect.signature(model.with_cfg) == inspect.signature(Driven().with_cfg)
            assert model.with_cfg.__name__ == "with_cfg"
            assert model.with_cfg.__self__ is model

    def test_an_exception_in_it_ends_the_call(self):
        model = Driven()
        with dit_cache(model, EVERY_SECOND, method="fails") as cache:
            for step in range(4):
                with torch.no_grad(), pytest.raises(ZeroDivisionError):
                    model.fails(torch.ones(1, 3, 4), torch.tensor(1 - step / 4))
            assert cache.stats.reused_calls == 0
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                cache.reset()


@pytest.mark.parametrize(
    ("method", "error", "match"),
    [
        ("nothing", InvalidSetting, r"Driven has no method of that name"),
        ("forward", InvalidSetting, r"leave method= out"),
        ("layers", WrongType, r"is a module of Driven"),
        ("skip", WrongType, r"cannot be called"),
        (3, WrongType, r"name of a method"),
    ],
)
def test_what_is_no_method_is_refused_before_anything_is_touched(method, error, match):
    model = Driven()
    blocks, before = list(model.layers), dict(vars(model))
    with pytest.raises(error, match=match):
        dit_cache(model, EVERY_SECOND, method=method)
    assert all(one is other for one, other in zip(model.layers, blocks, strict=True))
    assert vars(model) == before
    assert not model._forward_hooks
