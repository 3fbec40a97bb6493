"""The optional parts of this package: what each is for, and which packages it needs.

Python's standard library only, as ``dithooks env`` reads it where PyTorch cannot be imported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

# By the name that pip knows: what it is for, and the packages that have to be there
EXTRAS: dict[str, tuple[str, tuple[str, ...]]] = {
    "diffusers": ("pipelines of diffusers", ("diffusers", "safetensors")),
    "demo": ("the demo", ("diffusers", "safetensors", "pillow")),
    "search": ("progress bars, and SSIM", ("rich", "scikit-image")),
    "plot": ("plots", ("matplotlib",)),
    "video": ("videos as mp4", ("imageio", "imageio-ffmpeg")),
    "lpips": ("--metric lpips", ("stlpips-pytorch",)),
    "hub": ("plans on the Hugging Face Hub", ("huggingface_hub",)),
    "yaml": ("configurations in YAML", ("PyYAML",)),
    "ray": ("many machines", ("ray", "pillow")),
}


def missing_extras(installed: Callable[[str], str | None]) -> Iterator[tuple[str, str]]:
    """Yield each part that lacks a package: what it is for and needs, and what to type.

    Args:
        installed: returns the version of a package, or None.

    Example:
        >>> list(missing_extras({"diffusers": "0.42"}.get))[0]
        ('pipelines of diffusers need safetensors', 'pip install "dithooks[diffusers]"')
    """
    for extra, (purpose, packages) in EXTRAS.items():
        lacking = [each for each in packages if installed(each) is None]
        if lacking:
            needs = "needs" if purpose.startswith(("the ", "--")) else "need"
            yield f"{purpose} {needs} {', '.join(lacking)}", f'pip install "dithooks[{extra}]"'
