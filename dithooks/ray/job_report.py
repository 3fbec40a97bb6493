"""What a job came to, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Counts:
    """Rows of one actor: drawn, failed, and the seconds its pipeline took for those that were drawn."""

    drawn: int = 0
    failed: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class JobReport:
    """What one call of :func:`~dithooks.ray.generate` did.

    Args:
        out: the folder.
        rows: of the prompts; each is drawn, failed or skipped.
        drawn: now.
        failed: now; they are in the output with their error.
        skipped: done before, of which
        failed_before: so many hold an error; ``retry_failed=True`` draws them again.
        seconds: from start to end, the loading of pipelines included.
        blocks_run: block executions of the rows drawn now, of
        blocks_total: as many without the cache; 0 without a plan.
        actors: what each did, by the first characters of its id in Ray.
        remarks: what the cache had to say, once each.

    Example:
        >>> report = JobReport("out", 12, 7, 1, 4, 0, 10.0, 312.0, 672.0, {"1f2e3d4c": Counts(7, 1, 8.25)})
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
    actors: Mapping[str, Counts] = field(default_factory=dict)
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
