"""What figures were taken on."""

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
        named = getattr(getattr(torch, device.type, None), "get_device_name", str)
        name = named(device)
    return f"{name}, {torch.get_num_threads()} threads, Python {platform.python_version()}, torch {torch.__version__}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found
