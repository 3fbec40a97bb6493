"""Blocks that are driven without their model's call: a range whose inside is used later is refused, no other."""

from dataclasses import dataclass

import pytest
import torch
from driven_models import Layer
from torch import nn

from dithooks import DitCacheConfig, Threshold, dit_cache, timestep_scope
from dithooks.errors import WiringError

pytestmark = pytest.mark.core


class Looped(nn.Module):
    """Two lists of four layers and a way to run them, by name."""

    def __init__(self, way):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.layers = nn.ModuleList(Layer(4, 4) for _ in range(4))
            self.others = nn.ModuleList(Layer(4, 4) for _ in range(4))
        self.way = way

    def forward(self, x, timestep):
        return WAYS[self.way](self, x, timestep)


def plainly(model, x, timestep):
    for layer in [*model.layers, *model.others]:
        x = layer(x, timestep)
    return x


def variable_kept_for_its_shape(model, x, timestep):
    for layer in model.layers:
        text = layer(x, timestep)
        x = text
    for layer in model.others:
        x = layer(x, timestep)
    return x[:, : text.shape[1]]


def two_variables_in_turn(model, x, timestep):
    for index in (0, 2):
        half = model.layers[index](x, timestep)
        x = model.layers[index + 1](half, timestep)
    for layer in model.others:
        x = layer(x, timestep)
    return x


def alternating_lists(model, x, timestep):
    for first, second in zip(model.layers, model.others, strict=True):
        inner = first(x, timestep)
        x = second(inner, timestep)
    return x


def former_kept(model, x, timestep):
    for layer in [*model.layers, *model.others]:
        former = x
        x = layer(former, timestep)
    return x


def popped_within(model, x, timestep):
    skips = []
    for layer in model.layers:
        x = layer(x, timestep)
        skips.append(x)
    for layer in model.others:
        x = layer(x + skips.pop(), timestep)
    return x


def kept_in_a_variable(model, x, timestep):
    kept = None
    for number, layer in enumerate([*model.layers, *model.others]):
        if number == 6:
            x = x + torch.sin(kept)
        x = layer(x, timestep)
        if number == 1:
            kept = x
    return x


def collected_in_a_list(model, x, timestep):
    hidden = []
    for layer in [*model.layers, *model.others]:
        x = layer(x, timestep)
        hidden.append(x)
    return torch.stack(hidden).sin().mean(0)


def collected_in_a_tuple(model, x, timestep):
    hidden = ()
    for layer in [*model.layers, *model.others]:
        x = layer(x, timestep)
        hidden = (*hidden, x)
    return torch.stack(hidden).sin().mean(0)


def ends_of_lists_collected(model, x, timestep):
    hidden = []
    for layers in (model.layers, model.others):
        for layer in layers:
            x = layer(x, timestep)
        hidden.append((x, timestep))
    return x + sum(each.sin() for each, _ in hidden)


@dataclass
class State:
    x: torch.Tensor


def kept_in_an_object(model, x, timestep):
    kept = None
    for number, layer in enumerate([*model.layers, *model.others]):
        if number == 7:
            x = x + kept.x.sin()
        x = layer(x, timestep)
        if number == 1:
            kept = State(x)
    return x


WAYS = {
    way.__name__: way
    for way in (
        *(plainly, variable_kept_for_its_shape, two_variables_in_turn, alternating_lists, former_kept, popped_within),
        *(kept_in_a_variable, collected_in_a_list, collected_in_a_tuple, ends_of_lists_collected, kept_in_an_object),
    )
}
RANGES = [(0, 2), (1, 3), (0, 4), (2, 3), (1, 6), (0, 8)]


def refused(way, first, number, driven, config=None, **settings):
    """Whether a run of the model is refused for what it uses of the range; called, that is known from repeating it."""
    model = Looped(way)
    call = model.forward if driven else model
    cache = dit_cache(model, config or DitCacheConfig(1, 2, first, number), blocks=["layers", "others"], **settings)
    try:
        with cache, torch.no_grad():
            for step in range(4):
                with timestep_scope(step, steps=4):
                    call(torch.linspace(-1, 1, 24).reshape(1, 6, 4), torch.tensor(0.5))
    except WiringError as error:
        return "the model uses more of these blocks than what leaves the last one" in str(error) or str(error)
    return False


@pytest.mark.parametrize(
    "way", ["plainly", "variable_kept_for_its_shape", "two_variables_in_turn", "alternating_lists", "former_kept"]
)
@pytest.mark.parametrize(("first", "number"), RANGES)
def test_what_a_loop_leaves_in_variables_is_no_use(way, first, number):
    assert refused(way, first, number, driven=False) is False
    assert refused(way, first, number, driven=True) is False


@pytest.mark.parametrize(
    ("way", "used"),
    [
        ("kept_in_a_variable", lambda first, end: first <= 1 < end < 6),
        ("kept_in_an_object", lambda first, end: first <= 1 < end < 7),
        ("collected_in_a_list", lambda first, end: first < end),
        ("collected_in_a_tuple", lambda first, end: first < end),
        ("ends_of_lists_collected", lambda first, end: first <= 3 < end),
        ("popped_within", lambda first, end: first < 3 and first < end < 4),
    ],
)
@pytest.mark.parametrize(("first", "number"), RANGES)
def test_what_is_used_behind_the_range_is_refused(way, used, first, number):
    found = refused(way, first, number, driven=True)
    if used(first, first + number - 1):
        assert found is True
    elif way != "popped_within":  # where all of it is inside, what the model does between blocks is not followed
        assert found is False


def test_a_range_is_refused_when_driven_as_when_called():
    for way in ("kept_in_a_variable", "collected_in_a_list"):
        assert refused(way, 1, 3, driven=False) is True
        assert refused(way, 1, 3, driven=True) is True


def test_verify_switches_it_off():
    assert refused("kept_in_a_variable", 0, 4, driven=True, verify=False) is False


def test_a_policy_that_looks_sees_the_blocks_before_the_range():
    for way in ("plainly", "two_variables_in_turn"):
        reasons = []
        for driven in (False, True):
            model = Looped(way)
            call = model.forward if driven else model
            config = DitCacheConfig(cache_block_start=2, policy=Threshold(0.9, max_warmup_steps=1))
            with torch.no_grad(), dit_cache(model, config, blocks=["layers", "others"]) as cache:
                for step in range(6):
                    with timestep_scope(step, steps=6):
                        call(torch.ones(1, 6, 4), torch.tensor(step / 6))
                reasons.append([(each.step, each.reason, each.value) for each in cache.decisions])
        assert reasons[0] == reasons[1]
        assert [each[1] for each in reasons[1]][:4] == ["warm-up", "reuse", "reuse", "reuse"]


def test_lists_that_alternate_are_counted_in_the_order_of_their_calls():
    for first, number in ((0, 4), (1, 2), (0, 8)):
        model = Looped("alternating_lists")
        with (
            torch.no_grad(),
            dit_cache(model, DitCacheConfig(1, 2, first, number), blocks=["layers", "others"]) as cache,
        ):
            for step in range(7):
                with timestep_scope(step, steps=7):
                    model.forward(torch.ones(1, 6, 4), torch.tensor(0.5))
            assert cache.stats.reused_calls >= 2
            assert cache.stats.calls == 7
            assert cache.stats.blocks_run == 8 * 7 - number * cache.stats.reused_calls
