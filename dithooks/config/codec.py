"""Configurations and plans as JSON, by the fields of their dataclasses; policies and predictors also by their class."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from math import inf
from types import NoneType
from typing import Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import numpy as np

from ..errors import InvalidSetting, WrongType
from ..policies.budget import Budget
from ..policies.easycache import EasyCache
from ..policies.interval import Interval
from ..policies.magnitude import MagnitudeRatio
from ..policies.mask import Mask
from ..policies.policy import Policy
from ..policies.threshold import Threshold
from ..policies.uncached import Uncached
from ..predictors.fitted import Fitted
from ..predictors.polynomial import Linear, Reuse, Taylor
from ..predictors.predictor import Predictor
from ..storage.replacement import write_text
from ..validation import brief, located, named_beside, shown
from .safe_json import JSON_BYTES, parsed, read_file, strict

PARTS = (Interval, Mask, Threshold, Budget, MagnitudeRatio, EasyCache, Uncached, Reuse, Linear, Taylor, Fitted)
KINDS: dict[str, type] = {part.__name__: part for part in PARTS}
T = TypeVar("T", bound="JsonFile")


class JsonFile:
    """A dataclass that can be written to a JSON file and read from it."""

    _schemas: ClassVar[tuple[int, ...]]  # that are read
    _required: ClassVar[tuple[str, ...]] = ()  # fields of every file, beside those without a default

    @property
    def _schema(self) -> int:
        """The schema that is written: the last, unless an earlier one has a field for all that is set."""
        return self._schemas[-1]

    def to_json(self) -> str:
        """A JSON object with a schema number, the class's name as its kind, and all fields.

        JSON has no infinity: an infinite PSNR is ``"inf"``.

        Raises:
            TypeError: a policy or predictor is not one of the library's own.
        """
        return json.dumps(_encode_file(self), indent=2, allow_nan=False)

    @classmethod
    def from_json(cls: type[T], text: str) -> T:
        """Read what :meth:`to_json` wrote, in this or an earlier version.

        Raises:
            ValueError: the text is not JSON, of another kind or schema, or has missing, unknown or invalid fields.
            TypeError: a field is of the wrong type.
        """
        return cls._from_data(parsed(text, cls.__name__))

    @classmethod
    def _from_part(cls: type[T], data: Any) -> T:
        """Read the object of a part of a file."""
        return cls._from_data(data)

    @classmethod
    def _from_data(cls: type[T], data: Any) -> T:
        """Read the object of a whole file, or of a part of one."""
        name = cls.__name__
        if not isinstance(data, dict) or data.get("kind") != name:
            kind = data.get("kind") if isinstance(data, dict) else None
            there = f", not {brief(kind)}" if isinstance(kind, str) else ""
            raise InvalidSetting(f'not a {name}: a JSON object with "kind": "{name}" is expected{there}')
        if data.get("schema") not in cls._schemas:
            known = ", ".join(map(str, cls._schemas))
            raise InvalidSetting(f"{name} schema {shown(data.get('schema'))} is not known: this version reads {known}")
        values = {field: value for field, value in data.items() if field not in ("schema", "kind")}
        return cls(**arguments_of(cls, values, name, cls._required))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file, which is replaced once all is written (:func:`.replacing`).

        Raises:
            ValueError: it is more than is ever read from a file.
            OSError: the file cannot be written.
        """
        text = self.to_json() + "\n"
        strict(text)
        if (size := len(text.encode())) > JSON_BYTES:
            raise InvalidSetting(f"{os.fspath(path)} would have {size:,} bytes: no more than {JSON_BYTES:,} are read")
        write_text(path, text)

    @classmethod
    def load(cls: type[T], path: str | os.PathLike[str]) -> T:
        """Read a file that :meth:`save` wrote; errors are those of :meth:`from_json`, with the path in front."""
        return read_file(path, cls.from_json)


def plain(value: Any) -> Any:
    """A value with Python's own numbers, tuples for sequences and arrays, and dicts for mappings."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def _encode(value: Any) -> Any:
    if isinstance(value, (Policy, Predictor)):
        if type(value) not in PARTS:
            raise WrongType(f"{type(value).__name__} is not one of the library's own: it cannot be written as JSON")
        return {"kind": type(value).__name__, **_encode_fields(value)}
    if isinstance(value, JsonFile):
        return _encode_file(value)
    if is_dataclass(value):
        return _encode_fields(value)
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _encode(item) for key, item in value.items()}
    return "inf" if value == inf else value


def _encode_file(file: JsonFile) -> dict[str, Any]:
    return {"schema": file._schema, "kind": type(file).__name__, **_encode_fields(file)}


def _encode_fields(part: Any) -> dict[str, Any]:
    return {each.name: _encode(getattr(part, each.name)) for each in fields(part) if _is_written(each, part)}


def _is_written(each: Field[Any], part: Any) -> bool:
    """Fields of later versions are left out at their defaults, so that earlier versions read the file."""
    return each.metadata.get("written") != "where given" or getattr(part, each.name) != each.default


def _decode(value: Any, hint: Any, where: str) -> Any:
    """The value of a field with this type hint; ``where`` names the field in errors."""
    items = get_args(hint)
    if NoneType in items and is_dataclass(items[0]) and value is not None:
        return _decode(value, items[0], where)
    if isinstance(hint, type) and issubclass(hint, JsonFile):
        try:
            return hint._from_part(value)
        except (TypeError, ValueError) as error:
            raise located(where, error) from None
    if isinstance(hint, type) and is_dataclass(hint):
        if not isinstance(value, dict):
            raise WrongType(f"{where} must be an object with the fields of a {hint.__name__}, not {shown(value)}")
        if issubclass(hint, (Policy, Predictor)):
            return _decode_part({"kind": hint.__name__, **value})
        arguments = arguments_of(hint, value, where)
        try:
            return hint(**arguments)
        except (TypeError, ValueError) as error:
            raise located(where, error) from None
    if get_origin(hint) is tuple and is_dataclass(items[0]):
        if not isinstance(value, list):
            raise WrongType(f"{where} must be a list, not {shown(value)}")
        return tuple(_decode(item, items[0], f"{where}[{number}]") for number, item in enumerate(value))
    if get_origin(hint) is Mapping and isinstance(value, dict):  # its keys are names: "kind" may be one of them
        return {key: _decode(item, items[1], f"{where}[{key!r}]") for key, item in value.items()}
    if isinstance(value, list):
        return tuple(_decode(item, Any, where) for item in value)
    if not isinstance(value, dict):
        return value
    if "kind" in value:
        return _decode_part(value)
    return {key: _decode(item, Any, where) for key, item in value.items()}


def _decode_part(data: dict[str, Any]) -> Any:
    """A policy or predictor."""
    name = data["kind"]
    if not isinstance(name, str) or name not in KINDS:
        raise InvalidSetting(f"there is no policy or predictor {brief(name)}: known are {', '.join(KINDS)}")
    return KINDS[name](**arguments_of(KINDS[name], {k: v for k, v in data.items() if k != "kind"}, name))


def arguments_of(kind: type, values: Mapping[str, Any], where: str, required: Collection[str] = ()) -> dict[str, Any]:
    """Return the arguments of a dataclass, from the values of its fields in JSON."""
    known = {each.name: each for each in fields(kind)}
    if unknown := sorted(set(values) - set(known)):
        raise InvalidSetting(f"{where} has no field {named_beside(unknown, known)}")
    if missing := [name for name, each in known.items() if name not in values and _is_required(each, required)]:
        raise InvalidSetting(f"{where} lacks {', '.join(missing)}")
    hints = get_type_hints(kind)
    return {
        name: inf if value == "inf" and known[name].metadata.get("infinite") else _decode(value, hints[name], name)
        for name, value in values.items()
    }


def _is_required(each: Field[Any], required: Collection[str]) -> bool:
    return each.name in required or (each.default is MISSING and each.default_factory is MISSING)
