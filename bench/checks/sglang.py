"""Check the hooks of SGLang's denoising stage on SGLang itself: ``python -m bench.checks.sglang --out bench/results``.

The real plugin loader, stage, scheduler and tiny models of its own classes, on a CPU. Exit codes: 0 all rows hold, or
SGLang cannot be installed here; 1 one does not, or an import breaks.
"""

from __future__ import annotations

import dataclasses
import operator
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import torch
from torch import Tensor, nn

from bench.checks import engines
from bench.checks.engines import FAST, HIGH, STEPS, by_hand, row

ABOUT = (
    "SGLang's own plugin loader, denoising stage, UniPC scheduler and tiny `WanTransformer3DModel` (6 blocks, of which "
    "4 are cached; guidance by two calls), on a CPU with the stand-ins of `bench/checks/sglang_on_cpu.py`; the manager "
    "that moves weights is a dummy. Oracle: the same stage without a cache, the plan followed by hand in the place of "
    "the cached blocks. Off: relative L2 of the latents at the end."
)
PINNED = ("sglang==0.5.23", "cache-dit==1.5.3")
SMALL = (
    *("addict", "apache-tvm-ffi", "compressed-tensors", "dill", "einops", "gguf", "loguru", "msgspec", "openai"),
    *("orjson", "partial-json-parser", "pybase64", "sentencepiece", "torchvision", "triton"),
)
EXACT = 1e-6  # relative L2
OFF: dict[str, Any] = {"cache_dit_params": {"dithooks": False}}
EXPERTS = ("transformer", "transformer_2")
BOTH = {  # for each expert two computed steps of its own, then two reused ones
    "both": (1.3, ((1, 1, 0, 0) * 2, (None, None, (1.5, -0.5), (1.25, -0.25), None, None, (0.75, 0.25), (1.0,))))
}


def check() -> list[dict[str, Any]]:
    """The rows of the table."""
    from bench.checks.sglang_on_cpu import stand_in

    kept = stand_in()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "plans.json"
        os.environ |= {"DITHOOKS_PLAN": str(file), "DITHOOKS_TIER": "fast"}
        os.environ |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "0",
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        engines.plans("WanTransformer3DModel", 6).save(file)
        rows = list(_rows(_Server()))
    del kept
    return rows


class _Server:
    """SGLang, as far as a stage needs it, with its plugins loaded."""

    def __init__(self) -> None:
        from sglang.multimodal_gen.runtime.platforms import initialize_current_platform

        initialize_current_platform()
        from sglang.multimodal_gen.configs.models.dits.wanvideo import WanVideoArchConfig, WanVideoConfig
        from sglang.multimodal_gen.configs.pipeline_configs.wan import WanT2V480PConfig
        from sglang.multimodal_gen.runtime import server_args
        from sglang.multimodal_gen.runtime.distributed import parallel_state
        from sglang.multimodal_gen.runtime.platforms import plugins

        plugins.load_plugins()
        plugins.apply_plugin_hooks()
        self.patched = set(plugins.HookRegistry._patched)
        arch = WanVideoArchConfig(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=12,
            freq_dim=16,
            ffn_dim=48,
            num_layers=6,
        )
        self.dit = WanVideoConfig(arch_config=arch)
        pipeline = WanT2V480PConfig(dit_config=self.dit)
        pipeline.dit_precision = "fp32"
        defaults: dict[str, Any] = {}
        for each in dataclasses.fields(server_args.ServerArgs):
            made = each.default_factory
            plain = None if each.default is dataclasses.MISSING else each.default
            defaults[each.name] = plain if made is dataclasses.MISSING else made()
        own = {"kv_gather_degree": 1, "pipeline_config": pipeline, "disable_autocast": True, "num_gpus": 1}
        self.args = SimpleNamespace(**{**defaults, **own})
        server_args.set_global_server_args(self.args)
        with tempfile.NamedTemporaryFile() as store:
            parallel_state.maybe_init_distributed_environment_and_model_parallel(
                tp_size=1, sp_size=1, distributed_init_method=f"file://{store.name}_ranks"
            )

    def model(self, seed: int) -> nn.Module:
        """A tiny Wan."""
        from sglang.multimodal_gen.runtime.models.dits.wanvideo import WanTransformer3DModel

        torch.manual_seed(seed)
        model: nn.Module = WanTransformer3DModel(self.dit, hf_config={}).eval()
        for each in model.parameters():
            nn.init.normal_(each, std=0.2)
        return model

    def stage(self, model: nn.Module, second: nn.Module | None = None) -> Any:
        """A denoising stage."""
        from sglang.multimodal_gen.runtime.pipelines_core.stages.denoising import DenoisingStage

        stage = DenoisingStage(model, None, transformer_2=second)
        stage.set_component_residency_manager(MagicMock())
        return stage

    def scheduler(self, steps: int) -> Any:
        """A scheduler at the beginning of a run."""
        from sglang.multimodal_gen.runtime.models.schedulers import scheduling_flow_unipc_multistep as module

        scheduler = module.FlowUniPCMultistepScheduler(shift=3.0)
        scheduler.set_timesteps(steps, device="cpu")
        return scheduler

    def draw(self, stage: Any, seed: int, fails: bool = False, steps: int = STEPS, **asked: Any) -> Tensor:
        """The latents of a request, drawn as its worker draws them."""
        from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
        from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req

        scheduler = self.scheduler(steps)
        if fails:
            scheduler.step = MagicMock(side_effect=[*[(torch.zeros(1, 4, 3, 4, 4),)] * 3, RuntimeError("as told")])
        noise = torch.Generator().manual_seed(seed)
        batch = Req(
            sampling_params=SamplingParams(
                **{"guidance_scale": 3.0, **asked}, num_inference_steps=steps, height=32, width=32, num_frames=9
            ),
            request_id=f"request-{seed}",
            latents=torch.randn(1, 4, 3, 4, 4, generator=noise),
            prompt_embeds=[torch.randn(1, 8, 12, generator=noise)],
            negative_prompt_embeds=[torch.randn(1, 8, 12, generator=noise)],
            timesteps=scheduler.timesteps,
            scheduler=scheduler,
            do_classifier_free_guidance=asked.get("guidance_scale") != 1.0,
            raw_latent_shape=(1, 4, 3, 4, 4),
        )
        return stage.forward(batch, self.args).latents


def _place() -> tuple[int, bool]:
    from sglang.multimodal_gen.runtime.managers.forward_context import get_forward_context

    here = get_forward_context()
    return int(here.current_timestep), bool(here.forward_batch.is_cfg_negative)


@contextmanager
def _oracle(*models: nn.Module, plan: Any) -> Iterator[None]:
    back = [by_hand(model, "blocks", plan, _place) for model in models]
    yield
    for each in back:
        each()


def _rows(server: _Server) -> Iterator[dict[str, Any]]:
    hooked = sorted(name.rpartition(".")[2] for name in server.patched)
    what = "entry point `sglang.multimodal_gen.plugins`, `load_plugins`, `apply_plugin_hooks`"
    yield row(what, ", ".join(f"`{name}`" for name in hooked), len(hooked) == 3)
    model = server.model(0)
    stage, before = server.stage(model), list(model.blocks)
    kinds = (
        ("a request that asks for nothing: the server's tier", {}, FAST),
        ('`cache_dit_params={"dithooks": "high"}`', {"cache_dit_params": {"dithooks": "high"}}, HIGH),
        ("one without guidance", {"guidance_scale": 1.0}, FAST),
        ('`{"dithooks": "fast"}`, after a request of the other tier', {"cache_dit_params": {"dithooks": "fast"}}, FAST),
    )
    for seed, (what, asked, plan) in enumerate(kinds):
        plain = server.draw(stage, seed, **{**asked, **OFF})
        with _oracle(model, plan=plan):
            wanted = server.draw(stage, seed, **{**asked, **OFF})
        counted = _Count(model)
        error, moved = _off(server.draw(stage, seed, **asked), wanted), _off(server.draw(stage, seed, **asked), plain)
        calls = 1 if "guidance_scale" in asked else 2
        due = 2 * calls * (STEPS * 2 + sum(plan[0]) * 4)
        figure = f"{error:.1e} off; {moved:.2f} from a run without; {counted.stop()} block calls, {due} by the plan"
        yield row(what, figure, error < EXACT < moved and counted.count == due + 2)
    server.draw(stage, 9)
    plain = server.draw(stage, 9, **OFF)
    same = all(map(operator.is_, model.blocks, before)) and model._plain_blocks()
    bare = not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())
    yield row('`{"dithooks": false}`: blocks and hooks', "as before the first request", same and bare)
    server.draw(stage, 9)
    gone = server.draw(stage, 9, enable_cache_dit=False)
    yield row("`enable_cache_dit=False`", "no cache", bool((gone == plain).all()) and model._plain_blocks())
    yield _failing(server, stage, model)
    yield _unknown(server, stage)
    yield _experts(server)
    yield _text(server, stage, model)


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


class _Count:
    """The calls of a model's own blocks, also where a stand-in makes them."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        self._hooks = [each.norm1.register_forward_hook(self._add) for each in model.blocks]

    def _add(self, *_: Any) -> None:
        self.count += 1

    def stop(self) -> int:
        """Take the hooks off; return the number of calls."""
        for hook in self._hooks:
            hook.remove()
        return self.count


def _failing(server: _Server, stage: Any, model: nn.Module) -> dict[str, Any]:
    """A request that fails in the middle leaves nothing to the next."""
    with _oracle(model, plan=FAST):
        wanted = server.draw(stage, 20, **OFF)
    server.draw(stage, 21)
    failed = ""
    try:
        server.draw(stage, 21, fails=True)
    except RuntimeError as error:
        failed = str(error)
    error = _off(server.draw(stage, 20), wanted)
    what = "a request whose scheduler fails at its fourth step, and the one after it"
    return row(what, f"{error:.1e} off", failed == "as told" and error < EXACT)


def _unknown(server: _Server, stage: Any) -> dict[str, Any]:
    told = ""
    try:
        server.draw(stage, 0, cache_dit_params={"dithooks": "fastest"})
    except ValueError as error:
        told = str(error).partition(":")[0]
    return row("a tier that there is not", told, told == "there is no tier 'fastest'")


def _experts(server: _Server) -> dict[str, Any]:
    """Two experts, as in Wan 2.2, that take turns after half of the steps."""
    from sglang.multimodal_gen.runtime.platforms import plugins

    from dithooks.integrations.serving.served_plans import ServedPlans
    from dithooks.integrations.sglang.stage_hooks import STAGE

    own = plugins.HookRegistry._hooks[f"{STAGE}._denoise"][0][1].__self__
    former, own._plans = own._plans, ServedPlans(engines.plans("WanTransformer3DModel", 6, EXPERTS, BOTH), "both")
    arch = server.args.pipeline_config.dit_config.arch_config
    timesteps = server.scheduler(STEPS).timesteps
    arch.boundary_ratio = float(timesteps[3] + timesteps[4]) / 2000
    try:
        models = server.model(3), server.model(4)
        stage, given = server.stage(*models), {"guidance_scale_2": 3.0}
        plain = server.draw(stage, 30, **given, **OFF)
        with _oracle(*models, plan=BOTH["both"][1]):
            wanted = server.draw(stage, 30, **given, **OFF)
        drawn = server.draw(stage, 30, **given)
    finally:
        own._plans, arch.boundary_ratio = former, None
    error, moved = _off(drawn, wanted), _off(drawn, plain)
    what = "two experts that take turns after four steps, as in Wan 2.2"
    return row(what, f"{error:.1e} off; {moved:.2f} from a run without", error < EXACT < moved)


def _text(server: _Server, stage: Any, model: nn.Module) -> dict[str, Any]:
    """What SGLang saves by keeping the prompt's keys and values, and a cache switches off."""
    counts = []
    for asked in (OFF, {}):
        server.draw(stage, 40, **asked)
        calls: list[object] = []
        add = partial(lambda calls, *_: calls.append(None), calls)
        hooks = [each.attn2.to_k.register_forward_hook(add) for each in model.blocks]
        server.draw(stage, 41, **asked)
        for hook in hooks:
            hook.remove()
        counts.append(len(calls))
    what = "how often a block's keys are made of the prompt, in a run of 8 steps with guidance"
    return row(what, f"{counts[0]} times without a cache, {counts[1]} times with it", counts[0] < counts[1])


if __name__ == "__main__":
    sys.exit(engines.main("sglang", ABOUT, PINNED, SMALL, check))
