"""Plans from a recording alone: the model is not run again, whatever the target."""

from __future__ import annotations

import datetime

from ..config.cache_plan import CachePlan
from ..config.provenance import Provenance
from ..config.transformer_plan import PAYLOADS, Payload
from ..environment.machine import machine, versions
from ..errors import InvalidSetting, WrongType
from ..progress_bars import ProgressCallback
from ..recording.recording import Recording
from ..validation import check_choice, check_count, check_number, shown
from .candidate import MODES, Candidate, StepMode, Variant
from .costs import Cost
from .interval_planner import IntervalPlanner
from .partial_planner import PartialPlanner
from .planner import Planner

PACKAGES = ("dithooks", "torch", "numpy", "diffusers")


def plan(
    recording: Recording,
    target_speedup: float,
    *,
    cost: Cost = "time",
    anchors: int = 2,
    late_error_weight: float | None = None,
    interval: int | None = None,
    payload: Payload = "residual",
    mode: StepMode = "whole",
) -> CachePlan:
    """Return the plan with the least predicted error of all plans that reach a speed-up.

    Of every range that the wiring allows, the exact best schedule is solved for (:mod:`.schedule_solver`). Errors are
    predicted, not measured, and residuals are forecast, with weights that fit the recorded run: :func:`search` also
    runs the best few plans, fits their weights to the cached run, and forecasts whole outputs where that is better.

    Args:
        recording: of :func:`record`.
        target_speedup: times as fast as the recorded run, > 1. Where that cannot be reached, the fastest plan is
            returned, and ``plan.provenance.reached`` is false.
        cost: what the speed-up is of: ``"time"``, of the whole run, by the measured block times; or ``"blocks"``, of
            block executions.
        anchors: residuals that a reused step's residual is forecast from, 1 to 3.
        late_error_weight: how many times more an error at the end of a run counts than one at its beginning. Left out,
            it is what the recording measured, if it was made with ``probe=True``, or else 10.
        interval: ≥ 2: only plans of the form of a ``DitCacheConfig`` with four numbers, which refresh a range every so
            many steps from a start on, and reuse the last residual as it is (``anchors`` has no effect). Where no range
            and start reach the target with this interval, the next larger one that does is taken. Each of several
            transformers has a range and start of its own. :func:`.interval_planner.interval_config` turns a piece of
            the plan into the configuration. Left out, schedules are free, and weights are fitted.
        payload: the forecast: ``"residual"`` of a range, or ``"output"`` of the whole transformer, whose call is
            left out; for that the recording has to have the solver's steps, and ``interval`` is left out.
        mode: ``"whole"``: a step computes the whole range, or nothing of it; ``"tail"``: all blocks are in two ranges,
            each with its own schedule, so that the last blocks may run alone; ``"conditional"``: outputs are forecast,
            and at some steps one branch of guidance alone is computed, and the other taken to be as far from it as
            before. Both are mostly worse than their predicted error says: compare by running the plans.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> import torch
        >>> from dithooks import dit_cache, record
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
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> _ = torch.manual_seed(0)
        >>> model = Model()
        >>> found = plan(record(model, run), 1.6, cost="blocks")
        >>> found.speedup, sum(found.pieces[0].steps)
        (1.6666666666666667, 3)
        >>> with dit_cache(model, found) as cache:
        ...     _ = run(model)
        >>> cache.stats.reused_calls
        2
        >>> print(plan(record(model, run), 1.6, cost="blocks", interval=2).pieces[0])
        blocks: 0 … 2 of 3  ●○●○●  2 of 5 steps reused
    """
    if not isinstance(recording, Recording):
        raise WrongType(
            f"recording must be a Recording, as record() returns and Recording.load reads, not {shown(recording)}"
        )
    target = check_target_speedup(target_speedup)
    planner = make_planner(recording, cost, check_interval(interval))
    if check_count("anchors", anchors, 1) > 3:
        raise InvalidSetting(f"anchors={anchors}: residuals are made of 1, 2 or 3")
    check_choice("payload", payload, PAYLOADS)
    if check_choice("mode", mode, MODES) != "whole":
        _check_mode(mode, payload, interval)
    if payload == "output" or mode == "conditional":
        payload = "output"
        _check_outputs(recording, interval)
    if mode == "conditional" and recording.solver is not None and recording.solver.apart is None:
        raise InvalidSetting(
            "mode='conditional': at some step of the recorded run, guidance was no weighted sum of two outputs, or the "
            "one with the prompt was not called first, so that there is nothing to hold: leave mode out, or record the "
            "run again if an earlier version made the recording"
        )
    weight = _checked_weight(late_error_weight)
    candidate = planner.candidate(target, Variant(anchors, weight, payload=payload, mode=mode))
    if mode == "tail" and not candidate.choices:
        raise InvalidSetting(
            "mode='tail': the blocks cannot be parted in two ranges: the wiring allows no such pair, or they are not "
            "called in the order of their lists. Leave mode out"
        )
    return build_plan(planner, candidate, target, "by planning from a recording")


def frontier(
    recording: Recording, *, cost: Cost = "time", anchors: int = 2, late_error_weight: float | None = None
) -> list[tuple[float, float]]:
    """Return the Pareto front of all plans as (speed-up, predicted error), slowest first.

    Arguments and errors are those of :func:`plan`.

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
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> from dithooks import record
        >>> _ = torch.manual_seed(0)
        >>> found = frontier(record(Model(), run), cost="blocks")
        >>> found[0][0], found[-1][0]
        (1.0, 5.0)
        >>> sorted(error for _, error in found) == [error for _, error in found]
        True
    """
    return Planner(recording, cost).frontier(Variant(anchors, _checked_weight(late_error_weight)))


def make_planner(
    recording: Recording,
    cost: Cost,
    interval: int | None,
    report: ProgressCallback = lambda stage, done, total: None,
    payloads: tuple[Payload, ...] = ("residual",),
    fits: bool = False,
    modes: tuple[StepMode, ...] = (),
) -> Planner:
    """Return the planner of free schedules, or, with an interval, of those that refresh at it."""
    if interval is None:
        return PartialPlanner(recording, cost, report, payloads, fits, modes=modes)
    return IntervalPlanner(recording, cost, report, interval=interval)


def build_plan(planner: Planner, candidate: Candidate, target: float, method: str) -> CachePlan:
    """Turn a candidate into a plan.

    Raises:
        ValueError: the candidate skips no block.
    """
    recording = planner.recording
    if not candidate.choices:
        recorded = "; ".join(
            f"{trace.path or 'the model'}: {trace.calls} calls at {len(trace.steps)} steps, {len(trace.ranges)} ranges"
            for trace in recording.traces
        )
        raise InvalidSetting(
            f"nothing of this run can be reused ({recorded}): it takes two steps, and a range that the wiring "
            "allows. If it had more, name each with `with timestep_scope(step): ...`"
        )
    provenance = Provenance(
        date=datetime.date.today().isoformat(),
        versions=versions(*PACKAGES),
        machine=machine(),
        samples=max(recording.samples, 1),
        target=target,
        method=method,
        predicted_speedup=candidate.speedup,
        predicted_error=candidate.error,
        reached=candidate.reaches,
    )
    return CachePlan(planner.pieces(candidate), recording.made, provenance)


def _check_outputs(recording: Recording, interval: int | None) -> None:
    """Refuse to plan with outputs that were not recorded."""
    if interval is not None:
        raise InvalidSetting("payload='output' and interval exclude each other: leave one of both out")
    if recording.solver is None:
        why = recording.unsolved or "an earlier version made it"
        raise InvalidSetting(
            f"payload='output': the recording has no steps of a scheduler ({why}): record the run again, with "
            "scheduler=..., or leave payload out"
        )


def _check_mode(mode: StepMode, payload: Payload, interval: int | None) -> None:
    """Refuse a mode of steps with what excludes it."""
    if interval is not None:
        raise InvalidSetting(f"mode={shown(mode)} and interval exclude each other: leave one of both out")
    if mode == "tail" and payload == "output":
        raise InvalidSetting("mode='tail' runs some of the blocks, and payload='output' leaves all of them out")


def _checked_weight(value: float | None) -> float | None:
    return None if value is None else check_number("late_error_weight", value, 0, strictly=True)


def check_target_speedup(value: object) -> float:
    """Return a speed-up, checked.

    Raises:
        TypeError: not a number.
        ValueError: not above 1.
    """
    target = check_number("target_speedup", value, 0)
    if target <= 1:
        raise InvalidSetting(f"target_speedup={target:g}: a run as fast as that needs no cache; give a number above 1")
    return target


def check_interval(value: object) -> int | None:
    """Return the steps from one refresh to the next, checked; ``None`` stays ``None``.

    Raises:
        TypeError: neither a whole number nor ``None``.
        ValueError: below 2.
    """
    return None if value is None else check_count("interval", value, 2)
