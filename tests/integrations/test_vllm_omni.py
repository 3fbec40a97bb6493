"""The runner's parts, mixed into a runner of the form of vLLM-Omni's."""

import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from integrations.tiny_wan import FAST, HIGH, OFF, STEPS, TIMES, ByHand, Transformer, tiers
from toys import Net, Pipe

from dithooks import DitCacheConfig, Mask, dit_cache
from dithooks.integrations import vllm_omni
from dithooks.integrations.vllm_omni import runner_parts

BASE = "vllm_omni.diffusion.cache.base"
PLANS = {None: FAST, "fast": FAST, "high": HIGH, False: OFF, "slow": OFF}


class State:
    def __init__(self, name, asked):
        noise = torch.Generator().manual_seed(sum(map(ord, name)))
        self.request_id, self.step_index, self.chunk_num_steps, self.scheduler = name, 0, None, None
        self.latents, self.prompts = torch.randn(1, 6, 4, generator=noise), torch.randn(2, 1, 4, generator=noise)
        self.sampling = SimpleNamespace(extra_args={} if asked is None else {"dithooks": asked})
        self.total_steps = STEPS


class Runner:
    """Loads nothing, and steps the requests of a wave as one batch."""

    def __init__(self, model, stepwise):
        self.pipeline, self.cache_backend, self.state_cache = SimpleNamespace(transformer=model), None, {}
        self.od_config, self.fails = SimpleNamespace(cache_config=None, step_execution=stepwise), None

    def load_model(self):
        pass

    def _prepare_batch_inputs(self, states, new):
        return states, torch.cat([each.latents for each in states]), []

    def _cleanup_finished_step_requests(self, wave):
        for name in wave:
            self.state_cache.pop(name, None)

    def _execute_stepwise_core(self, states):
        self.state_cache.update({each.request_id: each for each in states})
        states, x, _ = self._prepare_batch_inputs(states, [])
        t = torch.stack([TIMES[each.step_index] for each in states])
        outs = [self.pipeline.transformer(x, t, torch.cat([each.prompts[n] for each in states])) for n in (0, 1)]
        for each, out in zip(states, sum(outs).split(1), strict=True):
            each.latents, each.step_index = each.latents - out / STEPS, each.step_index + 1
            if each.step_index == STEPS or each.request_id == self.fails:
                self.state_cache.pop(each.request_id)

    def _execute_request_list(self, requests):
        self._refresh_cache_for_requests(requests, od_config=self.od_config)
        x = requests[0].state.latents
        for step, t in enumerate(TIMES):
            x = x - sum(self.pipeline.transformer(x, t, p) for p in requests[0].state.prompts) / STEPS
            if requests[0].request_id == self.fails and step == 3:
                raise RuntimeError("as told")
        return x


class Backend:
    def __init__(self, config):
        self.config, self.enabled = config, False


@pytest.fixture
def runner(monkeypatch, tmp_path):
    module = ModuleType(BASE)
    module.CacheBackend = Backend
    monkeypatch.setitem(sys.modules, BASE, module)
    vllm_omni.__getattr__.cache_clear()
    tiers().save(tmp_path / "plans.json")
    monkeypatch.setenv("DITHOOKS_PLAN", str(tmp_path / "plans.json"))
    monkeypatch.setenv("DITHOOKS_TIER", "fast")

    def make(stepwise):
        made = type("Cached", (vllm_omni.RunnerParts, Runner), {})(Transformer(), stepwise)
        made.load_model()
        return made

    yield make
    vllm_omni.__getattr__.cache_clear()


def request(name, asked):
    state = State(name, asked)
    parameters = SimpleNamespace(extra_args=state.sampling.extra_args, num_inference_steps=STEPS)
    return SimpleNamespace(request_id=name, sampling_params=parameters, state=state)


def by_hand(name, asked):
    run, state = ByHand(Transformer(), PLANS[asked]), State(name, asked)
    x = state.latents
    for step, t in enumerate(TIMES):
        x = x - sum(run(step, number, x, t, prompt) for number, prompt in enumerate(state.prompts)) / STEPS
    return x


@torch.no_grad()
def test_whole_requests_are_drawn_by_what_each_asks_for(runner):
    one = runner(stepwise=False)
    for number, asked in enumerate([None, "high", False, "fast", "slow", None]):
        name = f"request-{number}"
        drawn = one._execute_request_list([request(name, asked)])
        assert torch.allclose(drawn, by_hand(name, asked), atol=1e-6), asked


@torch.no_grad()
def test_a_request_that_fails_leaves_nothing_to_the_next(runner):
    one = runner(stepwise=False)
    one.fails = "bad"
    with pytest.raises(RuntimeError, match="as told"):
        one._execute_request_list([request("bad", None)])
    assert one._dithooks.handle.stats.bytes_held == 0
    assert torch.allclose(one._execute_request_list([request("good", None)]), by_hand("good", None), atol=1e-6)


@torch.no_grad()
def test_rows_of_a_batch_are_computed_or_reused_by_their_own_plans(runner):
    one, asked = runner(stepwise=True), {"a": None, "b": "high", "c": False, "d": "slow", "e": None}
    states, starts = {name: State(name, each) for name, each in asked.items()}, {"a": 0, "b": 1, "c": 1, "d": 2, "e": 2}
    one.fails = "e"
    for tick in range(STEPS + 3):
        wave = [s for n, s in states.items() if starts[n] <= tick and s.step_index < STEPS and (n != "e" or tick == 2)]
        if wave:
            one._execute_stepwise_core(wave)
    for name in "abcd":
        assert torch.allclose(states[name].latents, by_hand(name, asked[name]), atol=1e-5), name
    stats = one._dithooks.handle.stats
    assert stats.reused_calls == 2 * sum(1 - bit for name in "ab" for bit in PLANS[asked[name]][0])
    assert stats.bytes_held == 0
    assert not one._dithooks.handle._requests


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:no call of")
def test_a_request_that_is_not_cached_leaves_out_no_range(runner):
    """Of several, the further ones have policies of their own."""
    further = {"cache_block_start": 2, "policy": Mask((1, 0, 0))}
    given = {"cache_num_blocks": 1, "more_ranges": (further,)}
    for config in (
        DitCacheConfig(1, 3, **given),
        DitCacheConfig(1, 3, overrides={"transformer": given}),
    ):
        pipe = Pipe(Net())
        with dit_cache(pipe, config) as cache:
            assert len(cache.ranges) == 2
            request = cache.request(steps=3, plan=runner_parts.uncached(cache.config))
            assert cache.forecast(request) == (1.0, 1.0, 1.0)


def test_a_request_that_is_cancelled_is_freed(runner):
    one, state = runner(stepwise=True), State("a", None)
    for _ in range(2):
        one._execute_stepwise_core([state])
    assert one._dithooks.handle.stats.bytes_held > 0
    one._cleanup_finished_step_requests({"a"})
    assert one._dithooks.handle.stats.bytes_held == 0


def test_without_a_plan_the_runner_is_as_it_was(runner, monkeypatch):
    monkeypatch.delenv("DITHOOKS_PLAN")
    one = runner(stepwise=False)
    assert one._dithooks is one.cache_backend is None
    assert type(one.pipeline.transformer.blocks[1]) is type(Transformer().blocks[1])


def test_compiled_blocks_are_not_cached_in_step_mode(runner, caplog):
    one = type("Cached", (vllm_omni.RunnerParts, Runner), {})(Transformer(), True)
    one.pipeline.transformer.blocks[0].compile(backend="eager")
    one.load_model()
    assert one._dithooks is None
    assert "enforce_eager=True" in caplog.text
