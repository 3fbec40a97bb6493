"""What is believed of a run is compared with what it was."""

import warnings

import pytest
import torch
from toys import Net, Pipe, latents, prompt

from dithooks import BlockAdapter, DitCacheConfig, dit_cache, timestep_scope
from dithooks.blocks.block_lists import Expected

CONFIG = DitCacheConfig(2, 2, 1, 3)


def attached(pipe, **beliefs):
    return dit_cache(BlockAdapter(pipe, expected=Expected(**beliefs)), CONFIG)


def sampled(net, prompts, steps):
    x = latents()
    for step in steps:
        with timestep_scope(step):
            for e in prompts:
                net(x, torch.tensor(0.5), e)


@pytest.mark.parametrize(
    ("beliefs", "message"),
    [
        ({"has_separate_cfg": True}, "has_separate_cfg=True, but none of 8 steps made more than one call"),
        ({"num_inference_steps": 10}, "num_inference_steps=10, but the run had 8"),
        ({"has_separate_cfg": True, "num_inference_steps": 7}, "more than one call; num_inference_steps=7, but"),
    ],
)
def test_what_turns_out_otherwise_is_said_once(beliefs, message):
    pipe = Pipe(Net())
    with attached(pipe, **beliefs) as cache:
        with pytest.warns(UserWarning, match=message) as said:
            [pipe(latents()) for _run in range(3)]
        assert len(said) == 1
        assert cache.stats.reused_calls == 9


def test_two_calls_a_step_where_one_is_believed_are_told_apart_all_the_same():
    net, prompts = Net("swapped"), [prompt(), 3 * prompt()]
    adapter = BlockAdapter(transformer=net, expected=Expected(has_separate_cfg=False))
    with dit_cache(adapter, CONFIG) as cache:
        with pytest.warns(UserWarning, match="has_separate_cfg=False, but a step made 2 calls"):
            sampled(net, prompts, [*range(8), 0])
        assert {each.branch for each in cache.decisions} == {0, 1}


@pytest.mark.filterwarnings("error")
def test_what_is_as_believed_is_not_worth_a_word():
    pipe = Pipe(Net())
    with attached(pipe, has_separate_cfg=False, num_inference_steps=8):
        pipe(latents())
        pipe(latents())


@pytest.mark.filterwarnings("error")
def test_a_run_that_is_broken_off_says_nothing_of_the_next():
    net, x = Net(), latents()
    with dit_cache(BlockAdapter(transformer=net, expected=Expected(num_inference_steps=8)), CONFIG):
        for t in torch.linspace(1, 0.1, 8)[:5]:  # nothing tells whether it would have gone on
            net(x, t)


def test_of_several_ranges_one_speaks():
    net = Net("two_lists")
    adapter = BlockAdapter(
        Pipe(net), blocks=[net.blocks, net.singles], params=[CONFIG, CONFIG], expected=Expected(num_inference_steps=9)
    )
    with warnings.catch_warnings(record=True) as said, dit_cache(adapter, CONFIG):
        warnings.simplefilter("always")
        sampled(net, [prompt(tokens=6)], [*range(8), 0])
    assert [str(each.message) for each in said] == [
        "transformer.blocks (Net): num_inference_steps=9, but the run had 8: the run counts"
    ]


def test_another_thing_than_an_expected():
    with pytest.raises(TypeError, match=r"expected: 7 \(int\) is not an Expected"):
        BlockAdapter(Pipe(Net()), expected=7)
