"""A transformer as it is, uncompiled: every method in turn, next to the plain run of the same round."""

from __future__ import annotations

import time
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench.checks.watch import Watch
from dithooks import plan, record

from .deadline import Deadline
from .geometry import Geometry
from .limits import GOAL, limits
from .methods import EVERY, Method, Setting, Unavailable
from .models import build
from .report import FAILED, MEASURED
from .session import Known, Row, Session
from .watching import Ran, block_times, counting, timed

WARM_UP = 3  # steps: computed, reused, computed
FEWEST, MOST = 6, 12  # steps of a run, where the time decides
PLANNED = "planned"  # the row that takes a recording


class Eager:
    """One transformer, and what is known of its plain run.

    Args:
        session: what all parts share.
        geometry: of the transformer.
        deadline: of this part.
        facts: what is said of the part besides its rows.
    """

    def __init__(self, session: Session, geometry: Geometry, deadline: Deadline, facts: dict[str, Any]) -> None:
        self.session, self.geometry, self.deadline, self.facts = session, geometry, deadline, facts
        self.device = session.device
        begun = time.perf_counter()
        self.pipe, self.run = build(geometry, self.device)
        facts["built_in_seconds"] = time.perf_counter() - begun
        facts["parameters"] = sum(each.numel() for each in self.pipe.transformer.parameters())
        facts["tokens"], facts["tera_flop_of_a_call"] = geometry.tokens, geometry.flops / 1e12
        self.known = session.known.setdefault(geometry.name, Known())
        self.steps = 0
        self.plain: list[float] = []
        self.plain_ran = Ran(geometry.blocks)
        self.plain_drawn = torch.empty(0)
        self.plain_peak: int | None = None

    def prepare(self, rows: int) -> None:
        """Warm up, and find how many steps there is time for, where the geometry leaves that open."""
        few = self.geometry.steps or FEWEST
        self.run(few, 2)
        step = timed(self.device, lambda: self.run(few, 1)).seconds
        call = step / self.geometry.calls
        self.steps = self.geometry.steps or self.known.steps or steps_that_fit(self.deadline.left, step, rows)
        self.known.steps = self.steps
        self.facts |= {"steps": self.steps, "seconds_of_a_call": call}
        self.facts["tera_flop_per_second"] = self.geometry.flops / 1e12 / call

    @property
    def setting(self) -> Setting:
        """What methods are attached to."""
        return Setting(self.pipe, self.steps, self.known.plan)

    def uncached(self, row: Row) -> None:
        """The plain run: its time, that of each block, and what the host waits for without any cache."""
        self.time_plain(row)
        self.known.times = block_times(self.pipe.transformer, lambda: self.run(self.steps))
        times = self.known.times
        self.facts["block_ms_least_and_most"] = [round(min(times.block_ms), 4), round(max(times.block_ms), 4)]
        self.facts["outside_of_blocks_ms_of_a_call"] = times.other_ms
        self.plain_ran = self.look(row)

    def time_plain(self, row: Row) -> float:
        """One more plain run."""
        done = timed(self.device, lambda: self.run(self.steps))
        self.plain.append(done.seconds)
        self.plain_drawn, self.plain_peak = done.drawn, done.peak_bytes
        self.known.plain_seconds = median(self.plain)
        row |= {"status": MEASURED, "why": "", "runs": len(self.plain), "seconds": median(self.plain)}
        row |= {"host_seconds": done.host_seconds, "all_seconds": self.plain, "peak_bytes": self.plain_peak}
        row |= {"finite": bool(done.drawn.isfinite().all()), "compiled": None}
        return done.seconds

    def look(self, row: Row) -> Ran:
        """One run that is not timed: which blocks run, and what the host reads meanwhile."""
        with counting(self.pipe.transformer, self.geometry) as ran, Watch(self.device) as watch:
            self.run(self.steps)
        row |= {"steps": ran.picture(self.geometry.calls), "blocks_run": sum(ran.counts), "blocks_counted": ran.counts}
        row |= {"host_reads": watch.reads.total(), "host_waits": watch.reported, "float64_tensors": watch.doubles}
        return ran

    def make_plan(self) -> None:
        """Record one run, and plan for as many block executions as the others have."""
        begun = time.perf_counter()
        recording = record(self.pipe, lambda _: [self.run(self.steps)])
        recorded = time.perf_counter()
        computed, blocks = -(-self.steps // EVERY), self.geometry.blocks
        target = self.steps * blocks / (computed * blocks + (self.steps - computed))
        self.known.plan = plan(recording, target, cost="blocks")
        self.facts["recorded_run_seconds"] = recording.recorded_ms / 1e3
        self.facts["recording_seconds_in_all"] = recorded - begun
        self.facts["planning_seconds"] = time.perf_counter() - recorded
        self.facts["plan"] = "; ".join(map(str, self.known.plan.pieces))

    def visit(self, method: Method, row: Row, plain_seconds: float) -> None:
        """Attach a method, warm it up, and time one run; the first time, also look at what it does.

        Raises:
            Unavailable: what the method needs is missing.
        """
        if find_spec(method.needs) is None:
            raise Unavailable(f"{method.needs} is not installed")
        with method.attach(self.setting) as handle:
            self.run(self.steps, WARM_UP)
            if "steps" not in row:
                ran = self.look(row)
                row["blocks_all"] = sum(self.plain_ran.counts)
            else:
                ran = None
            done = timed(self.device, lambda: self.run(self.steps))
            if handle is not None:
                row["bytes_held"] = handle.stats.bytes_peak
        self.note(row, done.seconds, done.host_seconds, plain_seconds)
        if done.peak_bytes is not None and self.plain_peak is not None:
            row |= {"peak_bytes": done.peak_bytes, "peak_above_plain_bytes": done.peak_bytes - self.plain_peak}
        if ran is not None:
            row |= apart(done.drawn, self.plain_drawn)

    def note(self, row: Row, seconds: float, host_seconds: float, plain_seconds: float) -> None:
        """One more timed run of a row, next to the plain run of its round."""
        row.setdefault("all_seconds", []).append(seconds)
        row.setdefault("all_speedups", []).append(plain_seconds / seconds)
        row |= {"status": MEASURED, "why": "", "runs": len(row["all_seconds"]), "compiled": None}
        row |= {"seconds": median(row["all_seconds"]), "speedup": median(row["all_speedups"])}
        row["host_seconds"] = host_seconds
        assert self.known.times is not None
        plain = median(self.plain)
        row |= limits(self.plain_ran.counts, row["blocks_counted"], self.known.times.block_ms, plain, row["speedup"])
        row["reaches_goal"] = row["ratio_to_limit"] >= GOAL


def apart(drawn: Tensor, plain: Tensor) -> dict[str, Any]:
    """How far from the plain latents; sane is more than nothing, and less than all."""
    finite = bool(drawn.isfinite().all())
    off = float((drawn.float() - plain.float()).norm() / plain.float().norm()) if finite else None
    return {"finite": finite, "relative_error": off, "sane": off is not None and 1e-6 < off < 1}


def steps_that_fit(seconds: float, step: float, rows: int) -> int:
    """An even number of steps, such that every row can be looked at and timed once.

    In plain runs: five for the plain row, the warm-up and the recording, and for each other row one and a half.

    Example:
        >>> steps_that_fit(130, 1.6, 5), steps_that_fit(130, 0.1, 5), steps_that_fit(130, 9, 5)
        (6, 12, 6)
    """
    runs = 5 + 1.5 * rows
    return min(max(int(seconds / (runs * max(step, 1e-9))) // 2 * 2, FEWEST), MOST)


def measure(session: Session, geometry: Geometry, methods: tuple[Method, ...], part: Row, deadline: Deadline) -> None:
    """All rows of the part, as far as the time allows: round by round, so that each is next to a plain run."""
    facts = part.setdefault("facts", {})
    plain_row, *rows = part["rows"]
    eager: Eager | None = None
    with session.guarded(plain_row, deadline):
        eager = Eager(session, geometry, deadline, facts)
        eager.prepare(len(rows))
        eager.uncached(plain_row)
    if eager is None or plain_row["status"] != MEASURED or not eager.plain_ran.calls:
        for row in rows:
            row["why"] = f"the plain run: {plain_row['why']}"
        return
    seconds = eager.plain[0]
    if PLANNED in (row["name"] for row in rows):
        planned = next(row for row in rows if row["name"] == PLANNED)
        if deadline.fits(2 * seconds):
            with session.guarded(planned, deadline):
                eager.make_plan()
                planned["why"] = "there is a plan, and there was no time to run it"
        else:
            planned["why"] = "there was no time to record a run"
    for number in range(session.rounds):
        if number and not deadline.fits(1.5 * eager.plain[-1]):
            break
        if number:
            with session.guarded(plain_row, deadline):
                seconds = eager.time_plain(plain_row)
        for method, row in zip(methods, rows, strict=True):
            turn(session, eager, method, row, seconds, deadline)


def turn(session: Session, eager: Eager, method: Method, row: Row, plain_seconds: float, deadline: Deadline) -> None:
    """A row's turn in a round, if it fits."""
    if row["status"] == FAILED or row.get("closed"):
        return
    expected = row.get("visit_seconds", 1.7 * plain_seconds)
    if not deadline.fits(expected):
        if row["status"] != MEASURED:
            row["why"] = f"it takes about {expected:.1f} s, and {max(deadline.left, 0):.1f} s were left of this part"
        return
    begun = time.perf_counter()
    with session.guarded(row, deadline):
        eager.visit(method, row, plain_seconds)
    row["closed"] = row["status"] != MEASURED  # what is missing now will be missing in the next round
    row["visit_seconds"] = time.perf_counter() - begun
