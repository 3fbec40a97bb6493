"""What cache-dit's settings let expect of a run is compared with what the run was."""

import warnings

import pytest
import torch
from toys import Net, Pipe, latents, prompt

from dithooks import timestep_scope
from dithooks.compat.cache_dit import BlockAdapter, DBCacheConfig, disable_cache, enable_cache
from dithooks.compat.cache_dit.enable import enabled
from dithooks.compat.cache_dit.expectation import Expectation
from dithooks.engine.run import RunEnd

CONFIG = {"Fn_compute_blocks": 1, "max_warmup_steps": 2, "residual_diff_threshold": 1.0}  # 1 is met by every change


def attached(pipe, has_separate_cfg=None, **expected):
    adapter = BlockAdapter(pipe=pipe, auto=True, has_separate_cfg=has_separate_cfg)
    enable_cache(adapter, DBCacheConfig(**CONFIG, **expected))
    return enabled(pipe)[0]


def sampled(net, prompts, steps):
    x = latents()
    for step in steps:
        with timestep_scope(step):
            for e in prompts:
                net(x, torch.tensor(0.5), e)


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ({"has_separate_cfg": True}, "has_separate_cfg=True, but none of 8 steps made more than one call"),
        ({"num_inference_steps": 10}, "num_inference_steps=10, but the run had 8"),
        ({"has_separate_cfg": True, "num_inference_steps": 7}, "more than one call; num_inference_steps=7, but"),
    ],
)
def test_a_run_that_differs_is_warned_of_once(expected, message):
    pipe = Pipe(Net())
    cache = attached(pipe, **expected)
    with pytest.warns(UserWarning, match=message) as caught:
        [pipe(latents()) for _run in range(3)]
    assert len(caught) == 1
    assert cache.stats.reused_calls == 18


def test_two_calls_a_step_where_one_is_expected_are_told_apart_all_the_same():
    pipe, prompts = Pipe(Net("swapped")), [prompt(), 3 * prompt()]
    cache = attached(pipe, has_separate_cfg=False)
    with pytest.warns(UserWarning, match="has_separate_cfg=False, but a step made 2 calls"):
        sampled(pipe.transformer, prompts, [*range(8), 0])
    assert {each.branch for each in cache.decisions} == {0, 1}


@pytest.mark.filterwarnings("error")
def test_a_run_as_expected_causes_no_warning():
    pipe = Pipe(Net())
    attached(pipe, has_separate_cfg=False, num_inference_steps=8)
    pipe(latents())
    pipe(latents())


@pytest.mark.filterwarnings("error")
def test_a_run_that_is_cut_short_causes_no_warning():
    net, x = Net(), latents()
    enable_cache(net, DBCacheConfig(**CONFIG, num_inference_steps=8))
    for t in torch.linspace(1, 0.1, 8)[:5]:  # nothing tells whether it would have gone on
        net(x, t)
    disable_cache(net)


def test_of_several_ranges_one_warns():
    net = Net("two_lists")
    attached(Pipe(net), num_inference_steps=9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        sampled(net, [prompt(tokens=6)], [*range(8), 0])
        disable_cache(net)
    assert [str(each.message) for each in caught] == [
        "transformer.blocks (Net): num_inference_steps=9, but the run had 8: the run counts"
    ]


def test_the_expectation_follows_the_settings():
    """Other settings replace it; settings that are refused leave the former one in force."""
    pipe = Pipe(Net())
    cache = attached(pipe, num_inference_steps=9)
    enable_cache(pipe, DBCacheConfig(**CONFIG, num_inference_steps=8))
    pipe.transformer.is_cache_enabled = True
    with pytest.raises(ValueError, match="another cache enabled"):
        enable_cache(pipe, DBCacheConfig(**CONFIG, num_inference_steps=7))
    pipe.transformer.is_cache_enabled = False
    cache.update(cache.config)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(latents())


@pytest.mark.parametrize(
    ("cfg", "declared", "made", "ended", "parts"),
    [  # made: steps of the run, the most calls of a step, steps of the schedule
        (True, 8, (8, 2, 8), False, 0),
        (True, None, (8, 1, 8), False, 1),
        (False, None, (8, 2, 8), False, 1),
        (None, 10, (8, 1, 8), False, 1),
        (None, 10, (8, 1, None), True, 1),
        (None, 10, (8, 1, None), False, 0),  # it may have been cut short
        (None, 10, (12, 1, None), False, 1),
        (None, 4, (4, 1, 8), False, 0),  # another transformer makes the others
        (True, 10, (8, 1, 8), False, 2),
        (True, 10, (1, 1, 1), True, 0),
    ],
)
def test_a_run_that_differs_from_what_was_declared(cfg, declared, made, ended, parts):
    warning = Expectation(cfg, declared).difference(RunEnd("net", *made, is_over=ended))
    assert (0 if warning is None else len(warning[1].split("; "))) == parts
