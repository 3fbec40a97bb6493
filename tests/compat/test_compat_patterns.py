"""cache-dit's six patterns: what it says of each, and what a reused step of such blocks returns, worked out by hand."""

import pytest
import torch
from torch import nn

import dithooks
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import BlockAdapter, DBCacheConfig, ForwardPattern, steps_mask

BLOCKS = 10
WITH_TEXT = {ForwardPattern.Pattern_0, ForwardPattern.Pattern_1, ForwardPattern.Pattern_2}
TABLE = {  # Return_H_First, Return_H_Only, Forward_H_only
    ForwardPattern.Pattern_0: (True, False, False),
    ForwardPattern.Pattern_1: (False, False, False),
    ForwardPattern.Pattern_2: (False, True, False),
    ForwardPattern.Pattern_3: (False, True, True),
    ForwardPattern.Pattern_4: (True, False, True),
    ForwardPattern.Pattern_5: (False, False, True),
}


class Block(nn.Module):
    """Adds t to the image and 2 t to the text; without a text among the arguments, its text is twice the image."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern

    def forward(self, hidden_states, encoder_hidden_states=None, t=None):
        h = hidden_states + t
        e = 2 * h if encoder_hidden_states is None else encoder_hidden_states + 2 * t
        streams = {"hidden_states": h, "encoder_hidden_states": e}
        returned = tuple(streams[name] for name in self.pattern.Out)
        return returned[0] if self.pattern.Return_H_Only else returned


class Model(nn.Module):
    """Calls its blocks by what their pattern says of them, as cache-dit's own tests do; returns the streams' sum."""

    def __init__(self, pattern):
        super().__init__()
        self.pattern = pattern
        self.transformer_blocks = nn.ModuleList(Block(pattern) for _ in range(BLOCKS))

    def forward(self, hidden_states, timestep, encoder_hidden_states=None):
        h, e = hidden_states, encoder_hidden_states
        for block in self.transformer_blocks:
            out = block(h, t=timestep) if self.pattern.Forward_H_only else block(h, e, t=timestep)
            if self.pattern.Return_H_Only:
                h = out
            elif self.pattern.Return_H_First:
                h, e = out
            else:
                e, h = out
        return h if e is None else h + e


def by_hand(pattern, t, computed_at):
    """The output from h = 8, e = 16: the first block adds t, the nine others what they did at ``computed_at``."""
    h = 8 + t + 9 * computed_at
    if pattern in (ForwardPattern.Pattern_0, ForwardPattern.Pattern_1):
        return h + 16 + 2 * (t + 9 * computed_at)
    if pattern is ForwardPattern.Pattern_2:
        return h + 16
    if pattern is ForwardPattern.Pattern_3:
        return h
    return h + 2 * (8 + 10 * computed_at)  # the second stream is what it was when last computed


@torch.no_grad()
def run(model, steps):
    given = {"encoder_hidden_states": torch.full((1, 3, 4), 16.0)} if model.pattern in WITH_TEXT else {}
    return [float(model(torch.full((1, 3, 4), 8.0), float(steps - step), **given)[0, 0, 0]) for step in range(steps)]


@pytest.mark.parametrize("pattern", ForwardPattern)
class TestEach:
    def test_what_it_says(self, pattern):
        assert (pattern.Return_H_First, pattern.Return_H_Only, pattern.Forward_H_only) == TABLE[pattern]
        assert pattern.In == ("hidden_states", "encoder_hidden_states")[: 2 if pattern in WITH_TEXT else 1]
        h_only, first = pattern.Return_H_Only, pattern.Return_H_First
        text_first = ("encoder_hidden_states", "hidden_states")
        assert pattern.Out == (("hidden_states",) if h_only else text_first[::-1] if first else text_first)
        assert pattern.Supported
        assert pattern in ForwardPattern.supported_patterns()

    def test_this_librarys_own_is_the_same_by_number(self, pattern):
        own = dithooks.BlockAdapter(transformer=Model(pattern), blocks="transformer_blocks", forward_pattern=pattern)
        assert own.forward_pattern is dithooks.ForwardPattern(pattern.value)

    def test_a_reused_step(self, pattern):
        model = Model(pattern)
        adapter = BlockAdapter(transformer=model, blocks=model.transformer_blocks, forward_pattern=pattern)
        config = DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2, residual_diff_threshold=1.0)
        assert cache_dit.enable_cache(adapter, cache_config=config) is adapter
        computed_at = [6, 5, 5, 5, 5, 5]
        assert run(model, 6) == [by_hand(pattern, 6 - step, at) for step, at in enumerate(computed_at)]
        assert cache_dit.summary(adapter, logging=False)[0].cached_steps == [2, 3, 4, 5]
        cache_dit.disable_cache(adapter)
        assert run(model, 6) == [by_hand(pattern, t, t) for t in range(6, 0, -1)]

    def test_refreshed_for_other_numbers_of_steps(self, pattern):
        """As a server does between requests: a number of steps alone, then a mask for each number."""
        model = Model(pattern)
        adapter = BlockAdapter(transformer=model, blocks=model.transformer_blocks, forward_pattern=pattern)
        cache_dit.enable_cache(adapter, DBCacheConfig(Fn_compute_blocks=8, residual_diff_threshold=0.05))
        cache_dit.refresh_context(model, num_inference_steps=16, verbose=True)
        run(model, 16)
        for steps in (28, 50):
            mask = steps_mask(mask_policy="fast", total_steps=steps)
            config = DBCacheConfig(
                Fn_compute_blocks=1,
                num_inference_steps=steps,
                steps_computation_mask=mask,
                steps_computation_policy="static",
                enable_separate_cfg=False,
            )
            cache_dit.refresh_context(model, cache_config=config, verbose=True)
            at = [steps - max(s for s in range(step + 1) if mask[s]) for step in range(steps)]
            assert run(model, steps) == [by_hand(pattern, steps - step, at[step]) for step in range(steps)]
            reused = [step for step, bit in enumerate(mask) if not bit]
            assert cache_dit.summary(model, logging=False)[0].cached_steps == reused
