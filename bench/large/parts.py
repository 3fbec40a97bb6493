"""What is measured, by importance, and how much of the time each may take."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from . import NAMES, compiled, eager
from .deadline import Deadline
from .geometry import FLUX, TINY_FLUX, TINY_WAN, WAN_LARGE, WAN_SMALL, Geometry
from .methods import CACHE_DIT, FIRST_BLOCK, METHODS, OURS, PLAIN, Method
from .report import FAILED, new_row
from .session import Row, Session, first_line

LEAST = 10.0  # seconds with which a part is begun
Measure = Callable[[Session, Geometry, tuple[Method, ...], Row, Deadline], None]


@dataclass(frozen=True)
class Part:
    """One transformer in one way.

    Args:
        name: to ask for it by.
        geometry: of the transformer.
        tiny: stands for it, to go through the motions.
        way: how it is run.
        methods: beside the plain run, by importance.
        share: of all the time, at most; what a part leaves, the next ones may take.
        measure: fills the rows.
    """

    name: str
    geometry: Geometry
    tiny: Geometry
    way: str
    methods: tuple[Method, ...]
    share: float
    measure: Measure


by_blocks: Measure = partial(compiled.measure, whole=False)
as_a_whole: Measure = partial(compiled.measure, whole=True)
FIVE = (*OURS, CACHE_DIT, FIRST_BLOCK)
PARTS = (
    Part("flux", FLUX, TINY_FLUX, "eager", METHODS, 0.38, eager.measure),
    Part("wan", WAN_SMALL, TINY_WAN, "eager", FIVE, 0.32, eager.measure),
    Part("flux_blocks", FLUX, TINY_FLUX, "blocks compiled", FIVE, 1.0, by_blocks),
    Part("flux_whole", FLUX, TINY_FLUX, "compiled as a whole", OURS[:2], 1.0, as_a_whole),
    Part("wan_14b", WAN_LARGE, TINY_WAN, "eager", FIVE, 1.0, eager.measure),
)


def measure_all(session: Session, names: tuple[str, ...] = NAMES) -> None:
    """Every part, in order. All rows are there from the beginning, as not reached."""
    whole = session.deadline.left
    tiny = session.report.found["size"] == "tiny"
    chosen = [part for part in PARTS if part.name in names]
    laid_out = []
    for part in chosen:
        geometry = part.tiny if tiny else part.geometry
        rows = [new_row(each.name, each.library, each.what) for each in (PLAIN, *part.methods)]
        laid_out.append((part, geometry, session.report.part(part.name, f"{geometry.what}; {part.way}", rows)))
    session.write()
    for part, geometry, found in laid_out:
        share = part.share if len(chosen) > 1 else 1.0
        deadline = session.deadline.within(share * whole)
        if not deadline.fits(LEAST):
            found["why"] = f"{max(deadline.left, 0):.0f} s were left in all"
            for row in found["rows"]:
                row["why"] = found["why"]
            session.write()
            continue
        session.say(f"{part.name}: {found['what']}; {deadline.left:.0f} s")
        begun = session.deadline.spent
        try:
            part.measure(session, geometry, part.methods, found, deadline)
        except Exception as error:  # rows are guarded; this is what goes wrong between them
            traceback.print_exc()
            found |= {"status": FAILED, "why": f"{type(error).__name__}: {first_line(error)}"}
        if found["status"] != FAILED:  # a row that failed says so itself; what follows from it is in the others
            plain = found["rows"][0]
            found |= {"status": plain["status"], "why": plain["why"]}
        facts = found.setdefault("facts", {})
        facts["part_seconds"] = session.deadline.spent - begun
        facts["bytes_left_on_the_device"] = session.free()
        session.write()
