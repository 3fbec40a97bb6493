"""The engine on diffusers' own FLUX: both lists, ControlNet residuals, pipelines, compile."""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.utils import counters

from dithooks import DitCacheConfig, Linear, Threshold, dit_cache, timestep_scope
from dithooks.demo import load_pipeline

CONFIG = DitCacheConfig(2, 2, 0, 5)


@pytest.fixture
def flux():
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def inputs(text=5, batch=1):
    return {
        "hidden_states": torch.randn(batch, 16, 4),
        "encoder_hidden_states": torch.randn(batch, text, 32),
        "pooled_projections": torch.randn(batch, 32),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def steps(model, given, count=8, **extra):
    return [model(**given, timestep=torch.tensor([1 - k / count]), return_dict=False, **extra)[0] for k in range(count)]


def same(left, right, **tolerance):
    for a, b in zip(left, right, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.mark.parametrize("text", [5, 16])  # 16: as many text tokens as image tokens
@pytest.mark.parametrize(("start", "count"), [(0, 5), (0, 2), (2, 3), (1, 2), (1, 1), (4, 1)])
@pytest.mark.parametrize("controlled", [False, True])
def test_every_range_is_exact_on_identical_inputs(flux, text, start, count, controlled):
    given, control = inputs(text), {}
    if controlled:
        control = {
            "controlnet_block_samples": [torch.randn(1, 16, 32) for _ in range(2)],
            "controlnet_single_block_samples": [torch.randn(1, 16, 32) for _ in range(3)],
        }
    plain = flux(**given, timestep=torch.tensor([0.5]), return_dict=False, **control)[0]
    off = flux(**given, timestep=torch.tensor([0.2]), return_dict=False, **control)[0]
    assert (plain - off).abs().max() > 1e-3  # or the test would show nothing
    with dit_cache(flux, DitCacheConfig(0, 2, start, count)) as cache:
        for step in (0, 1):
            with timestep_scope(step):
                out = flux(**given, timestep=torch.tensor([0.5]), return_dict=False, **control)[0]
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


def test_plain_after_removal_and_fresh_in_every_run(flux):
    given = inputs()
    plain = steps(flux, given)
    with dit_cache(flux, CONFIG) as cache:
        first, second = steps(flux, given), steps(flux, given)
        assert cache.stats.reasons == {"warm-up": 4, "refresh": 6, "reuse": 6}
    same(first, second)
    same(steps(flux, given), plain)
    assert not torch.equal(first[3], plain[3])


def test_gradient_checkpointing_trains_as_without(flux):
    given = inputs()

    def gradients():
        flux.zero_grad()
        with torch.enable_grad():
            flux(**given, timestep=torch.tensor([0.5]), return_dict=False)[0].square().mean().backward()
        return [p.grad.clone() for p in flux.parameters() if p.grad is not None]

    plain = gradients()
    flux.enable_gradient_checkpointing()
    flux.train()
    with dit_cache(flux, CONFIG), pytest.warns(UserWarning, match="gradients"):
        attached = gradients()
    same(attached, plain, rtol=1e-5, atol=1e-6)


def test_another_cache_of_diffusers_is_refused(flux):
    from diffusers import FirstBlockCacheConfig

    flux.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match=r"another cache enabled: call its disable_cache\(\)"):
        dit_cache(flux, CONFIG)
    flux.disable_cache()
    with dit_cache(flux, CONFIG):
        pass


def test_save_and_load_while_attached(flux, tmp_path):
    given = inputs()
    plain = steps(flux, given, 2)
    with dit_cache(flux, CONFIG):
        flux.save_pretrained(tmp_path)
        same(steps(copy.deepcopy(flux), given, 2), plain)
    loaded = FluxTransformer2DModel.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    same(steps(loaded, given, 2), plain, rtol=1e-5, atol=1e-6)


class TestCompiled:
    """Compiled code gives what eager code gives, without a graph break; the backend traces and runs the graphs."""

    @pytest.fixture(autouse=True)
    def _fresh_compiler(self):
        torch._dynamo.reset()
        counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.fixture
    def eager(self, flux):
        given = inputs()
        with dit_cache(flux, CONFIG):
            return given, steps(flux, given)

    def check(self, flux, given, expected):
        with dit_cache(flux, CONFIG) as cache:
            for _ in range(3):
                same(steps(flux, given), expected, rtol=1e-5, atol=1e-6)
            assert cache.stats.reasons == {"warm-up": 6, "refresh": 9, "reuse": 9}
        assert not counters["graph_break"]
        return counters["stats"]["unique_graphs"]

    @pytest.mark.parametrize("early", [False, True], ids=["attached before", "attached after"])
    def test_whole_model(self, flux, eager, early):
        given, expected = eager
        plain = 0
        flux.compile(fullgraph=True, backend="eager")
        if early:
            before = steps(flux, given)
            plain = counters["stats"]["unique_graphs"]
        assert self.check(flux, given, expected) - plain == 2  # one that computes, one that reuses
        if early:
            same(steps(flux, given), before, rtol=1e-5, atol=1e-6)

    def test_repeated_blocks(self, flux, eager):
        given, expected = eager
        with dit_cache(flux, CONFIG) as cache:
            flux.compile_repeated_blocks(fullgraph=True, backend="eager")
            for _ in range(3):
                same(steps(flux, given), expected, rtol=1e-5, atol=1e-6)
            assert cache.stats.reused_calls == 9
        assert counters["stats"]["calls_captured"] > 0
        assert not counters["graph_break"]
        same(
            steps(flux, given, 2),
            [flux(**given, timestep=torch.tensor([1 - k / 2]), return_dict=False)[0] for k in (0, 1)],
        )

    @pytest.mark.parametrize("first", [0, 1])
    @pytest.mark.parametrize("whole", [False, True], ids=["repeated blocks", "whole model"])
    @pytest.mark.filterwarnings("ignore:.*reused nothing.*")
    def test_a_policy_that_looks(self, flux, whole, first):
        """It looks between blocks: compiled ones know nothing of that, a compiled model is cut in two there."""
        given, config = inputs(), DitCacheConfig(cache_block_start=first, policy=Threshold(0.4, 2), predictor=Linear())
        with dit_cache(flux, config) as cache:
            expected, decided = steps(flux, given), [each[2:6] for each in cache.decisions]
        assert {each[2] for each in decided} == {True, False}
        if whole:
            flux.compile(backend="eager")
        else:
            flux.compile_repeated_blocks(fullgraph=True, backend="eager")
        with dit_cache(flux, config) as cache:
            same(steps(flux, given), expected, rtol=1e-5, atol=1e-6)
            assert [each[2:6] for each in cache.decisions] == decided
        assert counters["stats"]["calls_captured"] > 0
        assert bool(counters["graph_break"]) == whole

    def test_a_forecast_needs_no_further_graph(self, flux):
        given, config = inputs(), DitCacheConfig(2, 2, 0, 4, predictor=Linear())
        with dit_cache(flux, config):
            expected = steps(flux, given)
        flux.compile(fullgraph=True, backend="eager")
        with dit_cache(flux, config):
            for _ in range(3):
                same(steps(flux, given), expected, rtol=1e-5, atol=1e-6)
        assert counters["stats"]["unique_graphs"] == 2
        assert not counters["graph_break"]

    def test_wrapped_by_torch_compile(self, flux, eager):
        """Nothing shows from inside that the model is compiled: the first call is still right, the rest is cached."""
        given, expected = eager
        compiled = torch.compile(flux, fullgraph=True, backend="eager")
        with dit_cache(flux, CONFIG) as cache:
            for _ in range(2):
                same(steps(compiled, given), expected, rtol=1e-5, atol=1e-6)
            assert cache.stats.reused_calls == 6

    def test_in_two_threads_at_once(self, flux, eager):
        given, expected = eager
        other = inputs(batch=1)
        with dit_cache(flux, CONFIG):
            others = steps(flux, other)
        flux.compile(fullgraph=True, backend="eager")
        barrier = threading.Barrier(2)

        def work(mine):
            outs = []
            with torch.no_grad():
                for k in range(8):
                    barrier.wait()
                    outs.append(flux(**mine, timestep=torch.tensor([1 - k / 8]), return_dict=False)[0])
            return outs

        with dit_cache(flux, CONFIG), ThreadPoolExecutor(2) as pool:
            steps(flux, given)  # compiled in one thread first: compiling in two at once is the compiler's own risk
            first, second = pool.map(work, [given, other])
        same(first, expected, rtol=1e-5, atol=1e-6)
        same(second, others, rtol=1e-5, atol=1e-6)


class TestShippedPipeline:
    @pytest.fixture
    def pipe(self):
        pipe = load_pipeline()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe, steps=28, **extra):
        call = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "pt"}
        return pipe(["red apple", "panda face"], **call, **extra).images

    def test_faster_and_the_same_pictures(self, pipe):
        plain = self.draw(pipe)
        with dit_cache(pipe, DitCacheConfig(8, 2, 0, 12)) as cache:
            cached = self.draw(pipe)
            stats = cache.stats
        assert stats.blocks_total == 28 * 2 * 12
        assert stats.blocks_total / stats.blocks_run >= 1.3
        psnr = -10 * torch.log10((cached - plain).square().mean())
        assert psnr >= 30
        assert torch.equal(self.draw(pipe), plain)

    def test_stopped_by_its_callback_and_run_again(self, pipe):
        def stop(pipe, step, timestep, values):
            if step == 5:
                raise KeyboardInterrupt
            return values

        config = DitCacheConfig(2, 3, 0, 12)
        with dit_cache(pipe, config):
            expected = self.draw(pipe, 10)
        with dit_cache(pipe, config):
            with pytest.raises(KeyboardInterrupt):
                self.draw(pipe, 10, callback_on_step_end=stop)
            assert torch.equal(self.draw(pipe, 10), expected)

    def test_named_by_path_and_by_list(self, pipe):
        config = DitCacheConfig(2, 2, 1, 6)
        with dit_cache(pipe, config, blocks="transformer.single_transformer_blocks"):
            expected = self.draw(pipe, 6)
        with dit_cache(pipe, config, blocks=pipe.transformer.single_transformer_blocks) as cache:
            assert torch.equal(self.draw(pipe, 6), expected)
            assert cache.stats.blocks_total == 12 * 8
