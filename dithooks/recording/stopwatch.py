"""The time of each block of a transformer, measured without waiting for the device where it has timed events."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

import torch
from torch import nn

from ..environment.machine import synchronize

OTHER, SAMPLING = "other", "sampling"


def has_timed_events(device: torch.device) -> bool:
    """Whether a device measures the time between two events in its stream; not all backends do."""
    if device.type in ("cpu", "meta"):
        return False
    try:
        since, until = (torch.Event(device=device, enable_timing=True) for _ in range(2))
        since.record()
        until.record()
        until.synchronize()
        return bool(since.elapsed_time(until) >= 0)
    except (RuntimeError, NotImplementedError, AttributeError):  # the last before PyTorch 2.4
        return False


class Stopwatch:
    """A stopwatch that adds the time from each mark to the next to the label of the first of the two.

    On the host, marks read the clock. On an accelerator they are events in its stream, which are read at the end. An
    accelerator without timed events is synchronized at every mark.

    Args:
        module: its device is timed.
    """

    def __init__(self, module: nn.Module) -> None:
        tensor = next(iter(module.parameters()), None)
        self._device = torch.device("cpu") if tensor is None else tensor.device
        self._events = has_timed_events(self._device)
        self._marks: list[tuple[Any, int | str | None]] = []
        self._spent: Counter[int | str] = Counter()

    def mark(self, what: int | str | None) -> None:
        """Set the label of the time from here on: a block's number, ``OTHER``, ``SAMPLING``; ``None``: not counted."""
        if self._events:
            event = torch.Event(device=self._device, enable_timing=True)
            event.record()
            self._marks.append((event, what))
            return
        synchronize(self._device)
        now = time.perf_counter() * 1e3
        if self._marks:
            since, before = self._marks.pop()
            if before is not None:
                self._spent[before] += now - since
        self._marks.append((now, what))

    def wait(self) -> None:
        """Wait for the device, and read its events."""
        if not self._events:
            return
        if self._marks:
            self._marks[-1][0].synchronize()
        for (since, what), (until, _) in zip(self._marks, self._marks[1:], strict=False):
            if what is not None:
                self._spent[what] += since.elapsed_time(until)
        self._marks = self._marks[-1:]

    def spent(self, what: int | str) -> float:
        """Return the milliseconds of a label."""
        return float(self._spent[what])
