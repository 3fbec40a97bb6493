"""The folder of plans beside ComfyUI's models, ``models/dithooks``."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from typing import Any

from ...config.cache_plan import CachePlan
from ...config.plan_tiers import PlanTiers
from ...errors import InvalidSetting, MissingFile
from ...validation import check_text, shown

KIND = "dithooks"
NONE = "(there is no plan in models/dithooks yet)"


def register_folder() -> None:
    """Make the folder known to ComfyUI, whose own ways to name more folders of a kind then hold for it."""
    paths = _paths()
    paths.add_model_folder_path(KIND, str(Path(paths.models_dir, KIND)))


def plan_names() -> list[str]:
    """Return the names of the plans that are there, for a list to choose from."""
    return [name for name in _paths().get_filename_list(KIND) if name.endswith(".json")] or [NONE]


def plan_file(name: str) -> Path:
    """Return the file of a plan that is there.

    Raises:
        MissingFile: it is not.
    """
    found = _paths().get_full_path(KIND, check_text("plan", name))
    if found is None or not name.endswith(".json"):
        raise MissingFile(
            f"there is no plan {shown(name)} in models/dithooks: put one there, or make one with 'dithooks: Record "
            "and plan', and reload the page"
        )
    return Path(found)


def new_plan_file(name: str) -> Path:
    """Return the file that a plan of this name is kept in.

    Raises:
        InvalidSetting: the name is not that of a file.
    """
    if not re.fullmatch(r"\w[\w .+×-]{0,99}", check_text("name", name)):
        raise InvalidSetting(f"name={shown(name)} is not that of a file: give letters, digits, spaces or . + - ×")
    folder = Path(_paths().get_folder_paths(KIND)[0])
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name.removesuffix('.json')}.json"


def load_plan_file(file: Path, tier: str = "") -> CachePlan:
    """Load a plan; of a file with several tiers, one of them.

    Args:
        file: of a plan or tiers.
        tier: name of the tier, or the quality that it is to promise, as for :meth:`PlanTiers.select`; empty for a file
            with one plan.
    """
    tiers = PlanTiers.load(file)
    if tier:
        return tiers.select(tier)
    if len(tiers.plans) > 1:
        names = ", ".join(map(shown, tiers.plans))
        raise InvalidSetting(f"{file.name} has several plans: set tier to one of {names:.150}")
    return next(iter(tiers.plans.values()))


def fingerprint_of(file: Path | None) -> str:
    """Return what changes when a file does; the same for each file that is not there."""
    try:
        if file is None:
            return ""
        state = file.stat()
    except OSError:
        return ""
    return f"{file} {state.st_mtime_ns} {state.st_size}"


def _paths() -> Any:
    return import_module("folder_paths")
