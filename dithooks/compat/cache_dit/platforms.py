"""The machine, as cache-dit asks for it: its device, and settings of its compiler."""

from __future__ import annotations

from typing import Any

from ...environment.accelerators import current_accelerator, device_count, device_module
from ...stats.user_warning import warn_user


class Platform:
    """The device that models run on: the accelerator of this machine, or else its CPU.

    Other names are those of the device's module in PyTorch: ``current_platform.empty_cache()`` is
    ``torch.cuda.empty_cache()`` where the device is a GPU.

    Example:
        >>> current_platform.is_accelerator_available() == (current_platform.device_type != "cpu")
        True
    """

    @property
    def device_type(self) -> str:
        """The kind of the device, such as ``"cuda"``."""
        device = current_accelerator()
        return "cpu" if device is None else device.type

    def is_accelerator_available(self) -> bool:
        """Return whether there is an accelerator."""
        return current_accelerator() is not None

    def device_count(self) -> int:
        """Return the number of accelerators; 1 where there is none but the CPU."""
        return device_count() or 1

    def __getattr__(self, name: str) -> Any:
        return getattr(device_module(self.device_type), name)


current_platform = Platform()


def set_compile_configs(**settings: Any) -> None:
    """Change nothing: a cached model compiles with PyTorch's settings as they are.

    Args:
        **settings: what cache-dit would set for the whole process; any value causes a warning.
    """
    if settings:
        warn_user(
            f"set_compile_configs: {', '.join(settings)} without effect: the cache needs none of it; set "
            "torch._inductor.config yourself where the compiled model is faster by it"
        )
