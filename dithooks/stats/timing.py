"""Times of calls, without waiting for the device: by the host's clock, or by events in an accelerator's stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Mark = Any  # a point in time: seconds of the host's clock, an event of a stream, or None where neither can be had


def mark(device: torch.device | None) -> Mark:
    """Mark the present in the device's order of work, after all work queued so far, without waiting for it."""
    if device is None or device.type in ("cpu", "meta"):
        return time.perf_counter()
    if is_capturing(device):  # an event that is captured into a graph cannot be timed
        return None
    try:
        event = torch.Event(device=device, enable_timing=True)
        event.record()
    except (RuntimeError, NotImplementedError, TypeError, AttributeError):  # not all backends, or PyTorch before 2.4
        return None
    return event


def is_capturing(device: torch.device) -> bool:
    """Return whether work queued on a device now is captured into a graph, and not run."""
    capturing = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    return capturing is not None and bool(capturing())


def marker_for(device: torch.device | None) -> Callable[[], Mark]:
    """Return a function that marks the time on a device."""
    if device is None or device.type in ("cpu", "meta"):
        return time.perf_counter
    return partial(mark, device)


def seconds_between(since: Mark, until: Mark) -> float | None:
    """Compute the seconds between two marks, both of them ready; ``None`` where they cannot be compared."""
    if isinstance(since, float) and isinstance(until, float):
        return until - since
    if since is None or until is None or type(since) is not type(until):
        return None
    try:
        return float(since.elapsed_time(until)) / 1e3
    except (RuntimeError, NotImplementedError, ValueError):  # times are extras: a pair without one has no duration
        return None


def is_ready(until: Mark) -> bool:
    """Return whether the device has reached a mark, without waiting for it."""
    if until is None or isinstance(until, float):
        return True
    try:
        return bool(until.query())
    except (RuntimeError, NotImplementedError):  # a device that cannot be asked has nothing to wait for
        return True
