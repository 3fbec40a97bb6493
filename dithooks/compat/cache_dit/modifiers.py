"""What differs for some blocks, and the older flat keywords, as changes of a configuration."""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidSetting, WrongType
from .configs import (
    BasicCacheConfig,
    C,
    CalibratorConfig,
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
    caching_type,
    check_names,
)

# Flat keywords of the forecast, and its fields that they set.
FORECAST = {
    "enable_taylorseer": "enable_calibrator",
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
}
ELSEWHERE = ("parallelism_config", "attention_backend", "quantize_config")  # what cache-dit sets up besides
ABSENT = ("enable_dmd", "enable_encoder_dmd", "enable_foca", "enable_encoder_foca")
FLAT = (*(each.name for each in dataclasses.fields(BasicCacheConfig)), *FORECAST)


def without_others(given: Mapping[str, Any]) -> dict[str, Any]:
    """What is left of keywords when those that are not about caching are taken away.

    Raises:
        ValueError: one of these is given.
    """
    if others := [name for name in ELSEWHERE if given.get(name) is not None]:
        raise InvalidSetting(
            f"{' and '.join(others)}: caching is all this library does; leave it out, and set it up before, with what "
            "diffusers or PyTorch have for it"
        )
    return {name: value for name, value in given.items() if name not in ELSEWHERE}


def from_keywords(keywords: Mapping[str, Any], owner: str) -> tuple[dict[str, Any], TaylorSeerCalibratorConfig | None]:
    """Split flat keywords into fields of :class:`BasicCacheConfig` and a forecast, if one is switched on or off.

    Args:
        keywords: by name; one that is ``None`` counts as not given.
        owner: who takes them, for the messages.

    Raises:
        TypeError: there is no such keyword.
        ValueError: what is asked for is not available.

    Example:
        >>> from_keywords({"max_warmup_steps": 4, "taylorseer_order": None}, "enable_cache")
        ({'max_warmup_steps': 4}, None)
    """
    for name in ABSENT:
        if keywords.get(name):
            raise InvalidSetting(
                f"{name}={keywords[name]!r}: this forecast is not available; take enable_taylorseer=True, or none"
            )
    if keywords.get("cache_type") is not None:  # before the fields of another type are taken for slips
        keywords = {**keywords, "cache_type": caching_type(keywords["cache_type"])}
    check_names(owner, (name for name in keywords if name not in ABSENT), FLAT)
    given = {name: value for name, value in keywords.items() if value is not None and name not in ABSENT}
    forecast = {FORECAST[name]: given.pop(name) for name in FORECAST if name in given}
    if not {"enable_calibrator", "enable_encoder_calibrator"} & set(forecast):
        if forecast:
            message = f"{' and '.join(n for n, f in FORECAST.items() if f in forecast)} without enable_taylorseer"
            warnings.warn(f"{owner}: {message} does nothing: add enable_taylorseer=True", UserWarning, stacklevel=3)
        return given, None
    forecast.setdefault("enable_calibrator", False)
    forecast.setdefault("enable_encoder_calibrator", forecast["enable_calibrator"])
    return given, TaylorSeerCalibratorConfig(**forecast)


class ParamsModifier:
    """What differs for one transformer or one of its lists of blocks.

    Args:
        cache_config: its fields that are not ``None`` count: give what differs by ``DBCacheConfig().reset(...)``.
        calibrator_config: likewise.
        **keywords: single fields, and the flat keywords ``enable_taylorseer``, ``enable_encoder_taylorseer``,
            ``taylorseer_cache_type`` and ``taylorseer_order``; they go before the configurations.

    Raises:
        TypeError: there is no such keyword, or one of the configurations is something else.
        ValueError: what is asked for is not available.

    Example:
        >>> modifier = ParamsModifier(residual_diff_threshold=0.2)
        >>> applied(modifier, DBCacheConfig(max_warmup_steps=4))[0].strify()
        'DBCache_F8B0_W4I1M0MC0_R0.2'
    """

    def __init__(
        self,
        cache_config: BasicCacheConfig | None = None,
        calibrator_config: CalibratorConfig | None = None,
        **keywords: Any,
    ) -> None:
        values, forecast = from_keywords(keywords, "ParamsModifier")
        for name, part, kind in (
            ("cache_config", cache_config, BasicCacheConfig),
            ("calibrator_config", calibrator_config, CalibratorConfig),
        ):
            if part is not None and not isinstance(part, kind):
                raise WrongType(f"{name} must be a {kind.__name__}, not {part!r}")
        if values:
            cache_config = merged(cache_config, DBCacheConfig().reset(**values))
        self.cache_config = cache_config
        self.calibrator_config = calibrator_config if forecast is None else forecast

    def __repr__(self) -> str:
        return f"ParamsModifier({self.cache_config!r}, {self.calibrator_config!r})"


def applied(
    modifier: ParamsModifier, cache_config: BasicCacheConfig, calibrator_config: CalibratorConfig | None = None
) -> tuple[BasicCacheConfig, CalibratorConfig | None]:
    """New configurations in which the modifier's fields that are not ``None`` count."""
    cache = merged(cache_config, modifier.cache_config)
    assert cache is not None
    return cache, merged(calibrator_config, modifier.calibrator_config)


def merged(base: C | None, changes: C | None) -> C | None:
    """A new configuration: the base's fields, and over them those of the changes that are not ``None``.

    Raises:
        TypeError: the changes are of another kind, with fields that the base has not.
    """
    if base is None or changes is None:
        return copy.deepcopy(changes if base is None else base)
    kind = type(changes) if isinstance(changes, type(base)) else type(base)
    return copy.deepcopy(kind().reset(**vars(base)).update(**vars(changes)))
