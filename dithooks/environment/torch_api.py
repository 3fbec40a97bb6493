"""Names of PyTorch that not all releases have, from 2.1 on: the one place that knows how older ones say the same.

The other rooms import these names, so that none of them asks for a version. ``torch_subprocess.py`` runs this very
file, which therefore imports nothing of this package.
"""

from __future__ import annotations

from typing import Any

import torch


def _no_event(**_: object) -> Any:
    """Raise NotImplementedError, as backends without timed events do."""
    raise NotImplementedError


def _never() -> bool:
    """Return False: releases that cannot tell compiled code from other code are refused it (``compiler_support``)."""
    return False


OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)  # before 2.5
is_dynamo_compiling = getattr(torch.compiler, "is_dynamo_compiling", _never)  # since 2.3
is_exporting = getattr(torch.compiler, "is_exporting", _never)  # since 2.7
AcceleratorError: type[RuntimeError] | None = getattr(torch, "AcceleratorError", None)  # since 2.8
Event: Any = getattr(torch, "Event", _no_event)  # since 2.4


def current_accelerator() -> torch.device | None:
    """The accelerator of this machine, None if there is none."""
    if hasattr(torch, "accelerator"):  # since 2.6
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    plugged_in = torch._C._get_privateuse1_backend_name()  # such as "npu", once torch_npu has been imported
    for kind in (plugged_in, "cuda", "xpu", "mps"):
        module = device_module(kind)
        if module is not None and hasattr(module, "is_available") and module.is_available():
            return torch.device(kind)
    return None


def device_count() -> int:
    """The number of the accelerator's devices; 0 if there is none."""
    kind = current_accelerator()
    if kind is None:
        return 0
    return int(getattr(device_module(kind), "device_count", lambda: 1)())


def device_module(device: torch.device | str) -> Any:
    """The module of PyTorch or a plug-in for a kind of device, such as ``torch.cuda``; None if there is none."""
    kind = device.type if isinstance(device, torch.device) else device
    return getattr(torch, kind, None) or getattr(torch.backends, kind, None)


def accelerator_modules(device: torch.device) -> list[Any]:
    """The modules to ask for a function of an accelerator, in this order: that for all of them, and its own."""
    modules = (getattr(torch, "accelerator", None), device_module(device))
    return [module for module in modules if module is not None]


def mesh_classes() -> tuple[Any, ...]:
    """The classes of meshes of devices; none where a mesh cannot be asked for its group, before 2.2."""
    try:
        from torch.distributed.device_mesh import DeviceMesh
    except ImportError:
        return ()
    return (DeviceMesh,)
