"""The loop's steps, taken from ``dithooks.steps``: within progress bars, and in loops that end early."""

from __future__ import annotations

from contextlib import suppress

import pytest
from by_hand import at_once, check
from sampler_models import WanT2V

from dithooks import DitCacheConfig, Interval, Mask, dit_cache, steps

MASK = DitCacheConfig(policy=Mask((1, 0, 1, 0, 0, 1, 0, 1, 0, 0)))
MASKED = dict.fromkeys(("cond False", "uncond False"), "CRCRRCRCRR")


class Bar:
    """A progress bar: it holds what it iterates over, and its length."""

    def __init__(self, items):
        self.items = items

    def __iter__(self):
        yield from self.items

    def __len__(self):
        return len(self.items)


@pytest.mark.parametrize(
    "around", [lambda items: Bar(steps(items)), lambda items: steps(Bar(items))], ids=["out", "in"]
)
def test_steps_within_a_bar_and_around_one(around):
    pipe = WanT2V(None)
    check(pipe.models, [pipe.model.blocks], pipe.sample, lambda: dit_cache(pipe.model, MASK), MASKED, steps=around)


@pytest.mark.parametrize("how", ["break", "exception", "bar that outlives it", "bar that is closed in the next run"])
@pytest.mark.parametrize("done", [1, 2, 5])
def test_a_loop_over_steps_that_ends_early(how, done):
    """The next run, of the same prompts, reuses nothing of it, from its first step on."""
    pipe = WanT2V(None)
    bars = []

    def run(steps, call, seed):
        def ends_early(items):
            bars.append(iter(Bar(steps(items))) if how.startswith("bar") else None)
            for k, item in enumerate(bars[-1] or steps(items)):
                if k == done:
                    if how == "exception":
                        raise InterruptedError
                    break
                yield item

        def goes_on(items):
            for k, item in enumerate(steps(items)):
                if k == 3 and how == "bar that is closed in the next run":
                    bars.pop().close()
                yield item

        with suppress(InterruptedError, IndexError):
            pipe.sample(ends_early, lambda branch, step: call(f"early {branch}", step), seed + 50)
        return pipe.sample(goes_on, call, seed)

    early = "CRCRR"[:done] + "." * (10 - done)
    letters = {"early cond False": early, "early uncond False": early}
    letters |= MASKED
    check(pipe.models, [pipe.model.blocks], run, lambda: dit_cache(pipe.model, MASK), letters, steps=steps)


def test_no_step_is_left_open_by_a_loop_that_ends_early():
    """Calls after it are told by their timesteps again."""
    pipe = WanT2V(None)

    def run(steps, call, seed):
        for _ in steps(range(10)):
            break
        return pipe.sample(at_once, call, seed)

    letters = dict.fromkeys(MASKED, "CCRCRCRCRC")
    check(
        pipe.models,
        [pipe.model.blocks],
        run,
        lambda: dit_cache(pipe.model, DitCacheConfig(policy=Interval(1, 2))),
        letters,
        steps=steps,
    )
