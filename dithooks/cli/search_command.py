"""``dithooks search``: from its arguments to plans, on the terminal and in files."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import DitHooksError, TargetError
from ..recording.rank_broadcast import is_rank_0
from ..recording.recording import Recording
from ..tuning.evaluation import Evaluation
from ..tuning.executors.executor import Executor
from ..tuning.result import SearchResult
from ..tuning.search import search
from .search_workers import workers
from .targets.pipeline_loading import DEMO
from .targets.runnable import GUIDANCE, STEPS, drawing_of, shipped

SEED = 1000  # of the demo, where nothing else is asked for: the calibration captions of the plans that ship
DONE, MISSED, INTERRUPTED = 0, 3, 130  # exit codes
Drawing = tuple[Any, Callable[[], object], "int | None"]  # the target, what draws with it, in how many steps, if known


@dataclass(frozen=True)
class SearchOptions:
    """What ``dithooks search`` is asked for, each field the argument of that name.

    Raises:
        TargetError: a number out of its range, arguments that exclude each other, or a file that cannot be written.
    """

    target: str
    speedups: tuple[float, ...] = (2.0,)
    out: str = "plan.json"
    steps: int | None = None
    cost: Literal["time", "blocks"] = "time"
    evals: int = 4
    local_moves: int = 0
    interval: int | None = None
    probe: bool = True
    max_runs: float = 6.0
    seconds: float = math.inf
    executor: Literal["ray", "torchrun"] | None = None
    workers: int | None = None
    journal: Path | None = None
    record: Path | None = None
    recording: Path | None = None
    json: str | None = None
    quiet: bool = False
    prompts: tuple[str, ...] = ()
    seed: int | None = None
    guidance: float | None = None

    def __post_init__(self) -> None:
        least_of = {"steps": 1, "evals": 1, "local_moves": 0, "interval": 2, "seed": 0, "workers": 1}
        for name, least in least_of.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise TargetError(f"--{name.replace('_', '-')} is {value}: it must be {least} or more")
        for name in ("max_runs", "seconds"):
            if not (value := getattr(self, name)) > 0:
                raise TargetError(f"--{name.replace('_', '-')} is {value:g}: it must be above 0")
        self._check_speedups()
        self._check_target()
        if self.workers is not None and self.executor != "ray":
            raise TargetError(
                "--workers goes with --executor ray: torchrun's ranks are as many as it was told to start"
            )
        if self.record is not None and self.recording is not None:
            raise TargetError("--record goes without --recording: that one is saved already")
        if self.journal is not None and self.journal.exists() and not self.journal.is_dir():
            raise TargetError(f"{self.journal} is a file: --journal takes a folder")
        self._check_files()

    def path(self, speedup: float) -> Path:
        """Of the plan for a target."""
        return Path(self.out.replace("{target}", f"{speedup:g}"))

    def _check_speedups(self) -> None:
        if wrong := [value for value in self.speedups if not 1 < value < math.inf]:
            raise TargetError(f"--target is {wrong[0]:g}: give a number above 1, such as 2 for twice as fast")
        if len(self.speedups) > 1 and "{target}" not in self.out:
            raise TargetError(
                f"--out is {self.out}: several targets need one with {{target}}, as in plan-{{target}}x.json"
            )

    def _check_target(self) -> None:
        own = {"prompt": self.prompts or None, "seed": self.seed, "guidance": self.guidance}
        given = [name for name, value in own.items() if value is not None]
        if self.target != DEMO and ":" not in self.target:
            raise TargetError(f"there is no target {self.target!r}: give {DEMO}, FILE.py:FACTORY or MODULE:FACTORY")
        if self.target != DEMO and given:
            raise TargetError(f"--{given[0]} goes with the target {DEMO} only: a factory says itself what it draws")
        if (self.seed or 0) >= 2**62:
            raise TargetError(f"--seed is {self.seed}: it must be below 2**62")
        if not math.isfinite(self.guidance or 0):
            raise TargetError(f"--guidance is {self.guidance}: give a number such as 3.0, or 1 for none")

    def _check_files(self) -> None:
        """Find out before the work whether its results can be written."""
        files = [self.path(value) for value in self.speedups]
        files += [Path(file) for file in (self.record, self.json) if file is not None and file != "-"]
        for path in files:
            if not path.is_dir() and path.parent.is_dir() and not os.access(path.parent, os.W_OK):
                raise TargetError(f"{path} cannot be written: {path.parent} may not be written to")
            if path.is_dir() or not path.parent.is_dir():
                lack = f"{path} is a folder" if path.is_dir() else f"{path.parent} is not a folder"
                raise TargetError(f"{path} cannot be written: {lack}")
        if len({path.resolve() for path in files}) < len(files):
            raise TargetError("two results would go to one file: give each --target once, and other names")


def run_search(options: SearchOptions) -> int:
    """Search a plan for each target and write it.

    Returns:
        The exit code.

    Raises:
        TargetError: nothing can be searched as asked.
    """
    with redirect_stdout(sys.stderr) if options.json == "-" else nullcontext():  # what a factory prints is no JSON
        recording = None if options.recording is None else _load(options.recording)
        drawing = _demo(options, recording) if options.target == DEMO else _own(options, recording)
        results: list[SearchResult] = []
        with workers(options.executor, options.workers, options.target) as executor:
            first = is_rank_0()  # of several ranks, the one that writes and prints
            for speedup in options.speedups:
                known = results[-1].recording if results else recording
                results.append(_search(options, drawing, speedup, known, executor))
                if first:
                    _deliver(options, speedup, results)
                if results[-1].interrupted:
                    if first:
                        _say_interrupted(options, results)
                    break
    said = [_told(each) for each in results]
    text = json.dumps(said if len(options.speedups) > 1 else said[0], indent=2, allow_nan=False)
    if first and options.json == "-":
        print(text)
    elif first and options.json is not None:
        _written(options.json, lambda path: path.write_text(text + "\n", encoding="utf-8"))
    reached = all(each.reached for each in results)
    return INTERRUPTED if results[-1].interrupted else DONE if reached else MISSED


def _search(
    options: SearchOptions,
    drawing: Drawing,
    speedup: float,
    recording: Recording | None,
    executor: Executor | None,
) -> SearchResult:
    target, draw, steps = drawing
    seed = torch.initial_seed()

    def run(_: object) -> object:
        torch.manual_seed(seed)  # every run has to draw the same, whichever generator it takes its noise from
        with torch.no_grad():
            return draw()

    try:
        return search(
            target,
            run,
            speedup,
            num_inference_steps=steps,
            recording=recording,
            cost=options.cost,
            max_evals=options.evals,
            local_moves=options.local_moves,
            interval=options.interval,
            probe=options.probe,
            max_runs=None if options.max_runs == math.inf else options.max_runs,
            max_seconds=None if options.seconds == math.inf else options.seconds,
            journal=options.journal,
            executor=executor,
            verbose=not options.quiet,
        )
    except DitHooksError as error:
        raise TargetError(str(error)) from error


# -- what is searched -------------------------------------------------------------------------------------------


def _demo(options: SearchOptions, recording: Recording | None) -> Drawing:
    pipe, prompts = shipped(options.prompts, fresh=False)
    steps = options.steps or (STEPS if recording is None else recording.steps)
    _check_steps(steps, recording)
    seed = SEED if options.seed is None else options.seed
    guidance = GUIDANCE if options.guidance is None else options.guidance
    return pipe, drawing_of(pipe, prompts, steps, seed, guidance), steps


def _own(options: SearchOptions, recording: Recording | None) -> Drawing:
    from .targets.user_factory import of_factory

    _check_steps(options.steps, recording)
    subject = of_factory(options.target)
    return subject.target, subject.run, options.steps


def _check_steps(steps: int | None, recording: Recording | None) -> None:
    if recording is not None and steps not in (None, recording.steps):
        raise TargetError(f"--steps is {steps}, but the recording is of {recording.steps}: leave it out")


def _load(path: Path) -> Recording:
    try:
        return Recording.load(path)
    except (ValueError, OSError) as error:
        raise TargetError(str(error)) from error


# -- what comes of it -------------------------------------------------------------------------------------------


def _deliver(options: SearchOptions, speedup: float, results: Sequence[SearchResult]) -> None:
    """Write what the last search has found, and say so."""
    result, path = results[-1], options.path(speedup)
    _written(path, result.plan.save)
    if options.record is not None and len(results) == 1:
        _written(options.record, result.recording.save)
    if options.json != "-":
        print(f"{result}\n\n{result.plan}\n\nwritten to {path}" + "\n" * (speedup != options.speedups[-1]))
    if not result.reached and not result.interrupted:
        found = result.plan.provenance
        measured = "" if found.measured_speedup is None else f", measured {found.measured_speedup:.2f}x"
        print(
            f"dithooks: target {speedup:g}x was not reached: predicted {found.predicted_speedup:.2f}x{measured}; "
            f"what comes nearest is in {path}",
            file=sys.stderr,
        )


def _say_interrupted(options: SearchOptions, results: Sequence[SearchResult]) -> None:
    path, left = options.path(options.speedups[len(results) - 1]), options.speedups[len(results) :]
    how = "the best so far" if results[-1].evaluations else "a plan from the recording, which was not run,"
    rest = f"; not searched: {', '.join(f'{value:g}x' for value in left)}" if left else ""
    print(f"dithooks: interrupted: {how} is in {path}{rest}", file=sys.stderr)


def _written(file: str | Path, write: Callable[[Path], object]) -> None:
    try:
        write(Path(file))
    except OSError as error:
        raise TargetError(f"{file} cannot be written: {error}") from error


def _told(result: SearchResult) -> dict[str, Any]:
    """A result, fit for JSON."""
    return {
        "target": result.plan.provenance.target,
        "plan": json.loads(result.plan.to_json()),
        "evaluations": [_evaluation(each) for each in result.evaluations],
        "run_equivalents": result.run_equivalents,
        "seconds": result.seconds,
        "reached": result.reached,
        "interrupted": result.interrupted,
    }


def _evaluation(evaluation: Evaluation) -> dict[str, Any]:
    found, score = evaluation.plan.provenance, evaluation.score
    numbers = {} if score is None else asdict(score)
    finite = {name: value if value is None or math.isfinite(value) else str(value) for name, value in numbers.items()}
    return {
        "ranges": [[piece.path, piece.first, piece.blocks] for piece in evaluation.plan.pieces],
        "steps": [piece.picture for piece in evaluation.plan.pieces],
        "predicted_speedup": found.predicted_speedup,
        "predicted_error": found.predicted_error,
        "seconds": evaluation.seconds,
        "speedup": evaluation.speedup,
        "blocks": evaluation.blocks,
        "score": finite or None,  # infinity is written as in a plan: JSON has none
        "failure": evaluation.failure,
    }
