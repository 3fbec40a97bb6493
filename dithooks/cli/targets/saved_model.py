"""A saved model as a subject of ``dithooks inspect``: its folder, or its id in the local cache of the Hugging Face Hub.

Only the configurations are read. Weights are neither downloaded nor loaded.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from ...errors import TargetError
from ...inspection.diffusers_class import Subject, counts_of, of_pipeline, of_transformer
from ...tiny import build, of_class
from .saved_json import read_object


def of_folder(folder: Path, title: str = "") -> Subject:
    """The pipeline or the transformer that was saved to a folder.

    Raises:
        TargetError: the folder holds neither, or one of a class that is not known.
    """
    title = title or str(folder)
    single = read_object(folder / "config.json").get("_class_name")
    if isinstance(single, str):
        if not of_class(single):
            raise TargetError(f"{title} holds a {single}, which is no transformer class that is known here")
        return of_transformer(single, _counts(single, folder), f"config.json of {title}")
    index = read_object(folder / "model_index.json")
    if index:
        listed = {name: entry[1] for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2}
    else:  # a snapshot may hold only some of the folders
        configs = {path.parent.name: read_object(path) for path in sorted(folder.glob("*/config.json"))}
        listed = {name: config.get("_class_name") for name, config in configs.items()}
    parts = {name: cls for name, cls in listed.items() if isinstance(cls, str) and of_class(cls)}
    if not parts:
        has = ", ".join(f"{name}: {cls}" for name, cls in listed.items() if isinstance(cls, str))
        has = has or "no model_index.json or config.json"
        raise TargetError(f"{title} holds no transformer of a class that is known here ({has})")
    missing = [name for name in parts if not (folder / name / "config.json").is_file()]
    if missing:
        raise TargetError(f"{title} lacks {missing[0]}/config.json: download it, or name the class {parts[missing[0]]}")
    counts = {name: _counts(cls, folder / name) for name, cls in parts.items()}
    cls = index.get("_class_name", "a pipeline")
    return of_pipeline(f"{cls} from {title}", parts, counts, "its config.json")


def of_id(name: str) -> Subject:
    """The model of an id, from the local cache of the Hugging Face Hub.

    Raises:
        TargetError: the cache does not hold it.
    """
    hub = importlib.import_module("huggingface_hub")
    errors = importlib.import_module("huggingface_hub.errors")
    try:
        folder = hub.snapshot_download(name, local_files_only=True)
    except (errors.LocalEntryNotFoundError, errors.HFValidationError):
        raise TargetError(
            f"{name} is neither a folder nor in the local cache of the Hugging Face Hub, and nothing is downloaded "
            "here: download it (hf download), or name its pipeline class, such as FluxPipeline"
        ) from None
    return of_folder(Path(folder), name)


def _counts(name: str, folder: Path) -> dict[str, int]:
    """Blocks per list of a class with the configuration in a folder."""
    cls: Any = type(build(name).model)
    known = cls.extract_init_dict(read_object(folder / "config.json"))[0]
    try:
        return counts_of(cls, known)
    except Exception as error:  # a constructor may raise anything for a configuration that is not its own
        raise TargetError(f"{folder / 'config.json'} makes no {name}: {' '.join(str(error).split())}") from error
