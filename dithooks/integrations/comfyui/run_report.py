"""What a cache did while a sampler drew, in a line or two."""

from __future__ import annotations

import logging
from collections import Counter, deque
from dataclasses import dataclass, field

from ...handle import CacheHandle

LATEST = 8  # runs that a report lists
LOG = logging.getLogger("dithooks")  # ComfyUI's console shows the log


@dataclass
class RunReport:
    """Lines about the latest runs of the samplers behind one node.

    Args:
        lines: one for each run, the latest last.
    """

    lines: deque[str] = field(default_factory=lambda: deque(maxlen=LATEST))

    def add(self, line: str, is_warning: bool = False) -> None:
        """Add a line, and log it."""
        LOG.log(logging.WARNING if is_warning else logging.INFO, "dithooks: %s", line)
        self.lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self.lines) or "no sampler has drawn with this model yet: connect what is drawn to `after`"


def summary_line(cache: CacheHandle, steps: int) -> tuple[str, bool]:
    """Return what a cache did in a run of so many steps, and whether that was nothing.

    Args:
        cache: after the run.
        steps: of the sampler.
    """
    calls: dict[int, list[bool]] = {}
    for each in cache.decisions:
        calls.setdefault(each.step, []).append(each.reuse)
    reused, some = sum(all(each) for each in calls.values()), sum(any(each) for each in calls.values())
    stats = cache.stats
    if not some:
        reasons = Counter({reason: count for reason, count in stats.reasons.items() if count})
        why = ", ".join(f"{reason} {count}×" for reason, count in reasons.most_common(3)) or "the model was not called"
        return f"NOTHING was reused in {steps} steps: {why}", True
    partly = f" and {some - reused} in part" if some > reused else ""
    fewer = stats.blocks_total / max(stats.blocks_run, 1)
    return f"{reused} of {steps} steps reused{partly}, {fewer:.1f}× fewer blocks", False
