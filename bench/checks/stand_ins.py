"""Stand-ins for what other engines import and these checks do not need; all else of them is the real package."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

import torch

# Compiled code registers these; torchvision's wheels on PyPI have none for a PyTorch built for the CPU.
TORCHVISION_OPS = ("nms", "qnms", "roi_align", "qroi_align", "roi_pool", "ps_roi_align", "ps_roi_pool", "deform_conv2d")


def torchvision_schemas() -> torch.library.Library | None:
    """Declare torchvision's operations, none of which is called, if its compiled code cannot be loaded.

    Returns:
        The declarations, which hold as long as this is kept.
    """
    if hasattr(torch.ops.torchvision, "nms"):
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in TORCHVISION_OPS:
        library.define(f"{name}(Tensor x) -> Tensor")
        if not name.startswith("q") and name != "nms":
            library.define(f"_{name}_backward(Tensor x) -> Tensor")
    _KEPT.append(library)
    return library


def modelscope() -> ModuleType:
    """Put a hub without files in ``modelscope``'s place, which is asked for weights only."""

    def snapshot_download(*_: Any, **__: Any) -> None:
        raise RuntimeError("these checks download nothing")

    module = ModuleType("modelscope")
    module.__spec__ = importlib.machinery.ModuleSpec("modelscope", None)
    module.snapshot_download = snapshot_download  # type: ignore[attr-defined]
    return sys.modules.setdefault("modelscope", module)


def bare_package(name: str) -> ModuleType:
    """Import a package without its ``__init__``, so that one part of it can be imported without what others need.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    found = importlib.util.find_spec(name)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(f"{name} is not installed", name=name)
    module = ModuleType(name)
    module.__path__ = list(found.submodule_search_locations)
    module.__spec__ = found
    return sys.modules.setdefault(name, module)


_KEPT: list[torch.library.Library] = []  # declarations are withdrawn with their library
