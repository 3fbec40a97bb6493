"""The search: record once, plan exactly, run the best few, keep the best."""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any

from torch import nn

from ..attachment import compiled_of
from ..blocks.adapter import BlockAdapter, chains_of
from ..blocks.chain import fingerprint
from ..blocks.find import Blocks
from ..cache_plan import CachePlan
from ..policy.base import check_count, check_number
from .inputs import same_inputs
from .journal import Journal
from .planner import Candidate, Planner
from .plans import assembled, checked_target
from .prices import Cost, Savings, checked_cost
from .progress import Report, progress
from .proposals import Proposals, proposals
from .ranks import agree, leads
from .record import MEMORY, record
from .recording import Recording
from .result import SearchResult, best_of
from .score import Score, samples_of
from .stopwatch import caught_up
from .verify import Evaluation, Verifier

NEAR = 0.95  # of the target: runs differ by as much from one time to another


@dataclass(frozen=True)
class Limits:
    """How long a search goes on.

    Args:
        evals: plans that are run, and
        climb: further ones that only move a refresh of the best.
        generations: block executions of all, the recorded run included, over those of an uncached run.
        seconds: of all.
    """

    evals: int
    climb: int
    generations: float | None
    seconds: float | None

    def __post_init__(self) -> None:
        check_count("max_evals", self.evals, 1)
        check_count("climb", self.climb, 0)
        for name, value in (("max_generations", self.generations), ("max_seconds", self.seconds)):
            if value is not None:
                check_number(name, value, 0, strictly=True)

    def allow(self, generations: float, seconds: float) -> bool:
        """Whether that much may be spent."""
        spent = ((generations, self.generations), (seconds, self.seconds))
        return all(limit is None or value <= limit for value, limit in spent)


def search(
    target: object,
    run: Callable[[Any], Any],
    target_speedup: float = 2.0,
    *,
    num_inference_steps: int | None = None,
    recording: Recording | None = None,
    cost: Cost = "time",
    max_evals: int = 4,
    climb: int = 0,
    max_generations: float | None = 6.0,
    max_seconds: float | None = None,
    blocks: Blocks = None,
    scheduler: object = None,
    memory: int = MEMORY,
    share: float = 1.0,
    journal: str | os.PathLike[str] | None = None,
    verbose: bool = True,
) -> SearchResult:
    """Find the plan that is so many times as fast, and nearest to the pictures without a cache.

    One run is recorded, in which everything is computed; of every range of blocks the exact best schedules are worked
    out from it; the best few are run, and the one with the highest PSNR to the recorded run is returned, with what was
    measured. Ctrl-C ends it with the best so far. The target is as it was before when this returns or raises. Search
    before compiling: a recorded run is not, and compiling would be counted as time.

    Args:
        target: as for :func:`dit_cache`; nothing may be cached in it.
        run: draws the calibration pictures, always the same ones, given the pipeline, and returns them: a list of
            pictures, videos or latents, as arrays, tensors or PIL images. One batch of a few prompts is enough.
        target_speedup: times as fast as the uncached ``run``, > 1.
        num_inference_steps: what ``run`` is expected to take; another number is an error.
        recording: of an earlier :func:`record` of the same ``run``; left out, it is made.
        cost: ``"time"``: the target is of the whole run's time, by the block times that were measured; ``"blocks"``:
            of block executions.
        max_evals: plans that are run at most.
        climb: further runs at most, each with one refresh of the best plan moved by a step.
        max_generations: block executions at most, over those of one uncached run; ``None``: no limit.
        max_seconds: time at most; a run that has begun is not broken off.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.
        memory: as for :func:`record`.
        share: as for :func:`record`.
        journal: a folder that keeps what was found; a search that was broken off goes on from there.
        verbose: show progress, on stderr.

    Returns:
        The plan, flagged where the target was not reached, and all that was tried. Under ``torch.distributed`` every
        rank calls this, rank 0 decides, and all return the same plan.

    Raises:
        TypeError, ValueError: as :func:`dit_cache` and :func:`record`; or an argument is of the wrong type or range;
            or ``run`` does not draw the same pictures each time.
        RuntimeError: none of the plans could be run.

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
    begun = time.perf_counter()
    wanted = checked_target(target_speedup)
    limits = Limits(max_evals, climb, max_generations, max_seconds)
    checked_cost(cost)
    if not callable(run):
        raise TypeError(f"run must be a function that is given the target and draws, not {run!r}")
    if recording is not None and not isinstance(recording, Recording):
        raise TypeError(f"recording must be a Recording, as record() returns, not {recording!r}")
    chains = [chain for chain, _ in chains_of(target, blocks)]
    here = fingerprint(chains)
    if recording is not None and recording.made.fingerprint != here:
        raise ValueError(
            f"the recording is of another model, {recording.made.model} (fingerprint {recording.made.fingerprint}, "
            f"here {here}): record this one"
        )
    if any(compiled_of(chain)() for chain in chains):
        warnings.warn(
            "the model is compiled: what is recorded is not, and the first runs of a plan compile, so speed-ups are "
            "not what they will be: search first, compile then",
            UserWarning,
            stacklevel=2,
        )
    kept = Journal.open(journal, {"fingerprint": here, "num_inference_steps": num_inference_steps, "cost": cost})
    with progress(verbose and leads()) as report:
        recorded = recording or kept.recording()
        if agree(recorded is None):  # on every rank, or on none
            recorded = record(
                target,
                run,
                num_inference_steps=num_inference_steps,
                blocks=blocks,
                scheduler=scheduler,
                memory=memory,
                share=share,
                report=report,
            )
            kept.keep_recording(recorded, samples_of(recorded.results))
        assert recorded is not None
        if num_inference_steps not in (None, recorded.steps):
            raise ValueError(
                f"num_inference_steps={num_inference_steps}, but the recording is of {recorded.steps} steps"
            )
        pipe = target.pipe if isinstance(target, BlockAdapter) else target
        named = {chain.path: chain.owner for chain in chains}
        owner = named.get(recorded.traces[0].path, chains[0].owner)  # recorded by another way to the same model
        drawn = partial(_drawn, run, pipe, owner, recorded.traces[0].inputs)
        spent, seconds = 1.0, recorded.run_ms / 1e3
        if recorded.results is None:  # it was loaded: what it drew is not in the file, and time was another machine's
            report("uncached run", 0, None)
            results, seconds = drawn()
            recorded, spent = replace(recorded, results=results), 2.0
        seconds, executions = agree(seconds), Savings.of(recorded, "blocks").total
        reference = samples_of(recorded.results) if leads() else None
        verifier = Verifier(target, drawn, reference, seconds, executions, blocks, scheduler)
        driver = _Driver(verifier, Planner(recorded, cost, report), wanted, limits, kept, report, begun, spent)
        return driver.drive()


@dataclass(eq=False)
class _Driver:
    """Runs what is proposed until a limit is reached; on several ranks, the first one decides."""

    verifier: Verifier
    planner: Planner
    target: float
    limits: Limits
    journal: Journal
    report: Report
    begun: float
    generations: float

    def __post_init__(self) -> None:
        self.evaluations: list[Evaluation] = []
        self.interrupted = False

    def drive(self) -> SearchResult:
        """All of it."""
        most = self.limits.evals, self.limits.climb
        proposed = proposals(self.planner, self.target, *most) if leads() else None
        score: float | None = None
        try:
            while (plan := self._next(proposed, score)) is not None:
                evaluation = self._evaluated(plan)
                self.evaluations.append(evaluation)
                self.generations += evaluation.blocks
                score = evaluation.worth
        except KeyboardInterrupt:
            self.interrupted = True
        return self._result()

    def _next(self, proposed: Proposals | None, score: float | None) -> CachePlan | None:
        """The plan that is to be run, on every rank."""
        text = None
        if proposed is not None:
            try:
                candidate = proposed.send(score) if self.evaluations else next(proposed)
                if self._affordable(candidate):
                    text = assembled(self.planner, candidate, self.target, "by search").to_json()
            except StopIteration:
                pass
        text = agree(text)
        return None if text is None else CachePlan.from_json(text)

    def _affordable(self, candidate: Candidate) -> bool:
        share = 1.0 / candidate.speedup
        seconds = time.perf_counter() - self.begun + share * self.verifier.seconds
        return not self.evaluations or self.limits.allow(self.generations + share, seconds)

    def _evaluated(self, plan: CachePlan) -> Evaluation:
        """Run a plan, or look up how it did."""
        most = self.limits.evals + self.limits.climb
        best = best_of(self.evaluations)
        note = "" if best is None else f"best so far {best.worth:.1f} dB at {best.speedup:.2f}×"
        self.report("run plans", len(self.evaluations), most, note)
        key = json.dumps([asdict(piece) for piece in plan.pieces])
        known: dict[str, Any] | None = agree(self.journal.evaluation(key))
        if known is None:
            found = self.verifier(plan)
            seen: dict[str, Any] = {"seconds": found.seconds, "blocks": found.blocks, "failure": found.failure}
            seen |= {} if found.score is None else asdict(found.score)
            known = agree(seen)
            self.journal.keep_evaluation(key, known)
        scored = None if known["failure"] else Score(**{each.name: known[each.name] for each in fields(Score)})
        speedup = self.verifier.seconds / known["seconds"] if known["seconds"] else 0.0
        return Evaluation(plan, known["seconds"], speedup, scored, known["blocks"], known["failure"])

    def _result(self) -> SearchResult:
        best = best_of(self.evaluations)
        failures = [each.failure or "its pictures are not finite" for each in self.evaluations]
        if best is None and failures:
            raise RuntimeError(f"none of {len(failures)} plans could be run: {'; '.join(dict.fromkeys(failures))}")
        if best is not None:
            plan, score = best.plan, best.score
            assert score is not None
            fast = self.planner.cost == "blocks" or best.speedup >= self.target * NEAR
            found = replace(
                plan.provenance,
                measured_speedup=best.speedup,
                psnr=score.psnr,
                relative_l1=score.relative_l1 if math.isfinite(score.relative_l1) else None,
                ssim=score.ssim,
                reached=plan.provenance.reached and fast,
            )
            plan = replace(plan, provenance=found)
        else:  # interrupted: what the recording says
            candidate = self.planner.candidate(self.target)
            plan = assembled(self.planner, candidate, self.target, "by planning from a recording")
            plan = CachePlan.from_json(agree(plan.to_json()))
        return SearchResult(
            plan,
            plan.provenance.reached,
            tuple(self.evaluations),
            self.planner.recording,
            self.generations,
            time.perf_counter() - self.begun,
            self.interrupted,
        )


def _drawn(run: Callable[[Any], Any], pipe: Any, owner: nn.Module, inputs: Mapping[str, Any]) -> tuple[Any, float]:
    """What one run draws, and the seconds that it takes.

    Raises:
        ValueError: it draws something else than what was recorded; of several ranks only the first is asked to.
    """
    with same_inputs(owner, inputs) if leads() else nullcontext():
        begun = time.perf_counter()
        results = run(pipe)
        caught_up()
        return results, time.perf_counter() - begun
