"""Adapters loaded, switched, weighted, fused, swapped and unloaded before, between and within runs, by diffusers and by
plain PEFT: weights and modules end where they would have without a cache, and no residual outlives the weights it was
taken with.
"""

import copy
import gc
import weakref

import pytest
import torch
from models import flux
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from pipelines import flux as flux_pipeline
from toys import Net, latents, loop

from dithooks import DitCacheConfig, Linear, Threshold, dit_cache, timestep_scope

pytestmark = [pytest.mark.line("LoRA"), pytest.mark.on("tiny FLUX")]

CONFIG = DitCacheConfig(2, 4, 0, 5)  # of 8 steps: two of warm-up, a refresh, three reused, a refresh, one reused
SCHEDULE = ["warm-up", "warm-up", "refresh", "reuse", "reuse", "reuse", "refresh", "reuse"]
TARGETS = ["to_q", "to_k", "to_v", "proj_mlp", "norm.linear"]


def given():
    generator = torch.Generator().manual_seed(5)
    return {
        "hidden_states": torch.randn(1, 16, 4, generator=generator),
        "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
        "pooled_projections": torch.randn(1, 32, generator=generator),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(5, 3),
        "timestep": torch.tensor([0.5]),
    }


def run(model, at=lambda: None, when=5, **extra):
    """Eight steps on the same input, so that a reused step has to give what a computed one would."""
    outputs = []
    for k in range(8):
        if k == when:
            at()
        with timestep_scope(k):
            outputs.append(model(**given(), return_dict=False, **extra)[0])
    return outputs


def config(alpha=4, rank=2):
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, init_lora_weights=False)


@pytest.fixture(scope="module", autouse=True)
def files(tmp_path_factory):
    """Adapters as they are saved: 1 and 3 differ in their weights only, 2 in its strength as well."""
    root = tmp_path_factory.mktemp("adapters")
    for number, alpha in ((1, 4), (2, 8), (3, 4)):
        model = flux()
        torch.manual_seed(number)
        model.add_adapter(config(alpha), "x")
        model.save_lora_adapter(root / str(number), "x")
    FILES["root"] = root
    yield
    FILES.clear()


FILES = {}


def traces(model):
    """All that could be left of a cache, or be another after it."""
    return {
        name: (type(module), sorted(vars(module)), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    }


def alike(model, twin):
    assert traces(model) == traces(twin)
    mine, other = model.state_dict(), twin.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert all(torch.equal(a, b) for a, b in zip(run(model), run(twin), strict=True))


def load(name, number, **extra):
    how = {"prefix": None, "use_safetensors": True, "adapter_name": name, **extra}
    return lambda model: model.load_lora_adapter(FILES["root"] / str(number), **how)


def call(method, *args, **kwargs):
    return lambda model: getattr(model, method)(*args, **kwargs)


def peft(method):
    """Of a wrapper of PEFT's, made by :func:`wrap`."""
    return lambda model: getattr(model.__dict__["wrapper"][0], method)()


def wrap(model):
    model.__dict__["wrapper"] = (get_peft_model(model, config()),)  # a tuple: not to be found among the modules


SEQUENCES = {
    "load, set, fuse, unload": [
        load("a", 1),
        call("set_adapters", ["a"], [0.3]),
        call("fuse_lora"),
        call("unload_lora"),
    ],
    "add, fuse, unfuse, unload": [
        call("add_adapter", config(), "a"),
        call("fuse_lora", lora_scale=0.5),
        call("unfuse_lora"),
        call("unload_lora"),
    ],
    "add, disable, enable, delete": [
        call("add_adapter", config(), "a"),
        call("disable_adapters"),
        call("enable_adapters"),
        call("delete_adapters", "a"),
    ],
    "two, both, one, the other": [
        lambda model: [load("a", 1)(model), load("b", 2)(model)],
        call("set_adapters", ["a", "b"], [0.7, 1.2]),
        call("set_adapter", "a"),
        call("set_adapters", "b", {"single_transformer_blocks": 2.0}),
    ],
    "load, delete, load, fuse": [load("a", 1), call("delete_adapters", "a"), load("a", 2), call("fuse_lora")],
    "swap one for another in place": [
        load("a", 1),
        load("a", 2, hotswap=True),
        load("a", 3, hotswap=True),
        call("unload_lora"),
    ],
    "PEFT: inject, merge, write, load": [
        lambda model: inject_adapter_in_model(config(), model),
        call("apply", lambda module: module.merge() if hasattr(module, "merge") else None),
        call("apply", lambda module: module.unmerge() if hasattr(module, "unmerge") else None),
        lambda model: model.load_state_dict({k: v + 0.1 for k, v in model.state_dict().items() if "lora_" in k}, False),
    ],
    "PEFT: wrap, merge, unmerge, unload": [wrap, peft("merge_adapter"), peft("unmerge_adapter"), peft("unload")],
}


def played(sequence, shift, cached):
    """Each operation at a moment: 1 once attached, 2 and 4 within a run, 3 and 5 after one, 6 when removed."""
    model, outputs = flux(), []

    def act(moment):
        torch.manual_seed(moment)
        if moment >= shift and moment - shift < len(sequence):
            sequence[moment - shift](model)

    handle = dit_cache(model, CONFIG) if cached else None
    act(1)
    outputs += run(model, lambda: act(2))
    act(3)
    outputs += run(model, lambda: act(4))
    act(5)
    reasons = []
    if handle is not None:
        reasons = [each.reason for each in handle.decisions]
        assert handle.stats.reused_calls == reasons.count("reuse")
        handle.remove()
    act(6)
    return model, outputs, reasons


@pytest.mark.filterwarnings("ignore::UserWarning:peft")
@pytest.mark.parametrize("shift", [1, 2, 3])
@pytest.mark.parametrize("name", SEQUENCES)
def test_at_any_moment(name, shift):
    """Four operations, one after another from any moment on: outputs, weights and modules are those of a twin without a
    cache, and the call that follows a change within a run is computed, for that reason.
    """
    model, outputs, reasons = played(SEQUENCES[name], shift, cached=True)
    twin, expected, _ = played(SEQUENCES[name], shift, cached=False)
    changed = [k for k in (5, 13) if not torch.equal(expected[k], expected[k - 1])]
    assert changed
    same = [
        k for k in (5, 13) if k not in changed and reasons[k] == "weights"
    ]  # unloaded when fused: nothing but names
    assert reasons == ["weights" if k in changed + same else reason for k, reason in enumerate(SCHEDULE * 2)]
    for output, plain, reason in zip(outputs, expected, reasons, strict=True):
        if reason == "reuse":
            torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
        else:
            assert torch.equal(output, plain)
    alike(model, twin)


@pytest.mark.parametrize(("when", "reasons"), [(3, {"weights": 1}), (4, {}), (5, {"weights": 1})])
def test_a_forecast_takes_no_residual_of_other_weights(when, reasons):
    """A line through two residuals, and an adapter reweighted at a reused step, at a refresh and after one: those of
    before are left out of it.
    """
    model = flux()
    load("a", 1)(model)

    def change():
        model.set_adapters(["a"], [0.1])

    with dit_cache(model, DitCacheConfig(1, 3, 0, 5, predictor=Linear())) as cache:
        outputs = run(model, change, when)
        assert {reason: n for reason, n in cache.stats.reasons.items() if reason == "weights"} == reasons
        assert cache.stats.reused_calls == 4 - len(reasons)
    load("a", 1)(twin := flux())
    expected = run(twin, lambda: twin.set_adapters(["a"], [0.1]), when)
    assert not torch.allclose(expected[when], expected[when - 1], rtol=1e-3, atol=1e-3)
    for output, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)


def test_a_policy_that_looks_at_the_blocks_before_the_range():
    """An adapter switched off where a threshold would let a step be reused: computed, and reuse goes on after it."""
    model = flux()
    load("a", 1)(model)
    with dit_cache(model, DitCacheConfig(cache_block_start=1, policy=Threshold(0.5, max_warmup_steps=1))) as cache:
        outputs = run(model, model.disable_adapters)
        decided = [each.reason for each in cache.decisions]
    assert decided[5] == "weights"
    assert decided[1:5] + decided[6:] == ["reuse"] * 6
    torch.testing.assert_close(outputs[7], run(flux())[7], rtol=1e-4, atol=1e-5)


def test_strength_told_to_each_call():
    """``joint_attention_kwargs={"scale": …}`` that is another within a run: computed, and right from there on."""
    model = flux()
    load("a", 1)(model)
    told = {"scale": 1.0}
    with dit_cache(model, CONFIG) as cache:
        outputs = run(model, lambda: told.update(scale=0.2), joint_attention_kwargs=told)
        assert cache.stats.reasons == {"warm-up": 2, "refresh": 2, "reuse": 3, "weights": 1}
    told["scale"] = 1.0
    expected = run(model, lambda: told.update(scale=0.2), joint_attention_kwargs=told)
    assert (expected[5] - expected[4]).abs().max() > 1e-3
    for output, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)


def test_swapped_in_place_at_equal_strength():
    """Nothing but values in memory shows that, within a run, so it is not noticed: ``reset()`` is the remedy."""
    model = flux()
    load("a", 1)(model)
    swap = load("a", 3, hotswap=True)
    with dit_cache(model, CONFIG) as cache:
        run(model, lambda: swap(model))
        assert [each.reason for each in cache.decisions] == SCHEDULE
        load("a", 1, hotswap=True)(model)
        outputs = run(model, lambda: [swap(model), cache.reset()])
    load("a", 1, hotswap=True)(model)
    expected = run(model, lambda: swap(model))
    assert (expected[5] - expected[4]).abs().max() > 1e-3
    for output, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("how", ["enable again", "set what is set", "save", "copy"])
def test_what_leaves_the_weights_as_they_are_computes_nothing(how, tmp_path):
    """Adapters enabled once more, set to what they were, saved, or copied within a run: as much is reused."""
    model = flux()
    load("a", 1)(model)
    model.set_adapters(["a"], [0.5])
    act = {
        "enable again": lambda: model.enable_adapters(),
        "set what is set": lambda: model.set_adapters(["a"], [0.5]),
        "save": lambda: model.save_lora_adapter(tmp_path, "a"),
        "copy": lambda: copy.deepcopy(model),
    }[how]
    with dit_cache(model, CONFIG) as cache:
        run(model, act)
        assert [each.reason for each in cache.decisions] == SCHEDULE


def test_an_adapter_that_is_unloaded_is_freed():
    """Unloaded while attached, between two runs: its tensors are gone at once, not only with the next call."""
    model = flux()
    with dit_cache(model, CONFIG):
        load("a", 1)(model)
        run(model)
        alive = [weakref.ref(value) for name, value in model.named_parameters() if "lora_" in name]
        assert len(alive) == 42
        model.unload_lora()
        gc.collect()
        assert not any(each() is not None for each in alive)


def test_compiled_and_swapped():
    """A compiled model that is prepared for adapters of several strengths and ranks: swapped within a run, it is
    computed, and comes out as without a cache and compiler.
    """
    torch._dynamo.reset()

    model, twin = flux(), flux()
    for each in (model, twin):
        each.enable_lora_hotswap(target_rank=4)
        load("a", 1)(each)
    model.compile(backend="eager")
    with dit_cache(model, CONFIG) as cache:
        outputs = run(model, lambda: load("a", 2, hotswap=True)(model))
        assert [each.reason for each in cache.decisions] == [*SCHEDULE[:5], "weights", *SCHEDULE[6:]]
    expected = run(twin, lambda: load("a", 2, hotswap=True)(twin))
    assert (expected[5] - expected[4]).abs().max() > 1e-3
    for output, plain in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, plain, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.on("FluxPipeline")
def test_pipeline(tmp_path):
    """Loaded from a file, weighted by the callback of a step, fused and unloaded by the pipeline, all while attached:
    weights and pictures are as without.
    """
    maker, _ = flux_pipeline()
    torch.manual_seed(1)
    names = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v", "proj_mlp"], init_lora_weights=False)
    maker.transformer.add_adapter(names, "x")
    maker.save_lora_weights(tmp_path, get_peft_model_state_dict(maker.transformer, adapter_name="x"))

    def weigh(pipe, step, timestep, values):
        if step == 4:  # the next is the sixth
            pipe.set_adapters(["a"], [0.1])
        return values

    def draw(pipe, call, **extra):
        call = call | {"generator": torch.Generator().manual_seed(3), "output_type": "latent", "num_inference_steps": 8}
        return pipe(**call, **extra).images

    pipe, call = flux_pipeline()
    twin, _ = flux_pipeline()
    plain = draw(twin, call)
    config = DitCacheConfig(2, 4, 0, len(pipe.transformer.transformer_blocks))
    with dit_cache(pipe, config) as cache:
        draw(pipe, call)
        calls = cache.stats.calls
        cache.reset()
        pipe.load_lora_weights(tmp_path, adapter_name="a")
        draw(pipe, call, callback_on_step_end=weigh)
        assert cache.stats.reasons["weights"] == calls // 8
        assert cache.stats.reused_calls == 3 * (calls // 8)
        pipe.fuse_lora()
        draw(pipe, call)
        pipe.unload_lora_weights()
        draw(pipe, call)
    twin.load_lora_weights(tmp_path, adapter_name="a")
    twin.set_adapters(["a"], [0.1])
    twin.fuse_lora()
    twin.unload_lora_weights()
    mine, other = pipe.transformer.state_dict(), twin.transformer.state_dict()
    assert list(mine) == list(other)
    assert all(torch.equal(mine[name], other[name]) for name in mine)
    assert torch.equal(draw(pipe, call), draw(twin, call))
    assert not torch.equal(draw(pipe, call), plain)


@pytest.mark.on("a model of one's own")
def test_a_config_made_without_an_adapter_serves_with_one():
    """And the other way round: a model is the same model to a saved config, whatever adapters it has."""
    net, config = Net().eval(), LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)
    with dit_cache(net, CONFIG) as cache:
        made = cache.config
    inject_adapter_in_model(config, net)
    with dit_cache(net, made) as cache:
        loop(net, latents(), 8)
        assert cache.stats.reused_calls == 4
        assert cache.config == made
