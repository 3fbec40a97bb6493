"""Several transformers that are enabled together, and then changed one by one."""

import pytest
from toys import Net, Pipe, latents

import dithooks
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import BlockAdapter


class TestSeveralTransformers:
    """Enabled together, and then one by one."""

    @pytest.fixture
    def pipe(self):
        pipe = Pipe(Net(depth=6))
        pipe.transformer_2 = Net(depth=6)
        return pipe

    def ranges(self, pipe):
        return {
            attached.chain.name.split(" ")[0]: attached.cache.decider.policy
            for handle in dithooks.handle.handles_of(pipe)
            for attached in handle._attached
        }

    def test_one_is_refreshed(self, pipe):
        cache_dit.enable_cache(pipe, Fn_compute_blocks=1, residual_diff_threshold=0.1)
        cache_dit.refresh_context(pipe.transformer, max_warmup_steps=4)
        cache_dit.refresh_context(pipe.transformer_2, max_warmup_steps=1)
        assert [each.max_warmup_steps for each in self.ranges(pipe).values()] == [4, 1]
        cache_dit.refresh_context(pipe, max_warmup_steps=2)
        assert [each.max_warmup_steps for each in self.ranges(pipe).values()] == [2, 2]
        cache_dit.refresh_context(pipe.transformer_2, residual_diff_threshold=0.3)
        assert [each.residual_diff_threshold for each in self.ranges(pipe).values()] == [0.1, 0.3]

    def test_one_is_disabled(self, pipe):
        cache_dit.enable_cache(pipe, Fn_compute_blocks=1)
        cache_dit.disable_cache(pipe.transformer_2)
        assert list(self.ranges(pipe)) == ["transformer"]
        cache_dit.disable_cache(pipe.transformer)
        assert self.ranges(pipe) == {}

    def test_one_is_summed_up(self, pipe):
        cache_dit.enable_cache(pipe, Fn_compute_blocks=1, residual_diff_threshold=1.0, max_warmup_steps=1)
        pipe(latents())
        assert [each.blocks for each in cache_dit.summary(pipe.transformer, logging=False)] == ["transformer.blocks"]
        assert [each.blocks for each in cache_dit.summary(pipe.transformer_2, logging=False)] == [""]

    def test_each_by_itself_with_one_pipeline(self, pipe):
        for transformer in (pipe.transformer, pipe.transformer_2):
            adapter = BlockAdapter(pipe=pipe, transformer=transformer, blocks=transformer.blocks, forward_pattern=3)
            cache_dit.enable_cache(adapter, Fn_compute_blocks=1)
        assert len(self.ranges(pipe)) == 2
        with pytest.raises(ValueError, match="cached already, otherwise"):
            cache_dit.enable_cache(pipe, Fn_compute_blocks=1)
        cache_dit.disable_cache(pipe)
        assert self.ranges(pipe) == {}
