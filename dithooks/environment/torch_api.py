"""Names of PyTorch that not all releases have, from 2.1 on: the one place that knows how older ones say the same.

The other rooms import these names, so that none of them asks for a version.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

try:
    from torch import OutOfMemoryError  # since 2.5
except ImportError:
    _BY_DEVICE = [module for module in vars(torch).values() if isinstance(module, ModuleType)]
    OutOfMemoryError = next(  # type: ignore[misc]
        vars(each)["OutOfMemoryError"] for each in _BY_DEVICE if "OutOfMemoryError" in vars(each)
    )
try:
    from torch import AcceleratorError  # since 2.8
except ImportError:

    class AcceleratorError(RuntimeError):  # type: ignore[no-redef]
        """An error that releases without one of that name never raise."""


try:
    from torch.compiler import is_dynamo_compiling  # since 2.3
except ImportError:

    def is_dynamo_compiling() -> bool:
        """Return False: releases that cannot tell compiled code from other code are refused it."""
        return False


try:
    from torch.compiler import is_exporting  # since 2.7
except ImportError:

    def is_exporting() -> bool:
        """Return False: older releases cannot tell."""
        return False


if hasattr(torch, "get_autocast_dtype"):  # since 2.4

    def autocast_dtype(device: str) -> torch.dtype | None:
        """Return the dtype that autocast computes in on a type of device; ``None`` where it is off, or not known."""
        try:
            return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        except RuntimeError:  # a device without autocast
            return None

else:

    def autocast_dtype(device: str) -> torch.dtype | None:
        """Do the same, by what each device has of its own."""
        if device == "cpu":
            return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None
        module = getattr(torch, device, None)
        if module is None:
            return None
        # torch_npu's module has these names; where one has not, PyTorch's own are meant.
        is_enabled = getattr(module, "is_autocast_enabled", torch.is_autocast_enabled)
        return getattr(module, "get_autocast_dtype", torch.get_autocast_gpu_dtype)() if is_enabled() else None


__all__ = [
    "AcceleratorError",
    "OutOfMemoryError",
    "autocast_dtype",
    "is_dynamo_compiling",
    "is_exporting",
    "mesh_classes",
]


def mesh_classes() -> tuple[Any, ...]:
    """The classes of meshes of devices; none where a mesh cannot be asked for its group, before 2.2."""
    try:
        from torch.distributed.device_mesh import DeviceMesh
    except ImportError:
        return ()
    return (DeviceMesh,)
