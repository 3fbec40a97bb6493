"""What ``dithooks generate`` does: its runs, their results and what was seen of them."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import date
from pathlib import Path
from typing import Any

import torch

from ..environment.machine import machine, synchronize, versions
from ..handle import CacheHandle
from .cache_settings import Setting, cached, summary
from .generate_options import GenerateOptions, Task, call_of, setting_of, tasks_of
from .media import ANIMATED, ENCODED, check_suffix, default_path, frames_of, write_frames
from .messages import one_line
from .output_files import as_json, check_results, write_json, written
from .targets.pipeline_loading import Named, device_of, dtype_of, find_pipeline

DONE, INTERRUPTED = 0, 130  # exit codes
PACKAGES = ("torch", "diffusers", "transformers", "accelerate")


def generate(options: GenerateOptions) -> int:
    """Draw, and write what came of it.

    Returns:
        The exit code.

    Raises:
        TargetError: it cannot be done as asked; nothing is written then.
    """
    with redirect_stdout(sys.stderr) if options.json == "-" else nullcontext():
        named = find_pipeline(options.model)
        setting = setting_of(options, named)
        call, ignored = call_of(options, named, setting)
        video = named.video and options.frames != 1
        tasks = tasks_of(options, named, options.out or default_path(video))
        for task in tasks:
            check_suffix(task.file, video)
        stats = Path(options.json) if options.json else (options.out or default_path(video)).with_suffix(".json")
        given = [Path(options.plan)] if options.plan is not None else []
        check_results([*(task.file for task in tasks), *([] if options.json == "-" else [stats])], given)
        device = device_of(options.device)
        dtype = dtype_of(options.dtype, device)
        for name in ignored:
            print(f"dithooks: {named.kind.__name__} takes no {name}: drawn without it", file=sys.stderr)
        pipe = named.load(device, dtype, options.quiet)
        told = _drawn(options, named, pipe, call, setting, tasks, device)
    told = _asked(options, named, setting, call, ignored) | told
    told |= {"device": str(device), "dtype": str(dtype).removeprefix("torch."), "machine": machine(device)}
    told |= {"versions": _versions(), "date": date.today().isoformat()}
    for remark in told["remarks"]:
        print(f"dithooks: {remark}", file=sys.stderr)
    if options.json == "-":
        print(as_json(told))
    elif told["results"]:
        write_json(stats, told)
        _show(told, stats)
    if told["interrupted"]:
        print(f"dithooks: interrupted: {len(told['results'])} of {len(tasks)} are written", file=sys.stderr)
    return INTERRUPTED if told["interrupted"] else DONE


# -- what comes of it -------------------------------------------------------------------------------------------


def _drawn(
    options: GenerateOptions,
    named: Named,
    pipe: Any,
    call: Mapping[str, Any],
    setting: Setting | None,
    tasks: list[Task],
    device: torch.device,
) -> dict[str, Any]:
    """Make the runs, and write each result when it is there."""
    remarks: list[str] = []
    results: list[dict[str, Any]] = []
    stats: dict[str, Any] = {}
    interrupted = False
    with torch.no_grad(), _attached(pipe, setting, remarks) as handle:
        try:
            for task in tasks:
                results.append(_run(options, named, pipe, call, task, device, remarks))
        except KeyboardInterrupt:
            interrupted = True
        if handle is not None:
            found = handle.stats
            stats = {name: getattr(found, name) for name in ("blocks_run", "blocks_total", "bytes_peak")}
            stats["decisions"] = summary(handle.decisions, 0) | {"reasons": found.reasons}
    seconds = sum(each["seconds"] for each in results)
    told = {"results": results, "seconds": round(seconds, 4), "blocks_run": None, "blocks_total": None}
    return told | {"bytes_peak": 0, "decisions": None} | stats | {"remarks": remarks, "interrupted": interrupted}


@contextmanager
def _attached(pipe: Any, setting: Setting | None, remarks: list[str]) -> Iterator[CacheHandle | None]:
    if setting is None:
        with one_line():
            yield None
        return
    with cached(pipe, setting, remarks) as handle:
        yield handle


def _run(
    options: GenerateOptions,
    named: Named,
    pipe: Any,
    call: Mapping[str, Any],
    task: Task,
    device: torch.device,
    remarks: list[str],
) -> dict[str, Any]:
    given = dict(call) | ({} if task.prompt is None else {"prompt": task.prompt})
    if "generator" in named.takes:  # on the host, so that the noise is the same on every device
        given["generator"] = torch.Generator("cpu").manual_seed(task.seed)
    synchronize(device)
    begin = time.perf_counter()
    result = pipe(**given)
    synchronize(device)
    seconds = time.perf_counter() - begin
    drawn = frames_of(result)
    frames, file = drawn[0], task.file
    if len(frames) > 1 and file.suffix.lower() not in (*ENCODED, *ANIMATED):
        file = file.with_suffix(".gif")
        remarks.append(f"{task.file} cannot hold the {len(frames)} frames that were drawn: they are in {file}")
    if len(drawn) > 1:
        remarks.append(f"a run drew {len(drawn)} results: the first is in {file}")
    written(file, lambda path: write_frames(path, frames, options.fps))
    told = {"file": str(file), "prompt": task.prompt, "seed": task.seed, "seconds": round(seconds, 4)}
    return told | {"frames": len(frames), "size": list(frames[0].size)}


def _asked(
    options: GenerateOptions, named: Named, setting: Setting | None, call: Mapping[str, Any], ignored: list[str]
) -> dict[str, Any]:
    """What was asked for, fit for JSON."""
    steps = call.get("num_inference_steps", named.takes.get("num_inference_steps"))
    return {
        "model": options.model,
        "pipeline": named.kind.__name__,
        "steps": steps if isinstance(steps, int) else None,
        "call": {name: value for name, value in call.items() if name != "output_type"},
        "fps": options.fps,
        "not_taken": ignored,
        "setting": None if setting is None else setting.to_dict() | {"file": options.plan},
    }


def _versions() -> dict[str, str]:
    from dithooks import __version__

    return {"dithooks": __version__, **versions(*PACKAGES)}


def _show(told: Mapping[str, Any], stats: Path) -> None:
    """On the terminal, a line for each result, and what was run."""
    for each in told["results"]:
        what = "" if each["prompt"] is None else f"{each['prompt']!r}, "
        frames = "" if each["frames"] == 1 else f"{each['frames']} frames, "
        print(f"{each['file']}: {what}seed {each['seed']}, {frames}{each['seconds']:.2f} s")
    total, ran = told["blocks_total"], told["blocks_run"]
    if total:
        fewer = f", {total / ran:.2f} times fewer" if ran else ""
        print(f"{told['setting']['name']}: {ran} of {total} blocks run{fewer}; {told['bytes_peak']:,} bytes kept")
        for name, steps in told["decisions"]["steps"].items():
            print(f"  {name}  {steps}")
    else:
        print("drawn without a cache: --plan or --target make it faster")
    print(f"statistics: {stats}")
