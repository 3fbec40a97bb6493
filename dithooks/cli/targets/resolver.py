"""The subject of ``dithooks inspect``, from its name on the command line."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path

from ...errors import TargetError
from ...inspection.diffusers_class import Subject, components_of, of_pipeline, of_transformer, quiet
from ...integrations.diffusers_placeholders import missing_packages
from ...tiny import names
from ...validation import shown
from .saved_model import of_folder, of_id
from .user_factory import of_factory


def find_subject(name: str) -> Subject:
    """Find the factory, the folder, the class of transformers or pipelines, or the model's id that a name stands for.

    Raises:
        TargetError: it stands for none of these.
    """
    if ":" in name:
        return of_factory(name)
    if Path(name).is_dir():
        return of_folder(Path(name))
    if name in names():
        return of_transformer(name)
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return of_id(name)
    with quiet():
        diffusers = importlib.import_module("diffusers")
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type) and name.endswith("Pipeline"):
            if lacking := missing_packages(cls):
                needed = " ".join(lacking)
                raise TargetError(f"{name} cannot be imported: it needs {needed} (pip install {needed})")
            return of_pipeline(name, components_of(cls))
    if cls is not None:
        raise TargetError(f"{name} of diffusers is neither a pipeline nor a transformer that is known here")
    pipelines = [each for each in dir(diffusers) if each.endswith("Pipeline")]
    close = difflib.get_close_matches(name, [*names(), *pipelines], n=3)
    hint = f"do you mean {' or '.join(close)}?" if close else "give a class of diffusers, a folder, or FILE.py:FACTORY"
    raise TargetError(f"there is no {shown(name)} (diffusers {diffusers.__version__}): {hint}")
