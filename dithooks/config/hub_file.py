"""Files from the Hugging Face Hub, its local cache, or a folder that looks like a repository."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, TypeVar

from ..errors import DitHooksError, FileError, InvalidSetting, MissingFile, MissingPackage, WrongType
from ..validation import check_text, shown
from .codec import JsonFile

H = TypeVar("H", bound="HubFile")


class HubFile(JsonFile):
    """A JSON file that can be shared on the Hugging Face Hub."""

    _file: ClassVar[str]  # its name in a repository

    @classmethod
    def from_pretrained(
        cls: type[H],
        repo: str | os.PathLike[str],
        filename: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
    ) -> H:
        """Load from a repository on the Hugging Face Hub, or from a folder.

        The file may be anybody's: it is read like all others, within bounds, and nothing in it is run.

        Args:
            repo: a folder; or an id, such as ``"org/repo"``, of a repository that is downloaded, or found in the local
                cache. A folder of that name comes first.
            filename: the file in the repository; ``None``: ``plan.json`` of a plan, ``plans.json`` of tiers.
            revision: a branch, tag or commit; of repositories only.
            cache_dir: the local cache, if it is another one than that of ``huggingface_hub``.
            local_files_only: look into the cache only; with ``HF_HUB_OFFLINE=1`` nothing else is done anyway.
            token: as ``huggingface_hub`` takes it.

        Raises:
            TypeError, ValueError: the id or the name of the file is none; or the file is refused.
            OSError: there is no such file, or it cannot be read or downloaded.
            ModuleNotFoundError: ``huggingface_hub`` is not installed, and ``repo`` is no folder.
        """
        name = check_name(cls._file if filename is None else filename)
        if isinstance(repo, os.PathLike) or os.path.isdir(check_text("repo", repo)):
            if revision is not None:
                raise InvalidSetting(f"revision={shown(revision)} is of repositories: the folder {repo} has none")
            return cls.load(Path(repo) / name)
        given = {"revision": revision, "cache_dir": cache_dir, "local_files_only": local_files_only, "token": token}
        try:
            file = hub_module("from_pretrained").hf_hub_download(repo, name, **given)
        except Exception as error:
            raise readable(error, f"{repo}: {name}") from error
        return cls.load(file)


def check_name(name: object) -> str:
    """Return the name of a file in a repository.

    Raises:
        TypeError, ValueError: it is none, or leads out of the repository.
    """
    path = PurePosixPath(check_text("filename", name))
    if path.is_absolute() or ".." in path.parts or path.suffix != ".json" or "\\" in str(path):
        raise InvalidSetting(f"filename={shown(str(path))} is not that of a .json file in a repository")
    return str(path)


def hub_module(subject: str) -> Any:
    """Import ``huggingface_hub``.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    try:
        return import_module("huggingface_hub")
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{subject} needs huggingface_hub, which is not installed: pip install 'dithooks[hub]'; a local folder "
            "needs nothing"
        ) from error


def readable(error: Exception, what: str) -> Exception:
    """Return an error of ``huggingface_hub`` as one of this library, in a line that says what it is about."""
    if isinstance(error, DitHooksError):
        return error
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    missing = ("EntryNotFoundError", "RepositoryNotFoundError", "RevisionNotFoundError", "LocalEntryNotFoundError")
    if any(kind.__name__ in missing for kind in type(error).__mro__):
        return MissingFile(
            f"{what} is not there, or cannot be reached: {text:.120}. Check the names and the revision, and offline, "
            "whether it is in the cache"
        )
    if isinstance(error, (ValueError, TypeError)):
        kind = WrongType if isinstance(error, TypeError) else InvalidSetting
        return kind(f"{what} is refused by huggingface_hub: {text:.200}")
    return FileError(f"{what} cannot be read or written on the Hub: {text:.200}")
