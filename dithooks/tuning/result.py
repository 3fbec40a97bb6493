"""The result of a search: the best plan, and all that were tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from math import isfinite

from ..config.cache_plan import CachePlan
from ..config.plan_tiers import PlanTiers, target_name
from ..markup import diagram, step_squares, table
from ..recording.recording import Recording
from ..stats.text_table import text_table
from .evaluation import Evaluation, Objective

MOST_WHY = 200  # characters of the reason that no weights could be fitted: an error of the scheduler may be long


@dataclass(frozen=True, eq=False, repr=False)
class SearchResult:
    """The result of :func:`search`; printed, it is a table of the plans that were tried.

    Args:
        plan: the best plan: attach it with ``dit_cache(pipe, result.plan)``, keep it with ``result.plan.save(path)``.
        reached: whether the plan reaches the target: the speed-up by prediction, and by measurement within 5%; or the
            PSNR, by the ``objective`` of the search.
        evaluations: every plan that was run, in order.
        recording: the recording of the uncached run; :func:`plan` makes plans for other targets from it.
        run_equivalents: block executions of the whole search, over those of one uncached run.
        seconds: time of the whole search.
        interrupted: whether Ctrl-C ended the search.
        target_psnr: the PSNR in dB that was asked for in place of a speed-up; ``None``: a speed-up was.
        reused_runs: block executions that a journal has saved, over those of one uncached run: of the recorded run, and
            of plans that an earlier search has run.
        tiers: the result for each of several targets, by the name of its tier; empty where there was one target. All
            else is then of all of them together, and ``plan`` is that of the first.

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
        >>> from dithooks import search
        >>> _ = torch.manual_seed(0)
        >>> found = search(Model(), run, 1.6, cost="blocks", verbose=False)
        >>> found.reached, found.plan.speedup >= 1.6, found.evaluations[0].score is not None
        (True, True, True)
    """

    plan: CachePlan
    reached: bool
    evaluations: tuple[Evaluation, ...]
    recording: Recording
    run_equivalents: float
    seconds: float
    interrupted: bool = False
    target_psnr: float | None = None
    tiers: Mapping[str, SearchResult] = field(default_factory=dict)
    reused_runs: float = 0.0

    @property
    def plans(self) -> PlanTiers:
        """The plans of all targets, as one file keeps them; of one target, a tier with its name, such as "2x"."""
        if not self.tiers:
            return PlanTiers({target_name(self.plan.provenance.target): self.plan})
        return PlanTiers({name: each.plan for name, each in self.tiers.items()})

    def __repr__(self) -> str:
        psnr = self.plan.provenance.psnr
        drawn = "" if psnr is None else f", PSNR {psnr:.2f} dB"
        ending = f"{self._taken()}{'; weights are not fitted to the scheduler' if self._unfitted() else ''}"
        return f"<SearchResult {self.plan.speedup:.2f}× fewer blocks{drawn}; {ending}>"

    def _repr_html_(self) -> str:
        """Return the plans that were run, for a notebook: as a diagram of speed and quality, and as a table."""
        if self.tiers:
            return "".join(f"<p><b>{escape(name)}</b></p>{each._repr_html_()}" for name, each in self.tiers.items())
        why = "".join(f"<br/>{escape(each)}" for each in (self._unfitted(),) if each)
        head, rows = self._table()
        points, best = dict[str, tuple[float, float]](), ""
        for number, (each, row) in enumerate(zip(self.evaluations, rows, strict=True), 1):
            if each.score is not None and isfinite(each.score.psnr):
                name = f"{number}: {row[1]}, {each.speedup:.2f}×, {each.score.psnr:.2f} dB"
                points[name] = each.speedup, each.score.psnr
                best = name if row[0].startswith("best") else best
        numbered = [[number, *row[:2], step_squares(row[2]), *row[3:]] for number, row in enumerate(rows, 1)]
        seen = diagram(points, ("times as fast", "PSNR in dB: up is better"), best)
        return f"{seen}{table(['plan', *head], numbered)}{escape(self._taken())}{why}"

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """Return the table of the plans that were run; one that is wider than so many columns is cut into parts."""
        if self.tiers:
            parts = [f"{name}\n{each._tabulated(width)}" for name, each in self.tiers.items()]
            together = f"together {self.run_equivalents:.1f} run equivalents, {self.seconds:.0f} s"
            text = "\n\n".join([*parts, "; ".join(filter(None, [together, self._saved()]))])
        else:
            text = self._tabulated(width)
        return "\n".join(filter(None, [text, self._unfitted()]))

    def _tabulated(self, width: int | None) -> str:
        """Return the table of the plans that were run for one target, and what that took."""
        head, rows = self._table()
        return f"{text_table([head, *rows], width, left=len(head))}\n{self._taken()}"

    def _table(self) -> tuple[list[str], list[list[str]]]:
        """Return the heads of the columns, and a row for each plan that was run."""
        head = ["", "range", "steps", "predicted", "measured", "error", "PSNR", "worst", "rel. L1", "SSIM"]
        further = ["LPIPS"] if any(each.score and each.score.lpips is not None for each in self.evaluations) else []
        rows = [_row(each, _is_same(each.plan, self.plan), len(further)) for each in self.evaluations]
        return [*head, *further], rows

    def _taken(self) -> str:
        """Say what the search took, and what it missed."""
        goal = f"{self.plan.provenance.target:g}×" if self.target_psnr is None else f"{self.target_psnr:g} dB"
        ran = sum(not each.is_reused for each in self.evaluations)
        plans = f"{ran} plan{'' if ran == 1 else 's'} run"
        taken = f"{plans}, {self.run_equivalents:.1f} run equivalents, {self.seconds:.0f} s"
        flags = ["" if self.reached else f"{goal} was not reached", "interrupted" if self.interrupted else ""]
        return "; ".join(filter(None, [taken, *flags, self._saved()]))

    def _unfitted(self) -> str:
        """Say why no weights could be fitted; nothing of intervals, which reuse residuals as they are."""
        weights = [each for piece in self.plan.pieces for each in piece.coefficients if each is not None]
        return "" if all(each == (1.0,) for each in weights) else unfitted(self.recording)

    def _saved(self) -> str:
        """Say what a journal has saved."""
        if not self.reused_runs:
            return ""
        reused = sum(each.is_reused for each in self.evaluations)
        plans = f"; {reused} plan{'' if reused == 1 else 's'} reused" if reused else ""
        return f"the journal saved {self.reused_runs:.1f} runs{plans}"


def unfitted(recording: Recording) -> str:
    """Say why no weights can be fitted in closed loop; nothing where they can be."""
    if recording.solver is not None:
        return ""
    why = " ".join((recording.unsolved or "an earlier version made the recording").split())
    return f"weights are those of the recording, not fitted to the scheduler: {why[:MOST_WHY]}"


def unguided(recording: Recording) -> str:
    """Say why no steps of one branch alone are planned; nothing where they may be."""
    if recording.solver is None or recording.solver.apart is not None:
        return ""
    return (
        "no steps of one branch alone: the recorded guidance is no weighted sum of two outputs at each step, the one "
        "with the prompt is not called first, or an earlier version made the recording"
    )


def _row(evaluation: Evaluation, best: bool, further: int) -> list[str]:
    plan, score = evaluation.plan, evaluation.score
    ranges = ", ".join(  # of each transformer
        "output"
        if piece.payload == "output"
        else " and ".join(f"{own.first}–{own.first + own.blocks - 1}" for own in piece.ranges)
        for piece in plan.pieces
    )
    steps = ", ".join(piece.picture for piece in plan.pieces)
    found = plan.provenance
    marks = ["best"] * best + ["reused"] * evaluation.is_reused
    row = [", ".join(marks), ranges, steps, f"{found.predicted_speedup:.2f}×"]
    if score is None:
        unknown = ["–"] * (3 + further)
        return [*row, "failed", f"{found.predicted_error:.2g}", *unknown, evaluation.failure[:60]]
    ssim = "–" if score.ssim is None else f"{score.ssim:.4f}"
    measured = [
        f"{evaluation.speedup:.2f}×",
        f"{found.predicted_error:.2g}",
        f"{score.psnr:.2f} dB",
        f"{score.worst:.1f}",
    ]
    learned = ["–" if score.lpips is None else f"{score.lpips:.4f}"]
    return [*row, *measured, f"{score.relative_l1:.2g}", ssim, *learned[:further]]


def _is_same(one: CachePlan, other: CachePlan) -> bool:
    """Return whether two plans compute the same steps of the same ranges, whatever their weights are."""
    return [(each.schedule[1:], each.predictor.anchors) for each in one.pieces] == [
        (each.schedule[1:], each.predictor.anchors) for each in other.pieces
    ]


def best_evaluation(evaluations: Sequence[Evaluation], objective: Objective = "both") -> Evaluation | None:
    """Return the best evaluation of those predicted to reach the target, or else the fastest one.

    ``None``: no plan could be run.
    """

    def rank(evaluation: Evaluation) -> tuple[bool, float, float]:
        made, merit = evaluation.plan.provenance, evaluation.merit(objective)
        return made.reached, 0.0 if made.reached else made.predicted_speedup, merit or 0.0

    scored = [evaluation for evaluation in evaluations if evaluation.psnr is not None]
    return max(scored, key=rank) if scored else None


def fastest_evaluation(evaluations: Sequence[Evaluation], objective: Objective, least: float) -> Evaluation | None:
    """Return the fastest evaluation of those that draw at a PSNR at least, or else the one that draws best."""
    scored = [(merit, each) for each in evaluations if (merit := each.merit(objective)) is not None]
    good = [each for merit, each in scored if merit >= least]
    if good:
        return max(good, key=lambda each: (each.plan.provenance.predicted_speedup, each.merit(objective)))
    return max(scored, key=lambda pair: pair[0])[1] if scored else None
