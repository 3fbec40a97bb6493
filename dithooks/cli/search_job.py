"""The work of ``dithooks search``: its options checked, its searches run, its plans printed and written."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import torch

from ..environment.machine import machine, versions
from ..errors import TargetMissed, UsageError
from ..handle import dit_cache
from ..integrations.diffusers_bars import hidden_bars
from ..planning.candidate import StepMode
from ..recording.image_metrics import Metric, samples_of
from ..recording.rank_broadcast import is_rank_0
from ..recording.recording import Recording
from ..stats.text_table import folded, output_width
from ..stats.warning_collector import collect_warnings
from ..storage.replacement import write_text
from ..tuning.evaluation import Evaluation, Objective
from ..tuning.executors.executor import Executor
from ..tuning.result import SearchResult
from ..tuning.search import search
from .comparison import PICTURED
from .html_report import search_page
from .messages import one_line
from .option_checks import check_guidance, check_installed, check_least, check_psnr, check_seed, check_speedup
from .output_files import as_json, stdout_kept_for_json
from .search_workers import workers
from .targets.pipeline_loading import DEMO
from .targets.runnable import GUIDANCE, STEPS, check_model, drawing_of, shipped

SPEEDUP = 2.0  # where none is asked for
SEED = 1000  # the demo's default: with it, the plans that ship were searched
DONE, MISSED, INTERRUPTED = 0, 3, 130  # exit codes
Draw = Callable[["int | None"], object]  # in so many steps
Drawing = tuple[Any, Draw, "int | None"]  # the target, what draws with it, in how many steps, if known


@dataclass(frozen=True)
class SearchOptions:
    """The options of ``dithooks search``, each field the argument of that name.

    Raises:
        TargetError: the model is neither the demo nor a factory.
        UsageError: a number is out of its range, or options exclude each other.
    """

    model: str
    speedups: tuple[float, ...] = ()
    target_psnr: float | None = None
    min_psnr: float | None = None
    objective: Objective = "both"
    metrics: tuple[Metric, ...] = ()
    modes: tuple[StepMode, ...] = ()
    out: str = "plan.json"
    steps: tuple[int, ...] = ()
    cost: Literal["time", "blocks"] = "time"
    max_evals: int | None = None
    local_moves: int | None = None
    interval: int | None = None
    probe: bool = False
    max_runs: float = 4.0
    max_seconds: float = math.inf
    executor: Literal["ray", "torchrun"] | None = None
    workers: int | None = None
    journal: Path | None = None
    record: Path | None = None
    recording: Path | None = None
    report: Path | None = None
    json: str | None = None
    quiet: bool = False
    prompts: tuple[str, ...] = ()
    seed: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        check_least(self, max_evals=1, local_moves=0, interval=2, workers=1)
        self._check_steps()
        for name in ("max_runs", "max_seconds"):
            if not (value := getattr(self, name)) > 0:
                raise UsageError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")
        for speedup in self.speedups:
            check_speedup(speedup)
        check_psnr(self, "target_psnr", "min_psnr")
        check_installed(self.metrics)
        if self.target_psnr is not None and self.speedups:
            raise UsageError("--target-psnr goes without --target: it asks for the fastest plan that is good enough")
        if len(set(self.speedups)) < len(self.speedups) and self.are_tiers:
            raise UsageError(f"--target is given twice with the same number: {', '.join(map(str, self.speedups))}")
        if self.modes:
            self._check_modes()
        check_model(self.model, {"prompt": self.prompts or None, "seed": self.seed, "guidance": self.guidance})
        check_seed(self.seed)
        check_guidance(self.guidance)
        if self.workers is not None and self.executor != "ray":
            raise UsageError("--workers goes with --executor ray: torchrun sets the number of its ranks itself")
        if self.report is not None and self.report.suffix.lower() not in (".html", ".htm"):
            raise UsageError(f"--report {self.report} is a page: give a name that ends in .html")
        if self.record is not None and self.recording is not None:
            raise UsageError("--record goes without --recording: that one is saved already")

    def _check_steps(self) -> None:
        least = 2 if len(self.steps) > 1 else 1
        for steps in self.steps:
            if steps < least:
                raise UsageError(f"--steps is {steps}: it must be {least} or more")
        if len(set(self.steps)) < len(self.steps):
            raise UsageError(f"--steps is given twice with the same number: {', '.join(map(str, self.steps))}")
        if len(self.steps) > 1:
            for name in ("interval", "executor"):
                if getattr(self, name) is not None:
                    raise UsageError(f"--{name} goes with one number of --steps, not with {len(self.steps)}")

    def _check_modes(self) -> None:
        given = {"interval": self.interval, "target-psnr": self.target_psnr}
        others = [f"--{name}" for name, value in given.items() if value is not None]
        others += ["several --steps"] * (len(self.steps) > 1) + ["several --target for one file"] * self.are_tiers
        if others:
            raise UsageError(f"--mode and {others[0]} exclude each other: leave one of both out")

    @property
    def goals(self) -> tuple[float, ...]:
        """The goals of the search, one after another: speed-ups, or a PSNR."""
        return self.speedups or (SPEEDUP if self.target_psnr is None else self.target_psnr,)

    @property
    def are_tiers(self) -> bool:
        """Whether the plans of several targets go to one file."""
        return len(self.speedups) > 1 and "{target}" not in self.out

    def named(self, goal: float) -> str:
        """A goal with its unit."""
        return f"{goal:g}x" if self.target_psnr is None else f"{goal:g} dB"

    def path(self, goal: float) -> Path:
        """The file of the plan for a goal."""
        return Path(self.out.replace("{target}", f"{goal:g}"))


def run_search(options: SearchOptions) -> int:
    """Search a plan for each goal and write it.

    Returns:
        The exit code.

    Raises:
        UsageError: an option cannot be followed, or a file cannot be read or written.
        TargetError: there is no such factory.
        DitHooksError: as :func:`dithooks.search`.
    """
    with stdout_kept_for_json(options.json):
        recording = None if options.recording is None else _load(options.recording)
        drawing = _of_demo(options, recording) if options.model == DEMO else _of_factory(options, recording)
        results: list[SearchResult] = []
        numbers: list[dict[str, Any]] = []
        with hidden_bars(drawing[0]), workers(options.executor, options.workers, options.model) as executor:
            first = is_rank_0()  # rank 0 alone writes and prints
            for goal in () if options.are_tiers else options.goals:
                known = results[-1].recording if results else recording
                try:
                    result = _search(options, drawing, goal, known, executor)
                except TargetMissed as error:  # others may be reached
                    numbers.append(_numbers_of_none(options, goal, error))
                    if first:
                        print(f"dithooks: target {options.named(goal)}: {error}", file=sys.stderr)
                    continue
                results.append(result)
                numbers.append(_numbers(result))
                if first:
                    _deliver(options, goal, result, is_first=len(results) == 1)
                if result.interrupted:
                    if first:
                        _report_interruption(options, goal, result)
                    break
            if options.are_tiers:
                remarks: list[str] = []
                try:
                    with collect_warnings(remarks):  # of tiers that are left out
                        found = _search(options, drawing, options.speedups, recording, executor)
                except TargetMissed as error:
                    remarks.append(str(error))
                    numbers += [_numbers_of_none(options, goal, error) for goal in options.speedups]
                else:
                    results.append(found)
                    numbers += [_numbers(each) for each in found.tiers.values()]
                    if first:
                        _deliver_tiers(options, found)
                for remark in remarks if first else ():
                    print(f"dithooks: {remark}", file=sys.stderr)
        if first and results and options.report is not None:
            _write_report(options, drawing, results)
    text = as_json(numbers if len(options.goals) > 1 else numbers[0])
    if first and options.json == "-":
        print(text)
    elif first and options.json is not None:
        write_text(options.json, text + "\n")
    if any(result.interrupted for result in results):
        return INTERRUPTED
    reached = len(numbers) == len(options.goals) and all(each["reached"] for each in numbers)
    return DONE if reached else MISSED


def _search(
    options: SearchOptions,
    drawing: Drawing,
    goal: float | tuple[float, ...],
    recording: Recording | None,
    executor: Executor | None,
) -> SearchResult:
    target, draw, steps = drawing
    seed = torch.initial_seed()

    def run(_: object, count: int | None = steps) -> object:
        torch.manual_seed(seed)  # every run has to draw the same, whichever generator it takes its noise from
        with torch.no_grad():
            return draw(count)

    with one_line():
        return search(
            target,
            run,
            goal if isinstance(goal, float) and options.target_psnr is None else SPEEDUP,
            num_inference_steps=steps,
            steps=options.steps if len(options.steps) > 1 else None,
            recording=recording,
            cost=options.cost,
            max_evals=options.max_evals,
            local_moves=options.local_moves,
            interval=options.interval,
            probe=options.probe,
            objective=options.objective,
            metrics=options.metrics,
            modes=options.modes,
            target_psnr=options.target_psnr,
            targets=goal if isinstance(goal, tuple) else None,
            min_psnr=options.min_psnr,
            max_runs=None if options.max_runs == math.inf else options.max_runs,
            max_seconds=None if options.max_seconds == math.inf else options.max_seconds,
            journal=options.journal,
            executor=executor,
            verbose=not options.quiet,
        )


def _of_demo(options: SearchOptions, recording: Recording | None) -> Drawing:
    pipe, prompts = shipped(options.prompts, fresh=False)
    steps = options.steps[0] if options.steps else STEPS if recording is None else recording.steps
    _check_recorded(steps, recording)
    seed = SEED if options.seed is None else options.seed
    guidance = GUIDANCE if options.guidance is None else options.guidance
    return pipe, lambda count: drawing_of(pipe, prompts, count or steps, seed, guidance)(), steps


def _of_factory(options: SearchOptions, recording: Recording | None) -> Drawing:
    from .targets.user_factory import of_factory, of_factory_with_steps

    steps = options.steps[0] if options.steps else None
    _check_recorded(steps, recording)
    if len(options.steps) > 1:
        target, draw = of_factory_with_steps(options.model)
        return target, lambda count: draw(count or options.steps[0]), steps
    subject = of_factory(options.model)
    return subject.target, lambda _: subject.run(), steps


def _check_recorded(steps: int | None, recording: Recording | None) -> None:
    if recording is not None and steps not in (None, recording.steps):
        raise UsageError(f"--steps is {steps}, but the recording is of {recording.steps}: leave it out")


def _load(path: Path) -> Recording:
    try:
        return Recording.load(path)
    except (ValueError, OSError) as error:
        raise UsageError(str(error)) from error


def _deliver(options: SearchOptions, goal: float, result: SearchResult, is_first: bool) -> None:
    """Write the plan of a search, and of the first the recording; print it."""
    path = options.path(goal)
    result.plan.save(path)
    if options.record is not None and is_first:
        result.recording.save(options.record)
    if options.json != "-":
        width = output_width()
        print(f"{result.to_text(width)}\n\n{folded(str(result.plan), width)}\n\nwritten to {path}")
        if goal != options.goals[-1]:
            print()
    if not result.reached and not result.interrupted:
        print(
            f"dithooks: target {options.named(goal)} was not reached: {_nearest(options, result)}; what comes nearest "
            f"is in {path}",
            file=sys.stderr,
        )


def _deliver_tiers(options: SearchOptions, found: SearchResult) -> None:
    """Write the plans of several targets into one file, and the recording; print them."""
    path = Path(options.out)
    found.plans.save(path)
    if options.record is not None:
        found.recording.save(options.record)
    if options.json != "-":
        width = output_width()
        print(f"{found.to_text(width)}\n\n{folded(str(found.plans), width)}\n\nwritten to {path}")
    for name, each in found.tiers.items():
        if not each.reached and not each.interrupted:
            print(f"dithooks: target {name} was not reached: {_nearest(options, each)}", file=sys.stderr)
    if found.interrupted:
        left = [options.named(goal) for goal in options.speedups if options.named(goal) not in found.tiers]
        rest = f"; not searched: {', '.join(left)}" if left else ""
        print(f"dithooks: interrupted: the best so far is in {path}{rest}", file=sys.stderr)


def _write_report(options: SearchOptions, drawing: Drawing, results: list[SearchResult]) -> None:
    """Draw with each plan once more, and write the page."""
    target, draw, steps = drawing
    each_found: dict[str, SearchResult] = {}
    for result in results:
        each_found |= result.tiers or {options.named(result.target_psnr or result.plan.provenance.target): result}
    reference = results[0].recording.results
    if reference is None:  # of a recording that was read from a file
        reference = _drawn(draw, steps)
    drawn = {}
    for name, result in each_found.items():
        with collect_warnings([]), dit_cache(target, result.plan):
            drawn[name] = result, samples_of(_drawn(draw, steps))[:PICTURED]
    about = {
        "model": options.model,
        "cost": options.cost,
        "machine": machine(),
        "date": date.today().isoformat(),
        **versions("dithooks", "torch", "diffusers"),
    }
    pasted = {name: _pasted(options, name, result) for name, result in each_found.items()}
    assert options.report is not None
    captions = options.prompts or (shipped((), fresh=False)[1] if options.model == DEMO else ())
    text = search_page(drawn, samples_of(reference)[:PICTURED], captions, about, pasted)
    write_text(options.report, text)
    if options.json != "-":
        print(f"pictures, steps and the plans that were run: {options.report}")


def _drawn(draw: Draw, steps: int | None) -> object:
    torch.manual_seed(torch.initial_seed())
    with torch.no_grad():
        return draw(steps)


def _pasted(options: SearchOptions, name: str, result: SearchResult) -> str:
    """Return the lines that use a plan."""
    if options.are_tiers:
        load, path, tier = "PlanTiers", options.out, f', tier="{name}"'
    else:
        goal = result.target_psnr or result.plan.provenance.target
        load, path, tier = "CachePlan", str(options.path(goal)), ""
    return (
        f"from dithooks import {load}, dit_cache\n\nplan = {load}.load({path!r})\n"
        f"with dit_cache(pipe, plan{tier}):\n    pipe(...)"
    )


def _nearest(options: SearchOptions, result: SearchResult) -> str:
    """What a plan that misses the target has instead."""
    origin = result.plan.provenance
    if options.target_psnr is not None:
        return "no plan was run" if origin.psnr is None else f"the mean is {origin.psnr:.1f} dB"
    measured = "" if origin.measured_speedup is None else f", measured {origin.measured_speedup:.2f}x"
    return f"predicted {origin.predicted_speedup:.2f}x{measured}"


def _report_interruption(options: SearchOptions, goal: float, result: SearchResult) -> None:
    left = options.goals[options.goals.index(goal) + 1 :]
    how = "the best so far" if result.evaluations else "a plan from the recording, which was not run,"
    rest = f"; not searched: {', '.join(map(options.named, left))}" if left else ""
    print(f"dithooks: interrupted: {how} is in {options.path(goal)}{rest}", file=sys.stderr)


def _numbers(result: SearchResult) -> dict[str, Any]:
    """A result, fit for JSON."""
    return {
        "target": result.plan.provenance.target,
        "target_psnr": result.target_psnr,
        "plan": json.loads(result.plan.to_json()),
        "evaluations": [_evaluation(evaluation) for evaluation in result.evaluations],
        "run_equivalents": result.run_equivalents,
        "seconds": result.seconds,
        "reached": result.reached,
        "interrupted": result.interrupted,
    }


def _numbers_of_none(options: SearchOptions, goal: float, error: TargetMissed) -> dict[str, Any]:
    """A search that found no plan good enough, fit for JSON."""
    asked = {"target": goal if options.target_psnr is None else None, "target_psnr": options.target_psnr}
    return {**asked, "plan": None, "failure": str(error), "reached": False, "interrupted": False}


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    origin, score = evaluation.plan.provenance, evaluation.score
    numbers = {} if score is None else asdict(score)
    finite = {name: value if value is None or math.isfinite(value) else str(value) for name, value in numbers.items()}
    return {
        "ranges": [[own.path, own.first, own.blocks] for piece in evaluation.plan.pieces for own in piece.ranges],
        "steps": [piece.picture for piece in evaluation.plan.pieces],
        "predicted_speedup": origin.predicted_speedup,
        "predicted_error": origin.predicted_error,
        "seconds": evaluation.seconds,
        "speedup": evaluation.speedup,
        "blocks": evaluation.blocks,
        "score": finite or None,  # infinity is written as text, as in a plan: JSON has none
        "failure": evaluation.failure,
    }
