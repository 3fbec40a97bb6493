"""Push plans to a repository on the Hugging Face Hub, or to a folder, with a model card and a picture."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.cache_plan import CachePlan
from ..config.hub_file import check_name, hub_module, readable
from ..config.plan_tiers import PlanTiers, target_name
from ..errors import FileError, InvalidSetting, MissingFile, WrongType
from ..plots.frontier import frontier
from ..plots.style import save
from ..plots.tier_levels import tiers
from ..storage.regular_file import read_bytes
from ..storage.replacement import write_text
from ..tuning.result import SearchResult
from ..validation import check_text, shown
from .model_card import MARK, model_card

ID = r"\w[\w.-]{0,95}/\w[\w.-]{0,95}"
NAME = r"\w[\w.-]{0,95}"
CARD, CARD_BYTES = "README.md", 2**22
MESSAGE = "Plans of dithooks"


def push_to_hub(
    plans: CachePlan | PlanTiers | SearchResult,
    repo: str | os.PathLike[str],
    *,
    filename: str | None = None,
    base_model: str | None = None,
    licence: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = MESSAGE,
    token: str | bool | None = None,
) -> str:
    """Write plans to a repository on the Hugging Face Hub, or to a folder, with a model card and a picture.

    The card, ``README.md``, has what the plans promise as a table and as a picture, how to use them and where they come
    from. A card that somebody else has written stays: this one is then called after the plans' file, ``plan.md``.
    :meth:`CachePlan.from_pretrained` and :meth:`PlanTiers.from_pretrained` load the plans again.

    Args:
        plans: a plan, tiers, or what a search has found, of which the picture then shows every plan that was run.
        repo: a folder that is there, or a ``Path``, which is made; or an id such as ``"org/repo"``, of a repository
            that is made if it does not exist.
        filename: name of the file; ``None``: ``plan.json``, or ``plans.json`` of tiers.
        base_model: id of the model that the plans are for, for the card.
        licence: licence of the plans by the Hub's name, such as ``"apache-2.0"``, for the card.
        private: whether a repository that is made is private; ``None``: as is usual on the Hub.
        revision: the branch; ``None``: the main one.
        create_pr: propose the change instead of making it.
        commit_message: message of the change.
        token: as ``huggingface_hub`` takes it; ``None``: that of its login.

    Returns:
        The folder, or the address of the change on the Hub.

    Raises:
        TypeError, ValueError: an argument is of the wrong type, or no id or name.
        OSError: something cannot be written, here or there.
        ModuleNotFoundError: matplotlib is not installed, or ``huggingface_hub``, which a folder does not need.
    """
    if not isinstance(plans, (CachePlan, PlanTiers, SearchResult)):
        raise WrongType(f"plans must be a CachePlan, PlanTiers or SearchResult, not {shown(plans)}")
    shared = plans if not isinstance(plans, SearchResult) else plans.plans if plans.tiers else plans.plan
    name = check_name(type(shared)._file if filename is None else filename)
    if "/" in name or not re.fullmatch(NAME, name):
        raise InvalidSetting(f"filename={shown(name)} is not a plain name: give one such as plan.json")
    for option, value, form in (("base_model", base_model, ID), ("licence", licence, NAME)):
        if value is not None and not re.fullmatch(form, check_text(option, value)):
            raise InvalidSetting(f"{option}={shown(value)} is none: give one such as 'org/model' or 'apache-2.0'")
    is_folder = isinstance(repo, os.PathLike) or os.path.isdir(check_text("repo", repo))
    if not is_folder and not re.fullmatch(ID, str(repo)):
        raise InvalidSetting(f"repo={shown(repo)} is neither a folder nor an id such as 'org/repo'")
    if is_folder and (revision is not None or create_pr):
        raise InvalidSetting(f"revision and create_pr are of repositories on the Hub: the folder {repo} has neither")
    stem, figure = name.removesuffix(".json"), _figure(plans)

    def write(folder: Path, has_other_card: bool) -> None:
        card, picture = f"{stem}.md" if has_other_card else CARD, f"{stem}.png"
        save(figure, folder / picture)
        shared.save(folder / name)
        where = str(repo) if re.fullmatch(ID, str(repo)) else "path/to/this/folder"
        write_text(folder / card, model_card(shared, where, name, picture, base_model, licence))

    if not is_folder:
        options: dict[str, Any] = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        return _push(str(repo), write, {"private": private}, options, token)
    folder = Path(repo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(f"{folder} cannot be made: {error.strerror}") from error
    write(folder, _is_of_others(folder / CARD))
    return str(folder)


def _push(
    repo: str, write: Callable[[Path, bool], None], made: dict[str, Any], options: dict[str, Any], token: Any
) -> str:
    """Write the files to a folder, and upload that."""
    api = hub_module("push_to_hub").HfApi(token=token)
    try:
        api.create_repo(repo, exist_ok=True, **made)
        known = api.file_exists(repo, CARD, revision=options["revision"])
        card = api.hf_hub_download(repo, CARD, revision=options["revision"]) if known else None
    except Exception as error:
        raise readable(error, repo) from error
    with tempfile.TemporaryDirectory() as place:
        write(Path(place), card is not None and _is_of_others(Path(card)))
        try:
            return str(api.upload_folder(repo_id=repo, folder_path=place, **options))
        except Exception as error:
            raise readable(error, repo) from error


def _is_of_others(card: Path) -> bool:
    """Whether there is a card that was not written here."""
    try:
        return MARK.encode() not in read_bytes(card, CARD_BYTES)
    except MissingFile:
        return False
    except (FileError, InvalidSetting):  # whatever it is, it is not from here
        return True


def _figure(plans: CachePlan | PlanTiers | SearchResult) -> Any:
    """Draw the plans that a search has run, or what plans promise."""
    if isinstance(plans, SearchResult):
        if any(each.psnr is not None for each in plans.evaluations):
            return frontier(*(plans.tiers.values() or [plans]))
        plans = plans.plans
    if isinstance(plans, CachePlan):
        plans = PlanTiers({target_name(plans.provenance.target): plans})
    return tiers(plans)
