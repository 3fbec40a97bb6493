"""Code that a saved pipeline brings along, found before anything is loaded: old diffusers have run it unasked."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...errors import TargetError
from .saved_json import read_object

OPTION = "--trust-remote-code"
KNOWN = ("diffusers", "transformers", "dithooks")  # packages that components may come from
CONFIGS = "*config.json"  # of models, tokenizers, processors of pictures and of videos, and others


def refuse_code(title: str, index: Mapping[str, Any], folder: Path | None) -> None:
    """Refuse a pipeline that brings code of its own.

    Args:
        title: the pipeline's name on the command line.
        index: its model_index.json.
        folder: its folder; None if there is none here yet.

    Raises:
        TargetError: it brings code, or a configuration that cannot be read; the message names where.
    """
    found = next(code_of(index, folder), None)
    if found is not None:
        raise TargetError(
            f"{title} brings code of its own, which loading it would run: {found}. Read it, then add {OPTION}"
        )


def code_of(index: Mapping[str, Any], folder: Path | None) -> Iterator[str]:
    """The places in a saved pipeline that name code of its own, or hold it."""
    for name, entry in index.items():
        if name.startswith("_") or not isinstance(entry, (list, tuple)) or len(entry) != 2 or entry[0] is None:
            continue
        if not _is_known(entry[0]):
            yield f"model_index.json takes {name[:60]!r} from the module {str(entry[0])[:60]!r}"
        if folder is not None:
            yield from _code_in(name, folder)


def _code_in(component: str, folder: Path) -> Iterator[str]:
    place = folder / component
    if not place.resolve().is_relative_to(folder.resolve()):
        yield f"model_index.json has a component outside of the folder, {component[:60]!r}"
        return
    yield from sorted(str(file.relative_to(folder)) for file in place.glob("*.py"))
    for config in sorted(place.glob(CONFIGS)):
        if "auto_map" in read_object(config):
            yield f"auto_map in {component}/{config.name}"


def _is_known(library: object) -> bool:
    """Whether a component's library is a package that is known here, or a pipeline's module of diffusers."""
    if not isinstance(library, str):
        return False
    if library.partition(".")[0] in KNOWN:
        return True
    from diffusers import pipelines

    return library.isidentifier() and hasattr(pipelines, library)
