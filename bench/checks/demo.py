"""Checks that take an accelerator. ``python -m bench.checks`` runs them; on a CPU they go through the same motions.

A check is a function that is given the device and returns figures by name, ``ok`` among them: whether what it checks
holds, or None where that cannot be tried on this machine. It says in its docstring what that is. To add one, write it
here or in a file of its own, and list it in ``CHECKS``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.checks.compiled import compiled
from bench.checks.offload import offload
from bench.checks.sharded import sharded
from bench.checks.watch import Watch
from dithooks import CacheHandle, CachePlan, DitCacheConfig, Threshold, dit_cache, record
from dithooks.demo import load_pipeline, load_plan
from dithooks.demo.outcome import PROMPTS, psnr
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.engine.change_metrics import RelativeChange
from dithooks.environment.machine import memory_allocated, peak_memory, reset_peak_memory, synchronize
from dithooks.recording.stopwatch import has_timed_events

Figures = dict[str, Any]
STEPS, PAIRS, MIDDLE = 28, 3, 20  # of a run; timed runs of each kind; the step at which memory is compared
LOOKS = Threshold(0.3, max_warmup_steps=4, max_continuous_cached_steps=3)
ROOM = 64 * 1024  # what an allocator may round up to, in all


class Demo:
    """The pipeline that ships, on a device, and the same latents to begin with on every one."""

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.pipe: EmojiPipeline = load_pipeline().to(device)
        if dtype != torch.float32:
            self.pipe.to(dtype)
        self.pipe.set_progress_bar_config(disable=True)
        self.noise = torch.randn(len(PROMPTS), 64, 48, generator=torch.Generator().manual_seed(0))

    def draw(self, at: Callable[[int], object] | None = None) -> Tensor:
        """One run, (pictures, tokens, channels); ``at`` is called after every step."""

        def on_step(pipe: object, step: int, *_: object) -> None:
            if at is not None:
                at(step)

        latents: Tensor = self.pipe(
            list(PROMPTS),
            num_inference_steps=STEPS,
            latents=self.noise,
            output_type="latent",
            callback_on_step_end=on_step,
        ).images
        return latents

    def timed(self) -> float:
        """Seconds of a run, till the device is done."""
        synchronize(self.device)
        begin = time.perf_counter()
        self.draw()
        synchronize(self.device)
        return time.perf_counter() - begin

    def watched(self) -> Watch:
        """A run, and what it waited for."""
        with Watch(self.device) as watch:
            self.draw()
        return watch


def decisions(cache: CacheHandle) -> list[tuple[int, int, bool]]:
    """Of all calls: step, branch, whether reused."""
    return [(each.step, each.branch, each.reuse) for each in cache.decisions]


def on_host(config: DitCacheConfig | CachePlan) -> tuple[Tensor, CacheHandle]:
    """Latents and decisions of a run on the CPU."""
    demo = Demo(torch.device("cpu"))
    with dit_cache(demo.pipe, config) as cache:
        return demo.draw(), cache


def apart(ours: Tensor, theirs: Tensor) -> float:
    """Relative L2 distance, worked out on the host."""
    ours, theirs = ours.cpu().double(), theirs.cpu().double()
    return float((ours - theirs).norm() / theirs.norm())


def static_plan(device: torch.device) -> Figures:
    """A plan decides on the device as on the CPU, gives its pictures, and waits for the device but once a run."""
    plan = load_plan("2x")
    expected, cache_on_host = on_host(plan)
    demo = Demo(device)
    plain_latents = demo.draw()
    plain = demo.watched()
    with dit_cache(demo.pipe, plan) as cache:
        latents = demo.draw()
        same = decisions(cache) == decisions(cache_on_host)
        cached = demo.watched()
        pairs = [(demo.timed(),) for _ in range(PAIRS)]
        reused, allowed = cache.stats.reused_calls, cache.stats.blocks_total / cache.stats.blocks_run
    pairs = [(cached_s, demo.timed()) for (cached_s,) in pairs]
    extra = cached.reads.total() - plain.reads.total()
    off = apart(latents, expected)
    scale = [(each.cpu() + 1) / 2 for each in (latents, plain_latents)]
    return {
        "ok": same and off < 1e-2 and extra <= 1 and reused > 0 and cached.doubles <= plain.doubles,
        "decisions as on the CPU": same,
        "relative L2 to the CPU's": off,
        "PSNR to plain, dB": min(psnr(*scale)),
        "host reads, plain": plain.reads.total(),
        "host reads, cached": cached.reads.total(),
        "waits that the device reports, plain and cached": [plain.reported, cached.reported],
        "float64 tensors, plain and cached": [plain.doubles, cached.doubles],
        "seconds, plain": median(plain_s for _, plain_s in pairs),
        "seconds, cached": median(cached_s for cached_s, _ in pairs),
        "speed-up": median(plain_s / cached_s for cached_s, plain_s in pairs),
        "speed-up that the blocks allow": allowed,
    }


def threshold(device: torch.device) -> Figures:
    """A policy that looks sees on the device what it sees on the CPU, and reads one number for each decision."""
    config = DitCacheConfig(cache_block_start=1, policy=LOOKS)
    _, on_cpu = on_host(config)
    demo = Demo(device)
    plain = demo.watched()
    with dit_cache(demo.pipe, config) as cache:
        demo.draw()
        first = list(cache.decisions)
        cached = demo.watched()
        looked = sum(each.value is not None for each in cache.decisions) - sum(each.value is not None for each in first)
    limit = LOOKS.residual_diff_threshold
    pairs = list(zip(first, on_cpu.decisions, strict=True))
    until = next((n for n, (ours, theirs) in enumerate(pairs) if ours.reuse != theirs.reuse), len(pairs))
    values = [(o.value, t.value) for o, t in pairs[: until + 1] if o.value is not None and t.value is not None]
    off = max(abs(ours - theirs) / theirs for ours, theirs in values)
    near = until == len(pairs) or abs((pairs[until][1].value or math.inf) - limit) / limit < 0.01
    extra = cached.reads.total() - plain.reads.total()
    return {
        "ok": near and off < 1e-2 and extra == looked > 0 and cached.doubles <= plain.doubles,
        "decisions as on the CPU": f"{until} of {len(pairs)}, till one differs",
        "changes seen, relative to the CPU's": off,
        "decisions by a value": looked,
        "host reads, plain": plain.reads.total(),
        "host reads, cached": cached.reads.total(),
        "waits that the device reports, plain and cached": [plain.reported, cached.reported],
        "float64 tensors, plain and cached": [plain.doubles, cached.doubles],
    }


def memory(device: torch.device) -> Figures:
    """``bytes_held`` is what the device's allocator has given out for the cache, and all of it comes back."""
    demo, config = Demo(device), DitCacheConfig(4, 2)
    used: dict[str, int | None] = {}

    def look(name: str) -> Callable[[int], None]:
        return lambda step: used.update({name: memory_allocated(device)}) if step == MIDDLE else None

    demo.draw()  # what a first run leaves behind is none of the cache's
    reset_peak_memory(device)
    latents = demo.draw(look("plain"))
    peaks, before, held = [peak_memory(device)], memory_allocated(device), []
    with dit_cache(demo.pipe, config) as cache:
        demo.draw()
        reset_peak_memory(device)
        demo.draw(lambda step: (look("cached")(step), held.append(cache.stats.bytes_held)))
        peaks.append(peak_memory(device))
        peak = cache.stats.bytes_peak
    plain, cached, after = used["plain"], used["cached"], memory_allocated(device)
    if plain is None or cached is None or before is None or after is None:
        return {"ok": device.type == "cpu", "bytes held": held[MIDDLE], "the device tells its memory": False}
    # Of the last call's latents one is kept besides, to recognise the next call by.
    return {
        "ok": abs(cached - plain - held[MIDDLE]) <= latents.nbytes + ROOM and after - before <= ROOM,
        "bytes held": held[MIDDLE],
        "bytes allocated for it": cached - plain,
        "bytes left after removal": after - before,
        "bytes_peak": peak,
        "peak of a run, plain and cached": peaks,
    }


def host_memory(device: torch.device) -> Figures:
    """With ``cache_device="cpu"`` residuals lie in pinned memory, nothing waits, and the pictures are the very same."""
    demo, found = Demo(device), {}
    for where in (None, "cpu"):
        with dit_cache(demo.pipe, DitCacheConfig(4, 2, cache_device=where)) as cache:
            latents = demo.draw()
            watch = demo.watched()
            seconds = median(demo.timed() for _ in range(PAIRS))
            found[where] = latents, watch, seconds, cache.stats.reused_calls
    (there, on_device, seconds_there, reused), (here, on_cpu, seconds_here, _) = found[None], found["cpu"]
    try:
        pins = device.type == "cpu" or torch.empty(1, pin_memory=True).is_pinned()
    except RuntimeError:
        pins = False
    extra = on_cpu.reads.total() - on_device.reads.total()
    return {
        "ok": torch.equal(here, there) and reused > 0 and (extra == 0 or not pins),
        "the very same": torch.equal(here, there),
        "host memory can be pinned": pins,
        "further host reads": extra,
        "waits that the device reports, on it and on the host": [on_device.reported, on_cpu.reported],
        "seconds, on the device": seconds_there,
        "seconds, on the host": seconds_here,
    }


def half_precision(device: torch.device) -> Figures:
    """Changes of bfloat16 and float16 activations are measured in float32, as far off as that, and never overflow."""
    figures: Figures = {"ok": True}
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        before = torch.full((1, 300_000), 40.0).to(dtype)  # their sum is beyond float16
        now = (before.float() + torch.randn(before.shape, generator=generator)).to(dtype)
        gauge = RelativeChange("mean")
        gauge.note([before.to(device)], [before.to(device)])
        seen = gauge.look([now.to(device)])
        assert seen is not None
        exact = float((now.double() - before.double()).abs().mean() / before.double().abs().mean())
        off = abs(float(seen) - exact) / exact
        demo = Demo(device, dtype)
        doubles = demo.watched().doubles  # of the model's own
        with dit_cache(demo.pipe, DitCacheConfig(cache_block_start=1, policy=LOOKS)) as cache:
            latents = demo.draw()
            values = [each.value for each in cache.decisions if each.value is not None]
            doubles -= demo.watched().doubles
        fine = off < 1e-4 and seen.dtype == torch.float32 and all(map(math.isfinite, values)) and doubles >= 0
        figures["ok"] = figures["ok"] and fine and bool(values) and bool(latents.isfinite().all())
        figures |= {f"{dtype}: off float64": off, f"{dtype}: decisions by a value": len(values)}
    return figures


def recorded(device: torch.device) -> Figures:
    """A run can be recorded, with the time of each block, by events where the device can time them."""
    demo = Demo(device)
    seconds = demo.timed()
    recording = record(demo.pipe, lambda _: demo.draw())
    trace = recording.traces[0]
    return {
        "ok": bool((trace.block_ms > 0).all()) and len(trace.block_ms) == 12,
        "events can be timed": has_timed_events(device),
        "ms of a block, least and most": [float(trace.block_ms.min()), float(trace.block_ms.max())],
        "run, plain, ms": seconds * 1e3,
        "run, as recorded and without what that costs, ms": [recording.recorded_ms, recording.run_ms],
    }


CHECKS: tuple[Callable[[torch.device], Figures], ...] = (
    static_plan,
    threshold,
    memory,
    host_memory,
    half_precision,
    recorded,
    compiled,
    offload,
    sharded,
)
