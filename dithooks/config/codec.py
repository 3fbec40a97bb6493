"""Policies and predictors as JSON: an object with the class's name and its fields."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields
from typing import Any

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

KINDS: tuple[type, ...] = (
    Interval,
    Mask,
    Threshold,
    Budget,
    MagnitudeRatio,
    EasyCache,
    Uncached,
    Reuse,
    Linear,
    Taylor,
    Fitted,
)


def encode(value: Any) -> Any:
    """A part, or a sequence with parts in it, in JSON's types.

    Raises:
        TypeError: a policy or predictor that is not one of the library's own.
    """
    if isinstance(value, (Policy, Predictor)):
        if type(value) not in KINDS:
            raise WrongType(f"{type(value).__name__} is not one of the library's own: it cannot be written as JSON")
        given = {each.name: getattr(value, each.name) for each in fields(value) if _written(each, value)}  # type: ignore[arg-type]
        return {"kind": type(value).__name__, **{name: encode(item) for name, item in given.items()}}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {key: encode(item) for key, item in value.items()}
    return value


def _written(each: Field[Any], value: Any) -> bool:
    """All fields are, but those that came later and are not used: what is written without them stays as it was."""
    return "written" not in each.metadata or getattr(value, each.name) is not None


def plain(value: Any) -> Any:
    """Numbers as Python has them, sequences and arrays as tuples, mappings as dicts; parts as they are."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain(value.tolist())
    return tuple(plain(item) for item in value) if isinstance(value, (list, tuple)) else value


def decode(value: Any) -> Any:
    """What :func:`encode` wrote; objects without a kind stay dicts, and lists become tuples.

    Raises:
        ValueError: no such kind, or fields missing or unknown.
        TypeError: a field is of the wrong type.
    """
    if isinstance(value, list):
        return tuple(decode(item) for item in value)
    if not isinstance(value, dict):
        return value
    inner = {name: decode(item) for name, item in value.items() if name != "kind"}
    if "kind" not in value:
        return inner
    known = {kind.__name__: kind for kind in KINDS}
    if not isinstance(value["kind"], str) or value["kind"] not in known:
        raise InvalidSetting(f"there is no policy or predictor {value['kind']!r}: known are {', '.join(known)}")
    kind = known[value["kind"]]
    if strange := set(inner) - {each.name for each in fields(kind)}:
        raise InvalidSetting(f"{kind.__name__} has no field {', '.join(sorted(strange))}")
    try:
        return kind(**inner)
    except TypeError as error:
        if "missing" in str(error):
            raise InvalidSetting(f"{kind.__name__} lacks a field: {error}") from None
        raise
