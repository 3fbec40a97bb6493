"""Random configurations, shapes, branch orders, interrupted runs, requests by turns and changes of the cache, on models
whose outputs tell which calls they are made of: never a wrong shape or a stale residual, blocks as the formula says.
"""

import asyncio
import itertools
import math
import os
import random
import warnings
from dataclasses import dataclass

import hypothesis
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from oracle import MARKS, WIDTH, Oracle, Speaker
from toys import Counter

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Interval,
    Linear,
    MagnitudeRatio,
    Mask,
    Reuse,
    Taylor,
    Threshold,
    dit_cache,
    timestep_scope,
)

pytestmark = [
    pytest.mark.line("Fault campaign"),
    pytest.mark.on("a model that reveals its calls"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.slow,
]
MANY = int(os.environ.get("DITHOOKS_EXAMPLES", "0"))  # by hand: so many, at random


def examples(number):
    """Always the same in CI."""
    health = [
        HealthCheck.too_slow,
        HealthCheck.data_too_large,
        HealthCheck.filter_too_much,
        HealthCheck.large_base_example,
    ]
    return settings(
        deadline=None, max_examples=MANY or number, derandomize=not MANY, database=None, suppress_health_check=health
    )


@st.composite
def policies(draw, tells_steps):
    """Any policy; those that have to know the number of steps where something tells it."""
    limit, warm = draw(st.sampled_from([0.1, 0.3, 1.0, 3.0])), draw(st.integers(0, 2))
    shared = {"separate_branches": draw(st.booleans()), "reduce": draw(st.sampled_from(["mean", "max"]))}
    threshold = Threshold(limit, warm, max_continuous_cached_steps=draw(st.sampled_from([None, 1, 2])), **shared)
    bits = (1, *draw(st.lists(st.integers(0, 1), min_size=1, max_size=6)))
    ratios = (1.0, *draw(st.lists(st.sampled_from([0.8, 0.95, 1.0]), min_size=1, max_size=6)))
    kinds = [
        Interval(draw(st.integers(0, 3)), draw(st.integers(2, 4))),
        Interval(draw(st.integers(0, 3)), draw(st.integers(2, 4))),
        Mask(bits),
        Mask(bits, dynamic=threshold),
        threshold,
        EasyCache(limit, 2, **shared),
        MagnitudeRatio(ratios, 0.3, draw(st.integers(1, 3)), 0.0),
    ]
    return draw(st.sampled_from([*kinds, Budget(1.2, 1, **shared), Mask("medium")] if tells_steps else kinds))


@st.composite
def ranges(draw, depth):
    first = draw(st.integers(0, depth - 1))
    return first, draw(st.integers(first, depth - 1))


def predictors():
    orders = st.builds(Taylor, st.integers(1, 2), st.sampled_from(["sigma", "step"]))
    return st.one_of(st.just(Reuse()), st.just(Linear()), orders)


def configured(within, policy, predictor):
    first, last = within
    return DitCacheConfig(
        cache_block_start=first, cache_num_blocks=last - first + 1, policy=policy, predictor=predictor
    )


@dataclass
class Request:
    """One sampling run, as it is asked for."""

    steps: int
    branches: int
    batch: int
    tokens: int
    alone: tuple  # steps at which only the first branch is called
    shuffled: int  # seed of the branches' order at each step
    begin: int  # first step
    stop: int | None  # broken off before this one
    switch: tuple | None  # from a step on other latents: (step, batch, tokens)
    trouble: tuple | None  # an exception at a call's n-th place: (step, branch, place, what comes after)
    admin: tuple | None  # before a step, the cache is reset, or given another configuration: (step, configuration)
    labelled: bool
    double: bool


@st.composite
def requests(draw, clock, depth):
    steps = draw(st.integers(2, 7))
    branches, at = draw(st.integers(1, 3)), st.integers(0, steps - 1)
    begin = draw(st.integers(0, steps - 1)) if clock == "scheduler" and draw(st.booleans()) else 0
    batch = draw(st.integers(1, 2))
    # Another batch has other prompts: by these alone, branches that come and go then are not always told apart.
    switch = (draw(at), draw(st.integers(1, 2)) if clock == "scope and branch" else batch, draw(st.integers(1, 4)))
    places = st.integers(0, 2 * depth + 1)
    after = st.sampled_from(["the call again", "the step again", "what is next", "nothing"])
    admin = (draw(at), draw(st.one_of(st.none(), st.tuples(ranges(depth), policies(False), predictors()))))
    return Request(
        steps=steps,
        branches=branches,
        batch=batch,
        tokens=draw(st.integers(1, 4)),
        alone=draw(st.one_of(st.just(()), st.lists(at, max_size=3).map(tuple))),
        shuffled=draw(st.integers(0, 99)),
        begin=begin,
        # Where branches are named, one more run of their first step alone looks like that step once more.
        stop=draw(st.one_of(st.none(), st.none(), st.integers(2, steps) if clock == "scope and branch" else at)),
        switch=draw(st.sampled_from([None, None, switch])),
        trouble=draw(
            st.sampled_from([None, (draw(at), draw(st.integers(0, branches - 1)), draw(places), draw(after))])
        ),
        admin=draw(st.sampled_from([None, None, None, admin])),
        labelled=branches > 1 or begin > 0 or draw(st.booleans()),
        double=draw(st.integers(0, 5)) == 0,
    )


@dataclass
class Story:
    depth: int
    pair: bool
    clock: str
    within: tuple
    policy: object
    predictor: object
    requests: list
    by_turns: bool

    @property
    def quiet(self):
        """Whether nothing happens that calls are not counted by."""
        return not any(each.trouble or each.admin for each in self.requests)


@st.composite
def stories(draw):
    depth, clock = (
        draw(st.integers(2, 5)),
        draw(st.sampled_from(["scheduler", "timestep", "scope", "scope and branch"])),
    )
    asked = draw(st.lists(requests(clock, depth), min_size=1, max_size=4))
    return Story(
        depth=depth,
        pair=draw(st.booleans()),
        clock=clock,
        within=draw(ranges(depth)),
        policy=draw(policies(clock != "timestep")),
        predictor=draw(predictors()),
        requests=asked,
        by_turns=clock != "scheduler" and draw(st.booleans()),
    )


class Stage:
    """Plays a story."""

    def __init__(self, story):
        self.story, self.net = story, Speaker(story.depth, story.pair)
        self.transformer, self.scheduler = self.net, Counter() if story.clock == "scheduler" else None
        self.oracle = Oracle(self.net, *story.within, story.predictor, story.policy)
        self.oracle.counted_steps = story.clock != "timestep" or story.quiet
        self.generator = torch.Generator().manual_seed(0)

    def play(self):
        config = configured(self.story.within, self.story.policy, self.story.predictor)
        self.handle = dit_cache(self if self.scheduler is not None else self.net, config)
        try:
            acts = [self.act(number, each) for number, each in enumerate(self.story.requests)]
            if self.story.by_turns:
                asyncio.run(self.by_turns(acts))
            else:
                for _ in itertools.chain.from_iterable(acts):
                    pass
            self.count()
            return self.oracle
        finally:
            self.handle.remove()

    async def by_turns(self, acts):
        """Each request in a task of its own, a step of one after a step of another."""

        async def alone(act):
            for _ in act:
                await asyncio.sleep(0)

        await asyncio.gather(*map(alone, acts))

    def act(self, number, asked):
        """The steps of a request, one after another."""
        if self.scheduler is not None:
            self.scheduler.set_timesteps(asked.steps)
            self.scheduler.begin_index = asked.begin
        form, dtype = (asked.batch, asked.tokens), torch.float64 if asked.double else torch.float32
        prompts, trouble = self.prompts(asked, form, dtype), asked.trouble
        for step in range(asked.begin, asked.steps):
            if asked.stop == step:
                return
            if asked.admin is not None and asked.admin[0] == step:
                self.change(asked.admin[1])
            if asked.switch is not None and asked.switch[0] == step:
                prompts = prompts if form[0] == asked.switch[1] else self.prompts(asked, asked.switch[1:], dtype)
                form = asked.switch[1:]
            x = torch.randn(*form, WIDTH, generator=self.generator, dtype=dtype)
            order = [n for n in range(asked.branches) if n == 0 or step not in asked.alone]
            random.Random(asked.shuffled + step).shuffle(order)
            place = 0
            while place < len(order):
                failing = trouble[2] if trouble is not None and trouble[:2] == (step, order[place]) else None
                if self.call(number, asked, order[place], step, x, prompts[order[place]], failing):
                    place += 1
                    continue
                after, trouble = trouble[3], None
                if after == "nothing":
                    return
                place = {"the call again": place, "the step again": 0, "what is next": place + 1}[after]
            if self.scheduler is not None:
                self.scheduler.step()
            yield

    def prompts(self, asked, form, dtype):
        if not asked.labelled and not self.story.pair:
            return [None] * asked.branches
        return [torch.randn(form[0], 2, WIDTH, generator=self.generator, dtype=dtype) for _ in range(asked.branches)]

    def call(self, number, asked, branch, step, x, prompt, failing):
        """One call. Returns whether it came to its end."""
        time = 1 - step / asked.steps
        drift = 30 + 12 * math.sin(step + 2 * branch + asked.shuffled)
        given = {"timestep": torch.tensor(time)} if self.story.clock in ("timestep", "scheduler") else {}
        places = iter(range(10_000))

        def at(_):
            if next(places) == failing:
                raise RuntimeError("raised on purpose")

        self.net.now.at = at
        told = {
            "sigma": time,
            "steps": asked.steps,
            "branch": branch if self.story.clock == "scope and branch" else None,
        }
        try:
            if self.story.clock.startswith("scope"):
                with timestep_scope(step, **told):
                    self.oracle.call(number, branch, step, time, drift, x, prompt, **given)
            else:
                self.oracle.call(number, branch, step, time, drift, x, prompt, **given)
        except RuntimeError as error:
            if "on purpose" not in str(error):
                raise
            return False
        finally:
            self.net.now.at = None
        return True

    def change(self, config):
        self.oracle.drop()
        if config is None:
            self.handle.reset()
        else:
            self.handle.update(configured(*config))
            (first, last), self.oracle.policy, self.oracle.predictor = config
            self.oracle.range = range(first, last + 1)

    def count(self):
        """Blocks run = computed · blocks + reused · (blocks − range), by what was seen to run."""
        stats, calls = self.handle.stats, self.oracle.calls
        assert stats.calls == stats.computed_calls + stats.reused_calls == sum(stats.reasons.values())
        if self.story.quiet:
            assert stats.calls == len(calls)
            assert stats.reused_calls == self.oracle.reused() == sum(each.reuse for each in self.handle.decisions)
            within = len(self.oracle.range)
            run = sum(self.story.depth - within if told.reused else self.story.depth for told in calls)
            assert (stats.blocks_run, stats.blocks_total) == (run, len(calls) * self.story.depth)


def played(story):
    """The oracle of a story that was played."""
    calls = sum(2 * each.steps * each.branches for each in story.requests)
    hypothesis.assume(calls < MARKS)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Stage(story).play()


ABSENT = Request(7, 2, 1, 2, (2,), 0, 0, None, None, None, None, True, False)  # the second branch misses a refresh


@examples(300)
@given(story=stories())
@example(story=Story(3, False, "scheduler", (0, 1), Interval(0, 2), Reuse(), [ABSENT], False))
@example(story=Story(3, True, "scope", (1, 2), Interval(0, 2), Linear(), [ABSENT, ABSENT], True))
def test_never_stale_and_never_of_a_wrong_shape(story):
    """Up to four requests, one after another or by turns, with one to three branches in any order, some of them at some
    steps only, latents that change form, runs broken off, exceptions and what may follow, reset() and update(); with
    policies, predictors, ranges, clocks and dtypes of all kinds."""
    played(story)


def test_much_of_it_is_reused():
    """Computing always would never be wrong, either: of the calls of such stories an eighth and more are reused, and a
    fifth of the stories have trouble, or requests by turns."""
    seen = {"calls": 0, "reused": 0, "stories": 0, "trouble": 0, "turns": 0}

    @examples(100)
    @given(story=stories())
    def play(story):
        oracle = played(story)
        seen["calls"] += len(oracle.calls)
        seen["reused"] += oracle.reused()
        seen["stories"] += 1
        seen["trouble"] += not story.quiet
        seen["turns"] += story.by_turns

    play()
    assert seen["reused"] > 0.12 * seen["calls"], seen
    assert min(seen["trouble"], seen["turns"]) > 0.2 * seen["stories"], seen


@examples(60)
@given(
    depth=st.integers(2, 6),
    data=st.data(),
    start=st.integers(0, 4),
    interval=st.integers(2, 5),
    steps=st.integers(1, 9),
    branches=st.integers(1, 3),
)
def test_an_interval_runs_as_many_blocks_as_the_formula_says(depth, data, start, interval, steps, branches):
    """Steps before the start and every so many from there on run all blocks, the others those outside of the range."""
    first, last = data.draw(ranges(depth))
    asked = Request(steps, branches, 1, 2, (), 0, 0, None, None, None, None, True, False)
    story = Story(depth, False, "scheduler", (first, last), Interval(start, interval), Reuse(), [asked], False)
    oracle = played(story)
    computed = sum(step < start or (step - start) % interval == 0 for step in range(steps))
    assert len(oracle.calls) == steps * branches
    assert oracle.reused() == (steps - computed) * branches


class Experts:
    """A pipeline of two transformers, the second from some step on."""

    def __init__(self, depths, within, predictor, policy):
        self.scheduler = Counter()
        self.transformer, self.transformer_2 = (Speaker(depth) for depth in depths)
        both = (self.transformer, self.transformer_2)
        self.oracles = [Oracle(net, *within, predictor, policy) for net in both]

    def __call__(self, request, steps, switch, branches, generator):
        self.scheduler.set_timesteps(steps)
        prompts = [torch.randn(1, 2, WIDTH, generator=generator) for _ in range(branches)]
        for step in range(steps):
            oracle = self.oracles[step >= switch]
            x = torch.randn(1, 3, WIDTH, generator=generator)
            for branch, prompt in enumerate(prompts):
                oracle.call(
                    request,
                    branch,
                    step,
                    1 - step / steps,
                    20.0 + step,
                    x,
                    prompt,
                    timestep=torch.tensor(1 - step / steps),
                )
            self.scheduler.step()


@examples(80)
@given(
    depths=st.tuples(st.integers(3, 5), st.integers(3, 5)),
    within=ranges(3),
    predictor=predictors(),
    policy=policies(False),
    runs=st.lists(st.tuples(st.integers(2, 8), st.integers(0, 8), st.integers(1, 2)), min_size=1, max_size=3),
)
def test_two_transformers(depths, within, predictor, policy, runs):
    """Of a pipeline with two, each has its own residuals, and none from before the switch or from another request."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = Experts(depths, within, predictor, policy)
        with dit_cache(pipe, configured(within, policy, predictor)) as cache:
            for number, (steps, switch, branches) in enumerate(runs):
                pipe(number, steps, switch, branches, generator)
            assert cache.stats.reused_calls == sum(oracle.reused() for oracle in pipe.oracles)
            assert cache.stats.calls == sum(len(oracle.calls) for oracle in pipe.oracles)
