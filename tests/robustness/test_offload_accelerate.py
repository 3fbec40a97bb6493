"""accelerate's hooks, which bring weights from the host's memory or a disk for each layer, block or model and take them
away again: put on before or after the cache, taken off in either order, and renewed by a pipeline after every picture.
"""

import pytest
import torch
from models import flux
from offloading import CONFIGS, NEVER, STATIC, Way, expected, kept, offloaded, run, settled, step, wan
from traces import attributes

from dithooks import dit_cache
from dithooks.demo import load_pipeline
from dithooks.demo.draw import CAPTIONS

accelerate = pytest.importorskip("accelerate")
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module  # noqa: E402

pytestmark = [
    pytest.mark.line("Offload"),
    pytest.mark.on("tiny FLUX"),
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),
]
EARLY = pytest.mark.parametrize("early", [True, False], ids=["offloaded first", "cached first"])
HOWS = pytest.mark.parametrize("how", CONFIGS)


class Fetched(dict):
    """Weights in the host's memory; ``names`` are those that were asked for."""

    def __init__(self, weights):
        super().__init__(weights)
        self.names = []

    def __getitem__(self, name):
        self.names.append(name)
        return super().__getitem__(name)


def layers(model, folder=None):
    weights = Fetched(model.state_dict())
    accelerate.cpu_offload(model, "cpu", state_dict=weights)
    assert all(parameter.is_meta for parameter in model.parameters())
    return weights


def whole(model, folder=None):
    accelerate.cpu_offload_with_hook(model, "cpu:0")  # another device than "cpu", so that weights are moved


def disk(model, folder):
    accelerate.disk_offload(model, folder, "cpu")
    assert all(parameter.is_meta for parameter in model.parameters())


def dispatched(model, folder):
    """Some blocks from a disk, others not; the hooks are on the blocks, too."""
    places = {name: "cpu" for name, _ in model.named_children() if name != "single_transformer_blocks"}
    places |= {f"single_transformer_blocks.{n}": place for n, place in enumerate(("cpu", "disk", "cpu"))}
    places["transformer_blocks"] = "disk"
    accelerate.dispatch_model(model, places, offload_dir=folder)
    assert model.single_transformer_blocks[1].norm.linear.weight.is_meta


WAYS = {"layers": layers, "whole model": whole, "disk": disk, "device map": dispatched}


@pytest.fixture(params=WAYS)
def way(request, tmp_path):
    exact = request.param in ("layers", "whole model")
    return Way(lambda model: WAYS[request.param](model, tmp_path), exact, request.param == "device map")


@EARLY
@HOWS
def test_cached_as_without_offloading(way, how, early):
    """A run with the cache gives what it gives without offloading, by the same decisions; then it is plain."""
    want, model = expected(flux, how), flux()
    with offloaded(model, way.offload, CONFIGS[how], early, way.around) as cache:
        cached = run(model)
        assert settled(cache) == want.settled
        assert cache.stats.reused_calls == len(want.reused) > 0
    plain = run(model)
    way.same(cached, want.cached)
    way.same(plain, want.plain)
    for k in range(8):  # bit for bit the same wherever it was computed, warm-up and refreshes
        assert torch.equal(cached[k], plain[k]) == (k not in want.reused)


@EARLY
@pytest.mark.filterwarnings("ignore:.*a run of 8 steps reused nothing")
def test_all_computed_is_the_plain_run(way, early):
    """With a cache that computes every step, all outputs are bit for bit those of the offloaded model without it."""
    model = flux()
    with offloaded(model, way.offload, NEVER, early, way.around) as cache:
        computed = run(model)
        assert cache.stats.reused_calls == 0
        assert cache.stats.blocks_run == cache.stats.blocks_total > 0
    assert torch.equal(computed, run(model))


def test_its_hooks_are_as_before(way):
    """After runs and remove(), every hook and every replaced forward is the very object that it was before."""
    model = flux()
    way.offload(model)
    before, hooked = kept(model), [name for name, each in model.named_modules() if "_hf_hook" in vars(each)]
    assert hooked
    with dit_cache(model, STATIC) as cache:
        run(model)
        assert cache.stats.reused_calls > 0
        assert kept(model) != before
    assert kept(model) == before
    assert [name for name, each in model.named_modules() if "_hf_hook" in vars(each)] == hooked


@EARLY
def test_what_is_skipped_is_not_fetched(early):
    """On a reused step, no weight of the skipped blocks is fetched, and each of all others is, once."""
    model, found = flux(), {}
    with offloaded(model, lambda model: found.update(weights=layers(model)), STATIC, early):
        weights, fetched = found["weights"], []
        run(model)  # in the first run, a call is made again
        for k in range(8):
            weights.names.clear()
            step(model, k)
            fetched.append(sorted(weights.names))
    skipped = ("transformer_blocks.1.", "single_transformer_blocks.0.", "single_transformer_blocks.1.")
    everything, others = sorted(weights), sorted(name for name in weights if not name.startswith(skipped))
    assert len(others) < len(everything)
    assert fetched == [everything] * 3 + [others, everything] * 2 + [others]


@EARLY
def test_offloading_ends_first(way, early):
    """Its hooks can be taken off while the cache is attached: the run stays cached, and after remove() it is plain."""
    want, model = expected(flux, "static"), flux()
    with offloaded(model, way.offload, STATIC, early) as cache:
        way.same(run(model), want.cached)
        remove_hook_from_module(model, recurse=True)
        assert not any(parameter.is_meta for parameter in model.parameters())
        way.same(run(model), want.cached)
        assert cache.stats.reused_calls == 2 * len(want.reused)
    way.same(run(model), want.plain)
    assert not any({"_hf_hook", "_old_forward"} & set(vars(module)) for module in model.modules())


@EARLY
def test_calls_made_again_go_through_its_hooks(early):
    """The call that gave the first residual is made again to test it, through the hooks on the model, too."""

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    model, hook, calls = flux(), Counting(), []
    with offloaded(model, lambda model: add_hook_to_module(model, hook), STATIC, early):
        for k in range(8):
            before = hook.calls
            step(model, k)
            calls.append(hook.calls - before)
    assert calls.pop(2) > 1
    assert calls == [1] * 7


@EARLY
@HOWS
@pytest.mark.on("tiny Wan")
def test_blocks_with_parameters_of_their_own(how, early):
    """Where a block itself holds a parameter, so that hooks are on it, too, all is as where only its layers do."""
    want, model = expected(wan, how), wan()
    with offloaded(model, layers, CONFIGS[how], early, around=True) as cache:
        assert torch.equal(run(model), want.cached)
        assert settled(cache) == want.settled
    assert torch.equal(run(model), want.plain)


@pytest.mark.on("the shipped pipeline")
class TestPipeline:
    """Its own switch, which takes all hooks off after every call and puts new ones on."""

    @pytest.fixture
    def pipe(self):
        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe):
        noise = torch.Generator().manual_seed(0)
        return pipe(CAPTIONS[0], num_inference_steps=4, generator=noise, output_type="pt").images

    @EARLY
    def test_model_offload_in_call_after_call(self, pipe, early):
        """The cache holds in every call of the pipeline, with its hooks, renewed, gone and back again."""
        plain = self.draw(pipe)
        with dit_cache(pipe, STATIC):
            cached = self.draw(pipe)
        with offloaded(pipe, lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), STATIC, early) as cache:
            hook = pipe.transformer._hf_hook
            for calls in (1, 2):
                assert torch.equal(self.draw(pipe), cached)
                assert cache.stats.reused_calls == 2 * calls
                assert pipe.transformer._hf_hook is not hook
            pipe.remove_all_hooks()
            assert torch.equal(self.draw(pipe), cached)
            assert not hasattr(pipe.transformer, "_hf_hook")
            pipe.enable_model_cpu_offload(device="cpu")
            assert torch.equal(self.draw(pipe), cached)
            assert cache.stats.reused_calls == 8
        assert isinstance(pipe.transformer._hf_hook, accelerate.hooks.CpuOffload)
        assert torch.equal(self.draw(pipe), plain)

    def test_model_offload_is_as_before(self, pipe):
        """After remove(), the hooks that the pipeline's last call put on are the very same objects."""
        pipe.enable_model_cpu_offload(device="cpu")
        with dit_cache(pipe, STATIC):
            self.draw(pipe)
            hook, forward = pipe.transformer._hf_hook, pipe.transformer.forward
        assert pipe.transformer._hf_hook is hook
        assert pipe.transformer.forward is forward
        before = attributes(pipe.transformer)
        with dit_cache(pipe, STATIC):
            pass
        assert attributes(pipe.transformer) == before

    @EARLY
    def test_sequential_offload(self, pipe, early):
        """The pipeline's sequential offload, of which only the device differs from accelerate's for layers."""
        plain = self.draw(pipe)
        with dit_cache(pipe, STATIC):
            cached = self.draw(pipe)

        def offload(pipe):
            pipe.enable_sequential_cpu_offload(device="cpu")

        other = load_pipeline()
        other.set_progress_bar_config(disable=True)
        offload(other)
        try:
            self.draw(other)
        except TypeError as error:
            pytest.skip(f"on a CPU, enable_sequential_cpu_offload() fails without a cache, too ({error!r:.60}…)")
        with offloaded(pipe, offload, STATIC, early) as cache:
            assert torch.equal(self.draw(pipe), cached)
            assert cache.stats.reused_calls == 2
        assert torch.equal(self.draw(pipe), plain)

    @EARLY
    def test_sequential_offload_of_its_transformer(self, pipe, early):
        """What sequential offload does, done for the transformer alone, where the device can be the host."""
        plain = self.draw(pipe)
        with dit_cache(pipe, STATIC):
            cached = self.draw(pipe)
        with offloaded(pipe, lambda pipe: layers(pipe.transformer), STATIC, early) as cache:
            assert torch.equal(self.draw(pipe), cached)
            assert cache.stats.reused_calls == 2
        assert torch.equal(self.draw(pipe), plain)
