"""How long calls take, without waiting for the device: by the clock, or by events in an accelerator's own stream."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

Mark = Any  # seconds of the host's clock, or an event; None: this cannot be timed


def mark(device: torch.device | None) -> Mark:
    """Now, as the device sees it: what was queued before comes before it, and nothing is waited for."""
    if device is None or device.type in ("cpu", "meta"):
        return time.perf_counter()
    capturing = getattr(getattr(torch, device.type, None), "is_current_stream_capturing", None)
    if capturing is not None and capturing():  # what is recorded into a graph tells no time
        return None
    try:
        event = torch.Event(device=device, enable_timing=True)
        event.record()
    except (RuntimeError, NotImplementedError, TypeError):  # not all backends have events that tell the time
        return None
    return event


def marker_for(device: torch.device | None) -> Callable[[], Mark]:
    """Return a function that marks the time on a device."""
    if device is None or device.type in ("cpu", "meta"):
        return time.perf_counter
    return partial(mark, device)


def seconds_between(since: Mark, until: Mark) -> float | None:
    """Seconds from one mark to another; ``None`` where that cannot be told. Call it when :func:`is_ready` says so."""
    if isinstance(since, float) and isinstance(until, float):
        return until - since
    if since is None or until is None or type(since) is not type(until):
        return None
    try:
        return float(since.elapsed_time(until)) / 1e3
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def is_ready(until: Mark) -> bool:
    """Whether the device has come to a mark; asked without waiting for it."""
    if until is None or isinstance(until, float):
        return True
    try:
        return bool(until.query())
    except (RuntimeError, NotImplementedError):
        return True
