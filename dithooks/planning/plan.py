"""A plan from a recording alone, for one target after another: the model is not run again."""

from __future__ import annotations

import datetime

from ..config.cache_plan import CachePlan
from ..config.provenance import Provenance
from ..environment.machine import machine, versions
from ..errors import InvalidSetting, WrongType
from ..progress_bars import ProgressCallback
from ..recording.recording import Recording
from ..validation import check_count, check_number
from .costs import Cost
from .interval_planner import IntervalPlanner
from .planner import Candidate, Planner, Variant

PACKAGES = ("dithooks", "torch", "numpy", "diffusers")


def plan(
    recording: Recording,
    target_speedup: float,
    *,
    cost: Cost = "time",
    anchors: int = 2,
    late_error_weight: float | None = None,
    interval: int | None = None,
) -> CachePlan:
    """The plan with the least predicted error of those that are so many times as fast, from a recording alone.

    Of every range that the wiring allows, the exact best schedule is found (:mod:`.solve`); its error is predicted, not
    measured: :func:`search` also runs the best few.

    Args:
        recording: of :func:`record`.
        target_speedup: times as fast as the recorded run, > 1. Where that cannot be reached, the fastest plan is
            returned, and ``plan.provenance.reached`` is false.
        cost: ``"time"``: of the whole run, by the block times that were measured; ``"blocks"``: of block executions.
        anchors: residuals that a reused one is made of, 1 to 3.
        late_error_weight: how many times more an error at the end of a run counts than one at its beginning. Left out,
            it is what the recording measured, or else 10.
        interval: ≥ 2; only plans that four numbers can say: from some step on refreshed every so many steps, the last
            residual reused as it is (``anchors`` has no effect). Where no range and start reach the target so, the next
            larger interval that does is taken. :func:`.intervals.numbers_of` reads the numbers off a piece. Of several
            transformers, each has a range and start of its own. Left out, any schedule, with fitted weights.

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
            f"recording must be a Recording, as record() returns and Recording.load reads, not {recording!r}"
        )
    target = checked_target(target_speedup)
    planner = planner_of(recording, cost, checked_interval(interval))
    if check_count("anchors", anchors, 1) > 3:
        raise InvalidSetting(f"anchors={anchors}: residuals are made of 1, 2 or 3")
    candidate = planner.candidate(target, Variant(anchors, _checked_weight(late_error_weight)))
    return assembled(planner, candidate, target, "by planning from a recording")


def frontier(
    recording: Recording, *, cost: Cost = "time", anchors: int = 2, late_error_weight: float | None = None
) -> list[tuple[float, float]]:
    """(speed-up, predicted error) of every plan that no other is both faster and better than, slowest first.

    Args and errors as for :func:`plan`.

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


def planner_of(
    recording: Recording, cost: Cost, interval: int | None, report: ProgressCallback = lambda stage, done, total: None
) -> Planner:
    """The planner of all schedules, or of those with an interval."""
    if interval is None:
        return Planner(recording, cost, report)
    return IntervalPlanner(recording, cost, report, interval=interval)


def assembled(planner: Planner, candidate: Candidate, target: float, method: str) -> CachePlan:
    """A candidate as a plan.

    Raises:
        ValueError: it leaves nothing out.
    """
    recording = planner.recording
    if not candidate.choices:
        seen = "; ".join(
            f"{trace.path or 'the model'}: {trace.calls} calls at {len(trace.steps)} steps, {len(trace.ranges)} ranges"
            for trace in recording.traces
        )
        raise InvalidSetting(
            f"nothing of this run can be reused ({seen}): it takes two steps, and a range that the wiring allows. If "
            "it had more, tell them with `with timestep_scope(step): ...`"
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


def _checked_weight(value: float | None) -> float | None:
    return None if value is None else check_number("late_error_weight", value, 0, strictly=True)


def checked_target(value: object) -> float:
    """A speed-up that is one.

    Raises:
        TypeError: not a number.
        ValueError: not above 1.
    """
    target = check_number("target_speedup", value, 0)
    if target <= 1:
        raise InvalidSetting(f"target_speedup={target:g}: a run as fast as that needs no cache; give a number above 1")
    return target


def checked_interval(value: object) -> int | None:
    """Steps from one refresh to the next, or ``None``.

    Raises:
        TypeError: neither a whole number nor ``None``.
        ValueError: below 2.
    """
    return None if value is None else check_count("interval", value, 2)
