"""The runs of ``dithooks generate``, their results and their statistics."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..environment.machine import machine, synchronize, versions
from ..errors import UsageError
from ..handle import CacheHandle
from ..integrations.diffusers_bars import hidden_bars
from ..progress_bars import is_terminal, progress
from ..storage.replacement import replacing
from .cache_settings import CacheSetting, cached, summary
from .generate_options import DrawTask, GenerateOptions, call_of, setting_of, tasks_of
from .media import ANIMATED, ENCODED, check_suffix, default_path, frames_of, write_frames
from .messages import one_line
from .output_files import as_json, check_results, stdout_kept_for_json, write_json
from .targets.pipeline_loading import PipelineSource, device_of, dtype_of, find_pipeline
from .user_errors import call_user

DONE, MISSED, INTERRUPTED = 0, 3, 130  # exit codes
SOUNDS = ("audio", "sound")  # of what pipelines return
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def generate(options: GenerateOptions) -> int:
    """Draw each result and write it, with its statistics.

    Returns:
        The exit code.

    Raises:
        UsageError: an option cannot be followed, or a file cannot be read or written.
        TargetError: there is no such pipeline.
        DitHooksError: as :func:`dithooks.dit_cache`.
    """
    with stdout_kept_for_json(options.json):
        source = find_pipeline(options.model, options.trust_remote_code)
        setting = setting_of(options, source)
        call, ignored = call_of(options, source, setting)
        video = source.video and options.frames != 1
        tasks = tasks_of(options, source, options.out or default_path(video))
        for task in tasks:
            check_suffix(task.file, video)
        stats = Path(options.json) if options.json else (options.out or default_path(video)).with_suffix(".json")
        given = [Path(options.plan)] if options.plan is not None else []
        check_results([*(task.file for task in tasks), *([] if options.json == "-" else [stats])], given)
        device = device_of(options.device)
        dtype = dtype_of(options.dtype, device)
        for name in ignored:
            print(f"dithooks: {source.kind.__name__} takes no {name}: drawn without it", file=sys.stderr)
        pipe = source.load(device, dtype, options.quiet)
        if options.tiling:
            _decode_in_tiles(pipe, source)
        drawn = _draw(options, source, pipe, call, setting, tasks, device)
    statistics = _request(options, source, setting, call, ignored) | drawn
    statistics |= {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "machine": machine(device)}
    statistics |= {"versions": _versions(), "date": date.today().isoformat()}
    for remark in statistics["remarks"]:
        print(f"dithooks: {remark}", file=sys.stderr)
    if options.json == "-":
        print(as_json(statistics))
    elif statistics["results"]:
        write_json(stats, statistics)
        _show(statistics, stats)
    if statistics["interrupted"]:
        print(f"dithooks: interrupted: {len(statistics['results'])} of {len(tasks)} are written", file=sys.stderr)
        return INTERRUPTED
    if statistics["missed"] is not None:
        print(f"dithooks: {statistics['missed']}", file=sys.stderr)
        return MISSED
    return DONE


def _decode_in_tiles(pipe: Any, source: PipelineSource) -> None:
    """Let the decoder work in tiles.

    Raises:
        UsageError: the pipeline has none that can.
    """
    enable = getattr(getattr(pipe, "vae", None), "enable_tiling", None)
    if enable is None:
        raise UsageError(f"--tiling is for a VAE that can work in tiles, which {source.kind.__name__} does not have")
    try:
        enable()
    except NotImplementedError as error:  # diffusers gives every VAE the method, and raises from those without tiles
        raise UsageError(f"--tiling: {error}") from error


def _draw(
    options: GenerateOptions,
    source: PipelineSource,
    pipe: Any,
    call: Mapping[str, Any],
    setting: CacheSetting | None,
    tasks: list[DrawTask],
    device: torch.device,
) -> dict[str, Any]:
    """Make the runs, and write each result as soon as it is drawn."""
    remarks: list[str] = []
    results: list[dict[str, Any]] = []
    stats: dict[str, Any] = {}
    interrupted, missed = False, None
    bars = hidden_bars(pipe) if options.quiet or not is_terminal() else nullcontext()
    shown = progress(not options.quiet and not is_terminal())  # on a terminal, the pipeline shows its own steps
    with torch.no_grad(), _attached(pipe, setting, remarks) as handle, bars, shown as report:
        try:
            for number, task in enumerate(tasks):
                report("draw", number, len(tasks))
                results.append(_run(options, source, pipe, call, task, device, remarks))
        except KeyboardInterrupt:
            interrupted = True
        if handle is not None:
            counts = handle.stats
            stats = {name: getattr(counts, name) for name in ("blocks_run", "blocks_total", "bytes_peak")}
            stats["decisions"] = summary(handle.decisions, 0) | {"reasons": counts.reasons}
            missed = setting.missed(counts) if setting is not None and setting.is_missed_by(counts) else None
    seconds = sum(result["seconds"] for result in results)
    drawn = {"results": results, "seconds": round(seconds, 4), "blocks_run": None, "blocks_total": None}
    return (
        drawn
        | {"bytes_peak": 0, "decisions": None}
        | stats
        | {"remarks": remarks, "interrupted": interrupted, "missed": missed}
    )


@contextmanager
def _attached(pipe: Any, setting: CacheSetting | None, remarks: list[str]) -> Iterator[CacheHandle | None]:
    if setting is None:
        with one_line():
            yield None
        return
    with cached(pipe, setting, remarks) as handle:
        yield handle


def _run(
    options: GenerateOptions,
    source: PipelineSource,
    pipe: Any,
    call: Mapping[str, Any],
    task: DrawTask,
    device: torch.device,
    remarks: list[str],
) -> dict[str, Any]:
    given = dict(call) | ({} if task.prompt is None else {"prompt": task.prompt})
    if "generator" in source.takes:  # on the host, so that the noise is the same on every device
        given["generator"] = torch.Generator("cpu").manual_seed(task.seed)
    synchronize(device)
    begin = time.perf_counter()
    result = call_user(pipe, **given)
    synchronize(device)
    seconds = time.perf_counter() - begin
    drawn = frames_of(result)
    frames, file = drawn[0], task.file
    if len(frames) > 1 and file.suffix.lower() not in (*ENCODED, *ANIMATED):
        file = file.with_suffix(".gif")
        remarks.append(f"{task.file} cannot hold the {len(frames)} frames that were drawn: they are in {file}")
    if len(drawn) > 1:
        remarks.append(f"a run drew {len(drawn)} results: the first is in {file}")
    if any(getattr(result, name, None) is not None for name in SOUNDS):
        remarks.append(f"{file} is silent: the sound that {source.kind.__name__} has made, too, is left out")
    with replacing(file) as draft:
        write_frames(draft, frames, options.fps)
    entry = {"file": str(file), "prompt": task.prompt, "seed": task.seed, "seconds": round(seconds, 4)}
    return entry | {"frames": len(frames), "size": list(frames[0].size)}


def _request(
    options: GenerateOptions,
    source: PipelineSource,
    setting: CacheSetting | None,
    call: Mapping[str, Any],
    ignored: list[str],
) -> dict[str, Any]:
    """The options and the calls that follow from them, fit for JSON."""
    steps = call.get("num_inference_steps", source.takes.get("num_inference_steps"))
    return {
        "model": options.model,
        "pipeline": source.kind.__name__,
        "steps": steps if isinstance(steps, int) else None,
        "call": {name: value for name, value in call.items() if name != "output_type"},
        "fps": options.fps,
        "not_taken": ignored,
        "setting": None if setting is None else setting.to_dict() | {"file": options.plan},
    }


def _versions() -> dict[str, str]:
    from dithooks import __version__

    return {"dithooks": __version__, **versions(*PACKAGES)}


def _show(statistics: Mapping[str, Any], stats: Path) -> None:
    """Print a line for each result, and the blocks that ran."""
    for result in statistics["results"]:
        prompt = "" if result["prompt"] is None else f"{result['prompt']!r}, "
        frames = "" if result["frames"] == 1 else f"{result['frames']} frames, "
        print(f"{result['file']}: {prompt}seed {result['seed']}, {frames}{result['seconds']:.2f} s")
    total, ran = statistics["blocks_total"], statistics["blocks_run"]
    if total:
        fewer = f", {total / ran:.2f} times fewer" if ran else ""
        print(f"{statistics['setting']['name']}: {ran} of {total} blocks run{fewer}; "
              f"{statistics['bytes_peak']:,} bytes kept")  # fmt: skip
        for name, steps in statistics["decisions"]["steps"].items():
            print(f"  {name}  {steps}")
    else:
        print("drawn without a cache: --plan or --target make it faster")
    print(f"statistics: {stats}")
