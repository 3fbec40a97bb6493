"""The steps of pipelines as DiffSynth-Studio has them: a ``model_fn`` over blocks, compared with a loop by hand."""

import copy
import inspect
import pickle
import threading
from types import SimpleNamespace

import pytest
import torch
from diffsynth_pipelines import STEPS, Pipeline, model_fn
from torch import nn

import dithooks
from dithooks import DitCacheConfig, Linear, dit_cache, record
from dithooks.engine.sessions import current_context
from dithooks.errors import InvalidSetting, WrongType
from dithooks.integrations.diffsynth import diffsynth_steps

CONFIG = DitCacheConfig(2, 2, cache_block_start=1, cache_num_blocks=3)


class ByHand:
    """One transformer's calls with blocks 1 … 3 left out: it is told its passes by what they are given."""

    def __init__(self, steps=range(STEPS), start=2, interval=2):
        self.steps, self.start, self.interval = list(steps), start, interval
        self.residuals, self.asked, self.reused = {}, {}, 0

    def __call__(self, dit, latents, timestep, context, sliding_window_size=None, **kwargs):
        size = sliding_window_size or latents.shape[1]
        parts = latents.split(size, dim=1)
        return torch.cat([self.part(dit, n, part, timestep, context) for n, part in enumerate(parts)], dim=1)

    def part(self, dit, number, x, timestep, context):
        key = (number, *context.tolist())
        step = self.steps[self.asked.setdefault(key, 0)]
        self.asked[key] += 1
        time = (timestep / 1000).float()
        x = dit.blocks[0](x, context, time)
        if step < self.start or (step - self.start) % self.interval == 0 or key not in self.residuals:
            before = x
            for block in dit.blocks[1:4]:
                x = block(x, context, time)
            self.residuals[key] = x - before
        else:
            x, self.reused = x + self.residuals[key], self.reused + 1
        return dit.blocks[4](x, context, time)


def cached(pipe, config=CONFIG, **given):
    with diffsynth_steps(pipe), dit_cache(pipe, config) as cache:
        return pipe(**given), cache


def test_each_call_of_a_step_has_a_residual_of_its_own():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand})
    got, cache = cached(pipe)
    assert torch.equal(got, expected)
    assert hand.reused == cache.stats.reused_calls == 8
    assert not torch.equal(got, pipe())


@pytest.mark.parametrize("counts", [False, True])
def test_experts_go_on_with_the_number_of_the_step(counts):
    pipe = Pipeline(experts=2, counts=counts)
    hands = {"dit": ByHand(range(5)), "dit2": ByHand(range(5, STEPS))}
    expected = pipe(calls=hands)
    got, cache = cached(pipe)
    assert torch.equal(got, expected)
    assert hands["dit"].reused + hands["dit2"].reused == cache.stats.reused_calls == 6
    assert {each.range for each in cache.ranges} == {"dit.blocks", "dit2.blocks"}


def test_windows_are_told_apart_by_their_order():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand}, sliding_window_size=2)
    got, cache = cached(pipe, sliding_window_size=2)
    assert torch.equal(got, expected)
    assert hand.reused == cache.stats.reused_calls == 24


def test_guidance_on_some_steps_only_keeps_the_branches_apart():
    pipe, hand = Pipeline(), ByHand()
    hand.steps = list(range(STEPS))
    guided = {3, 4, 5, 6}
    other = ByHand(range(3, STEPS))

    def called(**given):
        return (other if "negative_prompt" in given else hand)(**given)

    expected = pipe(calls={"dit": called}, guided=lambda step: step in guided)
    got, cache = cached(pipe, guided=lambda step: step in guided)
    assert torch.equal(got, expected)
    assert hand.reused + other.reused == cache.stats.reused_calls == 5


def test_timesteps_that_are_one_number_in_half_precision_are_steps_of_their_own():
    pipe, hand = Pipeline(dtype=torch.bfloat16), ByHand(range(400))
    pipe.scheduler.set_timesteps(400)
    assert len(set(pipe.scheduler.timesteps.bfloat16().tolist())) < 400
    expected = pipe(steps=400, cfg_scale=1.0, calls={"dit": hand})
    got, cache = cached(pipe, steps=400, cfg_scale=1.0)
    assert torch.equal(got, expected)
    assert hand.reused == cache.stats.reused_calls == 199


def test_a_scope_has_step_branch_noise_level_and_number_of_steps():
    pipe, seen = Pipeline(), []

    def look(dit, latents, timestep, context, **kwargs):
        seen.append(current_context()[1])
        return model_fn(dit, latents, timestep, context)

    pipe.model_fn = look
    with diffsynth_steps(pipe):
        pipe(steps=3)
        pipe(steps=2, cfg_scale=1.0)
    assert [each.step for each in seen] == [0, 0, 1, 1, 2, 2, 0, 1]
    assert [each.branch for each in seen] == ["positive", "negative"] * 3 + ["positive"] * 2
    assert [each.steps for each in seen] == [3] * 6 + [2] * 2
    assert [each.sigma for each in seen][::2][:3] == torch.linspace(1, 0.2, 3).tolist()
    assert len({id(each.loop) for each in seen}) == 2
    assert current_context()[1] is None


def test_a_run_that_was_broken_off_is_not_gone_on_with():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand})

    def breaks(step):
        if step == 0:
            raise KeyboardInterrupt
        return True

    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG):
        with pytest.raises(KeyboardInterrupt):
            pipe(guided=breaks)
        assert torch.equal(pipe(), expected)


def test_what_an_exception_leaves_behind_is_dropped():
    pipe, calls = Pipeline(), []

    def failing(**given):
        calls.append(given)
        output = model_fn(**given)
        if len(calls) == 7:
            raise RuntimeError("out of memory, say")
        return output

    hand = ByHand()
    expected = pipe(calls={"dit": hand})
    pipe.model_fn = failing
    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG) as cache:
        with pytest.raises(RuntimeError, match="out of memory, say"):
            pipe()
        assert current_context()[1] is None
        assert torch.equal(pipe(), expected)
    assert cache.stats.bytes_held == 0


def test_residuals_are_freed_with_the_last_call_of_a_run():
    pipe = Pipeline(experts=2)
    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG) as cache:
        pipe()
        assert cache.stats.bytes_held == 0
        assert cache.stats.reused_calls > 0


def test_a_request_of_the_user_holds():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand})
    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG) as cache, cache.request():
        assert torch.equal(pipe(), expected)


def test_threads_have_runs_of_their_own():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand})
    pipe.scheduler.set_timesteps = lambda count: None  # one schedule for both: the loop of each is its own
    got, turns = {}, threading.Barrier(2, timeout=20)

    def guided(step):
        turns.wait()
        return True

    def draw(number):
        got[number] = pipe(guided=guided)

    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG):
        threads = [threading.Thread(target=draw, args=(number,)) for number in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], expected)


def test_compiled_blocks_are_cached_where_the_function_stands_for_the_transformers_call():
    pipe, hand = Pipeline(), ByHand()
    expected = pipe(calls={"dit": hand})
    torch._dynamo.reset()
    for block in pipe.dit.blocks:
        block.compile(backend="eager")
    with diffsynth_steps(pipe), dit_cache(pipe, CONFIG, method="model_fn") as cache:
        assert torch.equal(pipe(), expected)
    assert (cache.stats.reused_calls, cache.stats.bytes_held) == (8, 0)
    assert pipe.model_fn is model_fn


def test_the_attribute_is_the_same_object_again():
    pipe = Pipeline()
    before = dict(vars(pipe))
    with diffsynth_steps(pipe):
        assert pipe.model_fn is not model_fn
        assert inspect.signature(pipe.model_fn) == inspect.signature(model_fn)
        with diffsynth_steps(pipe):
            pipe(steps=2)
        pipe(steps=2)
    assert vars(pipe) == before
    assert pipe.model_fn is model_fn


def test_what_others_have_put_around_it_stays_and_runs_plainly():
    pipe, seen = Pipeline(), []
    with diffsynth_steps(pipe):
        inner = pipe.model_fn

        def around(**given):
            output = inner(**given)
            seen.append(current_context()[1])
            return output

        pipe.model_fn = around
    plain = pipe(steps=3)
    assert pipe.model_fn is around
    assert seen == [None] * 6
    pipe.model_fn = model_fn
    assert torch.equal(plain, pipe(steps=3))


def test_copies_have_the_plain_function():
    pipe = Pipeline()
    with diffsynth_steps(pipe):
        assert copy.deepcopy(pipe).model_fn is model_fn
        assert pickle.loads(pickle.dumps(pipe)).model_fn is model_fn


def test_forecasts_count_in_the_noise_level():
    """From steps 1 and 2 to 3: linear in σ, which falls by as much each time, is 2·Δ₂ − Δ₁; here σ falls unevenly."""
    pipe = Pipeline()
    levels = torch.tensor([1.0, 0.9, 0.6, 0.1])

    def set_timesteps(count):
        pipe.scheduler.sigmas, pipe.scheduler.timesteps = levels.clone(), 1000 * levels

    pipe.scheduler.set_timesteps = set_timesteps
    kept = []

    def by_hand(dit, latents, timestep, context, **kwargs):
        time = timestep / 1000
        x = dit.blocks[0](latents, context, time)
        if len(kept) < 3:
            before = x
            for block in dit.blocks[1:4]:
                x = block(x, context, time)
            kept.append(x - before)
        else:
            slope = (kept[2] - kept[1]) / (0.6 - 0.9)
            x = x + kept[2] + slope * (0.1 - 0.6)
        return dit.blocks[4](x, context, time)

    expected = pipe(cfg_scale=1.0, calls={"dit": by_hand})
    config = DitCacheConfig(2, 2, cache_block_start=1, cache_num_blocks=3, predictor=Linear())
    got, _ = cached(pipe, config, cfg_scale=1.0)
    assert torch.allclose(got, expected, atol=1e-5)
    assert not torch.allclose(got, cached(pipe, cfg_scale=1.0)[0], atol=1e-4)


def test_a_search_finds_a_plan_of_residuals():
    """Nobody sees what a transformer returns that is not called: no output is forecast, and no weights are fitted."""
    pipe = Pipeline()

    def run(pipe):
        with diffsynth_steps(pipe):
            return [pipe()]

    recording = record(pipe, run)
    assert recording.solver is None
    assert recording.unsolved == "a loop runs the blocks without their transformer's call, whose output nobody sees"
    found = dithooks.search(pipe, run, 1.4, cost="blocks", verbose=False, max_evals=1)
    assert [(each.path, each.payload) for each in found.plan.pieces] == [("dit", "residual")]
    with diffsynth_steps(pipe), dit_cache(pipe, found.plan) as cache:
        pipe()
    assert cache.stats.blocks_total / cache.stats.blocks_run >= 1.4


def test_teacache_and_this_cache_exclude_each_other():
    pipe = Pipeline()
    with diffsynth_steps(pipe), pytest.raises(InvalidSetting, match="tea_cache_l1_thresh: TeaCache would leave out"):
        pipe(tea_cache=object())
    assert current_context()[1] is None


@pytest.mark.parametrize("target", [nn.Linear(2, 2), SimpleNamespace(model_fn=print, scheduler=None), None])
def test_what_is_no_pipeline_of_diffsynth_is_refused(target):
    message = "has no model_fn or no scheduler: give a pipeline of DiffSynth-Studio"
    with pytest.raises(WrongType, match=message), diffsynth_steps(target):
        pass
