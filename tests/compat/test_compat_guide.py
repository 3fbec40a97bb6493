"""The examples of cache-dit's guide as they are written there, on diffusers' pipelines with tiny random parts."""

import copy
import warnings

import diffusers
import pytest
import torch
from pipelines import flow, flux, noise, prompts, qwen_image, wan
from torch import nn
from traces import attributes

import dithooks
import dithooks.compat.cache_dit as cache_dit
from dithooks import DitCacheConfig, Taylor, Threshold, dit_cache
from dithooks.compat.cache_dit import (
    BlockAdapter,
    BlockAdapterRegistry,
    DBCacheConfig,
    ForwardPattern,
    ParamsModifier,
    TaylorSeerCalibratorConfig,
    load_configs,
)
from dithooks.compat.cache_dit.functors import HiDreamPatchFunctor, PatchFunctor
from dithooks.tiny import build

STEPS = 8
SMALL = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 0.9}  # these models have 4 blocks
pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning", "ignore:`FluxPosEmbed`:FutureWarning")


def hidream():
    names = [f"{part}{number}" for part in ("text_encoder", "tokenizer") for number in ("", "_2", "_3", "_4")]
    transformer = build("HiDreamImageTransformer2DModel").model
    pipe = diffusers.HiDreamImagePipeline(transformer=transformer, vae=None, scheduler=flow(), **dict.fromkeys(names))
    pipe.default_sample_size = 16  # pictures have that size, whatever is asked for
    call = prompts("prompt_embeds_t5", 8, 8) | prompts("pooled_prompt_embeds", 8)
    call |= {f"{sign}prompt_embeds_llama3": noise(2, 1, 8, 4, seed=3) for sign in ("", "negative_")}
    return pipe, call | {"guidance_scale": 2.0, "output_type": "latent"}


SETTINGS = """
cache_config:
  max_warmup_steps: 8
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 1
"""


class Example:
    """A pipeline of the guide, and its picture without a cache."""

    def __init__(self, build):
        self.pipe, self.call = build()
        self.pipe.set_progress_bar_config(disable=True)
        self.plain = self.run()

    def run(self, steps=STEPS):
        torch.manual_seed(0)
        given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0)}
        return torch.as_tensor(self.pipe(**given | self.call)[0])

    def by_dit_cache(self, *lists):
        """With a configuration for each list."""
        blocks, configs = [path for path, _ in lists], [config for _, config in lists]
        with dit_cache(dithooks.BlockAdapter(self.pipe, blocks=blocks, params=configs), configs[0]):
            return self.run()


def close(fn=1, warm_up=2, threshold=0.9, predictor=None, **limits):
    """The configuration of one list."""
    forecast = {} if predictor is None else {"predictor": predictor}
    policy = Threshold(threshold, max_warmup_steps=warm_up, **limits)
    return DitCacheConfig(cache_block_start=fn, policy=policy, **forecast)


def reused(target):
    return {stats.blocks: stats.cached_steps for stats in cache_dit.summary(target, logging=False)}


@pytest.fixture
def qwen():
    return Example(qwen_image)


@pytest.mark.filterwarnings("error::UserWarning")
class TestQwenImage:
    def test_one_line(self, qwen):
        pipe = cache_dit.enable_cache(qwen.pipe, cache_config=DBCacheConfig(**SMALL))
        output = qwen.run()
        cache_dit.disable_cache(pipe)
        assert torch.equal(qwen.run(), qwen.plain)
        assert torch.equal(output, qwen.by_dit_cache(("transformer.transformer_blocks", close())))
        assert not torch.equal(output, qwen.plain)

    def test_an_adapter_that_finds_the_blocks(self, qwen):
        adapter = BlockAdapter(pipe=qwen.pipe, auto=True, forward_pattern=ForwardPattern.Pattern_1)
        cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(**SMALL))
        assert torch.equal(qwen.run(), self._wanted(qwen, adapter))

    def test_an_adapter_by_hand(self, qwen):
        pipe = qwen.pipe
        adapter = BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=pipe.transformer.transformer_blocks,
            forward_pattern=ForwardPattern.Pattern_1,
        )
        cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(**SMALL))
        assert torch.equal(qwen.run(), self._wanted(qwen, adapter))

    def _wanted(self, qwen, adapter):
        """Disabling by the adapter, too."""
        cache_dit.disable_cache(adapter)
        wanted = qwen.by_dit_cache(("transformer.transformer_blocks", close()))
        cache_dit.enable_cache(adapter, cache_config=DBCacheConfig(**SMALL))
        return wanted

    @pytest.mark.parametrize("order", [1, 2])
    def test_with_a_forecast(self, qwen, order):
        config = DBCacheConfig(**SMALL | {"max_warmup_steps": 4}, max_continuous_cached_steps=1)
        forecast = TaylorSeerCalibratorConfig(taylorseer_order=order)
        cache_dit.enable_cache(qwen.pipe, cache_config=config, calibrator_config=forecast)
        output = qwen.run()
        cache_dit.disable_cache(qwen.pipe)
        wanted = close(warm_up=4, max_continuous_cached_steps=1, predictor=Taylor(order, axis="step"))
        assert torch.equal(output, qwen.by_dit_cache(("transformer.transformer_blocks", wanted)))

    @pytest.mark.parametrize("policy", ["dynamic", "static"])
    def test_a_mask_of_steps(self, qwen, policy):
        mask = cache_dit.steps_mask(compute_bins=[3, 1, 1], cache_bins=[1, 2])
        cache_dit.enable_cache(
            qwen.pipe,
            cache_config=DBCacheConfig(**SMALL, steps_computation_mask=mask, steps_computation_policy=policy),
            calibrator_config=TaylorSeerCalibratorConfig(taylorseer_order=1),
        )
        qwen.run()
        assert reused(qwen.pipe) == {"transformer.transformer_blocks": [3, 5, 6]}

    def test_the_transformer_alone(self, qwen):
        transformer = qwen.pipe.transformer
        cache_dit.enable_cache(
            BlockAdapter(
                transformer=transformer,
                blocks=transformer.transformer_blocks,
                forward_pattern=ForwardPattern.Pattern_1,
            ),
            cache_config=DBCacheConfig(**SMALL, num_inference_steps=50),
        )
        for steps, given in (
            (28, {"num_inference_steps": 28}),
            (12, {"cache_config": DBCacheConfig(**SMALL | {"max_warmup_steps": 10}, num_inference_steps=12)}),
        ):
            cache_dit.refresh_context(transformer, **given, verbose=True)
            qwen.run(steps)
            (stats,) = cache_dit.summary(transformer)
            assert stats.accumulated_executed_steps == steps
            assert stats.cached_steps == stats.cfg_cached_steps != []
            assert min(stats.cached_steps) == stats.cache_options["cache_config"].max_warmup_steps


@pytest.fixture
def slow():
    """Wan with more blocks, and a run of many steps, from one to the next of which little changes."""
    example = Example(wan)
    blocks = example.pipe.transformer.blocks
    blocks.extend([copy.deepcopy(block) for block in [*blocks, *blocks]])
    return example


class TestInManySteps:
    @pytest.mark.filterwarnings("error::UserWarning")
    def test_with_the_settings_by_default(self, slow):
        pipe, plain = slow.pipe, slow.run(28)
        cache_dit.enable_cache(pipe)
        output = slow.run(28)
        assert reused(pipe)["transformer.blocks"]
        cache_dit.disable_cache(pipe)
        assert torch.equal(slow.run(28), plain)
        with dit_cache(pipe, close(8, 8, 0.08)):
            assert torch.equal(output, slow.run(28))

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_with_settings_from_a_file(self, slow, tmp_path):
        pytest.importorskip("yaml")
        (tmp_path / "cache.yaml").write_text(SETTINGS)
        cache_dit.enable_cache(slow.pipe, **load_configs(tmp_path / "cache.yaml"))
        output = slow.run(28)
        assert reused(slow.pipe)["transformer.blocks"][:2] == [1, 3]  # of the first eight, every other may be
        cache_dit.disable_cache(slow.pipe)
        limits = {"warmup_interval": 2, "max_continuous_cached_steps": 2}
        with dit_cache(slow.pipe, close(1, 8, 0.12, Taylor(1, axis="step"), **limits)):
            assert torch.equal(output, slow.run(28))


class TestFlux:
    @pytest.mark.parametrize("where", ["enable_cache", "adapter"])
    def test_settings_for_each_list_and_a_pattern_that_diffusers_has_changed(self, where):
        example = Example(flux)
        pipe = example.pipe
        modifiers = [
            ParamsModifier(cache_config=DBCacheConfig().reset(Fn_compute_blocks=1, residual_diff_threshold=0.35)),
            ParamsModifier(cache_config=DBCacheConfig().reset(Fn_compute_blocks=2, residual_diff_threshold=0.3)),
        ]
        here, there = {"params_modifiers": modifiers}, {}
        adapter = BlockAdapter(
            pipe=pipe,
            transformer=pipe.transformer,
            blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
            forward_pattern=[ForwardPattern.Pattern_1, ForwardPattern.Pattern_3],
            **(here if where == "adapter" else there),
        )
        config = DBCacheConfig(max_warmup_steps=2)
        cache_dit.enable_cache(adapter, cache_config=config, **(here if where == "enable_cache" else there))
        with pytest.warns(UserWarning, match="forward pattern 3, h -> h, was declared .*what was seen counts") as said:
            output = [example.run() for _ in range(2)]
        assert len(said) == 1
        cache_dit.disable_cache(pipe)
        wanted = example.by_dit_cache(
            ("transformer.transformer_blocks", close(1, threshold=0.35)),
            ("transformer.single_transformer_blocks", close(2, threshold=0.3)),
        )
        assert torch.equal(output[0], wanted)
        assert torch.equal(output[1], wanted)
        assert not torch.equal(wanted, example.plain)
        assert torch.equal(example.run(), example.plain)


class TestWan:
    """Two transformers: one for the noisy steps, 0 to 9 of 14 here, and one for the rest."""

    @pytest.fixture
    def example(self):
        example = Example(lambda: wan(2))
        pipe = example.pipe
        cache_dit.enable_cache(
            BlockAdapter(
                pipe=pipe,
                transformer=[pipe.transformer, pipe.transformer_2],
                blocks=[pipe.transformer.blocks, pipe.transformer_2.blocks],
                forward_pattern=[ForwardPattern.Pattern_2, ForwardPattern.Pattern_2],
                params_modifiers=[
                    ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=4, max_cached_steps=3)),
                    ParamsModifier(cache_config=DBCacheConfig().reset(max_warmup_steps=2, max_cached_steps=1)),
                ],
                has_separate_cfg=True,
            ),
            cache_config=DBCacheConfig(**SMALL),
        )
        return example

    @pytest.mark.filterwarnings("error::UserWarning")
    def test_each_by_its_own_settings(self, example):
        for _ in range(2):
            example.run(14)
            high, low = cache_dit.summary(example.pipe, logging=False)
            assert (high.blocks, low.blocks) == ("transformer.blocks", "transformer_2.blocks")
            assert high.cached_steps == high.cfg_cached_steps == [4, 5, 6]
            assert len(low.cached_steps) == len(low.cfg_cached_steps) == 1
            assert (high.accumulated_executed_steps, low.accumulated_executed_steps) == (10, 4)
            assert high.accumulated_transformer_executed_steps == 20

    def test_the_second_warms_up_from_its_own_first_step(self, example):
        example.run(14)
        assert reused(example.pipe)["transformer_2.blocks"] == [12]

    def test_the_table_counts_the_steps_of_both(self, example, capsys):
        example.run(14)
        cache_dit.summary(example.pipe)
        assert "WanPipeline, 14 steps" in capsys.readouterr().out

    def test_off_again(self, example):
        example.run()
        cache_dit.disable_cache(example.pipe)
        assert torch.equal(example.run(), example.plain)


class Rewritten(PatchFunctor):
    """As users write them: other forwards on the blocks, marks on the transformer, and parts put in place of others."""

    def __init__(self, fails=False):
        self.fails, self.given = fails, []

    def _apply(self, transformer, **kwargs):
        self.given.append(transformer)
        for block in [*transformer.double_stream_blocks, *transformer.single_stream_blocks]:
            block.forward = self._forward.__get__(block)
            block.patched_by = self
        transformer.final_layer = nn.Sequential(transformer.final_layer)[0]
        transformer.added = nn.Identity()
        transformer._is_patched = True
        if self.fails:
            raise RuntimeError("no such block")
        return transformer

    @staticmethod
    def _forward(self, *args, **kwargs):
        self.called = True
        return type(self).forward(self, *args, **kwargs)


class Streams(dithooks.PatchFunctor):
    """HiDream's double blocks, as this library's functors say it."""

    def read(self, args, kwargs):
        return [kwargs["hidden_states"], kwargs["encoder_hidden_states"]]

    def take(self, output):
        return list(output)

    def build(self, streams, args, kwargs):
        return tuple(streams)


class TestHiDream:
    @pytest.fixture
    def example(self):
        return Example(hidream)

    @pytest.fixture
    def register(self):
        """Registers the guide's adapter with a functor."""

        def registered(functor):
            @BlockAdapterRegistry.register("HiDream")
            def hidream_adapter(pipe, **kwargs):
                return BlockAdapter(
                    pipe=pipe,
                    transformer=pipe.transformer,
                    blocks=[pipe.transformer.double_stream_blocks, pipe.transformer.single_stream_blocks],
                    forward_pattern=[ForwardPattern.Pattern_0, ForwardPattern.Pattern_3],
                    patch_functor=functor,
                    **kwargs,
                )

        yield registered
        BlockAdapterRegistry.unregister("HiDream")

    def wanted(self, example):
        lists = ("double_stream_blocks", "single_stream_blocks")
        return example.by_dit_cache(*((f"transformer.{name}", close(threshold=1e30)) for name in lists))

    @pytest.mark.filterwarnings("error::UserWarning")
    @pytest.mark.parametrize("kind", [HiDreamPatchFunctor, Rewritten])
    def test_a_registered_adapter_with_a_functor(self, example, register, kind):
        register(functor := kind())
        before, wanted = attributes(example.pipe.transformer), self.wanted(example)
        assert cache_dit.enable_cache(example.pipe, **SMALL | {"residual_diff_threshold": 1.0}) is example.pipe
        assert torch.equal(example.run(), wanted)
        assert not torch.equal(wanted, example.plain)
        assert list(reused(example.pipe).values()) == [[2, 3, 4, 5, 6, 7]] * 2
        if kind is Rewritten:
            assert functor.given == [example.pipe.transformer]
            assert all(block.called for block in example.pipe.transformer.double_stream_blocks)
        cache_dit.disable_cache(example.pipe)
        for module in example.pipe.transformer.modules():
            vars(module).pop("called", None)  # of the functor's functions, not of the functor
        assert attributes(example.pipe.transformer) == before
        assert torch.equal(example.run(), example.plain)

    def test_enabled_again_with_other_settings_it_is_not_rewritten_twice(self, example, register):
        register(functor := Rewritten())
        cache_dit.enable_cache(example.pipe, **SMALL)
        cache_dit.enable_cache(example.pipe, **SMALL, max_cached_steps=1)
        example.run()
        assert len(functor.given) == 1
        assert set(map(len, reused(example.pipe).values())) == {1}

    def test_with_another_functor_it_has_to_be_disabled_before(self, example, register):
        register(Rewritten())
        cache_dit.enable_cache(example.pipe, **SMALL)
        other = BlockAdapter(pipe=example.pipe, auto=True, patch_functor=HiDreamPatchFunctor())
        with pytest.raises(ValueError, match="is cached already, otherwise: disable_cache"):
            cache_dit.enable_cache(other, **SMALL)

    def test_what_others_have_set_since_stays(self, example, register):
        register(Rewritten())
        cache_dit.enable_cache(example.pipe, **SMALL)
        example.pipe.transformer._is_patched, example.pipe.transformer.theirs = "otherwise", 1
        cache_dit.disable_cache(example.pipe)
        assert (example.pipe.transformer._is_patched, example.pipe.transformer.theirs) == ("otherwise", 1)
        assert not hasattr(example.pipe.transformer, "added")

    @pytest.mark.parametrize("fault", ["functor", "blocks", "none"])
    def test_where_nothing_comes_of_it_nothing_stays(self, example, register, fault):
        register(Rewritten(fails=fault == "functor"))
        before = attributes(example.pipe.transformer)
        values = {"blocks": {"Fn_compute_blocks": 4}, "none": {"cache_type": "NONE"}}.get(fault, {})
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                cache_dit.enable_cache(example.pipe, **SMALL | values)
            except (RuntimeError, ValueError):
                assert fault != "none"
        assert attributes(example.pipe.transformer) == before

    def test_a_functor_of_this_library(self, example):
        transformer = example.pipe.transformer
        adapter = BlockAdapter(
            pipe=example.pipe,
            transformer=transformer,
            blocks=transformer.double_stream_blocks,
            patch_functor=Streams(),
        )
        before = attributes(transformer)
        cache_dit.enable_cache(adapter, **SMALL)
        output = example.run()
        cache_dit.disable_cache(adapter)
        assert attributes(transformer) == before
        plain = dithooks.BlockAdapter(example.pipe, blocks=transformer.double_stream_blocks, patch_functor=Streams())
        with dit_cache(plain, close()):
            assert torch.equal(output, example.run())
