"""The report of a job, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class ActorCounts:
    """The counts of one actor: rows drawn, rows failed, and seconds of the pipeline for the rows drawn."""

    drawn: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class JobReport:
    """The report of one call of :func:`~dithooks.ray.generate`.

    Args:
        out: the output folder.
        rows: rows of the prompts file; each was drawn, failed, or skipped.
        drawn: rows that this call drew.
        failed: rows that failed in this call; they are in the output with their error.
        skipped: rows that were done before.
        failed_before: skipped rows that hold an error; ``retry_failed=True`` draws them again.
        seconds: time of the whole call, the loading of pipelines included.
        blocks_run: block executions for the rows that this call drew.
        blocks_total: block executions for the same rows without a cache; 0 without a plan.
        actors: counts of each actor, by the first characters of its id in Ray.
        remarks: warnings and remarks of the cache, without repetitions.

    Example:
        >>> report = JobReport("out", 12, 7, 1, 4, 0, 10.0, 312.0, 672.0, {"1f2e3d4c": ActorCounts(7, 1, 8.25)})
        >>> report.complete
        False
        >>> print(report)
        12 rows in out: 7 drawn, 1 failed, 4 done before, in 10.0 s
        2.15 times fewer blocks run
        actor       drawn   failed   seconds a row
        1f2e3d4c        7        1           1.179
    """

    out: str
    rows: int
    drawn: int
    failed: int
    skipped: int
    failed_before: int
    seconds: float
    blocks_run: float = 0.0
    blocks_total: float = 0.0
    actors: Mapping[str, ActorCounts] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether every row of the prompts has its picture."""
        return self.failed + self.failed_before == 0

    def __str__(self) -> str:
        before = f" ({self.failed_before} of them failed)" if self.failed_before else ""
        lines = [
            f"{self.rows} rows in {self.out}: {self.drawn} drawn, {self.failed} failed, {self.skipped} done before"
            f"{before}, in {self.seconds:.1f} s"
        ]
        if self.blocks_run:
            lines.append(f"{self.blocks_total / self.blocks_run:.2f} times fewer blocks run")
        if self.actors:
            lines.append("actor       drawn   failed   seconds a row")
        for name, each in self.actors.items():
            mean = f"{each.seconds / each.drawn:.3f}" if each.drawn else "-"
            lines.append(f"{name:8} {each.drawn:8} {each.failed:8} {mean:>15}")
        return "\n".join([*lines, *(f"remark: {text}" for text in self.remarks)])
