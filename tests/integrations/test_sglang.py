"""The hooks of SGLang's denoising stage, on a stage and a forward context of the same form."""

import logging
import operator
import sys
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace

import pytest
import torch
from integrations.tiny_wan import FAST, HIGH, OFF, STEPS, TIMES, ByHand, Transformer, tiers

from dithooks.errors import InvalidSetting
from dithooks.integrations.serving.served_plans import ServedPlans
from dithooks.integrations.sglang import register
from dithooks.integrations.sglang.stage_hooks import STAGE, StageHooks

CONTEXT = "sglang.multimodal_gen.runtime.managers.forward_context"
PLUGINS = "sglang.multimodal_gen.runtime.platforms.plugins"


class Stage:
    """A denoising loop with guidance by two calls, as SGLang's: what is hooked is what it calls on itself."""

    def __init__(self, context, transformer, transformer_2=None, switch=None, fails_at=None):
        self.context, self.transformer, self.transformer_2 = context, transformer, transformer_2
        self.switch, self.fails_at, self.their_cache = switch, fails_at, []
        self.server_args = SimpleNamespace(enable_breakable_cuda_graph=False, enable_torch_compile=False)
        self._cache_dit_enabled = False

    def _maybe_enable_cache_dit(self, num_inference_steps, batch):
        self.their_cache.append(num_inference_steps)

    def _unmount_cache_dit(self):
        self._cache_dit_enabled = False

    def _predict_noise(self, current_model, latent_model_input, timestep, target_dtype=None, prompt=None):
        return current_model(latent_model_input, timestep, prompt)

    @torch.no_grad()
    def _denoise(self, batch, server_args):
        steps = STEPS if self.transformer_2 is None else (self.switch, STEPS - self.switch)
        self._maybe_enable_cache_dit(steps, batch)
        x = batch.latents
        for step, t in enumerate(batch.timesteps):
            model = self.transformer if self.switch is None or step < self.switch else self.transformer_2
            outs = []
            for is_negative, prompt in batch.branches:
                batch.is_cfg_negative = is_negative
                with self.context(step, batch):
                    outs.append(self._predict_noise(model, x, t, prompt=prompt))
            x = x - sum(outs) / STEPS
            if step == self.fails_at:
                raise RuntimeError("as told")
        return x


class Batch:
    def __init__(self, seed=1, branches=2, **asked):
        noise = torch.Generator().manual_seed(seed)
        self.latents, self.timesteps, self.request_id = torch.randn(1, 6, 4, generator=noise), TIMES, f"request-{seed}"
        prompts = torch.randn(branches, 1, 4, generator=noise)
        self.branches = [(number > 0, prompt) for number, prompt in enumerate(prompts)]
        self.is_warmup, self.is_cfg_negative = False, False
        self.sampling_params = SimpleNamespace(**{"enable_cache_dit": None, "cache_dit_params": None, **asked})


@pytest.fixture
def context(monkeypatch):
    module, here = ModuleType(CONTEXT), []
    module.get_forward_context_or_none = lambda: here[-1] if here else None
    monkeypatch.setitem(sys.modules, CONTEXT, module)

    @contextmanager
    def entered(step, batch):
        here.append(SimpleNamespace(current_timestep=step, forward_batch=batch))
        yield
        here.pop()

    return entered


def hooked(hooks):
    """A stage's class with the hooks around its methods, as SGLang applies them."""

    def around(original, hook):
        return lambda *args, **kwargs: hook(original, *args, **kwargs)

    pairs = (("_maybe_enable_cache_dit", hooks.begin), ("_predict_noise", hooks.predict), ("_denoise", hooks.denoise))
    return type("Hooked", (Stage,), {name: around(getattr(Stage, name), hook) for name, hook in pairs})


def by_hand(batch, plan, *models, switch=None):
    """The same loop, with the plan followed by hand."""
    runs = [ByHand(model, plan) for model in models]
    x = batch.latents
    for step, t in enumerate(TIMES):
        run = runs[0 if switch is None or step < switch else 1]
        x = x - sum(run(step, number, x, t, prompt) for number, (_, prompt) in enumerate(batch.branches)) / STEPS
    return x


ASKED = [
    ({}, FAST),
    ({"cache_dit_params": {"dithooks": "high"}}, HIGH),
    ({"cache_dit_params": {"dithooks": True}}, FAST),
    ({"cache_dit_params": {"dithooks": False}}, OFF),
    ({"enable_cache_dit": False}, OFF),
]


@torch.no_grad()
@pytest.mark.parametrize("branches", [1, 2, 3])
def test_each_request_is_drawn_by_what_it_asks_for(context, branches):
    model = Transformer()
    stage, blocks = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, model), list(model.blocks)
    for seed, (asked, plan) in enumerate([*ASKED, *reversed(ASKED)]):
        batch = Batch(seed, branches, **asked)
        drawn = stage._denoise(batch, None)
        if plan is OFF:
            assert all(map(operator.is_, model.blocks, blocks))
            assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
        else:
            assert not all(map(operator.is_, model.blocks, blocks))
        wanted = by_hand(batch, plan, Transformer())
        assert torch.allclose(drawn, wanted, atol=1e-6), (seed, asked)
    assert not stage.their_cache


@torch.no_grad()
def test_two_experts_each_have_their_part_of_the_plan(context):
    names, both = ("transformer", "transformer_2"), ((1, 1, 0) * 2, (None, None, (1.5, -0.5), None, None, (0.75, 0.25)))
    stage = hooked(StageHooks(ServedPlans(tiers(names, both), "fast")))(
        context, Transformer(1), Transformer(2), switch=3
    )
    wanted = by_hand(Batch(), both, Transformer(1), Transformer(2), switch=3)
    assert torch.allclose(stage._denoise(Batch(), None), wanted, atol=1e-6)


@torch.no_grad()
def test_a_request_that_fails_leaves_nothing_to_the_next(context):
    model = Transformer()
    stage = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, model)
    for fails_at in range(STEPS):
        stage.fails_at = fails_at
        with pytest.raises(RuntimeError, match="as told"):
            stage._denoise(Batch(7), None)
        stage.fails_at = None
        assert torch.allclose(stage._denoise(Batch(8), None), by_hand(Batch(8), FAST, Transformer()), atol=1e-6)


@torch.no_grad()
def test_what_a_request_came_to_is_logged_and_freed(context, caplog):
    hooks = StageHooks(ServedPlans(tiers(), "fast"))
    stage = hooked(hooks)(context, Transformer())
    with caplog.at_level(logging.INFO, "dithooks.sglang"):
        stage._denoise(Batch(3), None)
    assert "request request-3: 6 of 12 calls reused, 1.43× fewer blocks" in caplog.text


def test_a_tier_that_there_is_not_fails_its_request_only(context):
    stage = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, Transformer())
    with pytest.raises(InvalidSetting, match="no tier 'slow'"):
        stage._denoise(Batch(cache_dit_params={"dithooks": "slow"}), None)
    assert torch.allclose(stage._denoise(Batch(), None), by_hand(Batch(), FAST, Transformer()), atol=1e-6)


def test_another_model_is_drawn_without_a_cache_unless_it_was_asked_for(context, caplog):
    model = Transformer()
    model.blocks.append(type(model.blocks[0])(4, 4))
    stage = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, model)
    with torch.no_grad():
        stage._denoise(Batch(), None)
    assert "is drawn without a cache: the plan was made for another model" in caplog.text
    with pytest.raises(InvalidSetting, match="another model"):
        stage._denoise(Batch(cache_dit_params={"dithooks": "fast"}), None)


def test_a_request_for_their_cache_has_it_and_the_next_one_ours(context):
    model = Transformer()
    stage = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, model)
    stage._denoise(Batch(), None)
    stage._denoise(Batch(enable_cache_dit=True), None)
    stage._cache_dit_enabled = True
    assert stage.their_cache == [STEPS]
    assert type(model.blocks[2]) is type(Transformer().blocks[2])
    stage._denoise(Batch(), None)
    assert not stage._cache_dit_enabled
    assert stage.their_cache == [STEPS]


@pytest.mark.parametrize("reason", ["warm-up", "graphs"])
def test_warm_up_and_whole_graphs_are_not_cached(context, reason):
    model, batch = Transformer(), Batch()
    stage, blocks = hooked(StageHooks(ServedPlans(tiers(), "fast")))(context, model), list(model.blocks)
    batch.is_warmup = reason == "warm-up"
    stage.server_args.enable_breakable_cuda_graph = reason == "graphs"
    stage._denoise(batch, None)
    assert all(map(operator.is_, model.blocks, blocks))


def test_the_plugin_registers_its_hooks_only_where_a_plan_is_named(monkeypatch, tmp_path):
    module, registered = ModuleType(PLUGINS), {}
    module.HookType = SimpleNamespace(AROUND="around")
    module.HookRegistry = SimpleNamespace(register=lambda target, hook, kind: registered.update({target: (hook, kind)}))
    monkeypatch.setitem(sys.modules, PLUGINS, module)
    monkeypatch.delenv("DITHOOKS_PLAN", raising=False)
    register()
    assert not registered
    tiers().save(tmp_path / "plans.json")
    monkeypatch.setenv("DITHOOKS_PLAN", str(tmp_path / "plans.json"))
    register()
    names = ("_maybe_enable_cache_dit", "_predict_noise", "_denoise")
    assert {name: kind for name, (_, kind) in registered.items()} == {f"{STAGE}.{name}": "around" for name in names}
