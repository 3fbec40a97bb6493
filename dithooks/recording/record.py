"""The recording of one run in which everything is computed: token samples at the blocks' boundaries, and times."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from ..blocks.adapter import BlockAdapter
from ..blocks.block_lists import Chain, fingerprint
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..blocks.registry import chains_of
from ..blocks.whole_models import models_of
from ..config.cache_config import DitCacheConfig
from ..config.provenance import PlanTarget
from ..engine.attachment import check, is_compiled
from ..engine.clock import scheduler_of
from ..engine.replay import eagerly
from ..errors import InvalidSetting
from ..progress_bars import ProgressCallback
from ..user_run import check_run
from ..validation import check_count, check_number
from .guidance_shares import watched_outputs
from .input_check import same_inputs
from .model_recorder import ModelRecorder
from .recorder import STEPS, Recorder
from .recording import Recording
from .sensitivity import sensitivity
from .solver_trace import SolverRecorder
from .solver_watch import can_be_watched, watched_solver

MEMORY = 450_000_000  # bytes of samples, of one run: FLUX at 1024², 50 steps: 12 tokens of 4608 at 58 boundaries
DRIVEN = "a loop runs the blocks without their transformer's call, whose output nobody sees"


def record(
    target: CacheTarget,
    run: Callable[..., Any],
    *,
    num_inference_steps: int | None = None,
    blocks: Blocks = None,
    scheduler: object = None,
    memory: int = MEMORY,
    share: float = 1.0,
    probe: bool = False,
    report: ProgressCallback | None = None,
) -> Recording:
    """Call ``run(target)`` with everything computed, and record the residuals of all ranges of blocks at every step.

    At each boundary of the blocks the same few tokens are kept, as many as ``memory`` allows, or all in small models.
    The Gram matrices of all ranges are computed from these. Of a scheduler whose steps can be watched, a sample of what
    it is given and returns is kept, too. The first call of each transformer is made twice, to
    observe its wiring. Where a loop calls the blocks without the transformer, the whole run is made twice. Compiled
    models run uncompiled meanwhile.

    Args:
        target: as for :func:`dit_cache`; nothing may be cached in it.
        run: function that is given the pipeline, if it takes an argument, and draws the calibration pictures, in one
            batch or in several runs of as many steps: ``lambda pipe: pipe(prompts, num_inference_steps=28)``. Each of
            the runs may have guidance and a size of its own. Its results, a list of pictures, videos or latents, are
            kept.
        num_inference_steps: number of steps that the run is expected to make; another number is an error.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.
        memory: largest size of the samples on the host, in bytes, for a run with up to two calls per step.
        share: largest share of the tokens that is kept.
        probe: make the run once more, to measure how much of an error at each step remains at the end. The probe needs
            the results of at least four samples; with fewer, plans are made with a guess.
        report: called with a stage, how much of it is done, and its total.

    Raises:
        TypeError, ValueError: as :func:`dit_cache`; or ``run`` makes no step of the target, calls it with gradients,
            makes runs with different numbers of steps, or other shapes within a run, or not those that were expected.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> @torch.no_grad()
        ... def run(model):
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.75, 0.5, 0.25)]
        >>> recording = record(Model(), run)
        >>> recording.traces[0].gram(0, 2).shape
        (4, 4)
    """
    run = check_run(run)
    if check_number("share", share, 0, strictly=True) > 1:
        raise InvalidSetting(f"share={share}: of the tokens, at most all can be kept, 1")
    check_number("memory", memory, 0, strictly=True)
    if num_inference_steps is not None:
        check_count("num_inference_steps", num_inference_steps, 1)
    chains = recordable(target, blocks)
    for chain in chains:
        if chain.block_lists:
            check(chain, DitCacheConfig(0, 2), [])
    pipe = target.target if isinstance(target, BlockAdapter) else target
    scheduler_now = scheduler_of(pipe, scheduler)
    recorders = [_recorder(chain, scheduler_now, num_inference_steps, memory, share) for chain in chains]
    results, taken, solver = _recorded(run, pipe, recorders, report, scheduler_now())
    driven = [recorder.driven() for recorder in recorders]
    if any(driven):  # once more, now that the loop's blocks are known
        fresh = [_recorder(chain, scheduler_now, num_inference_steps, memory, share) for chain in chains]
        recorders = [old if by_hand else new for old, new, by_hand in zip(recorders, fresh, driven, strict=True)]
        results, taken, solver = _recorded(run, pipe, recorders, report, scheduler_now())
    called = [recorder for recorder in recorders if recorder.calls]
    if not called:
        raise InvalidSetting("run made no step of the target: it is given the pipeline, and has to call it")
    traces = tuple(recorder.trace() for recorder in called)
    first, scheduling = called[0], scheduler_now()
    steps = first.schedule.steps or 1 + max(int(trace.steps[-1]) for trace in traces)
    if num_inference_steps not in (None, steps, getattr(scheduling, "num_inference_steps", None)):
        raise InvalidSetting(
            f"num_inference_steps={num_inference_steps}, but run made {steps} steps: give the same number"
        )
    parameter = next((p for p in first.chain.owner.parameters() if p.is_floating_point()), None)
    made = PlanTarget(
        model="+".join(type(chain.owner).__name__ for chain in chains),
        fingerprint=fingerprint(chains),
        blocks=sum(len(trace.blocks) for trace in traces),
        dtype="none" if parameter is None else str(parameter.dtype).removeprefix("torch."),
        steps=steps,
        scheduler=None if scheduling is None else type(scheduling).__name__,
        size=first.size,
    )
    solved, unsolved = (None, DRIVEN) if any(driven) else (solver.trace(steps), solver.reason)
    spent = sum(recorder.spent_ms for recorder in called)
    samples, runs = first.rows, first.tally.runs
    recording = Recording(
        traces,
        made,
        first.schedule.sigmas,
        samples,
        runs,
        taken - spent,
        taken,
        results,
        solver=solved,
        unsolved=unsolved,
    )
    if not probe:
        return recording

    def again() -> Any:
        with ExitStack() as stack:
            if any(is_compiled(recorder.chain) for recorder in called):
                stack.enter_context(eagerly())
            for recorder, trace in zip(called, traces, strict=True):
                stack.enter_context(same_inputs(recorder.chain.owner, trace.inputs, trace.second, trace.calls))
            return run(pipe)

    if report is not None:
        report("probe", 0, None)
    lasts = [(recorder.last, recorder.sequence) for recorder in called]
    return replace(recording, sensitivity=sensitivity(again, lasts, recording))


def recordable(target: object, blocks: Blocks) -> list[Chain]:
    """Return the transformers of a target; where their blocks cannot be cached, without their lists of blocks.

    Raises:
        TypeError, ValueError: as :func:`dit_cache`, where not even whole models can be left out.
    """
    try:
        return [chain for chain, _ in chains_of(target, blocks)]
    except InvalidSetting:
        return [chain for chain, _ in models_of(target, blocks)]


def _recorder(chain: Chain, scheduler: Callable[[], Any], steps: int | None, memory: int, share: float) -> Recorder:
    kind = Recorder if chain.block_lists else ModelRecorder
    return kind(chain, scheduler, steps, memory, share)


def _recorded(
    run: Callable[[Any], Any],
    pipe: Any,
    recorders: Sequence[Recorder],
    report: ProgressCallback | None,
    scheduler: Any,
) -> tuple[Any, float, SolverRecorder]:
    """Make a run with the recorders' hooks; return its results, its milliseconds, and what the scheduler was given."""
    latest: list[tuple[int, int]] = []
    solver = SolverRecorder(lambda: latest[-1] if latest else None, recorders[0].expected or STEPS)

    def note(run: int, step: int) -> None:
        latest[:] = [(run, step)]

    with ExitStack() as stack:
        for recorder in recorders:
            recorder.on_call = note
        if scheduler is None or not can_be_watched(scheduler):
            solver.reason = "there is none whose step() takes an output and a sample"
        else:
            stack.enter_context(watched_solver(scheduler, solver))
            for recorder in recorders:
                stack.enter_context(watched_outputs(recorder.chain.owner, solver.returned))
        if any(is_compiled(recorder.chain) for recorder in recorders):
            stack.enter_context(eagerly())
        for recorder in recorders:
            stack.enter_context(recorder.hooked(report))
        begun = time.perf_counter()
        results = run(pipe)
        for recorder in recorders:
            recorder.stopwatch.wait()
        return results, (time.perf_counter() - begun) * 1e3, solver
