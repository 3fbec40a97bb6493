"""What figures were taken on, and the accelerator there: what PyTorch calls one, asked through ``torch.accelerator``.

Of what that offers, backends lack one thing or another, and so do the older releases of PyTorch; then the module that
PyTorch has for the device (``torch.get_device_module``) is asked for the same.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path

import torch


def machine(device: torch.device | None = None) -> str:
    """Processor or accelerator, threads, and versions of Python and torch."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux names the model here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if device is not None and device.type not in ("cpu", "meta"):
        name = device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def accelerator() -> torch.device | None:
    """The kind of accelerator that can be used here, ``None`` if there is none."""
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def device_name(device: torch.device) -> str:
    """What its backend calls a device, or else what PyTorch does."""
    try:
        return str(torch.get_device_module(device).get_device_name(device))
    except (AttributeError, RuntimeError):
        return str(device)


def synchronize(device: torch.device | None = None) -> None:
    """Wait until the accelerator, if there is one, has done what it was given; for the host there is no waiting.

    Args:
        device: which; by default the current accelerator's current device.

    Raises:
        RuntimeError: what it was given has failed.
    """
    device = accelerator() if device is None else device
    if device is None or device.type in ("cpu", "meta"):
        return
    try:
        torch.accelerator.synchronize(device)
    except RuntimeError:  # a backend that lacks this, or a failure, which the other will raise again
        torch.get_device_module(device).synchronize(device)


def memory_allocated(device: torch.device) -> int | None:
    """Bytes of all tensors on a device; ``None`` where its backend does not tell."""
    return _memory(device, "memory_allocated")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took on a device, since the start or :func:`reset_peak_memory`."""
    return _memory(device, "max_memory_allocated")


def reset_peak_memory(device: torch.device) -> None:
    """Let :func:`peak_memory` begin anew, where the backend can."""
    _memory(device, "reset_peak_memory_stats")


def _memory(device: torch.device, name: str) -> int | None:
    """What is asked of ``torch.accelerator``, which has it since PyTorch 2.9, or else of the device's own module."""
    for place in (torch.accelerator, torch.get_device_module(device)):
        # ValueError: it is not the accelerator that this build of PyTorch is for.
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):
            found = getattr(place, name)(device)
            return None if found is None else int(found)
    return None
