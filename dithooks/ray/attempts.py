"""What a process is at, kept outside of it: one that is ended can tell no more."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from typing import Any

from .files import Folder

UNDERWAY = "_underway"
ATTEMPTS = 3  # that never returned, after which a call is made no more


class Underway:
    """The calls of one chunk that were begun and have not returned, in ``_underway/``.

    Args:
        folder: of the job.
        name: of the chunk.
        actor: that is at it.

    Example: of a process that ended, the next one learns.
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     Underway(Folder(place), "chunk", "a1").begin([7, 8])
        ...     again = Underway(Folder(place), "chunk", "a1")
        ...     again.ended([7, 8]), again.ended([7])
        (1, 0)
    """

    def __init__(self, folder: Folder, name: str, actor: str) -> None:
        self._folder, self._file, self._actor = folder, f"{UNDERWAY}/{name}.json", actor
        self._calls: dict[str, dict[str, Any]] = {}
        if (data := folder.read(self._file)) is not None:
            self._calls = json.loads(data)["calls"]

    def ended(self, ids: Sequence[Any]) -> int:
        """How many processes ended in a call."""
        return int(self._calls.get(_key(ids), {}).get("attempts", 0))

    def last_words(self, ids: Sequence[Any]) -> str:
        """What the last of them said, in parentheses; nothing, if it could not."""
        said = self._calls.get(_key(ids), {}).get("said")
        return f" ({said})" if said else ""

    def begin(self, ids: Sequence[Any]) -> None:
        """A call begins: what is noted holds until :meth:`returned`."""
        call = self._calls.setdefault(_key(ids), {"attempts": 0})
        call["attempts"] += 1
        self._write()

    def say(self, ids: Sequence[Any], text: str) -> None:
        """Leave word of what ends this process."""
        self._calls[_key(ids)]["said"] = text
        self._write()

    def returned(self, ids: Sequence[Any]) -> None:
        """A call has returned, or failed; written down when the next begins."""
        self._calls.pop(_key(ids), None)

    def over(self) -> None:
        """The chunk is written: nothing is left to tell."""
        self._folder.delete(self._file)

    def _write(self) -> None:
        told = {"actor": self._actor, "host": platform.node(), "pid": os.getpid(), "calls": self._calls}
        self._folder.write(self._file, json.dumps(told).encode())


def clear(folder: Folder) -> None:
    """Forget what jobs before this one were at: their processes are not to blame, the driver was stopped."""
    for name in folder.names(UNDERWAY):
        folder.delete(f"{UNDERWAY}/{name}")


def _key(ids: Sequence[Any]) -> str:
    return json.dumps(list(ids))
