"""The attempts of a process at its calls, noted in files: a process that is killed cannot report them."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from .files import Folder

FOLDER = "_underway"
ATTEMPTS = 3  # of a call that ended the process, after which it is given up


class AttemptLog:
    """The calls of one chunk that have begun and not returned, in a file in ``_underway/``.

    Args:
        folder: the job's folder.
        name: name of the chunk.
        actor: id of the actor that draws it.

    Example: a process that was killed has left its attempt to the next one.
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     AttemptLog(Folder(place), "chunk", "a1").begin([7, 8])
        ...     again = AttemptLog(Folder(place), "chunk", "a1")
        ...     again.crashes([7, 8]), again.crashes([7])
        (1, 0)
    """

    def __init__(self, folder: Folder, name: str, actor: str) -> None:
        self._folder, self._file, self._actor = folder, f"{FOLDER}/{name}.json", actor
        self._calls: dict[str, dict[str, Any]] = {}
        if (data := folder.read(self._file)) is not None:
            self._calls = json.loads(data)["calls"]

    def crashes(self, ids: Sequence[Any]) -> int:
        """Return how many processes ended in a call."""
        return int(self._calls.get(_key(ids), {}).get("attempts", 0))

    def last_error(self, ids: Sequence[Any]) -> str:
        """Return the error that the last of these processes noted, in parentheses; empty: it noted none."""
        error = self._calls.get(_key(ids), {}).get("error")
        return f" ({error})" if error else ""

    def begin(self, ids: Sequence[Any]) -> None:
        """Note an attempt at a call, which holds until :meth:`returned`."""
        call = self._calls.setdefault(_key(ids), {"attempts": 0})
        call["attempts"] += 1
        self._write()

    def note_error(self, ids: Sequence[Any], text: str) -> None:
        """Note the error that ends this process."""
        self._calls[_key(ids)]["error"] = text
        self._write()

    def returned(self, ids: Sequence[Any]) -> None:
        """Forget the attempts at a call that has returned or raised; written when the next call begins."""
        self._calls.pop(_key(ids), None)

    def delete(self) -> None:
        """Delete the file, once the chunk is written."""
        self._folder.delete(self._file)

    def _write(self) -> None:
        log = {"actor": self._actor, "host": platform.node(), "pid": os.getpid(), "calls": self._calls}
        self._folder.write(self._file, json.dumps(log).encode())


def forget_attempts(folder: Folder) -> None:
    """Delete the attempts of earlier jobs at this folder: their calls ended because the driver was stopped."""
    for name in folder.names(FOLDER):
        folder.delete(f"{FOLDER}/{name}")


def _key(ids: Sequence[Any]) -> str:
    return json.dumps(list(ids))
