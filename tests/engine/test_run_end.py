"""Each run that is not cut short is shown at its end to the one who asked for it, whose warning is given once."""

import pytest
import torch
from toys import Net, Pipe, latents, loop

from dithooks import DitCacheConfig, dit_cache
from dithooks.engine.hooks import caches_of
from dithooks.engine.run import RunEnd

CONFIG = DitCacheConfig(2, 2, 1, 3)


@pytest.fixture
def ends():
    return []


@pytest.fixture
def attached(ends):
    """A function that attaches a cache whose ends of runs are noted, each with a warning."""

    def attach(target, net):
        handle = dit_cache(target, CONFIG)

        def note(run):
            ends.append(run)
            return "topic", f"{run.steps} steps were made"

        (decider,) = {cache.decider for cache in caches_of(net.modules())}
        decider.on_run_end = note
        return handle

    return attach


def test_runs_of_a_schedule(attached, ends):
    pipe, e = Pipe(Net("swapped")), torch.randn(2, 6, 8)
    with attached(pipe, pipe.transformer), pytest.warns(UserWarning, match="steps were made") as caught:
        [pipe(latents(), steps, prompts) for steps, prompts in ((8, [e, 3 * e]), (6, [e]))]
    name = "transformer (Net)"
    assert ends[0] == RunEnd(name, steps=8, most_calls=2, scheduled=8, is_over=True)
    assert ends[-1][1:4] == (6, 1, 6)
    assert [str(each.message) for each in caught] == ["8 steps were made"]


def test_a_run_without_a_schedule_ends_with_the_next_or_the_cache(attached, ends):
    net = Net()
    with attached(net, net):
        loop(net, latents(), steps=4)
        assert ends == []
        with pytest.warns(UserWarning, match="4 steps were made"):
            loop(net, latents(), steps=4)
        assert ends == [RunEnd("Net", 4, 1, None, is_over=True)]
    assert ends[1:] == [RunEnd("Net", 4, 1, None, is_over=False)]


def test_a_run_that_is_cut_short_is_not_shown(attached, ends):
    pipe = Pipe(Net())

    def stop(step):
        if step == 5:
            raise KeyboardInterrupt

    with attached(pipe, pipe.transformer):
        with pytest.raises(KeyboardInterrupt):
            pipe(latents(), at=stop)
        assert ends == []
    assert ends == []
