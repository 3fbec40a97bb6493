"""One run of the measurements: the time that is left, what is known so far, and a guard around every row."""

from __future__ import annotations

import gc
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dithooks import CachePlan
from dithooks.environment.machine import memory_allocated

from .deadline import Deadline, OutOfTime
from .methods import Unavailable
from .report import FAILED, Report
from .watching import Times

Row = dict[str, Any]


@dataclass
class Known:
    """Of one transformer, what a later part need not find again: it is made anew, and the same."""

    plan: CachePlan | None = None
    steps: int | None = None
    times: Times | None = None
    plain_seconds: float | None = None


@dataclass
class Session:
    """What all parts share.

    Args:
        device: where.
        deadline: of all of it.
        report: what is known so far.
        backend: of ``torch.compile``.
        rounds: timed runs of each row, at most.
    """

    device: torch.device
    deadline: Deadline
    report: Report
    backend: str = "inductor"
    rounds: int = 3
    known: dict[str, Known] = field(default_factory=dict)

    def write(self) -> None:
        """Keep what there is."""
        self.report.write(self.deadline.spent)

    def say(self, text: str) -> None:
        """One line of progress."""
        print(f"[{self.deadline.spent:4.0f} s] {text}", file=sys.stderr, flush=True)

    @contextmanager
    def guarded(self, row: Row, deadline: Deadline) -> Iterator[None]:
        """Work on a row. Whatever happens to it is written down, and the next one has its turn."""
        try:
            with deadline.kept():
                yield
        except OutOfTime:
            row["why"] = "broken off when the time of this part was up" + ("; fewer runs" if "seconds" in row else "")
        except (Unavailable, ModuleNotFoundError) as error:
            row["why"] = str(error)
        except Exception as error:
            traceback.print_exc()
            row |= {"status": FAILED, "why": f"{type(error).__name__}: {first_line(error)}"}
        finally:
            self.write()
            self.say(f"{row['name']}: {row['status']}" + (f", {row['why']}" if row["why"] else ""))

    def free(self) -> int | None:
        """Give back what the last part has left on the device; bytes that are still taken."""
        torch._dynamo.reset()
        gc.collect()
        if self.device.type != "cpu" and (empty := getattr(torch.get_device_module(self.device), "empty_cache", None)):
            empty()
        return memory_allocated(self.device) if self.device.type != "cpu" else None


def first_line(error: BaseException) -> str:
    """Of its text, which for a compiler's errors can be pages."""
    return (str(error).strip().splitlines() or [""])[0][:300]
