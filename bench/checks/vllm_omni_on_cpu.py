"""What vLLM-Omni's Qwen-Image needs to run on a CPU: schemas of torchvision, and attention as PyTorch has it.

Imported before vLLM-Omni.
"""

from __future__ import annotations

import torch

from bench.checks.sglang_on_cpu import schemas


def stand_in() -> list[torch.library.Library]:
    """Define the schemas, where torchvision's own library is not there; return what has to be kept."""
    return schemas()


def platform() -> None:
    """Let vLLM and vLLM-Omni run on a CPU: the latter has no such platform, so attention and devices are told it."""
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform
    from vllm_omni.diffusion.attention.backends.sdpa import SDPAImpl
    from vllm_omni.platforms.interface import UnspecifiedOmniPlatform

    vllm.platforms._current_platform = CpuPlatform()
    path = "vllm_omni.diffusion.attention.backends.sdpa.SDPABackend"
    UnspecifiedOmniPlatform.get_diffusion_attn_backend_cls = classmethod(lambda *_, **__: path)
    UnspecifiedOmniPlatform.is_available = classmethod(lambda *_: False)
    SDPAImpl.forward = SDPAImpl.forward_cuda
