"""The machine that figures were taken on, and its accelerator.

Accelerators are used through ``torch.accelerator``. Where a backend or an older release of PyTorch lacks one of its
functions, the device's own module is used.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
from pathlib import Path

import torch

from .accelerators import accelerator_modules, current_accelerator, device_module


def machine(device: torch.device | None = None) -> str:
    """Processor or accelerator, number of threads, and versions of Python and torch, in a line."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux has the processor's name here
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    if device is not None and device.type not in ("cpu", "meta"):
        name = device_name(device)
    return f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, without those that are not installed."""
    installed = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed[package] = importlib.metadata.version(package)
    return installed


def accelerator() -> torch.device | None:
    """The accelerator of this machine, None if there is none."""
    return current_accelerator()


def device_name(device: torch.device) -> str:
    """The name that the backend has for a device, or else that of PyTorch, such as "cuda:0"."""
    try:
        return str(device_module(device).get_device_name(device))
    except (AttributeError, RuntimeError):
        return str(device)


def synchronize(device: torch.device | None = None) -> None:
    """Wait until an accelerator has finished its work; return at once for the host, or if there is none.

    Args:
        device: the accelerator; by default the current device of this machine's accelerator.

    Raises:
        RuntimeError: some of that work has failed.
    """
    device = accelerator() if device is None else device
    if device is None or device.type in ("cpu", "meta"):
        return
    failure: RuntimeError | None = None
    for place in accelerator_modules(device):
        try:
            place.synchronize(device)
            return
        except RuntimeError as error:  # the backend lacks this, or its work failed: then the next one raises that again
            failure = error
    if failure is not None:
        raise failure


def empty_cache() -> None:
    """Return the memory that the accelerator's allocator keeps to the device, if there is one that does."""
    device = accelerator()
    for place in [] if device is None else accelerator_modules(device):
        with contextlib.suppress(AttributeError, RuntimeError):
            place.empty_cache()
            return


def memory_allocated(device: torch.device) -> int | None:
    """The bytes of all tensors on a device; None if its backend does not count them."""
    return _memory(device, "memory_allocated")


def peak_memory(device: torch.device) -> int | None:
    """The most bytes that tensors took on a device, since the start of the process or :func:`reset_peak_memory`."""
    return _memory(device, "max_memory_allocated")


def reset_peak_memory(device: torch.device) -> None:
    """Start :func:`peak_memory` again, if the backend can."""
    _memory(device, "reset_peak_memory_stats")


def _memory(device: torch.device, name: str) -> int | None:
    """Call a memory function of ``torch.accelerator`` (from PyTorch 2.9 on), or else of the device's own module."""
    for place in accelerator_modules(device):
        # ValueError: it is not the accelerator that this build of PyTorch is for.
        with contextlib.suppress(AttributeError, RuntimeError, ValueError):
            value = getattr(place, name)(device)
            return None if value is None else int(value)
    return None
