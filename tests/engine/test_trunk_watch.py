"""Where several stacks of a model may be its trunk, their first calls tell which one is, and that one is cached."""

import copy
import threading
import warnings

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.engine.attachment import Attachment

STEPS = 8
CONFIG = DitCacheConfig(2, 2, 0, 2)


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.one, self.two, self.runs = nn.Linear(width, width), nn.Linear(width, width), 0

    def forward(self, x, t):
        self.runs += 1
        return x + 0.3 * self.two(torch.tanh(self.one(x + t)))


class Stack(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(number))

    def forward(self, x, t):
        for layer in self.layers:
            x = layer(x, t)
        return x


class Model(nn.Module):
    """A heavy stack for what is given, and a light one that denoises; or the other way round."""

    def __init__(self, first=6, second=3):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = Stack(first), Stack(second)

    @property
    def runs(self):
        return [[layer.runs for layer in stack.layers] for stack in (self.one, self.two)]


def steps(model, x, given, per_step=True, denoiser="two", prompts=1, number=STEPS):
    """One run: the condition is encoded at every step, or once; several prompts one after another."""
    encode, denoise = (model.one, model.two) if denoiser == "two" else (model.two, model.one)
    outputs = []
    for number_of_prompt in range(prompts):
        condition = encode(given + number_of_prompt, torch.zeros(()))
    for step in range(number):
        with timestep_scope(step, steps=number):
            if per_step:
                condition = encode(given, torch.zeros(()))
            outputs.append(denoise(x + step + condition.mean(), torch.tensor(1 - step / 8)))
    return outputs


def by_hand(model, x, given):
    """The same run of the lighter stack, its first two blocks left out at the steps 3, 5 and 7."""
    condition, delta, outputs = model.one(given, torch.zeros(())), None, []
    for step in range(STEPS):
        t = torch.tensor(1 - step / 8)
        h = x + step + condition.mean()
        if step in (3, 5, 7):
            after = h + delta
        else:
            after = model.two.layers[1](model.two.layers[0](h, t), t)
            delta = after - h
        outputs.append(model.two.layers[2](after, t))
    return outputs


def lists_with_stand_ins(model):
    lists = [(name, each) for name, each in model.named_modules() if isinstance(each, nn.ModuleList)]
    return [name for name, each in lists if hasattr(each[0], "_dithooks")]


def same(ones, others):
    return all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ones, others, strict=True))


def moved(now="two.layers", before="one.layers"):
    return pytest.warns(UserWarning, match=rf"^{now} is cached from now on, not {before}: .*give blocks=")


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return torch.randn(1, 4, 8), torch.randn(1, 4, 8)


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize("per_step", [True, False])
@pytest.mark.parametrize("prompts", [1, 2])
def test_the_one_whose_input_changes_is_cached(inputs, per_step, prompts):
    """The heavier one is taken for the trunk at first. The first two steps show that it is not, and were not to be
    reused anyway."""
    model = Model()
    plain, layers = steps(model, *inputs, per_step), [*model.one.layers, *model.two.layers]
    cache = dit_cache(model, CONFIG)
    assert (cache.ranges[0].range, lists_with_stand_ins(model)) == ("one.layers", ["one.layers"])
    with moved() as said:
        first = steps(model, *inputs, per_step, prompts=prompts)
        again = steps(model, *inputs, per_step, prompts=prompts)
    assert len(said) == 1
    assert (cache.ranges[0].range, lists_with_stand_ins(model)) == ("two.layers", ["two.layers"])
    assert (cache.stats.reused_calls, cache.stats.blocks_total) == (6, 3 * (6 + 8))  # since step 2
    cache.remove()
    assert (cache.ranges[0].range, cache.stats.reused_calls) == ("two.layers", 6)
    if prompts == 1:
        assert same(first, by_hand(model, *inputs))
        assert same(again, by_hand(model, *inputs))
    assert all(a is b for a, b in zip(layers, [*model.one.layers, *model.two.layers], strict=True))
    assert lists_with_stand_ins(model) == []
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    assert same(steps(model, *inputs, per_step), plain)


def test_the_one_that_was_taken_stays_where_calls_agree(inputs):
    """Nothing is said, and the watch is over."""
    model = Model(first=3, second=6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_cache(model, CONFIG) as cache:
            steps(model, *inputs)
            assert not cache._watches
            assert not model.one.layers[0]._forward_pre_hooks
            assert (cache.ranges[0].range, cache.stats.reused_calls) == ("two.layers", 3)


@pytest.mark.parametrize("denoiser", ["one", "two"])
def test_one_that_is_called_alone(inputs, denoiser):
    """As where prompts were encoded before: the right one is cached at once, the wrong one makes way after 8 steps."""
    model, (x, _) = Model(), inputs
    stack = getattr(model, denoiser)

    def run(cache):
        for step in range(STEPS):
            with timestep_scope(step, steps=STEPS):
                stack(x + step, torch.tensor(0.5))
        return cache.ranges[0].range, cache.stats.reused_calls

    with dit_cache(model, CONFIG) as cache:
        if denoiser == "one":
            assert run(cache) == ("one.layers", 3)
        else:
            with moved():
                assert run(cache) == ("two.layers", 0)
            assert run(cache) == ("two.layers", 3)


def test_where_both_are_called_with_new_inputs_the_heavier_one_stays(inputs):
    model, (x, given) = Model(), inputs
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_cache(model, CONFIG) as cache:
            for _ in range(2):
                for step in range(STEPS):
                    with timestep_scope(step, steps=STEPS):
                        model.two(model.one(given + step, torch.zeros(())) + x, torch.tensor(0.5))
            assert (cache.ranges[0].range, cache.stats.reused_calls > 0, cache._watches) == ("one.layers", True, [])


def test_what_is_named_is_cached_whatever_is_called(inputs):
    model = Model()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_cache(model, CONFIG, blocks="one.layers") as cache:
            assert not model.two.layers[0]._forward_pre_hooks
            steps(model, *inputs)
            assert cache.ranges[0].range == "one.layers"
            assert cache.stats.reused_calls == 3


def test_settings_that_do_not_fit_the_other_one_leave_all_as_it_is(inputs):
    model = Model()
    with dit_cache(model, DitCacheConfig(2, 2, 0, 5)) as cache:
        with pytest.warns(UserWarning, match=r"^one.layers is cached, but two.layers denoises.*past the end"):
            steps(model, *inputs)
        assert (cache.ranges[0].range, cache._watches) == ("one.layers", [])


def test_the_choice_is_kept_by_updates_and_by_the_config(inputs):
    """A config that names the model it was made for is one for that stack."""
    model = Model()
    with dit_cache(model, CONFIG) as cache:
        with moved():
            steps(model, *inputs)
        cache.update(DitCacheConfig(1, 2, 0, 3))
        assert (cache.ranges[0].range, cache._watches) == ("two.layers", [])
        config = cache.config
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_cache(model, config) as cache:
            steps(model, *inputs)
            assert (cache.ranges[0].range, cache.stats.reused_calls) == ("two.layers", 3)


@pytest.mark.parametrize("place", ["detach", "attach", "_put_stand_ins"])
def test_a_move_that_is_interrupted_leaves_nothing_behind(inputs, place, monkeypatch):
    """Ctrl-C while the stand-ins are moved: the model is as it was, and so it is once the cache is removed."""
    model = Model()
    plain, layers = steps(model, *inputs), [*model.one.layers, *model.two.layers]
    cache, original = dit_cache(model, CONFIG), getattr(Attachment, place)

    def interrupted(self, *args, **kwargs):
        monkeypatch.setattr(Attachment, place, original)
        raise KeyboardInterrupt

    monkeypatch.setattr(Attachment, place, interrupted)
    with pytest.raises(KeyboardInterrupt):
        steps(model, *inputs)
    assert (cache.ranges[0].range, lists_with_stand_ins(model)) == ("one.layers", ["one.layers"])
    with moved():
        steps(model, *inputs)
    assert lists_with_stand_ins(model) == ["two.layers"]
    cache.remove()
    assert all(a is b for a, b in zip(layers, [*model.one.layers, *model.two.layers], strict=True))
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())
    assert same(steps(model, *inputs), plain)


def test_runs_in_other_threads_go_on(inputs):
    """Each thread has its own inputs: what one encodes does not stand between the steps of another."""
    model, wrong, start = Model(), [], threading.Barrier(4)
    given = [(inputs[0] + number, inputs[1] - number) for number in range(4)]
    wanted = [steps(model, *each, number=4) for each in given]

    def work(number):
        with torch.no_grad():
            start.wait()
            for _ in range(6):
                found = steps(model, *given[number], number=4)
                if not (same(found[:3], wanted[number][:3]) and all(each.isfinite().all() for each in found)):
                    wrong.append(number)

    with moved() as said, dit_cache(model, CONFIG) as cache:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for each in threads:
            each.start()
        for each in threads:
            each.join()
        assert (cache.ranges[0].range, cache._watches) == ("two.layers", [])
    assert not wrong
    assert len([each for each in said if "from now on" in str(each.message)]) == 1
    assert lists_with_stand_ins(model) == []
    assert not any(each._forward_pre_hooks or each._forward_hooks for each in model.modules())


def test_blocks_that_are_called_without_the_module_that_has_them(inputs):
    """A pipeline that is a module, whose functions run over the blocks; its components have names that tell nothing."""
    model, (x, given) = Model(), inputs

    def run():
        condition, outputs = given, []
        for layer in model.one.layers:
            condition = layer(condition, torch.zeros(()))
        for step in range(STEPS):
            with timestep_scope(step, steps=STEPS):
                h = x + step + condition.mean()
                for layer in model.two.layers:
                    h = layer(h, torch.tensor(1 - step / 8))
                outputs.append(h)
        return outputs

    plain = run()
    with dit_cache(model, CONFIG) as cache:
        with moved():
            found = run()
        assert (cache.ranges[0].range, cache.stats.reused_calls) == ("two.layers", 3)
    assert same(found, by_hand(model, *inputs))
    assert not same(found, plain)


def test_lists_that_are_called_in_another_order_count_in_that_order(inputs):
    """The cache is put on when the module that calls them has returned, not in the midst of its call."""

    class Backwards(Stack):
        def __init__(self):
            super().__init__(2)
            self.early = nn.ModuleList(Block() for _ in range(2))

        def forward(self, x, t):
            for layer in [*self.early, *self.layers]:
                x = layer(x, t)
            return x

    model = Model()
    model.one, model.two = Stack(7), Backwards()
    with dit_cache(model, CONFIG) as cache:
        with moved("two.layers, two.early", "one.layers"):
            steps(model, *inputs)
        assert cache.stats.reused_calls == 3
        assert "two.early.0 … two.early.1 of 4 blocks" in repr(cache)


def test_a_copy_of_the_model_is_not_watched(inputs):
    model = Model()
    with dit_cache(model, CONFIG) as cache:
        twin = copy.deepcopy(model)
        steps(twin, *inputs)
        assert (cache.ranges[0].range, len(cache._watches)) == ("one.layers", 1)
        assert lists_with_stand_ins(twin) == []


@pytest.mark.parametrize(
    "way", ["each, by torch.compile(part)", "the trunk, by torch.compile(part)", "the trunk, in place"]
)
@pytest.mark.filterwarnings("ignore:.*two.layers is cached from now on")
@torch.no_grad()
def test_compiled_once_attached(way):
    """What a part is called with tells it as well, where its blocks run in compiled code and show nothing."""
    torch._dynamo.reset()

    def run(model, parts):
        encode, denoise = parts
        x, condition = torch.linspace(-1, 1, 24).reshape(1, 3, 8), encode(torch.ones(1, 3, 8), torch.zeros(()))
        for step in range(STEPS):
            with timestep_scope(step, steps=STEPS):
                x = x - 0.1 * denoise(x + 0.1 * condition, torch.tensor(1 - step / STEPS))
        return x

    def model_of_plain_blocks():
        model = Model(6, 4)
        for layer in [*model.one.layers, *model.two.layers]:
            layer.__class__ = Silent
        return model

    eager, model = model_of_plain_blocks(), model_of_plain_blocks()
    with dit_cache(eager, CONFIG) as cache:
        expected = [run(eager, (eager.one, eager.two)) for _ in range(2)]
        told = [each.reuse for each in cache.decisions]
    with dit_cache(model, CONFIG) as cache:
        parts = [model.one, model.two]
        if way == "the trunk, in place":
            model.two.compile(backend="eager", fullgraph=True)
        else:
            parts[1] = torch.compile(model.two, backend="eager", fullgraph=True)
            if way.startswith("each"):
                parts[0] = torch.compile(model.one, backend="eager", fullgraph=True)
        for wanted in expected:
            assert torch.equal(run(model, parts), wanted)
        assert [each.reuse for each in cache.decisions] == told
        assert told.count(True) == 6
        assert cache.ranges[0].range == "two.layers"
    torch._dynamo.reset()


class Silent(Block):
    """A block that does not count its runs, which would be compiled."""

    def forward(self, x, t):
        return x + 0.3 * self.two(torch.tanh(self.one(x + t)))


def test_training_shows_nothing(inputs):
    """With gradients nothing is observed, whatever is called: the cache stays where it was put."""
    model = Model()
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "one is called with gradients|two is called with gradients|no call of")
        warnings.filterwarnings("error", "two.layers is cached")
        with dit_cache(model, CONFIG) as cache:
            steps(model, *inputs, per_step=True)
            assert lists_with_stand_ins(model) == ["one.layers"]
            assert cache.stats.reused_calls == 0
            cache.update(CONFIG)
