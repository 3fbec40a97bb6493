"""The search: record one run, plan exactly, run the best few plans, return the best."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

from ..blocks.block_lists import Chain, fingerprint
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..blocks.registry import chains_of
from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..config.transformer_plan import Payload
from ..engine.attachment import is_compiled
from ..engine.output_attachment import check_output
from ..errors import InvalidSetting, WiringError, WrongType
from ..integrations.diffusers_bars import hidden_bars
from ..planning.candidate import MODES, StepMode
from ..planning.costs import Cost, Savings, check_cost
from ..planning.plan import check_interval, check_target_speedup, make_planner
from ..progress_bars import progress
from ..recording.image_metrics import Metric, check_metrics, samples_of
from ..recording.rank_broadcast import broadcast_from_rank_0, is_rank_0, on_all_ranks
from ..recording.record import MEMORY, record, recordable
from ..recording.recording import Recording
from ..stats.user_warning import warn_user
from ..user_run import check_run
from ..validation import check_choice, check_count, check_number, shown
from .evaluation import OBJECTIVES, Evaluator, Fit, Objective, as_here
from .executors.executor import Executor, ParallelRunner
from .executors.lookup import executor_of
from .journal import Journal
from .other_steps import OtherSteps, RunOf, check_steps
from .result import SearchResult, unfitted, unguided
from .search_progress import SearchProgress
from .target_series import check_targets, tiers_of
from .timed_run import TimedRun, picture_mismatch
from .trial_driver import Limits, LocalRunner, PlanRunner, TrialDriver, check_measures

EVALS, FITTED_EVALS, FITTED_MOVES = 4, 6, 8  # plans that are run at most; the latter two where weights are fitted


def search(
    target: CacheTarget,
    run: Callable[..., Any],
    target_speedup: float = 2.0,
    *,
    num_inference_steps: int | None = None,
    steps: Sequence[int] | None = None,
    recording: Recording | None = None,
    cost: Cost = "time",
    max_evals: int | None = None,
    local_moves: int | None = None,
    interval: int | None = None,
    probe: bool = False,
    objective: Objective = "both",
    target_psnr: float | None = None,
    min_psnr: float | None = None,
    targets: Sequence[float] | Mapping[str, float] | None = None,
    max_runs: float | None = 3.95,
    max_seconds: float | None = None,
    blocks: Blocks = None,
    scheduler: object = None,
    memory: int = MEMORY,
    share: float = 1.0,
    metrics: Collection[Metric] = ("psnr", "ssim"),
    modes: Collection[StepMode] = (),
    journal: str | os.PathLike[str] | None = None,
    executor: str | Executor | None = None,
    verbose: bool = True,
) -> SearchResult:
    """Find the plan that reaches a speed-up and whose pictures are closest to those without a cache.

    One run is recorded, in which everything is computed. From the recording, the exact best schedules are solved for:
    of every range of blocks, and of the whole transformer where its call can be left out. The best few plans are run,
    and their weights are fitted meanwhile (:mod:`.closed_loop`). At last the weights of the best are fitted once more,
    on every second picture only: the others show how good it is on pictures that it was not fitted on, which is what
    ``plan.provenance`` says. Without a scheduler whose steps can be
    watched, or with an ``interval``, weights are those that the recording gives. The plan's speed is measured in one
    run, relative to one more uncached run where the target is of time. Ctrl-C ends the search with the best plan so
    far. When this returns or raises, nothing is cached in the target. Search before compiling: the recorded run is not
    compiled, and compilation would count as time.

    Args:
        target: as for :func:`dit_cache`; nothing may be cached in it.
        run: function that is given the pipeline, if it takes an argument, draws the calibration pictures, always the
            same ones, and returns them in that order: a list of pictures, videos or latents, as arrays, tensors or PIL
            images. One batch of a few prompts is enough; from four pictures on, half of them are left out of the fit,
            to show how good it is.
        target_speedup: times as fast as the uncached ``run``, > 1; without effect where ``target_psnr`` is given.
        num_inference_steps: number of steps that ``run`` is expected to make; another number is an error.
        steps: two or more numbers of steps that the plan is to serve for, and those in between: (28, 20, 50). ``run``
            is called as ``run(pipe, steps)`` then. The search is made at the first of them; at each other one a run is
            recorded, and the plan's schedule and one that is newly planned are fitted, of which the better one is kept.
            From three numbers on, each is left out once, to measure the loss where weights are carried over, which
            ``plan.provenance.elsewhere`` says. Beside ``max_runs``, each further number costs about one run of as many
            steps, and three at the speed-up that is asked for.
        recording: an earlier :func:`record` of the same ``run``; left out, the run is recorded.
        cost: what the target is of: ``"time"``, of the whole run, by the measured block times; or ``"blocks"``, of
            block executions.
        max_evals: largest number of plans that are run, without local moves. ``None``: 4, and where weights are fitted
            6, as far as ``max_runs`` allows.
        local_moves: largest number of further runs, each with one refresh of the best plan moved by a step. ``None``: 8
            where weights are fitted and ``max_evals`` is left out, or else none.
        interval: only plans with such an interval, as for :func:`plan`; a local move then shifts the start by a step.
        probe: make one more uncached run, in which single samples are disturbed, to measure how much of an error at
            each step remains at the end (:mod:`.sensitivity`), for plans whose weights are not fitted. The probe needs
            the results of at least four samples, and ``max_runs`` has to allow one run more. Without it, plans are
            tried for several guesses. With an ``interval`` no probe is made, since such plans hardly depend on it.
        objective: what plans are chosen by: ``"mean"``, the mean PSNR of the pictures; ``"worst"``, that of the worst;
            or ``"both"``, a mean in which bad pictures count a little more (``Score.soft``).
        target_psnr: PSNR in dB, by ``objective``: the fastest plan that has it is searched, in place of one for a
            speed-up. Where none has it, the plan that draws best is returned, with ``reached`` false.
        min_psnr: PSNR in dB, by ``objective``, below which no plan is returned, but an error is raised.
        targets: several speed-ups, in place of ``target_speedup``: one recorded run serves them all, and what was found
            for each stands in ``result.tiers``, and in ``result.plans`` as one file keeps it. Tiers are called "1.5x"
            and so on, or as a mapping names them. All of them leave out the same blocks, with the same payload, so that
            requests of one batch may have any: the highest speed-up is searched first, and the others take after it.
            One that is below ``min_psnr`` is left out, with a warning.
        max_runs: block executions of the whole search at most, over those of one uncached run; ``None``: no limit. With
            several targets each has the rest of it after the uncached runs, which are made once: three cost at
            most 1 + 3 · 2.95 by default, or 2 + 3 · 1.95 with ``cost="time"``. A
            first call that is made twice, to record it, is not counted: with it the default stays below 4.
        max_seconds: time of the whole search at most; a run that has begun is completed.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`; weights are fitted to its steps.
        memory: as for :func:`record`.
        share: as for :func:`record`.
        metrics: what to measure of each plan. PSNR and SSIM are measured in any case, ``"lpips"`` only where it is
            named: shift-tolerant LPIPS, a learned distance, which takes the package of ``dithooks[lpips]``.
        modes: steps that are tried beside those that are computed or reused as a whole: ``"tail"``, at which the last
            blocks run alone; ``"conditional"``, at which one branch of guidance is computed. One plan more is run for
            the first, and two for the second. On the models that this was measured on they draw worse.
        journal: a folder that keeps the recording and all evaluations: an interrupted search goes on from there, after
            one uncached run to compare with.
        executor: where plans are run; the recording is made in this process. ``None``: in this process, one plan after
            another. ``"ray"``: on actors of Ray, one plan each; :class:`dithooks.ray.Actors` sets their number and
            resources. ``"torchrun"``: on the ranks of ``torch.distributed``, each of which calls this with a whole
            model of its own. Workers that would be idle run the plans that are likely to come next. So with
            ``cost="blocks"``, on machines that compute alike, the plan is the same, bit by bit, as without an
            executor. With ``cost="time"``, a plan's time is compared with that of an uncached run of the same worker,
            made while the other workers run, too.
        verbose: show progress on stderr.

    Returns:
        The plan, with ``reached`` false where it misses the target, and all plans that were tried. Under
        ``torch.distributed`` every rank calls this, rank 0 decides, and all return the same plan; without ``executor``
        all ranks run each plan together.

    Raises:
        TypeError, ValueError: as :func:`dit_cache` and :func:`record`; or an argument is of the wrong type or range;
            or ``run`` does not draw the same pictures each time, or on each worker; or the executor cannot be used.
        ModuleNotFoundError: the executor's package is not installed, or that of a metric.
        RuntimeError: none of the plans could be run, or the best one is below ``min_psnr``.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> @torch.no_grad()
        ... def run(model):
        ...     x = torch.ones(1, 4)
        ...     for t in (1.0, 0.8, 0.6, 0.4, 0.2):
        ...         x = x - 0.2 * model(x, t)
        ...     return [x]
        >>> found = search(Model(), run, 1.6, cost="blocks", verbose=False)
        >>> found.plan.speedup, found.reached
        (1.6666666666666667, True)
    """
    started_at = time.perf_counter()
    wanted, interval = check_target_speedup(target_speedup), check_interval(interval)
    for name, level in (("target_psnr", target_psnr), ("min_psnr", min_psnr)):
        if level is not None:
            check_number(name, level, 0)
    goals = check_targets(targets, target_psnr)
    limits = Limits(EVALS if max_evals is None else max_evals, local_moves or 0, max_runs, max_seconds)
    check_cost(cost)
    check_choice("objective", objective, OBJECTIVES)
    measured = check_metrics(metrics)
    excluded = {"interval": interval, "steps": steps, "targets": targets, "target_psnr": target_psnr}
    parts = _checked_modes(modes, [name for name, value in excluded.items() if value is not None])
    workers = executor_of(executor)
    with_steps = run
    first, *further = check_steps(steps, run) if steps is not None else (num_inference_steps,)
    if steps is not None:
        if interval is not None or workers is not None or num_inference_steps not in (None, first):
            raise InvalidSetting(
                f"steps={tuple(steps)} excludes interval and executor, and num_inference_steps other than {first}"
            )
        run, num_inference_steps = RunOf(run, check_count("steps", first, 1)), first
    run = check_run(run)
    if recording is not None and not isinstance(recording, Recording):
        raise WrongType(f"recording must be a Recording, as record() returns, not {shown(recording)}")
    chains = recordable(target, blocks)
    if _are_configured(target, blocks):
        raise InvalidSetting(
            "the adapter gives its blocks configurations of their own: leave params out to search for one"
        )
    here = fingerprint(chains)
    if workers is not None:
        workers.check([chain.owner for chain in chains])
    if recording is not None and recording.made.fingerprint != here:
        raise InvalidSetting(
            f"the recording is of another model, {recording.made.model} (fingerprint {recording.made.fingerprint}, "
            f"here {here}): record this one"
        )
    if any(is_compiled(chain) for chain in chains):
        warn_user(
            "the model is compiled: what is recorded is not, and the first runs of a plan compile, so speed-ups are "
            "not what they will be: search first, compile then"
        )
    purpose = {"fingerprint": here, "num_inference_steps": num_inference_steps, "cost": cost}
    kept = Journal.open(journal, purpose, check_measures)
    speeds = [wanted] if goals is None else list(goals.values())
    with progress(verbose and is_rank_0()) as display, hidden_bars(target if verbose else None):

        def runs_ahead(spent: float, goals: Sequence[float]) -> float:
            at_other_steps = [count / (first or 1) * (1 + 3 / goal) for count in further for goal in goals]
            return sum(limits.runs_ahead(spent, goal) for goal in goals) + sum(at_other_steps)

        is_timed = float(cost == "time")
        report = SearchProgress(display, is_timed + runs_ahead(1.0 + is_timed, speeds))
        recorded = recording or kept.recording()
        resumed = recorded is not None and recording is None
        calls = 0

        def counted(pipe: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(pipe)

        if broadcast_from_rank_0(recorded is None):  # on every rank, or on none
            recorded = record(
                target,
                counted,
                num_inference_steps=num_inference_steps,
                blocks=blocks,
                scheduler=scheduler,
                memory=memory,
                share=share,
                probe=bool(probe) and interval is None and limits.allow(2.0 + 1.0 / wanted, 0.0),
                report=report,
            )
            samples = samples_of(recorded.results) if is_rank_0() else []  # other ranks may return nothing
            kept.keep_recording(recorded, samples)
        assert recorded is not None
        if num_inference_steps not in (None, recorded.steps):
            raise InvalidSetting(
                f"num_inference_steps={num_inference_steps}, but the recording is of {recorded.steps} steps"
            )
        trace, checked = recorded.traces[0], is_rank_0() or workers is not None
        timed_run = TimedRun(run, blocks, trace.path, trace.inputs if checked else None, trace.second, trace.calls)
        spent, seconds, results = float(calls), None, recorded.results
        # A first run is slower than those that follow, and times in a file or journal were measured another day.
        if broadcast_from_rank_0(cost == "time" or resumed or results is None):
            report.expect(1.0 + runs_ahead(2.0, speeds), recorded.run_ms / 1e3)
            report("uncached run", 0, None)
            results, seconds = timed_run(target)
            report.expect(runs_ahead(2.0, speeds), seconds)
            if recorded.results is not None and is_rank_0():
                mismatch = picture_mismatch(samples_of(results), samples_of(recorded.results))
                if mismatch is not None:
                    raise InvalidSetting(
                        f"run does not draw what was recorded: {mismatch}. It has to draw the same pictures whenever "
                        "it is called; a journal of another run is of no use to it"
                    )
            recorded, spent = replace(recorded, results=results), spent + 1.0
        seconds, executions = seconds if cost == "time" else None, Savings.of(recorded, "blocks").total
        reference = samples_of(recorded.results) if is_rank_0() else None
        fits = interval is None and on_all_ranks(recorded.solver is not None)
        if interval is None and (remark := unfitted(recorded)):
            display.remark(remark)
        if "conditional" in parts and (remark := unguided(recorded)):
            display.remark(remark)
        if fits and max_evals is None:
            moves = FITTED_MOVES if local_moves is None else local_moves
            limits = replace(limits, evals=FITTED_EVALS, local_moves=moves)
        evaluator = Evaluator(
            target,
            timed_run,
            reference,
            seconds,
            executions,
            blocks,
            scheduler,
            solver=recorded.solver if fits else None,
            fit=Fit.ALL if fits else Fit.NONE,
            agreed=broadcast_from_rank_0 if workers is None else as_here,
            metrics=measured,
        )
        payloads = _payloads(target, chains, recorded) if interval is None else ("residual",)
        planner = make_planner(recorded, cost, interval, report, payloads, fits, parts)
        with ExitStack() as stack:
            runner: PlanRunner
            if workers is None:
                runner = LocalRunner(replace(evaluator, seconds=broadcast_from_rank_0(seconds)))
            else:
                report("start workers", 0, None)
                group = workers.start(evaluator, results, limits.plans)
                stack.callback(group.close)
                runner = ParallelRunner(group, objective)

            ahead, reused = list(speeds), float(resumed)

            def driven(goal: float, like: CachePlan | None = None) -> SearchResult:
                nonlocal reused
                ahead.remove(goal)
                report.begin_trials(runs_ahead(spent, ahead))
                driver = TrialDriver(
                    runner,
                    planner if like is None else planner.like(like.pieces),
                    goal,
                    limits,
                    kept,
                    report,
                    started_at,
                    spent,
                    evaluator,
                    objective,
                    target_psnr,
                    min_psnr,
                    reused,
                )
                reused = 0.0  # the recorded run is saved once
                result = driver.drive()
                if not further or result.interrupted:
                    return result
                elsewhere = OtherSteps(
                    target,
                    with_steps,
                    blocks,
                    scheduler,
                    cost,
                    objective,
                    payloads,
                    report,
                    evaluator,
                    recorded,
                    {"memory": memory, "share": share},
                )
                return elsewhere(result, driver.variant_of(result.plan), further)

            return driven(wanted) if goals is None else tiers_of(driven, goals, spent, runner)


def _are_configured(target: object, blocks: Blocks) -> bool:
    """Return whether an adapter gives some of the blocks configurations of their own."""
    with suppress(InvalidSetting):  # whole models, which have none
        return any(config is not None for _, config in chains_of(target, blocks))
    return False


def _checked_modes(modes: Collection[StepMode], excluded: Sequence[str]) -> tuple[StepMode, ...]:
    """Return the modes to try, each once; refuse them with arguments that make other plans."""
    if isinstance(modes, str) or not isinstance(modes, Collection):
        raise WrongType(f"modes must be a tuple of {', '.join(map(repr, MODES))}, not {shown(modes)}")
    for each in modes:
        check_choice("modes", each, MODES)
    chosen = tuple(each for each in MODES if each in modes and each != "whole")
    if chosen and excluded:
        raise InvalidSetting(f"modes and {excluded[0]} exclude each other: leave one of both out")
    return chosen


def _payloads(target: object, chains: Sequence[Chain], recorded: Recording) -> tuple[Payload, ...]:
    """Return what may be forecast: outputs, too, if they were recorded, and the call can be left out in the target."""
    if recorded.solver is None:
        return ("residual",)
    try:
        for chain in chains:
            check_output(chain, DitCacheConfig(0, 2, payload="output"), target, [])
    except (InvalidSetting, WiringError, WrongType):
        return ("residual",)
    return ("residual", "output")
