"""The accelerator of this machine and the modules to ask about it, in all releases of PyTorch from 2.1 on.

PyTorch is imported where it is used only: ``dithooks env`` hands this very file to another process.
"""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


def current_accelerator() -> torch.device | None:
    """The accelerator of this machine, None if there is none."""
    import torch

    if hasattr(torch, "accelerator"):  # since 2.6
        return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    plugged_in = torch.device("privateuseone").type  # its own name, such as "npu", once torch_npu has been imported
    for kind in (plugged_in, *(name for name, module in vars(torch).items() if isinstance(module, ModuleType))):
        module = device_module(kind)
        has_devices = module is not None and {"is_available", "device_count"} <= vars(module).keys()
        if has_devices and kind != "cpu" and module.is_available():
            return torch.device(kind)
    return None


def device_count() -> int:
    """The number of the accelerator's devices; 0 if there is none."""
    kind = current_accelerator()
    if kind is None:
        return 0
    counting = next((module for module in accelerator_modules(kind) if hasattr(module, "device_count")), None)
    return 1 if counting is None else int(counting.device_count())


def device_module(device: torch.device | str) -> Any:
    """The module of PyTorch or a plug-in for a kind of device, such as ``torch.cuda``; None if there is none."""
    import torch

    kind = device if isinstance(device, str) else device.type
    return getattr(torch, kind, None) or getattr(torch.backends, kind, None)


def accelerator_modules(device: torch.device) -> list[Any]:
    """The modules to ask for a function of an accelerator, in this order: that for all of them, and its own."""
    import torch

    modules = (getattr(torch, "accelerator", None), device_module(device))
    return [module for module in modules if module is not None]
