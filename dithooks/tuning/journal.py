"""The journal of a search: a folder from which an interrupted search goes on."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.safe_json import LARGEST, read_file, strict
from ..errors import FileError, InvalidSetting, MissingFile, WrongType, shortened
from ..recording.rank_broadcast import is_rank_0
from ..recording.recording import Recording
from ..storage.archive import read_arrays
from ..storage.regular_file import read_bytes
from ..storage.replacement import replacing, write_text
from ..validation import shown

SCHEMA = 1
PURPOSE, RECORDING, REFERENCE, EVALUATIONS = "purpose.json", "recording.npz", "reference.npz", "evaluations.jsonl"
FLOAT = "float"  # {"float": "inf"}: a number that JSON lacks
SPECIAL = ("inf", "-inf", "nan")
JOURNAL_BYTES = 2**24  # 16 MiB, of the evaluations of some ten thousand plans
Check = Callable[[Mapping[str, Any]], object]


class Journal:
    """The recording, the reference samples and the evaluations of one search; :meth:`open` makes a journal.

    Of several processes only rank 0 writes, and each reads the folder that it sees. Where these may differ, pass what
    was read through :func:`broadcast_from_rank_0`.
    """

    def __init__(self, folder: Path | None, evaluations: dict[str, dict[str, Any]]) -> None:
        self.folder = folder
        self._evaluations = evaluations
        self._recording: Recording | None = None

    @classmethod
    def open(
        cls, folder: str | os.PathLike[str] | None, purpose: Mapping[str, Any], check: Check | None = None
    ) -> Journal:
        """Open the journal of an earlier search with the same purpose, or a new one.

        Args:
            folder: the journal's folder, made if it does not exist; ``None``: the journal is kept in memory only.
            purpose: what distinguishes one search from another, in JSON's types: fingerprint, steps, size.
            check: is given the values of each evaluation that is read, and raises for those that are none.

        Raises:
            TypeError, ValueError: ``purpose`` is not JSON; or the folder is a file, or holds a journal that is another
                search's or cannot be read.
            OSError: the folder cannot be read or written; a :class:`.FileError`.

        Example:
            >>> journal = Journal.open(None, {"fingerprint": "0123456789abcdef", "steps": 28})
            >>> journal.keep_evaluation("plan a", {"psnr": 41.5, "seconds": [2.5, 2.25]})
            >>> journal.evaluation("plan a")
            {'psnr': 41.5, 'seconds': [2.5, 2.25]}
            >>> journal.evaluation("plan b") is None
            True
        """
        try:
            ours: dict[str, Any] = json.loads(json.dumps(dict(purpose), allow_nan=False))
        except (TypeError, ValueError) as error:
            kind = WrongType if isinstance(error, TypeError) else InvalidSetting
            raise kind(f"purpose={shown(purpose)} cannot be written as JSON ({error}): give plain values") from None
        if folder is None:
            return cls(None, {})
        path = Path(folder)
        if path.exists() and not path.is_dir():
            raise InvalidSetting(f"{path} is a file: give a folder for the journal")
        _claim(path, ours)
        return cls(path, _evaluations(path / EVALUATIONS, check))

    def recording(self) -> Recording | None:
        """Return what :meth:`keep_recording` kept, with the samples as results; ``None``: nothing yet.

        Raises:
            ValueError: the files cannot be read.
        """
        if self._recording is None and self.folder is not None:
            paths = [self.folder / RECORDING, self.folder / REFERENCE]
            if all(path.exists() for path in paths):
                recording, samples = (_readable(path, read) for path, read in zip(paths, _READERS, strict=True))
                self._recording = replace(recording, results=samples)
        return self._recording

    def keep_recording(self, recording: Recording, samples: Sequence[NDArray[Any]]) -> None:
        """Keep a recording, with the samples that the run drew in place of its results."""
        self._recording = replace(recording, results=list(samples))
        if self.folder is None or not is_rank_0():
            return
        # The reference first: a search that is killed in between records again, rather than go on without it
        with replacing(self.folder / REFERENCE) as draft, draft.open("wb") as file:
            np.savez(file, *samples)
        recording.save(self.folder / RECORDING)

    def evaluation(self, key: str) -> dict[str, Any] | None:
        """Return what was last kept under a key, tuples as lists; ``None``: nothing."""
        return deepcopy(self._evaluations.get(key))

    def keep_evaluation(self, key: str, values: Mapping[str, Any]) -> None:
        """Keep an evaluation; it is on the disk when this returns.

        Args:
            key: the plan's key.
            values: numbers, also infinite ones, texts, ``None``, or lists and mappings of these, by name.

        Raises:
            TypeError: a value is of another kind, or a name is no text.
            ValueError: a value is called "key".
        """
        if "key" in values:
            raise InvalidSetting(
                f"an evaluation's values cannot be called 'key', as those of {shown(key)}: give another name"
            )
        line = _encode(key, {"key": key, **values})
        self._evaluations[key] = {name: value for name, value in _decode(line).items() if name != "key"}
        if self.folder is not None and is_rank_0():
            _append(self.folder / EVALUATIONS, json.dumps(line, allow_nan=False).encode() + b"\n")


# -- files ------------------------------------------------------------------------------------------------------


def _claim(folder: Path, ours: dict[str, Any]) -> None:
    """Check that a folder is this search's, or make it so."""
    path = folder / PURPOSE
    if path.exists():
        stored = _readable(path, _read_purpose)
        differing = [n for n in {**stored, **ours} if n not in stored or n not in ours or stored[n] != ours[n]]
        if differing:
            difference = "; ".join(f"{n}: {_text(stored, n)} there, {_text(ours, n)} here" for n in differing)
            raise InvalidSetting(f"{folder} has the journal of another search ({difference}): give another folder")
    elif left := [name for name in (RECORDING, REFERENCE, EVALUATIONS) if (folder / name).exists()]:
        raise InvalidSetting(f"{folder} has {left[0]}, but no {PURPOSE} that names its search: give another folder")
    elif is_rank_0():
        head = {"schema": SCHEMA, "kind": "Journal", "purpose": ours}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FileError(f"{folder} cannot be made: {error.strerror}: give another folder") from error
        write_text(path, json.dumps(head, indent=2) + "\n")


def _text(purpose: Mapping[str, Any], name: str) -> str:
    return shortened(json.dumps(purpose[name]), 80) if name in purpose else "nothing"


def _append(path: Path, line: bytes) -> None:
    """Add a line to a file, or nothing of it."""
    try:
        with path.open("ab", buffering=0) as file:  # a buffer would write the rest of the line when it is closed
            before = file.tell()
            try:
                rest = memoryview(line)
                while rest:
                    rest = rest[file.write(rest) :]
                os.fsync(file.fileno())
            except BaseException:
                with suppress(OSError):  # else the next line would go on where this one broke off
                    os.truncate(path, before)
                raise
    except OSError as error:
        raise FileError(f"{path} cannot be written: {error.strerror}") from error


def _evaluations(path: Path, check: Check | None) -> dict[str, dict[str, Any]]:
    """Read all whole lines, and cut off an unfinished last one, which a killed process has left."""
    try:
        data = read_bytes(path, JOURNAL_BYTES)
    except MissingFile:
        return {}
    evaluations, torn = {}, len(data) - (data.rfind(b"\n") + 1)
    if data.count(b",") + data.count(b"{") + data.count(b"[") > LARGEST:
        raise InvalidSetting(f"{path} holds more than {LARGEST:,} values: give another folder")
    for number, line in enumerate(io.BytesIO(data[: len(data) - torn]), 1):
        if not line.strip():
            continue
        try:
            key, values = _evaluation(line)
            if check is not None:
                check(values)
        except (ValueError, TypeError) as error:
            raise InvalidSetting(
                f"{path}, line {number} is no evaluation ({error}): delete the line, and it is made again, or give "
                "another folder"
            ) from None
        evaluations[key] = values
    if torn and is_rank_0():
        os.truncate(path, len(data) - torn)
    return evaluations


def _evaluation(line: bytes) -> tuple[str, dict[str, Any]]:
    read = strict(line.decode())
    if not isinstance(read, dict) or "key" not in read:
        raise InvalidSetting("it has no key")
    values = {name: _decode(value) for name, value in read.items()}
    key = values.pop("key")
    if not isinstance(key, str):
        raise InvalidSetting(f"its key is {shown(key)}, not a text")
    return key, values


def _read_purpose(path: Path) -> dict[str, Any]:
    head = read_file(path, strict)
    if not isinstance(head, dict) or (head.get("kind"), head.get("schema")) != ("Journal", SCHEMA):
        raise InvalidSetting(f"a Journal of schema {SCHEMA} is expected")
    if not isinstance(purpose := head.get("purpose"), dict):
        raise InvalidSetting("it names no purpose")
    return purpose


def _read_samples(path: Path) -> list[NDArray[Any]]:
    arrays = read_arrays(path)
    if lacking := [name for name in (f"arr_{number}" for number in range(len(arrays))) if name not in arrays]:
        raise InvalidSetting(f"it lacks {lacking[0]}")
    samples = [arrays[f"arr_{number}"] for number in range(len(arrays))]
    if odd := [sample.dtype for sample in samples if sample.dtype.kind not in "biuf"]:
        raise InvalidSetting(f"it has an array of {odd[0]}, and pictures are of numbers")
    return samples


_READERS = (Recording.load, _read_samples)


def _readable(path: Path, read: Any) -> Any:
    try:
        return read(path)
    except (ValueError, TypeError, OSError) as error:
        raise InvalidSetting(
            f"{path} cannot be read ({error}): delete its folder to search again, or give another"
        ) from None


# -- numbers ----------------------------------------------------------------------------------------------------


def _encode(name: str, value: Any) -> Any:
    if value is None or isinstance(value, (str, bool)):
        return value
    if isinstance(value, Mapping):
        if not all(isinstance(each, str) for each in value) or set(value) == {FLOAT}:
            raise WrongType(f"{name} has names that cannot be kept: {', '.join(map(repr, value))}: give other texts")
        return {each: _encode(name, item) for each, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return _encode(name, value.tolist())
    if isinstance(value, (list, tuple)):
        return [_encode(name, item) for item in value]
    if not isinstance(value, (int, float)):
        raise WrongType(
            f"{name} must be made of numbers, texts, None, lists and mappings, not {shown(value)} "
            f"({type(value).__name__})"
        )
    return value if math.isfinite(value) else {FLOAT: repr(float(value))}


def _decode(value: Any) -> Any:
    if isinstance(value, list):
        return [_decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if set(value) == {FLOAT}:
        if value[FLOAT] not in SPECIAL:
            raise InvalidSetting(f"{shown(value[FLOAT])} is no number that JSON lacks")
        return float(value[FLOAT])
    return {name: _decode(item) for name, item in value.items()}
