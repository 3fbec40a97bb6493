"""Dotted paths: the modules of a pipeline, and the way from a target to a module and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from ..errors import InvalidSetting
from ..validation import shown
from .block_lists import WRAPPED

# Components of pipelines that encode, decode or steer; the denoiser is none of these.
OTHERS = (
    "text_encoder",
    "image_encoder",
    "audio_encoder",
    "vae",
    "vqvae",
    "movq",
    "controlnet",
    "safety_checker",
    "vocoder",
    "tokenizer",
)


def modules_of(target: object) -> dict[str, nn.Module]:
    """Return the modules of a pipeline by name, without components that are ``None``."""
    try:
        components = getattr(target, "components", None)
    except Exception:  # diffusers raises where a component is missing
        components = None
    source = components if isinstance(components, Mapping) else getattr(target, "__dict__", {})
    return {name: value for name, value in source.items() if isinstance(value, nn.Module)}


def denoisers_of(target: object) -> dict[str, nn.Module]:
    """Return the modules of a pipeline that may denoise."""
    return denoisers_among(modules_of(target))


def denoisers_among(components: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the components that may denoise: those called ``transformer…``, else all but encoders, VAEs and the like.

    Example:
        >>> parts = dict.fromkeys(["text_encoder", "vae_decoder", "ip_image_encoder_2", "dit"], nn.Identity())
        >>> list(denoisers_among(parts)), list(denoisers_among({**parts, "transformer_2": nn.Identity()}))
        (['dit'], ['transformer_2'])
    """
    named = {name: module for name, module in components.items() if name.split("_")[0] == "transformer"}
    return named or {
        name: module
        for name, module in components.items()
        if not is_called_other(name) and not type(module).__module__.startswith("transformers.")
    }


def is_called_other(name: str) -> bool:
    """Return whether a component encodes, decodes or steers, by its name: a word in it is how such are called."""
    return any(f"_{other}" in f"_{name}" for other in OTHERS)


def walk(target: object, path: str) -> Any:
    """Follow a dotted path, such as ``transformer.blocks.3``.

    Raises:
        ValueError: the path is not a dotted path, or leads nowhere; the message names the part that is missing.
    """
    if path == "" and isinstance(target, nn.Module):
        return target
    parts = path.split(".")
    if not all(part.isidentifier() or part.isdigit() for part in parts):
        raise InvalidSetting(f"blocks={shown(path)} is not a dotted path such as 'transformer.transformer_blocks'")
    here: Any = target
    for depth, part in enumerate(parts):
        try:
            if isinstance(here, nn.ModuleDict) and part in here:
                here = here[part]
            else:
                here = here[int(part)] if part.isdigit() and isinstance(here, nn.ModuleList) else getattr(here, part)
        except (AttributeError, IndexError):
            before = ".".join(parts[:depth]) or type(target).__name__
            options = sorted(dict(here.named_children()) if isinstance(here, nn.Module) else modules_of(here))
            raise InvalidSetting(f"blocks={shown(path)}: {before} has no {shown(part)}; it has {options}") from None
    return here


def path_of(target: object, module: nn.Module) -> str | None:
    """Return the dotted path from a target to a module in it; ``None`` if the module is not part of the target."""
    roots = {"": target} if isinstance(target, nn.Module) else modules_of(target)
    for root, top in roots.items():
        assert isinstance(top, nn.Module)
        for name, child in top.named_modules():
            if child is module:
                return ".".join(part for part in (root, name) if part)
    return None


def enclosing_modules(target: object, module: nn.Module) -> list[nn.Module]:
    """Return the modules of a target that contain a module, from the inside out, without wrappers of torch.compile.

    Example:
        >>> import torch
        >>> inner = torch.nn.Identity()
        >>> outer = torch.nn.Sequential(torch.nn.Sequential(inner))
        >>> [type(each).__name__ for each in enclosing_modules(outer, inner)]
        ['Sequential', 'Sequential']
    """
    path = path_of(target, module)
    if path is None:
        return []
    parts = path.split(".") if path else []
    begin = 0 if isinstance(target, nn.Module) else 1
    found = [walk(target, ".".join(parts[:depth])) for depth in range(begin, len(parts))]
    modules = [each for each in reversed(found) if isinstance(each, nn.Module) and each is not module]
    return [each for each in modules if not hasattr(each, WRAPPED) and not isinstance(each, nn.ModuleList)]


def dtype_of(owner: nn.Module) -> str | None:
    """Return the dtype of the transformer's first floating-point parameter, such as ``bfloat16``."""
    dtypes = (parameter.dtype for parameter in owner.parameters() if parameter.is_floating_point())
    return next((str(dtype).removeprefix("torch.") for dtype in dtypes), None)
