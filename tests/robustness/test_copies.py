"""Saved, loaded, moved, cast, copied, pickled, shared with another process, traced and exported, all while attached,
between runs and within one: files, keys and weights are as without a cache, copies are plain, and the original goes on.
"""

import copy
import hashlib
import io
import multiprocessing
import pickle
import warnings

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from pipelines import flux as flux_pipeline
from robustness.test_lora import CONFIG, SCHEDULE, flux, given, run, traces
from torch import nn
from torch.nn.utils import parametrizations
from toys import Net, latents, loop

from dithooks import CachePlan, DitCacheConfig, dit_cache, timestep_scope
from dithooks.demo import PLANS
from dithooks.engine.stand_in import SkipBlock
from dithooks.handle import handles_of

pytestmark = [pytest.mark.line("Save and copy"), pytest.mark.on("tiny FLUX")]


@pytest.fixture
def model():
    return flux()


@pytest.fixture
def cache(model):
    """Attached, with a run behind it."""
    with dit_cache(model, CONFIG) as cache:
        run(model)
        yield cache


def same(left, right):
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def reasons(cache):
    return [each.reason for each in cache.decisions]


def plain(model, rtol=0.0):
    """Nothing of a cache is in it, and it computes what a new one does, or nearly, where memory lies otherwise."""
    assert not any(isinstance(module, SkipBlock) for module in model.modules())
    assert handles_of(model) == []
    for output, expected in zip(run(model), run(flux()), strict=True):
        torch.testing.assert_close(output, expected, rtol=rtol, atol=rtol)


def files(folder):
    """The content of each file, by its path."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


@pytest.mark.parametrize("moment", ["between runs", "within one"])
@pytest.mark.parametrize("size", ["10GB", "40KB"])
def test_save_pretrained(model, cache, size, moment, tmp_path):
    """In one file or several: byte for byte the files of a plain model; loaded, it is a plain model."""
    flux().save_pretrained(tmp_path / "plain", max_shard_size=size)
    if moment == "between runs":
        model.save_pretrained(tmp_path / "attached", max_shard_size=size)
    else:
        run(model, lambda: model.save_pretrained(tmp_path / "attached", max_shard_size=size))
    saved = files(tmp_path / "attached")
    assert saved == files(tmp_path / "plain")
    assert (len(saved) > 3) == (size == "40KB")
    plain(FluxTransformer2DModel.from_pretrained(tmp_path / "attached", low_cpu_mem_usage=False).eval(), rtol=1e-5)
    cache.reset()
    run(model)
    assert reasons(cache) == SCHEDULE


@pytest.mark.on("FluxPipeline")
def test_pipeline_saved_and_loaded(tmp_path):
    """A whole pipeline, in all its files; loaded, it draws what it drew without a cache."""
    pipe, call = flux_pipeline()
    call |= {"num_inference_steps": 4, "output_type": "latent"}

    def draw(pipe):
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = draw(pipe)
    pipe.save_pretrained(tmp_path / "plain")
    with dit_cache(pipe, DitCacheConfig(1, 2)) as cache:
        draw(pipe)
        pipe.save_pretrained(tmp_path / "attached")
        assert cache.stats.reused_calls > 0
    assert files(tmp_path / "attached") == files(tmp_path / "plain")
    missing = {name: None for name, part in pipe.components.items() if part is None}
    loaded = FluxPipeline.from_pretrained(tmp_path / "attached", **missing)
    torch.testing.assert_close(draw(loaded), expected, rtol=1e-5, atol=1e-6)


def test_state_dict_and_everything_listed(model, cache, tmp_path):
    """Keys, their order, the very tensors, metadata, modules, parameters, buffers and their order; and a file of it."""
    twin = flux()
    mine, other = model.state_dict(), twin.state_dict()
    assert list(mine) == list(other)
    assert mine._metadata == other._metadata
    assert list(model.state_dict(prefix="x.", keep_vars=True)) == list(twin.state_dict(prefix="x.", keep_vars=True))
    own = dict(model.named_parameters())
    assert all(mine[name].data_ptr() == own[name].data_ptr() for name in own)
    for listed in ("named_modules", "named_parameters", "named_buffers", "named_children"):
        assert [name for name, _ in getattr(model, listed)()] == [name for name, _ in getattr(twin, listed)()]
    assert repr(model) == repr(twin)
    assert model.num_parameters() == twin.num_parameters()
    assert list(model.attn_processors) == list(twin.attn_processors)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    twin.load_state_dict(loaded, strict=True)
    plain(twin)


@pytest.mark.parametrize("moment", ["between runs", "within one"])
@pytest.mark.parametrize("assign", [False, True])
def test_load_state_dict(model, cache, assign, moment):
    """Strictly, into the tensors or in their place: from the next call on it is the new weights, and after removing."""
    other = {name: value * 1.1 for name, value in flux().state_dict().items()}
    twin = flux()
    before = run(twin)
    twin.load_state_dict(other)
    after = run(twin)
    assert (after[0] - before[0]).abs().max() > 1e-2
    cache.reset()
    if moment == "between runs":
        model.load_state_dict(other, strict=True, assign=assign)
        outputs, expected, told = run(model), after, SCHEDULE
    else:
        outputs = run(model, lambda: model.load_state_dict(other, strict=True, assign=assign))
        expected, told = before[:5] + after[5:], [*SCHEDULE[:5], "weights", *SCHEDULE[6:]]
    assert reasons(cache) == told
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-4)
    cache.remove()
    same(run(model), after)
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({}, strict=True)


@pytest.mark.parametrize("moment", ["between runs", "within one"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_cast(model, dtype, moment):
    """``to(dtype)``, with inputs to match: what was kept in another dtype is not used, and then it is kept in this."""

    def steps(model, first, last, dtype):
        inputs = {k: v.to(dtype) if "ids" not in k else v for k, v in given().items()}
        outputs = []
        for k in range(first, last):
            with timestep_scope(k):
                outputs.append(model(**inputs, return_dict=False)[0])
        return outputs

    with dit_cache(model, CONFIG) as cache:
        if moment == "between runs":
            run(model)
            size = cache.stats.bytes_peak
            cache.reset()
            outputs = steps(model.to(dtype), 0, 8, dtype)
            assert reasons(cache) == SCHEDULE
            assert cache.stats.bytes_peak * 4 == size * dtype.itemsize
        else:
            steps(model, 0, 5, torch.float32)
            outputs = steps(model.to(dtype), 5, 8, dtype)
            assert reasons(cache) == [*SCHEDULE[:5], "no anchor", *SCHEDULE[6:]]  # in it, the prompt is another one
    assert {output.dtype for output in outputs} == {dtype}
    expected = steps(flux().to(dtype), 0, 1, dtype) * len(outputs)
    for output, wanted in zip(outputs, expected, strict=True):
        assert (output - wanted).norm() < (1e-6 if dtype == torch.float64 else 3e-2) * wanted.norm()


def test_to_meta(model):
    """A model on the meta device goes through its steps, reuses as many, and loads its weights again."""
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with dit_cache(model, CONFIG) as cache:
        model.to("meta")
        for k in range(8):
            with timestep_scope(k):
                output = model(**{name: value.to("meta") for name, value in given().items()}, return_dict=False)[0]
        assert output.is_meta
        assert reasons(cache) == SCHEDULE
        cache.reset()
        model.load_state_dict(weights, assign=True)
        run(model)
        assert reasons(cache) == SCHEDULE
    plain(model)


def test_modes(model, cache):
    """``train``, ``eval``, ``requires_grad_``, ``apply``, ``zero_grad`` and ``share_memory`` reach every block and its
    like, and change nothing of what is reused within a run.
    """
    met = []

    def act():
        model.train()
        assert all(module.training for module in model.modules())
        model.eval()
        model.requires_grad_(False)
        model.apply(lambda module: met.append(type(module).__name__))
        model.zero_grad()
        model.share_memory()

    cache.reset()
    run(model, act)
    assert reasons(cache) == SCHEDULE
    twin, wanted = flux(), []
    twin.apply(lambda module: wanted.append(type(module).__name__))
    assert met == wanted
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    cache.remove()
    same(run(model), run(twin))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: loaded(saved(model)),
}


def saved(model):
    file = io.BytesIO()
    torch.save(model, file)
    return file.getvalue()


def loaded(data):
    return torch.load(io.BytesIO(data), weights_only=False)


@pytest.mark.parametrize("moment", ["between runs", "within one"])
@pytest.mark.parametrize("how", COPIES)
def test_copies_of_a_model_are_plain(model, how, moment):
    """No hook, stand-in or tensor is shared with the copy, to which a cache of its own can be attached; the original
    reuses as much as if nothing had happened.
    """
    twins = []
    with dit_cache(model, CONFIG) as cache:
        if moment == "between runs":
            run(model)
            cache.reset()
            twins.append(COPIES[how](model))
            run(model)
        else:
            run(model, lambda: twins.append(COPIES[how](model)))
        assert reasons(cache) == SCHEDULE
        (twin,) = twins
        pointers = {parameter.data_ptr() for parameter in model.parameters()}
        assert not pointers & {parameter.data_ptr() for parameter in twin.parameters()}
        assert b"dithooks" not in pickle.dumps(model)  # so that it can be loaded where that is not installed
        assert b"dithooks" not in pickle.dumps(twin)
        plain(twin)
        with dit_cache(twin, CONFIG) as other:
            run(twin)
            assert reasons(other) == SCHEDULE
            assert len(cache.decisions) == 8
    plain(model)


@pytest.mark.on("FluxPipeline")
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_a_pipeline_are_plain(how):
    """The copy draws what is drawn without a cache, and leaves the original's alone."""
    pipe, call = flux_pipeline()
    call |= {"num_inference_steps": 4, "output_type": "latent"}

    def draw(pipe):
        return pipe(**call, generator=torch.Generator().manual_seed(0)).images

    expected = draw(pipe)
    with dit_cache(pipe, DitCacheConfig(1, 2)) as cache:
        first = draw(pipe)
        settled = len(cache.decisions)
        twin = COPIES[how](pipe)
        assert torch.equal(draw(twin), expected)
        assert handles_of(twin) == []
        assert len(cache.decisions) == settled
        assert torch.equal(draw(pipe), first)
        assert not torch.equal(first, expected)


def test_a_shallow_copy_is_the_same_model(model, cache):
    """``copy.copy`` shares all it consists of, its cache as well: it is cached as long as the original is."""
    twin = copy.copy(model)
    cache.reset()
    run(twin)
    assert reasons(cache) == SCHEDULE
    cache.remove()
    plain(twin)
    plain(model)


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps, saved])
def test_copies_of_a_handle(model, cache, how):
    """Attached, it says why not; removed, its numbers and its configuration can be taken along."""
    with pytest.raises(TypeError, match="attached cannot be copied or pickled: copy or save the model"):
        how(cache)
    run(model)
    stats = cache.stats
    cache.remove()
    twin = how(cache)
    twin = pickle.loads(twin) if how is pickle.dumps else loaded(twin) if how is saved else twin
    assert not twin.active
    assert (twin.stats.calls, twin.config) == (stats.calls, cache.config)
    twin.remove()


def test_what_a_handle_tells_can_be_kept(model, cache):
    """Configuration, counts, decisions and a plan, through pickle and deepcopy."""
    for each in (cache.config, cache.stats, cache.decisions, CONFIG):
        assert pickle.loads(pickle.dumps(each)) == each
        assert copy.deepcopy(each) == each
    found = CachePlan.load(next((PLANS).glob("*.json")))
    assert pickle.loads(pickle.dumps(found)) == found
    twin = flux()
    with dit_cache(twin, pickle.loads(pickle.dumps(cache.config))) as other:
        run(twin)
        assert reasons(other) == SCHEDULE


@pytest.mark.on("a process of its own")
def test_sent_to_another_process():
    """A model with a cache, given to a process that was spawned: it runs there, plain; here, it is cached as before."""
    net, x = Net().requires_grad_(False).eval(), latents()
    expected = loop(net, x)
    with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
        first = loop(net, x)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            there = pool.apply(loop, (net, x))
        assert torch.equal(there, expected)
        assert not torch.equal(first, expected)
        assert torch.equal(loop(net, x), first)
        assert cache.stats.reused_calls == 4


@pytest.mark.parametrize("how", ["export", "trace"])
def test_written_down_within_a_run(model, cache, how):
    """``torch.export`` and ``torch.jit.trace``, at a step that would be reused: the program is the plain model's, with
    no residual in it, and the run goes on.
    """
    programs, inputs = [], given()

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *args):
            return self.model(**dict(zip(inputs, args, strict=True)), return_dict=False)[0]

    def act():
        with warnings.catch_warnings(), timestep_scope(5):
            warnings.simplefilter("ignore")
            if how == "export":
                programs.append(torch.export.export(Named(), tuple(inputs.values())).module())
            else:
                programs.append(torch.jit.trace(Named(), tuple(inputs.values()), check_trace=False))

    cache.reset()
    run(model, act)
    assert reasons(cache) == SCHEDULE
    other = {name: value if "ids" in name else value * 1.1 for name, value in inputs.items()}
    expected = flux()(**other, return_dict=False)[0]
    torch.testing.assert_close(programs[0](*other.values()), expected, rtol=1e-4, atol=1e-5)
    cache.remove()
    plain(model)


@pytest.mark.parametrize("where", ["single_transformer_blocks.1", "transformer_blocks.0"])
def test_weight_norm_put_on_a_block(model, cache, where):
    """A parametrization of a layer, put on within a run and taken off in the next: computed each time, and it ends as
    without a cache.
    """
    twin = flux()
    layers = [each.get_submodule(where).attn.to_v for each in (model, twin)]

    def put(layer):
        parametrizations.weight_norm(layer)
        layer.parametrizations.weight.original0.mul_(3)

    def off(layer):
        nn.utils.parametrize.remove_parametrizations(layer, "weight")

    cache.reset()
    outputs = run(model, lambda: put(layers[0])) + run(model, lambda: off(layers[0]))
    expected = run(twin, lambda: put(layers[1])) + run(twin, lambda: off(layers[1]))
    told = reasons(cache)
    assert [told[k] for k in (5, 13)] == ["weights"] * 2
    assert (expected[5] - expected[4]).abs().max() > 1e-4
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    cache.remove()
    assert traces(model) == traces(twin)
    same(run(model), run(twin))


def test_a_block_put_in_by_hand(model):
    """In the place of one in the middle of the range: ``remove`` says where, and leaves it; all else is as it was."""
    handle = dit_cache(model, CONFIG)
    run(model)
    mine = model.single_transformer_blocks[0] = flux().single_transformer_blocks[2]
    originals = [attached for each in handle._attached for attached in each._originals]
    with pytest.warns(UserWarning, match=r"single_transformer_blocks\.0: wrapped by something else, or replaced"):
        handle.remove()
    assert model.single_transformer_blocks[0] is mine
    blocks = [*model.transformer_blocks, *model.single_transformer_blocks]
    assert [a is b for a, b in zip(blocks, originals, strict=True)] == [True, True, False, True, True]
    assert handles_of(model) == []
    twin = flux()
    twin.single_transformer_blocks[0] = flux().single_transformer_blocks[2]
    same(run(model), run(twin))
