"""What makes the host wait for a device, counted from outside."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim"}
WAITED = "called a synchronizing"  # the mode also warns, once, that it is a prototype


class Watch(TorchDispatchMode):
    """Counts what makes the host wait for a device, and tensors in float64 on it.

    Numbers that are read are counted, and copies to the host that are not queued. Device modules that report waits
    themselves (``set_sync_debug_mode``) are asked as well, in :attr:`reported`.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.type, self.reads, self.doubles = device.type, Counter[str](), 0
        self._switch = getattr(torch.get_device_module(device), "set_sync_debug_mode", None)
        self._caught: list[warnings.WarningMessage] = []
        self._catching = warnings.catch_warnings(record=True)

    @property
    def reported(self) -> int | None:
        """Waits that the device's own module has warned of; ``None`` where it has no such mode."""
        if self._switch is None:
            return None
        return sum(WAITED in str(each.message) for each in self._caught)

    def __enter__(self) -> Watch:
        self._caught = self._catching.__enter__() or []
        if self._switch is not None:
            warnings.simplefilter("always")
            self._switch("warn")
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._switch is not None:
            self._switch("default")
        self._catching.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        given = [leaf for leaf in tree_leaves((args, kwargs or {})) if isinstance(leaf, Tensor)]
        result = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        here = any(tensor.device.type == self.type for tensor in given)
        leaves = here and any(tensor.device.type != self.type for tensor in made)
        queued = (kwargs or {}).get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
        if (here and name in READS) or (leaves and not queued):
            self.reads[name] += 1
        self.doubles += sum(tensor.device.type == self.type and tensor.dtype == torch.float64 for tensor in made)
        return result
