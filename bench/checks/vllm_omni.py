"""Check the runner on vLLM-Omni itself: ``python -m bench.checks.vllm_omni --out bench/results``.

Its real runner, batches and tiny models of its own classes, on a CPU. Exit codes: 0 all rows hold, or vLLM-Omni cannot
be installed here; 1 one does not, or an import breaks.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from bench.checks import engines
from bench.checks.engines import FAST, HIGH, STEPS, by_hand, row

ABOUT = (
    "vLLM-Omni's own `DiffusionModelRunner` (its loading and its memory book-keeping left out), `InputBatch` and tiny "
    "`QwenImageTransformer2DModel` (6 blocks, of which 4 are cached; guidance by two calls), on a CPU with the "
    "stand-ins of `bench/checks/vllm_omni_on_cpu.py`; the pipeline around them is written for this. Oracle: each "
    "request alone without a cache, the plan followed by hand in the place of the cached blocks. Off: relative L2 "
    "of the latents."
)
PINNED = ("vllm==0.30.0", "vllm-omni==0.30.0", "cache-dit==1.5.3")
SMALL = (
    *("aenum", "apache-tvm-ffi", "cachetools", "cbor2", "compressed-tensors", "einops", "gguf", "llguidance", "loguru"),
    *("msgspec", "omegaconf", "openai", "openai-harmony", "partial-json-parser", "prettytable", "pybase64"),
    *("sentencepiece", "tiktoken", "torchvision", "triton", "xgrammar"),
)
EXACT = 1e-5  # relative L2; kernels round otherwise in batches of another size
PLANS = {None: FAST, "fast": FAST, "high": HIGH, True: FAST, False: ((1,) * STEPS, (None,) * STEPS)}


def check() -> list[dict[str, Any]]:
    """The rows of the table."""
    from bench.checks.vllm_omni_on_cpu import platform, stand_in

    kept = stand_in()
    platform()
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29537", "RANK": "0"}
        os.environ |= {"WORLD_SIZE": "1", "LOCAL_RANK": "0", "DITHOOKS_TIER": "fast"}
        os.environ["DITHOOKS_PLAN"] = str(Path(folder) / "plans.json")
        engines.plans("QwenImageTransformer2DModel", 6).save(os.environ["DITHOOKS_PLAN"])
        rows = list(_rows(folder))
    del kept
    return rows


class _Pipeline(nn.Module):
    """A pipeline of the two modes, with Euler steps."""

    supports_step_execution = True

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer, self.place, self.fails = transformer, (0, 0), ""

    def predicted(self, latents: Tensor, times: Tensor, prompts: list[Tensor]) -> Tensor:
        outs = []
        for number, prompt in enumerate(prompts):
            self.place = (self.place[0], number)
            outs.append(
                self.transformer(
                    hidden_states=latents,
                    timestep=times,
                    encoder_hidden_states=prompt,
                    encoder_hidden_states_mask=torch.ones(prompt.shape[:2], dtype=torch.bool),
                    img_shapes=[[(1, 4, 4)]] * len(latents),
                    txt_seq_lens=[prompt.shape[1]] * len(latents),
                    return_dict=False,
                )[0]
            )
        return outs[1] + 3.0 * (outs[0] - outs[1])

    def prepare_encode(self, state: Any) -> None:
        start = _Start(state.sampling.seed)
        state.latents, state.timesteps = start.latents, start.times
        state.prompt_embeds, state.negative_prompt_embeds = start.prompts
        state.prompt_embeds_mask = state.negative_prompt_embeds_mask = torch.ones(1, 5, dtype=torch.bool)

    def denoise_step(self, batch: Any, *, states: Any) -> Tensor:
        return self.predicted(batch.latents, batch.timesteps, [batch.prompt_embeds, batch.negative_prompt_embeds])

    def step_scheduler(self, state: Any, noise_pred: Tensor) -> None:
        if state.request_id == self.fails and state.step_index == 3:
            raise RuntimeError("as told")
        state.latents = state.latents - noise_pred / STEPS
        state.step_index += 1

    def post_decode(self, state: Any) -> Any:
        from vllm_omni.diffusion.data import DiffusionOutput

        return DiffusionOutput(output=state.latents)

    def forward(self, batch: Any) -> Any:
        from vllm_omni.diffusion.data import DiffusionOutput

        start = _Start(batch.requests[0].sampling_params.seed)
        x = start.latents
        for step, t in enumerate(start.times):
            self.place = (step, 0)
            x = x - self.predicted(x, t[None], list(start.prompts)) / STEPS
        return DiffusionOutput(output=x)


class _Start:
    """What a request starts from."""

    def __init__(self, seed: int) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.latents, self.times = torch.randn(1, 16, 16, generator=noise), torch.linspace(1, 0, STEPS + 1)[:-1]
        self.prompts = torch.randn(2, 1, 5, 24, generator=noise).unbind()


def _rows(folder: str) -> Iterator[dict[str, Any]]:
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm_omni.diffusion.data import OmniDiffusionConfig
    from vllm_omni.diffusion.diffusion_engine import DiffusionEngine
    from vllm_omni.diffusion.distributed import parallel_state
    from vllm_omni.diffusion.models.qwen_image.qwen_image_transformer import QwenImageTransformer2DModel

    from dithooks.integrations import vllm_omni

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/ranks", rank=0, world_size=1)
    parallel_state.init_distributed_environment(
        world_size=1, rank=0, local_rank=0, distributed_init_method="env://", backend="gloo"
    )
    parallel_state.initialize_model_parallel()
    config, own = OmniDiffusionConfig(model="tiny"), f"{vllm_omni.__name__}.CachedEngine"
    engine = DiffusionEngine.resolve_engine_class(SimpleNamespace(engine_backend=own))
    runner = engine.default_diffusion_model_runner_cls
    yield row("`DiffusionEngine.resolve_engine_class` with our path, and the runner it names", f"`{runner}`", True)
    with set_current_vllm_config(VllmConfig()):
        torch.manual_seed(0)
        model = QwenImageTransformer2DModel(
            od_config=config,
            num_layers=6,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            in_channels=16,
            out_channels=4,
            axes_dims_rope=(4, 6, 6),
        ).eval()
    for each in model.parameters():
        nn.init.normal_(each, std=0.1)
    make = _Maker(model, config)
    yield from _whole(make)
    yield from _in_steps(make)


class _Maker:
    """Runners on one model."""

    def __init__(self, model: nn.Module, config: Any) -> None:
        from vllm.config import VllmConfig

        self.model, self.config, self.vllm = model, config, VllmConfig()

    def runner(self, stepwise: bool) -> Any:
        """A runner, loaded."""
        from dithooks.integrations import vllm_omni

        kind = vllm_omni.CachedModelRunner
        base = kind.__mro__[2]
        loaded = type("Loaded", (base,), {"load_model": lambda self: None, "_sample_peak_memory_mb": lambda self: 0.0})
        runner = object.__new__(type("Runner", (vllm_omni.RunnerParts, loaded), {}))
        self.config.step_execution = stepwise
        runner.od_config, runner.vllm_config, runner.device = self.config, self.vllm, torch.device("cpu")
        runner.cache_backend = runner.kv_transfer_manager = runner.input_batch = None
        runner.state_cache, runner.pipeline = {}, _Pipeline(self.model)
        runner.load_model()
        return runner


def _request(name: str, seed: int, asked: object) -> Any:
    from vllm_omni.diffusion.request import OmniDiffusionRequest
    from vllm_omni.inputs.data import OmniDiffusionSamplingParams

    extra = {} if asked is None else {"dithooks": asked}
    parameters = OmniDiffusionSamplingParams(seed=seed, num_inference_steps=STEPS, extra_args=extra)
    return OmniDiffusionRequest(prompt=name, sampling_params=parameters, request_id=name)


def _wanted(make: _Maker, seed: int, asked: object) -> Tensor:
    from vllm_omni.diffusion.forward_context import set_forward_context

    pipeline = _Pipeline(make.model)
    streams = ("encoder_hidden_states", "hidden_states")
    back = by_hand(make.model, "transformer_blocks", PLANS[asked], lambda: pipeline.place, streams)
    batch = SimpleNamespace(requests=[_request("wanted", seed, None)])
    try:
        with torch.inference_mode(), set_forward_context(vllm_config=make.vllm, omni_diffusion_config=make.config):
            return pipeline.forward(batch).output
    finally:
        back()


def _off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def _whole(make: _Maker) -> Iterator[dict[str, Any]]:
    """Whole requests, one by one."""
    from vllm_omni.diffusion.forward_context import set_forward_context

    plain = list(make.model.transformer_blocks)
    runner = make.runner(False)
    for seed, asked in enumerate((None, "high", False, "fast", True, "slowest")):
        request = _request(f"request-{seed}", seed, asked)
        with torch.inference_mode(), set_forward_context(vllm_config=make.vllm, omni_diffusion_config=make.config):
            runner._refresh_cache_for_requests([request], od_config=make.config)
            drawn = runner.pipeline.forward(SimpleNamespace(requests=[request])).output
        runner._dithooks.switch.remove()
        bare = all(a is b for a, b in zip(make.model.transformer_blocks, plain, strict=True))
        plan = False if asked == "slowest" else asked
        error = _off(drawn, _wanted(make, seed, plan))
        what = f"`_refresh_cache_for_requests`, then the run; `extra_args` has `{asked!r}`"
        yield row(what, f"{error:.1e} off", error < EXACT and bare)


def _in_steps(make: _Maker) -> Iterator[dict[str, Any]]:
    """Steps of several requests in one batch, by the runner's own step mode."""
    from vllm_omni.diffusion.sched.interface import CachedRequestData, DiffusionSchedulerOutput, NewRequestData

    runner = make.runner(True)
    asked = {"a": None, "b": "high", "c": False, "d": "fast", "e": True}
    starts = {"a": 0, "b": 1, "c": 1, "d": 3, "e": 4}
    seeds, running, drawn, ended = {name: 50 + n for n, name in enumerate(asked)}, [], {}, set()
    runner.pipeline.fails = "e"
    for tick in range(STEPS + 6):
        new = [name for name in asked if starts[name] == tick]
        if not new and not running:
            continue
        cached = CachedRequestData.make_empty()
        cached.request_ids.extend(running)
        output = DiffusionSchedulerOutput(
            step_id=tick,
            scheduled_new_reqs=[
                NewRequestData(request_id=name, req=_request(name, seeds[name], asked[name])) for name in new
            ],
            scheduled_cached_reqs=cached,
            finished_req_ids=set(ended),
            num_running_reqs=len(running) + len(new),
            num_waiting_reqs=0,
        )
        ended = set()
        for each in runner._execute_stepwise(
            output, validate_kv_metadata=False, record_output_peak_memory=False
        ).runner_outputs:
            if each.finished:
                ended.add(each.request_id)
                drawn[each.request_id] = each.result
        running = [name for name in [*running, *new] if name not in ended]
    handle = runner._dithooks.handle
    stats, known = handle.stats, len(handle._requests)
    runner._dithooks.switch.remove()  # before the oracle runs on the same model
    for name in "abcd":
        error = _off(drawn[name].output, _wanted(make, seeds[name], asked[name]))
        yield row(
            f"`_execute_stepwise`, batches of up to five requests; one that asks for `{asked[name]!r}`",
            f"{error:.1e} off",
            error < EXACT,
        )
    told = str(drawn["e"].error)
    yield row("one that fails at its fourth step, in the same batches", told, "as told" in told)
    due = 2 * (sum(1 - bit for name in "abd" for bit in PLANS[asked[name]][0]) + 2)
    figure = f"{stats.reused_calls} of {stats.calls} rows reused, {due} by the plans; {stats.bytes_held} bytes held"
    yield row("all rows, and what is held at the end", figure, stats.reused_calls == due and not stats.bytes_held)
    yield row("requests that the cache knows at the end", known, not known)


if __name__ == "__main__":
    sys.exit(engines.main("vllm_omni", ABOUT, PINNED, SMALL, check))
