"""Models quantised by torchao (int8, weights only and dynamic), with weights of a tensor subclass that lies about its
dtype, and with linear layers that have no weight at all: no weight is looked at in a call, and what is kept has the
dtype of the activations.
"""

import copy
import dataclasses
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from robustness.test_lora import CONFIG, SCHEDULE, flux, run
from torch import nn
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from toys import Net, Pipe, latents, loop, prompt

import dithooks
from dithooks import DitCacheConfig, Threshold, dit_cache, timestep_scope
from dithooks.tiny import build

pytestmark = [pytest.mark.line("Quantised"), pytest.mark.on("tiny FLUX")]

RECIPES = {"weight only": Int8WeightOnlyConfig(), "dynamic": Int8DynamicActivationInt8WeightConfig()}
SOURCES = str(Path(dithooks.__file__).parent)


class Packed(nn.Module):
    """A linear layer of int8 numbers and a scale for each row; who asks for its weight is refused."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.register_buffer("offset", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self):
        raise RuntimeError("a packed layer has no weight")

    @property
    def bias(self):
        raise RuntimeError("a packed layer has no bias")

    def forward(self, x):
        y = x @ (self.packed.to(x.dtype) * self.scale.to(x.dtype)).T
        return y if self.offset is None else y + self.offset.to(x.dtype)


class Lying(torch.Tensor):
    """int8 numbers and scales that say they are float32, and compute in the dtype of what they are multiplied with.

    Everything else that is done to them by the library's code is noted.
    """

    asked = ()

    @staticmethod
    def __new__(cls, packed, scale):
        return torch.Tensor._make_wrapper_subclass(cls, packed.shape, dtype=torch.float32, device=packed.device)

    def __init__(self, packed, scale):
        self.packed, self.scale = packed, scale

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is F.linear:
            x, weight, bias = (*args, *(kwargs or {}).values(), None)[:3]
            y = x @ (weight.packed.to(x.dtype) * weight.scale.to(x.dtype)).T
            return y if bias is None else y + bias.to(x.dtype)
        if sys._getframe(1).f_code.co_filename.startswith(SOURCES):
            Lying.asked = (*Lying.asked, getattr(func, "__qualname__", repr(func)))
        return super().__torch_function__(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return Lying(args[0].packed, args[0].scale)
        raise NotImplementedError(f"{func} of a packed weight")


def quantisable(module, path):
    """Wan reads its dtype off the weights that embed the time; torchao takes none with a single column."""
    return isinstance(module, nn.Linear) and module.in_features > 1 and "condition_embedder" not in path


def packed(model):
    """Every linear layer replaced by one without a weight."""
    for path, child in list(model.named_modules()):
        if quantisable(child, path):
            parent, _, name = path.rpartition(".")
            model.get_submodule(parent).register_module(name, Packed(child))
    return model


def lying(model):
    """The weight of every linear layer replaced by one that lies."""
    for path, module in model.named_modules():
        if quantisable(module, path):
            scale = module.weight.abs().amax(1, keepdim=True) / 127
            weight = Lying((module.weight / scale).round().to(torch.int8), scale)
            module.weight = nn.Parameter(weight, requires_grad=False)
    return model


def by_torchao(recipe):
    def quantised(model):
        quantize_(model, RECIPES[recipe], quantisable)
        return model

    return quantised


HOW = {"torchao, weight only": by_torchao("weight only"), "torchao, dynamic": by_torchao("dynamic")}
HOW |= {"a subclass that lies": lying, "no weight at all": packed}


def close(outputs, expected):
    """Rounded activations make more of the last digit than exact ones: 1 %, where the effect of a range is 100 %."""
    for output, plain in zip(outputs, expected, strict=True):
        assert (output - plain).norm() < 1e-2 * plain.norm()


def kept(cache):
    """Dtypes of all residuals that are kept now."""
    runs = [run for attached in cache._attached for run in attached.cache.decider._runs.values()]
    anchors = [anchor for run in runs for branch in run.branches.values() for anchor in branch.anchors]
    return {tensor.dtype for anchor in anchors for tensor in anchor.kept}


@pytest.mark.parametrize("how", HOW)
def test_quantised_before_it_is_attached(how):
    """On the same input at every step, what is reused is what is computed; as many bytes are kept as without."""
    plain = flux()
    with dit_cache(plain, CONFIG) as cache:
        unquantised = run(plain)
        size = cache.stats.bytes_peak
    model = HOW[how](flux())
    expected = run(model)
    assert 1e-3 < (expected[0] - unquantised[0]).abs().max() < 1
    with dit_cache(model, CONFIG) as cache:
        close(run(model), expected)
        assert [each.reason for each in cache.decisions] == SCHEDULE
        assert cache.stats.bytes_peak == size > 0
    assert torch.equal(run(model)[0], expected[0])


@pytest.mark.parametrize("moment", ["between runs", "within one"])
@pytest.mark.parametrize("how", HOW)
def test_quantised_while_attached(how, moment):
    """Between two runs, and within one, where the call that follows is computed; removing leaves it quantised."""
    model, twin = flux(), flux()
    before = run(twin)
    after = run(HOW[how](twin))
    assert (after[0] - before[0]).abs().max() > 1e-3
    with dit_cache(model, CONFIG) as cache:
        if moment == "between runs":
            close(run(model), before)
            HOW[how](model)
            close(run(model), after)
            assert [each.reason for each in cache.decisions] == SCHEDULE * 2
        else:
            close(run(model, lambda: HOW[how](model)), before[:5] + after[5:])
            assert [each.reason for each in cache.decisions] == [*SCHEDULE[:5], "weights", *SCHEDULE[6:]]
    assert torch.equal(run(model)[0], after[0])
    assert [(name, type(module)) for name, module in model.named_modules()] == [
        (name, type(module)) for name, module in twin.named_modules()
    ]


@pytest.mark.on("tiny Wan", "tiny SD3")
@pytest.mark.parametrize("name", ["WanTransformer3DModel", "SD3Transformer2DModel"])
@pytest.mark.parametrize("how", HOW)
def test_other_models(name, how):
    """The same on a video model, and on one whose last block drops a stream."""
    model, inputs = build(name)
    HOW[how](model)
    outputs = []
    plain = model(**inputs(), return_dict=False)[0]
    with dit_cache(model, DitCacheConfig(1, 2)) as cache:
        for k in range(4):
            with timestep_scope(k):
                outputs.append(model(**inputs(), return_dict=False)[0])
        assert cache.stats.reasons == {"warm-up": 1, "refresh": 2, "reuse": 1}
    close(outputs, [plain] * 4)


@pytest.mark.on("a model of one's own")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("how", ["a subclass that lies", "no weight at all"])
def test_kept_in_the_dtype_of_the_activations(how, dtype):
    """Whatever the weights say they are: half precision takes half the bytes, and comes out in half precision."""
    net = HOW[how](Net("swapped"))
    net.time.to(dtype)  # the one that is left as it was
    x, e, t = latents().to(dtype), prompt().to(dtype), torch.tensor(0.5, dtype=dtype)
    with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
        for k in range(2):
            with timestep_scope(k):
                out = net(x, t, e)
            if k == 0:
                assert kept(cache) == {dtype}
                assert cache.stats.bytes_held == 2 * (6 + 3) * 8 * dtype.itemsize
                computed = out
        assert cache.stats.reused_calls == 1
        assert out.dtype == dtype
    torch.testing.assert_close(out, computed, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("looking", [False, True])
def test_calls_leave_weights_alone(looking):
    """Of a weight that notes what is asked of it: its size when attaching, and nothing by any call."""
    policy = Threshold(0.5, max_warmup_steps=1)
    config = DitCacheConfig(cache_block_start=1, policy=policy) if looking else CONFIG
    model = lying(flux())
    Lying.asked = ()
    with dit_cache(model, config) as cache:
        assert set(Lying.asked) == {"TensorBase.numel"}  # which lists are long is told by their parameters
        Lying.asked = ()
        run(model)
        cache.reset()
        run(model)
        assert cache.stats.reused_calls >= 4
    assert Lying.asked == ()


@pytest.mark.parametrize("how", HOW)
def test_config_of_the_plain_model(how):
    """A config that was saved with the plain model serves the quantised one: to diffusers' models, it is the same."""
    model = flux()
    with dit_cache(model, CONFIG) as cache:
        made = cache.config
    assert made.fingerprint is not None
    HOW[how](model)
    with dit_cache(model, made) as cache:
        run(model)
        assert cache.stats.reused_calls == 4


@pytest.mark.on("a model of one's own")
@pytest.mark.parametrize("how", HOW)
def test_config_of_a_model_of_ones_own(how):
    """One without a configuration is recognised by the names and sizes of its weights: quantised weights are the same
    model; where there are none any more it is another one, and a warning names the remedy.
    """
    net = Net("single", width=16)
    with dit_cache(net, CONFIG) as cache:
        made = cache.config
    HOW[how](net)
    if how == "no weight at all":
        with pytest.raises(ValueError, match=r"made for another model .*replace\(config, fingerprint=None\)"):
            dit_cache(net, made)
        made = dataclasses.replace(made, fingerprint=None)
    with dit_cache(net, made) as cache:
        loop(net, latents(), 8)
        assert cache.stats.reused_calls == 4


@pytest.mark.parametrize("how", ["torchao, weight only", "a subclass that lies"])
@pytest.mark.parametrize("act", ["deepcopy", "to its device", "state_dict", "requires_grad_"])
def test_what_is_done_to_quantised_weights_within_a_run(how, act):
    """Copied, moved to where they are, or listed: as much is reused as without."""
    model = HOW[how](flux())
    do = {
        "deepcopy": lambda: copy.deepcopy(model) if how != "a subclass that lies" else None,
        "to its device": lambda: model.to("cpu"),
        "state_dict": lambda: model.state_dict(),
        "requires_grad_": lambda: model.requires_grad_(False),
    }[act]
    expected = run(model)
    with dit_cache(model, CONFIG) as cache:
        close(run(model, do), expected)
        assert [each.reason for each in cache.decisions] == SCHEDULE


@pytest.mark.on("a model of one's own")
@pytest.mark.parametrize("how", HOW)
def test_search_and_profile(how):
    """Recorded, planned and tried on the quantised model; the plan runs on it without a remark, and it is profiled."""
    net = HOW[how](Net("single", depth=4, width=16))
    pipe, x = Pipe(net), latents()
    found = dithooks.search(pipe, lambda pipe: pipe(x), 1.5, cost="blocks", verbose=False, max_evals=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dit_cache(pipe, found.plan) as cache:
            pipe(x)
            assert cache.stats.reused_calls > 0
    table = dithooks.profile(pipe, lambda: pipe(x))
    assert "blocks" in str(table)
