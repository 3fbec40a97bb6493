"""What SGLang's Wan needs to run on a CPU: schemas of torchvision, and two operations of ``sgl_kernel``, in PyTorch.

Imported before SGLang. Attention needs nothing: SGLang takes PyTorch's own on a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

VISION = (  # whose shapes torchvision registers when it is imported, also where its own library does not load
    *("nms", "qnms", "roi_align", "_roi_align_backward", "ps_roi_align", "_ps_roi_align_backward", "roi_pool"),
    *("_roi_pool_backward", "ps_roi_pool", "_ps_roi_pool_backward", "qroi_align", "deform_conv2d"),
    "_deform_conv2d_backward",
)
NORM = "(Tensor x, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str kind, float eps) -> Tensor"
RESIDUAL = (
    "(Tensor residual, Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, Tensor scale, Tensor shift, str kind, "
    "float eps) -> (Tensor, Tensor)"
)


def norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, scale: Tensor, shift: Tensor, kind: str, eps: float):
    """A norm in float32, scaled and shifted."""
    size, wide = x.shape[-1:], x.float()
    normed = F.layer_norm(wide, size, weight, bias, eps) if kind == "layer" else F.rms_norm(wide, size, weight, eps)
    return (normed * (1 + scale) + shift).to(x.dtype)


def residual_norm(residual: Tensor, x: Tensor, gate: Tensor | None, *norm_arguments):
    """The sum of a stream and what a layer adds, gated, and that sum's norm."""
    stream = residual + (x if gate is None else x * gate)
    return norm(stream, *norm_arguments), stream


def schemas() -> list[torch.library.Library]:
    """Define torchvision's schemas, where its own library is not there; return what has to be kept."""
    if hasattr(torch.ops.torchvision, "nms"):
        return []
    library = torch.library.Library("torchvision", "DEF")
    for name in VISION:
        library.define(f"{name}(Tensor x) -> Tensor")
    return [library]


def stand_in() -> list[torch.library.Library]:
    """Define schemas and operations; return what has to be kept."""
    kernels = torch.library.Library("sgl_kernel", "FRAGMENT")
    for name, schema, function in (
        ("fused_norm_scale_shift_cpu", NORM, norm),
        ("fused_scale_residual_norm_scale_shift_cpu", RESIDUAL, residual_norm),
    ):
        kernels.define(name + schema)
        kernels.impl(name, function, "CPU")
    return [*schemas(), kernels]
