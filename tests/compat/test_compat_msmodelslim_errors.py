"""What is refused of users of msmodelslim's DiT cache, and what is in force then."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from opensora import STEPS, OpenSoraPipeline, run_pipeline_and_save_videos, searching
from torch import nn

from dithooks.compat.msmodelslim import DitCacheAdaptor, DitCacheConfig

NAMES = ("cache_step_start", "cache_step_interval", "cache_block_start", "cache_num_blocks")


class TestErrors:
    @pytest.mark.parametrize("config", [{}, {"cache_ratio": 1.3}, DitCacheConfig(1, 2, 0, 1), 1.3])
    def test_a_config_of_another_type(self, config):
        with pytest.raises(ValueError, match="config must be a DitCacheSearchConfig, not"):
            DitCacheAdaptor(OpenSoraPipeline(), config)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("", "must be a path such as"),
            (None, "must be a path such as"),
            ("transformer..blocks", "not a dotted path"),
            ("transformer.transformer blocks", "not a dotted path"),
            ("transformer.blocks", "transformer has no 'blocks'; it has .'empty', 'transformer_blocks'"),
            ("dit.blocks", "has no 'dit'"),
            ("transformer", "leads to a Transformer, not to an nn.ModuleList"),
            ("transformer.empty", "empty nn.ModuleList"),
        ],
    )
    def test_a_path_that_leads_to_no_blocks(self, path, message):
        pipeline = OpenSoraPipeline()
        pipeline.transformer.empty = nn.ModuleList()
        with pytest.raises(ValueError, match=message):
            DitCacheAdaptor(pipeline, dit_block_path=path)

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ("transformer.blocks", "transformer has no 'blocks'; it has .'transformer_blocks'.$"),
            ("transformer..blocks", "'transformer..blocks' is not a dotted path such as"),
            ("dit.blocks", "has no 'dit'"),
            ("transformer.plain", "leads to a list, not to an nn.ModuleList"),
        ],
    )
    def test_a_wrong_path_is_named_where_nothing_around_the_blocks_is_a_module(self, path, message):
        transformer = SimpleNamespace(transformer_blocks=nn.ModuleList([nn.Identity()] * 5))
        pipeline = SimpleNamespace(transformer=transformer)
        assert DitCacheAdaptor(pipeline).handle is None
        if path.endswith("plain"):
            transformer.plain = list(transformer.transformer_blocks)
        with pytest.raises(ValueError, match=message) as caught:
            DitCacheAdaptor(pipeline, dit_block_path=path)
        assert "target is" not in str(caught.value)

    @pytest.mark.parametrize("target", ["a pipeline", 3, None, nn.Linear])
    def test_what_holds_nothing_is_blamed_itself(self, target):
        with pytest.raises(ValueError, match="leads to no blocks: target is"):
            DitCacheAdaptor(target)

    def test_another_number_of_blocks(self):
        with pytest.raises(ValueError, match=r"dit_block_num=5, but transformer\.transformer_blocks has 6"):
            DitCacheAdaptor(OpenSoraPipeline(), searching(dit_block_num=5))

    def test_no_timestep_set(self):
        class Timeless(OpenSoraPipeline):
            @torch.no_grad()
            def __call__(self, prompt):
                h = torch.zeros(1, 4, 4)
                for block in self.transformer.transformer_blocks:
                    h = block.forward(h, timestep=0.5)
                return h

        pipeline = Timeless()
        pipeline.scheduler = None
        adaptor = DitCacheAdaptor(pipeline)
        adaptor.update_cache_config(1, 4, 2, 3)
        pipeline("a cat")  # plain: it might be the rest of a call that began before
        with pytest.raises(ValueError, match="which sampling step is this"):
            pipeline("a cat")
        DitCacheAdaptor.set_timestep_idx(0)
        pipeline("a cat")

    @pytest.mark.parametrize("step", [-1, 1.5, "1", None, True])
    def test_a_timestep_that_is_none(self, step):
        with pytest.raises(ValueError, match="step"):
            DitCacheAdaptor.set_timestep_idx(step)

    def test_a_search_without_a_config(self):
        with pytest.raises(ValueError, match="search needs to know what is wanted"):
            DitCacheAdaptor(OpenSoraPipeline()).search(run_pipeline_and_save_videos)

    @pytest.mark.parametrize(
        ("run", "given", "message"),
        [
            ("videos", {}, "must be a function"),
            (lambda pipe: pipe("a").images * 2, {}, "list of 1 videos, not 2"),
            (lambda pipe: pipe("a").images, {"prompts_num": 3}, "list of 3 videos, not 1"),
            (lambda pipe: pipe("a").images[0][0], {}, "list of 1 videos, not ndarray"),
            (lambda pipe: pipe("a").images[0], {"prompts_num": 2}, "list of 2 videos, not 1"),
            (lambda pipe: np.stack(pipe("a").images * 3), {"num_videos": 2}, "list of 2 videos, not 3"),
            (lambda pipe: np.stack(pipe("a").images * 2), {}, "list of 1 videos, not 2"),
            (run_pipeline_and_save_videos, {"prompts_num": 0}, "prompts_num=0"),
            (run_pipeline_and_save_videos, {"prompts_num": 1.0}, "prompts_num must be an int"),
            (run_pipeline_and_save_videos, {"plan": "best"}, "there are 'interval' and 'free'"),
            (lambda pipe: pipe("a", STEPS - 2).images, {}, "num_inference_steps=12, but run made 10 steps"),
        ],
    )
    def test_a_run_that_is_none(self, run, given, message):
        with pytest.raises(ValueError, match=message):
            DitCacheAdaptor(OpenSoraPipeline(), searching()).search(run, **given)

    def test_videos_of_other_shapes(self):
        calls = []

        def run(pipe):
            calls.append(0)
            return [pipe("a").images[0][len(calls) - 1 :]]

        with pytest.raises(ValueError, match=r"shape \(7, 4, 4, 3\) with the cache and \(8, 4, 4, 3\) without"):
            DitCacheAdaptor(OpenSoraPipeline(), searching()).search(run)

    def test_a_ratio_out_of_reach(self):
        with pytest.raises(ValueError, match="cache_ratio=50 cannot be reached in 12 steps: the most is 12"):
            DitCacheAdaptor(OpenSoraPipeline(), searching(cache_ratio=50)).search(run_pipeline_and_save_videos)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            ({"cache_ratio": 1}, "above 1"),
            ({"cache_ratio": "fast"}, "above 1"),
            ({"cache_ratio": True}, "above 1"),
            ({"num_sampling_steps": None}, "num_sampling_steps must be given"),
            ({"num_sampling_steps": 0}, "num_sampling_steps=0"),
            ({"num_sampling_steps": 2.5}, "num_sampling_steps must be an int"),
            ({"cache_step_interval": 1}, "cache_step_interval=1"),
            ({"num_hidden_states": 0}, "num_hidden_states=0"),
            ({"dit_block_num": 0}, "dit_block_num=0"),
            ({"dit_block_num": "6"}, "dit_block_num must be an int"),
        ],
    )
    def test_search_configs(self, given, message):
        with pytest.raises(ValueError, match=message):
            searching(**given)

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("value", [-1, 1.5, None, "2"])
    def test_configs(self, name, value, tmp_path):
        good = dict(zip(NAMES, (2, 3, 1, 4), strict=True))
        with pytest.raises(ValueError, match=name):
            DitCacheConfig(**{**good, name: value})
        path = tmp_path / "cache.json"
        path.write_text(json.dumps({**good, name: value}))
        with pytest.raises(ValueError, match=rf"cache\.json is not a DitCacheConfig: {name}"):
            DitCacheConfig.load(path)
        pipeline = OpenSoraPipeline()
        adaptor = DitCacheAdaptor(pipeline)
        adaptor.update_cache_config(**good)
        with pytest.raises(ValueError, match=name):
            adaptor.update_cache_config(**{**good, name: value})
        assert adaptor.dit_cache_config == DitCacheConfig(**good)

    def test_one_is_missing(self):
        with pytest.raises(ValueError, match="cache_num_blocks"):
            DitCacheConfig(cache_step_start=1, cache_step_interval=2, cache_block_start=0)

    @pytest.mark.parametrize("text", ["", "[1, 2]", '{"cache_steps": 1}', "3"])
    def test_files_with_something_else(self, text, tmp_path):
        path = tmp_path / "cache.json"
        path.write_text(text)
        with pytest.raises(ValueError, match=r"cache\.json is not a DitCacheConfig"):
            DitCacheConfig.load(path)

    def test_a_range_past_the_end_leaves_what_was_in_force(self):
        adaptor = DitCacheAdaptor(OpenSoraPipeline())
        for wrong in (lambda: adaptor.update_cache_config(4, 3, 2, 2), lambda: setattr(adaptor, "dit_cache_config", 3)):
            with pytest.raises(ValueError, match=r"reach past the end|must be a DitCacheConfig"):
                wrong()
            assert adaptor.dit_cache_config is None
            assert adaptor.handle is None
        adaptor.update_cache_config(1, 3, 2, 2)
        with pytest.raises(ValueError, match="reach past the end"):
            adaptor.update_cache_config(4, 3, 2, 2)
        assert adaptor.dit_cache_config == DitCacheConfig(2, 2, 1, 3)
