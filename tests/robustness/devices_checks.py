"""What the library does on a device called ``npu``: run as a program, it prints what came out of each check, as JSON.

A program of its own, since renaming PyTorch's private-use backend holds for the process. ``test_devices.py`` runs it,
and says what must come out.
"""

from __future__ import annotations

import gc
import json
import math
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import torch
from devices_fake import Npu, set_up

sys.path.append(str(Path(__file__).parent.parent))
import toys

from dithooks import (
    Budget,
    DitCacheConfig,
    EasyCache,
    Fitted,
    Linear,
    MagnitudeRatio,
    Mask,
    Taylor,
    Threshold,
    dit_cache,
    profile,
    record,
    search,
    timestep_scope,
)
from dithooks.engine.change_metrics import OutputChangeEstimate, RelativeChange
from dithooks.engine.hooks import caches_of
from dithooks.environment.machine import device_name, machine, memory_allocated, synchronize
from dithooks.planning.plan import plan as planned

STEPS = 8
NPU = Npu()
ANCHORS = {Linear: 2, Taylor: 2, Fitted: 2}  # residuals that a forecast is made of; without one it is the last


class Schedule(toys.Counter):
    """A scheduler whose timesteps and noise levels lie where the model does, as diffusers' do."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def set_timesteps(self, steps: int) -> None:
        super().set_timesteps(steps)
        self.timesteps, self.sigmas = self.timesteps.to(self.device), self.sigmas.to(self.device)


def pipeline(device: str, dtype: torch.dtype = torch.float32, kind: str = "swapped"):
    """A small pipeline with guidance by two calls, and what runs it; the same numbers on every device."""
    torch.manual_seed(0)
    pipe = toys.Pipe(toys.Net(kind))
    noise, cond, uncond = toys.latents(), toys.prompt(), toys.prompt()
    pipe.transformer.to(device, dtype)
    pipe.scheduler = Schedule(device)
    noise, cond, uncond = (each.to(device, dtype) for each in (noise, cond, uncond))
    return pipe, lambda at=None, steps=STEPS: pipe(noise, steps, prompts=(cond, uncond), at=at)


def snapshot() -> Counter[str]:
    return Counter(NPU.ours)


def decisions(cache) -> list[tuple[int, int, bool, str]]:
    return [(each.step, each.branch, each.reuse, each.reason) for each in cache.decisions]


def reads(cache) -> int:
    """How many residuals of the latest run were read: those that a reused step adds for the first time."""
    seen, kept = set(), {}
    last = cache.decisions[-1].run
    for call in (each for each in cache.decisions if each.run == last):
        anchors = kept.setdefault(call.branch, [])
        if call.reuse:
            seen.update((call.branch, step) for step in anchors[-ANCHORS.get(type(cache.config.predictor), 1) :])
        else:
            anchors.append(call.step)
    return len(seen)


def compared(config: DitCacheConfig, kind: str = "swapped") -> dict:
    """A configuration on the host and on the device: decisions, outputs, and who waited for what, in two runs."""
    host, run_host = pipeline("cpu", kind=kind)
    with dit_cache(host, config) as cache:
        expected, decided = run_host(), decisions(cache)
    gc.collect()  # what earlier checks have left is not to go in the middle of this one
    pipe, run = pipeline("npu", kind=kind)
    NPU.waits.clear()
    plain = run()
    plain_waits = NPU.waits.total()
    before, steps, queued = NPU.memory_allocated(), [], Counter(NPU.queued)
    NPU.waits.clear()
    with dit_cache(pipe, config) as cache:
        out = run(at=lambda step: steps.append(snapshot().total()))
        same = decisions(cache) == decided
        first = snapshot()
        NPU.waits.clear()
        again, executions = run(), pipe.transformer.executions
        ours, waits = dict(NPU.ours), NPU.waits.total()
        looked = [each for each in cache.decisions if each.value is not None]
        read = reads(cache)
        found = {
            "reused": cache.stats.reused_calls,
            "computed": cache.stats.computed_calls,
            "executions": executions,
            "bytes_peak": cache.stats.bytes_peak,
            "looked": len(looked) // 2,
            "read": read,
        }
    return found | {
        "device": str(out.device),
        "same decisions": same,
        "off": float((out.cpu() - expected).abs().max()),
        "again off": float((again.cpu() - expected).abs().max()),
        "moved": float((out - plain).abs().max()),
        "plain waits": plain_waits,
        "ours, first run": dict(first),
        "ours after its first step": first.total() - steps[1],
        "ours, second run": ours,
        "waits, second run": waits,
        "queued": dict(NPU.queued - queued),
        "held after removal": NPU.memory_allocated() - before - out.nbytes - again.nbytes,
    }


def counting() -> dict:
    """That the simulation itself counts: each of these waits once, or not at all."""
    tensor, flags = torch.arange(4.0).to("npu"), torch.tensor([True, False, True, False]).to("npu")
    pinned = torch.empty(4, pin_memory=True)
    found = {}
    for name, action in {
        "item": lambda: tensor[0].item(),
        "float": lambda: float(tensor.sum()),
        "bool": lambda: bool(tensor.sum() > 0),
        "cpu": tensor.cpu,
        "to cpu": lambda: tensor.to("cpu"),
        "numbers by way of cpu": lambda: tensor.cpu().tolist(),
        "equal": lambda: torch.equal(tensor, tensor + 1),
        "nonzero": tensor.nonzero,
        "by mask": lambda: tensor[flags],
        "copied into the host's": lambda: torch.empty(4).copy_(tensor),
        "copied into unpinned, not blocking": lambda: torch.empty(4).copy_(tensor, non_blocking=True),
        "copied into pinned, not blocking": lambda: pinned.copy_(tensor, non_blocking=True),
        "from pinned, not blocking": lambda: pinned.to("npu", non_blocking=True),
        "arithmetic": lambda: (tensor * 2 + 1).sum().reshape(1).clone(),
    }.items():
        before = NPU.waits.total()
        action()
        found[name] = NPU.waits.total() - before
    return {"waits": found, "device": str(tensor.device), "pinned": pinned.is_pinned()}


def mixing() -> dict:
    """A tensor of the host's does not go with the device's; neither does a cached model with inputs left behind."""
    pipe, _ = pipeline("npu")
    raised = []
    for attempt in (
        lambda: torch.ones(2).to("npu") + torch.ones(2),
        lambda: pipe.transformer(toys.latents(), torch.ones(1), toys.prompt()),
    ):
        try:
            attempt()
        except RuntimeError as error:
            raised.append(str(error))
    return {"raised": raised}


def kept() -> dict:
    """Where residuals lie in the middle of a run, and what they take there."""
    found = {}
    for name, options in {
        "device": {},
        "host": {"cache_device": "cpu"},
        "host, not pinned": {"cache_device": "cpu"},
        "bfloat16": {"cache_dtype": "bfloat16"},
        "host, bfloat16": {"cache_device": "cpu", "cache_dtype": "bfloat16"},
    }.items():
        gc.collect()  # what earlier checks have left is not to go in the middle of this one
        NPU.pins = "not pinned" not in name
        pipe, run = pipeline("npu")
        seen, used = {}, {}

        def look(step, seen=seen, used=used, pipe=pipe):
            used[step] = NPU.memory_allocated()
            held = [run for flow in caches_of(pipe.transformer.modules()) for run in flow.decider._runs.values()]
            tensors = [t for run in held for branch in run.branches.values() for a in branch.anchors for t in a.kept]
            seen[step] = {
                "devices": sorted({str(tensor.device) for tensor in tensors}),
                "dtypes": sorted({str(tensor.dtype) for tensor in tensors}),
                "pinned": [tensor.device.type == "cpu" and tensor.is_pinned() for tensor in tensors],
                "bytes": sum(tensor.nbytes for tensor in tensors),
            }

        run(at=look)
        plain = dict(used)
        NPU.waits.clear(), NPU.queued.clear()
        with dit_cache(pipe, DitCacheConfig(2, 2, **options)) as cache:
            at = []
            out = run(at=lambda step, cache=cache, at=at, look=look: (look(step), at.append(cache.stats.bytes_held)))
            first = NPU.ours.total()
            again = run(at=None)
            found[name] = seen[5] | {
                "bytes_held": at[5],
                "device bytes": used[5] - plain[5],
                "latents": out.nbytes,
                "waits": NPU.ours.total() - first,
                "queued": dict(NPU.queued),
                "reused": cache.stats.reused_calls,
                "read": reads(cache),
                "again off": float((out - again).abs().max()),
            }
        NPU.pins = True
    return found


def clocks() -> dict:
    """What it costs to tell the step: a scope nothing, a timestep on the device one wait for each call."""
    pipe, _ = pipeline("npu", kind="single")
    net, x = pipe.transformer, toys.latents().to("npu")
    found = {}
    for scoped in (True, False):
        with dit_cache(net, DitCacheConfig(1, 2)) as cache:
            for _ in range(2):
                NPU.waits.clear()
                for step in range(STEPS):
                    t = torch.tensor(1 - step / STEPS).to("npu")
                    if scoped:
                        with timestep_scope(step):
                            net(x, t)
                    else:
                        net(x, t)
            told = "scope" if scoped else "timestep"
            found[told] = {"waits": dict(NPU.ours), "reused": cache.stats.reused_calls, "read": reads(cache)}
    return found


def profiled() -> dict:
    pipe, run = pipeline("npu")
    host, run_host = pipeline("cpu")
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1))
    found, expected = profile(pipe, run, config), profile(host, run_host, config)
    return {"same": str(found) == str(expected), "text": str(found)}


def searched() -> dict:
    """A recorded run, a plan from it, and a search, on a device that cannot time events."""
    pipe, run = pipeline("npu")
    host, run_host = pipeline("cpu")
    before = NPU.synchronized
    recording, expected = record(pipe, lambda _: run()), record(host, lambda _: run_host())
    waited = NPU.synchronized - before
    made = planned(recording, 1.5, cost="blocks")
    with dit_cache(pipe, made) as cache:
        first = run()
        NPU.waits.clear()
        off = float((run() - first).abs().max())
        reused, ours, read = cache.stats.reused_calls, dict(NPU.ours), reads(cache)
    result = search(pipe, lambda _: run(), target_speedup=1.5, cost="blocks", max_evals=2, verbose=False)
    trace, other = recording.traces[0], expected.traces[0]
    return {
        "grams off": float(abs(trace.grams - other.grams).max() / abs(other.grams).max()),
        "block_ms": float(trace.block_ms.min()),
        "synchronized": waited,
        "plan reused": reused,
        "plan waits": ours,
        "plan read": read,
        "plan off": off,
        "search reached": result.plan.provenance.reached,
    }


class Event:
    """An event in the device's stream, as far as it tells the time; here the device has done all at once."""

    def __init__(self, device: torch.device, enable_timing: bool) -> None:
        self.at = math.nan

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        NPU.synchronize()

    def elapsed_time(self, until: Event) -> float:
        return (until.at - self.at) * 1e3


def timed() -> dict:
    """A recorded run on a device whose events tell the time."""
    pipe, run = pipeline("npu")
    without, before = torch.Event, NPU.synchronized
    torch.Event = Event
    try:
        recording = record(pipe, lambda _: run())
    finally:
        torch.Event = without
    return {
        "block_ms": [float(each) for each in recording.traces[0].block_ms],
        "call_ms": recording.traces[0].call_ms,
        "run_ms": recording.run_ms,
        "calls": recording.traces[0].calls,
        "synchronized": NPU.synchronized - before,
    }


def mismatched() -> dict:
    """The model and what it is given move to the host in the middle of a run, and back."""
    pipe, _ = pipeline("npu", kind="single")
    net, x = pipe.transformer, toys.latents()
    with dit_cache(net, DitCacheConfig(0, 8)) as cache:
        for step, device in enumerate(["npu", "npu", "cpu", "cpu", "npu"]):
            net.to(device)
            with timestep_scope(step):
                net(x.to(device), torch.tensor(0.5).to(device))
        reasons = [each.reason for each in cache.decisions]
    return {"reasons": reasons}


class Collected(toys.Net):
    """Uses what a block in the middle returned, as long skips do."""

    def forward(self, hidden_states, timestep):
        h = self.embed(hidden_states)
        temb = self.time(timestep.reshape(-1, 1).to(h.dtype)).expand(h.shape[0], -1)
        early = 0
        for number, block in enumerate(self.blocks):
            h = block(h, temb=temb)
            early = h if number == 1 else early
        return self.proj(h + early)


def refused() -> dict:
    """The first residual is tested by replays on the device."""
    net, x = Collected("single").to("npu"), toys.latents().to("npu")
    try:
        with dit_cache(net, DitCacheConfig(1, 2)), timestep_scope(0):
            net(x, torch.tensor(0.5).to("npu"))
            with timestep_scope(1):
                net(x, torch.tensor(0.5).to("npu"))
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return {"error": None}


def golden(now: torch.Tensor, before: torch.Tensor) -> float:
    """mean|now − before| / mean|before| on the host, in double precision."""
    now, before = now.double(), before.double()
    return float((now - before).abs().mean() / before.abs().mean())


def precision() -> dict:
    """Changes of half-precision activations: their dtype, and how far they are from double precision."""
    found = {}
    torch.manual_seed(1)
    for dtype in (torch.bfloat16, torch.float16):
        large = torch.full((1, 300_000), 40.0).to(dtype)  # Σ|·| = 12,000,000; float16 ends at 65,504
        near = (large.float() + torch.randn(large.shape)).to(dtype)
        change = RelativeChange("mean")
        change.note([large.to("npu")], [large.to("npu")])
        measured = change.look([near.to("npu")])
        gauge = OutputChangeEstimate("mean")
        series = [torch.randn(2, 16, 8).mul(300 + 40 * k).to(dtype) for k in range(3)]
        for x in series[:2]:
            gauge.note([x.to("npu")], [(2 * x).to("npu")])
        rate = gauge.look([series[2].to("npu")])
        x = [each.double() for each in series]
        follows = 2 * (x[1] - x[0]).abs().mean() / (x[1] - x[0]).abs().mean()
        by_hand = float(follows * (x[2] - x[1]).abs().mean() / (2 * x[1]).abs().mean())
        found[str(dtype)] = {
            "dtype": str(measured.dtype),
            "change": float(measured),
            "change, float64": golden(near, large),
            "sum in half precision": float(large.abs().sum()),
            "rate dtype": str(rate.dtype),
            "rate": float(rate),
            "rate, float64": by_hand,
        } | decided(dtype)
    return found


def decided(dtype: torch.dtype) -> dict:
    """The differences that a policy decided by in a run, next to what the block before the range was seen to do."""
    pipe, _ = pipeline("npu", dtype, kind="single")
    given, effects = [], []
    block = pipe.transformer.blocks[0]
    hooks = [
        block.register_forward_pre_hook(lambda _, args: given.append(args[0].clone())),
        block.register_forward_hook(lambda _, args, out: effects.append((out - given[-1]).cpu())),
    ]
    cache = dit_cache(
        pipe, DitCacheConfig(cache_block_start=1, policy=Threshold(1e-6, max_warmup_steps=1)), verify=False
    )
    noise = toys.latents().to("npu", dtype)
    with cache:
        pipe(noise, 4)
        values = [each.value for each in cache.decisions if each.value is not None]
    for hook in hooks:
        hook.remove()
    by_hand = [golden(now, before) for before, now in pairwise(effects)]
    return {"values": values, "values, float64": by_hand[: len(values)], "finite": all(map(math.isfinite, values))}


def tiny_flux() -> dict:
    """diffusers' FLUX of two and three blocks, in the pipeline that ships, on the host and on the device."""
    from diffusers import FluxTransformer2DModel

    from dithooks.demo import load_pipeline

    pipe = load_pipeline()
    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        pooled_projection_dim=128,
        axes_dims_rope=(4, 4, 8),
    )
    pipe.register_modules(transformer=model.eval())
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 64, 48)

    def run():
        return pipe("penguin", num_inference_steps=5, latents=noise, output_type="latent").images

    configs = {
        "static": DitCacheConfig(1, 2),
        "threshold": DitCacheConfig(cache_block_start=1, policy=Threshold(0.5, max_warmup_steps=1)),
        "line on the host": DitCacheConfig(1, 2, predictor=Linear(), cache_device="cpu"),
    }
    expected = {}
    for name, config in configs.items():
        with dit_cache(pipe, config) as cache:
            expected[name] = (run(), decisions(cache))
    pipe.to("npu")
    NPU.waits.clear()
    plain = run()
    found = {"plain waits": NPU.waits.total(), "device": str(plain.device)}
    for name, config in configs.items():
        with dit_cache(pipe, config) as cache:
            out, decided = run(), decisions(cache)
            NPU.waits.clear()
            run()
            ours, waits = dict(NPU.ours), NPU.waits.total()
            found[name] = {
                "off": float((out.cpu() - expected[name][0]).abs().max()),
                "moved": float((out - plain).abs().max()),
                "same decisions": decided == expected[name][1],
                "reused": cache.stats.reused_calls,
                "looked": sum(each.value is not None for each in cache.decisions) // 2,
                "read": reads(cache),
                "waits": waits,
                "ours": ours,
            }
    return found


def questions() -> dict:
    """What the library asks of the accelerator."""
    device, before = torch.device("npu"), NPU.synchronized
    synchronize(device), synchronize(), synchronize(torch.device("cpu"))
    return {
        "synchronized": NPU.synchronized - before,
        "name": device_name(device),
        "machine": machine(device),
        "memory": memory_allocated(device) == NPU.memory_allocated(),
    }


FITTED = Fitted((None, None, (1.5, -0.5), None, (1.2, -0.2), (1.4, -0.4), None, None))
STATIC = {
    "interval": DitCacheConfig(2, 2),
    "range, weights given": DitCacheConfig(
        cache_block_start=1, cache_num_blocks=3, policy=Mask((1, 1, 0, 1, 0, 0, 1, 1)), predictor=FITTED
    ),
    "by step": DitCacheConfig(2, 2, predictor=Taylor(1, axis="step")),
    "on the host": DitCacheConfig(2, 2, cache_device="cpu"),
    "bfloat16": DitCacheConfig(2, 2, cache_dtype="bfloat16"),
    "line": DitCacheConfig(2, 2, predictor=Linear()),
    "preset": DitCacheConfig(policy=Mask("medium")),
    "magnitudes": DitCacheConfig(policy=MagnitudeRatio([1.0, *[0.99] * 7])),
}
LOOKING = {
    "threshold": DitCacheConfig(policy=Threshold(0.3, max_warmup_steps=1)),
    "by the first block": DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=1)),
    "largest sample": DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=1, reduce="max")),
    "one for both": DitCacheConfig(
        cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=1, separate_branches=False)
    ),
    "easycache": DitCacheConfig(policy=EasyCache(0.3)),
    "budget": DitCacheConfig(cache_block_start=1, policy=Budget(1.5)),
}
CHECKS: dict[str, Callable[[], dict]] = {
    **{f"static: {name}": lambda config=config: compared(config) for name, config in STATIC.items()},
    **{f"looking: {name}": lambda config=config: compared(config) for name, config in LOOKING.items()},
    **{
        check.__name__: check
        for check in (
            *(counting, mixing, kept, clocks, profiled, searched, timed, mismatched, refused, precision, tiny_flux),
            questions,
        )
    },
}


def main() -> None:
    set_up()
    found = {}
    with torch.no_grad(), NPU, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        for name, check in CHECKS.items():
            if sys.argv[1:] and name not in sys.argv[1:]:
                continue
            NPU.waits.clear(), NPU.queued.clear(), NPU.doubles.clear()
            try:
                found[name] = check() | {"doubles": dict(NPU.doubles)}
            except Exception:
                found[name] = {"traceback": traceback.format_exc()}
    json.dump(found, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
