"""Changes of a configuration: for some lists of blocks, and by cache-dit's older flat keywords."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

from ...errors import InvalidSetting, WrongType
from ...stats.user_warning import warn_user
from ...validation import shown
from .configs import (
    BasicCacheConfig,
    C,
    CalibratorConfig,
    DBCacheConfig,
    TaylorSeerCalibratorConfig,
    caching_type,
    check_names,
)

# Flat keywords of the forecast, and the fields that they set.
FORECAST = {
    "enable_taylorseer": "enable_calibrator",
    "enable_encoder_taylorseer": "enable_encoder_calibrator",
    "taylorseer_cache_type": "calibrator_cache_type",
    "taylorseer_order": "taylorseer_order",
}
ELSEWHERE = (
    "parallelism_config",
    "attention_backend",
    "quantize_config",
)  # cache-dit sets these up as well; this library does not
ABSENT = ("enable_dmd", "enable_encoder_dmd", "enable_foca", "enable_encoder_foca")
FLAT = (*(each.name for each in dataclasses.fields(BasicCacheConfig)), *FORECAST)


def without_others(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keywords without those that are not about caching.

    Raises:
        ValueError: a keyword that is not about caching has a value.
    """
    if others := [name for name in ELSEWHERE if given.get(name) is not None]:
        raise InvalidSetting(
            f"{' and '.join(others)}: caching is all this library does; leave it out, and set it up before, with what "
            "diffusers or PyTorch have for it"
        )
    return {name: value for name, value in given.items() if name not in ELSEWHERE}


def from_keywords(keywords: Mapping[str, Any], owner: str) -> tuple[dict[str, Any], TaylorSeerCalibratorConfig | None]:
    """Split flat keywords into fields of :class:`BasicCacheConfig` and a forecast, if one is enabled or disabled.

    Args:
        keywords: by name; ``None`` counts as not given.
        owner: the function or class that accepts the keywords, for messages.

    Raises:
        TypeError: a keyword is not known.
        ValueError: a setting is not available here.

    Example:
        >>> from_keywords({"max_warmup_steps": 4, "taylorseer_order": None}, "enable_cache")
        ({'max_warmup_steps': 4}, None)
    """
    for name in ABSENT:
        if keywords.get(name):
            raise InvalidSetting(
                f"{name}={shown(keywords[name])}: this forecast is not available; take enable_taylorseer=True, or none"
            )
    if keywords.get("cache_type") is not None:  # first, or the fields of another type would count as misspelt
        keywords = {**keywords, "cache_type": caching_type(keywords["cache_type"])}
    check_names(owner, (name for name in keywords if name not in ABSENT), FLAT)
    given = {name: value for name, value in keywords.items() if value is not None and name not in ABSENT}
    forecast = {FORECAST[name]: given.pop(name) for name in FORECAST if name in given}
    if not {"enable_calibrator", "enable_encoder_calibrator"} & set(forecast):
        if forecast:
            message = f"{' and '.join(n for n, f in FORECAST.items() if f in forecast)} without enable_taylorseer"
            warn_user(f"{owner}: {message} does nothing: add enable_taylorseer=True")
        return given, None
    forecast.setdefault("enable_calibrator", False)
    forecast.setdefault("enable_encoder_calibrator", forecast["enable_calibrator"])
    return given, TaylorSeerCalibratorConfig(**forecast)


class ParamsModifier:
    """Settings that differ for one transformer or one of its lists of blocks.

    Args:
        cache_config: changes every field that is not ``None``; make one by ``DBCacheConfig().reset(...)``.
        calibrator_config: changes every field that is not ``None``.
        **keywords: single fields, and the flat keywords ``enable_taylorseer``, ``enable_encoder_taylorseer``,
            ``taylorseer_cache_type`` and ``taylorseer_order``; they override the configurations.

    Raises:
        TypeError: a keyword is not known, or a configuration is of another type.
        ValueError: a setting is not available here.

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
                raise WrongType(f"{name} must be a {kind.__name__}, not {shown(part)}")
        if values:
            cache_config = merged(cache_config, DBCacheConfig().reset(**values))
        self.cache_config = cache_config
        self.calibrator_config = calibrator_config if forecast is None else forecast

    def __repr__(self) -> str:
        return f"ParamsModifier({self.cache_config!r}, {self.calibrator_config!r})"


def applied(
    modifier: ParamsModifier, cache_config: BasicCacheConfig, calibrator_config: CalibratorConfig | None = None
) -> tuple[BasicCacheConfig, CalibratorConfig | None]:
    """Return new configurations, changed by the modifier's fields that are not ``None``."""
    cache = merged(cache_config, modifier.cache_config)
    assert cache is not None
    return cache, merged(calibrator_config, modifier.calibrator_config)


def merged(base: C | None, changes: C | None) -> C | None:
    """Return a new configuration: the base, changed by the fields of ``changes`` that are not ``None``.

    Raises:
        TypeError: ``changes`` is of another class, with fields that the base does not have.
    """
    if base is None or changes is None:
        return copy.deepcopy(changes if base is None else base)
    kind = type(changes) if isinstance(changes, type(base)) else type(base)
    return copy.deepcopy(kind().reset(**vars(base)).update(**vars(changes)))
