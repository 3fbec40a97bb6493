"""The same rows compiled: block by block (``compile_repeated_blocks``), or the whole transformer as one graph.

Each row is attached, then compiled from nothing, then timed; the runs of a row follow each other, since to alternate
would mean to compile again. The plain row comes first, and is what the others are compared with. Time to compile is
told apart: the first run, less what a later one takes. Whatever the compiler's own cache on disk has kept of an earlier
row makes that shorter; which blocks run was counted before, uncompiled.
"""

from __future__ import annotations

from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import nn
from torch._dynamo.utils import counters

from .deadline import Deadline
from .eager import PLANNED, WARM_UP, Eager, apart
from .geometry import Geometry
from .limits import GOAL, limit_of_blocks, limit_of_times
from .methods import PLAIN, Method, Unavailable
from .report import MEASURED
from .session import Row, Session
from .watching import block_times, counting, timed

EXPECTED = {False: 30.0, True: 90.0}  # seconds to compile blocks, or a whole, before any is known
TRACING = 3.0  # the same, where the backend only traces


def measure(
    session: Session, geometry: Geometry, methods: tuple[Method, ...], part: Row, deadline: Deadline, whole: bool
) -> None:
    """All rows of the part, one after the other, as far as the time allows."""
    facts = part.setdefault("facts", {})
    rows = part["rows"]
    facts |= {"compiled": "the whole transformer" if whole else "block by block", "backend": session.backend}
    expected = EXPECTED[whole] if session.backend == "inductor" else TRACING
    eager: Eager | None = None
    with session.guarded(rows[0], deadline):
        eager = Eager(session, geometry, deadline, facts)
        eager.prepare(len(rows))
        eager.known.times = eager.known.times or block_times(eager.pipe.transformer, lambda: eager.run(eager.steps))
        rows[0]["why"] = "the model was made, and there was no time to compile it"
    if eager is None or eager.known.times is None:
        for row in rows[1:]:
            row["why"] = f"the plain run: {rows[0]['why']}"
        return
    for row in rows:
        if row["name"] == PLANNED and eager.known.plan is None and deadline.fits(2 * expected):
            with session.guarded(row, deadline):
                eager.make_plan()
                row["why"] = "there is a plan, and there was no time to run it"
    for method, row in zip((PLAIN, *methods), rows, strict=True):
        if not deadline.fits(expected):
            row["why"] = f"it may take {expected:.0f} s, and {max(deadline.left, 0):.0f} s were left of this part"
            continue
        left = deadline.left
        with session.guarded(row, deadline):
            visit(session, eager, method, row, deadline, whole)
        expected = max(left - deadline.left, 1.0)
        if method is PLAIN and row["status"] != MEASURED:
            for other in rows[1:]:
                other["why"] = "there is no plain run to compare with"
            return
        if method is PLAIN:
            eager.plain = row["all_seconds"]


def visit(session: Session, eager: Eager, method: Method, row: Row, deadline: Deadline, whole: bool) -> None:
    """Attach, count, compile, time.

    Raises:
        Unavailable: what the method needs is missing.
    """
    if find_spec(method.needs) is None:
        raise Unavailable(f"{method.needs} is not installed")
    transformer, steps, device = eager.pipe.transformer, eager.steps, session.device
    row |= {"compiled": "whole" if whole else "blocks", "fullgraph": method.whole}
    try:
        with method.attach(eager.setting):
            eager.run(steps, WARM_UP)  # a first call may be made more than once
            with counting(transformer, eager.geometry) as ran:
                eager.run(steps)
            row |= {"steps": ran.picture(eager.geometry.calls)}
            row |= {"blocks_run": sum(ran.counts), "blocks_counted": ran.counts}
            torch._dynamo.reset()
            counters.clear()
            compile_way(transformer, whole, method.whole, session.backend)
            times = [timed(device, lambda: eager.run(steps)).seconds]
            row |= {"graphs": counters["stats"]["unique_graphs"], "breaks": sum(counters["graph_break"].values())}
            while len(times) <= session.rounds and (len(times) < 2 or deadline.fits(1.2 * times[-1])):
                done = timed(device, lambda: eager.run(steps))
                times.append(done.seconds)
                note(row, eager, method, times, done.host_seconds)
                session.write()
            row["graphs_later"] = counters["stats"]["unique_graphs"] - row["graphs"]
    finally:
        uncompile(transformer)
    if method is PLAIN:
        eager.plain_drawn = done.drawn
    row |= {"finite": bool(done.drawn.isfinite().all())} if method is PLAIN else apart(done.drawn, eager.plain_drawn)


def note(row: Row, eager: Eager, method: Method, times: list[float], host_seconds: float) -> None:
    """What is known after one more run; the first of them compiled."""
    seconds = median(times[1:])
    row |= {"status": MEASURED, "why": "", "runs": len(times) - 1, "all_seconds": times[1:], "seconds": seconds}
    row |= {"compile_seconds": times[0] - seconds, "host_seconds": host_seconds}
    if method is PLAIN:
        return
    geometry, block_times_known = eager.geometry, eager.known.times
    assert block_times_known is not None
    plain = [eager.steps * geometry.calls] * geometry.blocks
    speedup = median(eager.plain) / seconds
    found: dict[str, Any] = {
        "limit": limit_of_blocks(plain, row["blocks_counted"]),
        "limit_by_time": limit_of_times(plain, row["blocks_counted"], block_times_known.block_ms),
    }
    row |= found | {name.replace("limit", "ratio_to_limit"): speedup / limit for name, limit in found.items()}
    row |= {"speedup": speedup, "blocks_all": sum(plain), "reaches_goal": speedup / found["limit"] >= GOAL}
    if eager.known.plain_seconds is not None:
        row["speedup_over_plain_eager"] = eager.known.plain_seconds / seconds


def compile_way(transformer: nn.Module, whole: bool, fullgraph: bool, backend: str) -> None:
    """As one graph, or one for each class of block."""
    if whole:
        transformer.compile(fullgraph=fullgraph, backend=backend)
    else:
        compile_blocks: Any = transformer.compile_repeated_blocks
        compile_blocks(fullgraph=fullgraph, backend=backend)


def uncompile(transformer: nn.Module) -> None:
    """As it was before either."""
    for module in transformer.modules():
        module._compiled_call_impl = None
