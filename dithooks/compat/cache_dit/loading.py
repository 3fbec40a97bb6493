"""cache-dit's configurations, read from a file or a mapping."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, overload

from ...config.safe_json import bounded, read_file, strict
from ...errors import InvalidSetting, WrongType
from .configs import CalibratorConfig, DBCacheConfig, check_names
from .masks import named_mask
from .modifiers import from_keywords, without_others

Source = str | os.PathLike[str] | Mapping[str, Any]
SECTION = "cache_config"


@overload
def load_configs(path_or_dict: Source, return_dict: Literal[True] = True, reset: bool = False) -> dict[str, Any]: ...


@overload
def load_configs(
    path_or_dict: Source, return_dict: bool, reset: bool = False
) -> dict[str, Any] | tuple[DBCacheConfig, CalibratorConfig | None]: ...


def load_configs(
    path_or_dict: Source, return_dict: bool = True, reset: bool = False
) -> dict[str, Any] | tuple[DBCacheConfig, CalibratorConfig | None]:
    """Read keywords for :func:`enable_cache`: ``enable_cache(pipe, **load_configs("cache.yaml"))``.

    Args:
        path_or_dict: as for :func:`load_cache_config`.
        return_dict: whether to return a dict with ``cache_config`` and ``calibrator_config``, rather than a pair.
        reset: as for :func:`load_cache_config`.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as :func:`load_cache_config`.

    Example:
        >>> sorted(load_configs({"cache_config": {"max_warmup_steps": 4}}))
        ['cache_config', 'calibrator_config']
    """
    cache_config, calibrator_config = load_cache_config(path_or_dict, reset)
    if not return_dict:
        return cache_config, calibrator_config
    return {"cache_config": cache_config, "calibrator_config": calibrator_config}


def load_cache_config(path_or_dict: Source, reset: bool = False) -> tuple[DBCacheConfig, CalibratorConfig | None]:
    """Read a cache config and a calibrator config.

    Args:
        path_or_dict: a YAML file, a JSON file (``.json``), or a mapping, with the section ``cache_config`` or with its
            entries themselves: fields of :class:`DBCacheConfig`, and ``enable_taylorseer``,
            ``enable_encoder_taylorseer``, ``taylorseer_cache_type`` and ``taylorseer_order``. A policy's name as
            ``steps_computation_mask`` goes with ``num_inference_steps``.
        reset: whether missing fields are ``None``, which changes nothing when applied to another configuration; else
            they have their defaults.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: a YAML file, without PyYAML.
        TypeError: an entry is not known, or the content is not a mapping.
        ValueError: the file cannot be parsed, or a setting is not available here.

    Example:
        >>> config, _ = load_cache_config({"max_warmup_steps": 4, "residual_diff_threshold": 0.12})
        >>> config.strify()
        'DBCache_F8B0_W4I1M0MC0_R0.12'
    """
    if isinstance(path_or_dict, Mapping):
        return _configs(path_or_dict, reset)
    if not isinstance(path_or_dict, (str, os.PathLike)):
        raise WrongType(f"path_or_dict must be the path of a file, or a mapping, not {path_or_dict!r}")
    path = Path(path_or_dict)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path_or_dict)!r}")
    return read_file(path, lambda text: _configs(_read(path, text), reset))


def _read(path: Path, text: str) -> Any:
    if path.suffix.lower() == ".json":
        try:
            return strict(text)
        except ValueError as error:
            raise InvalidSetting(f"this is not JSON: {error}") from None
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ImportError(f"{path}: YAML is read with PyYAML: pip install pyyaml, or write the file as JSON") from None
    try:
        data = yaml.safe_load(text)
        bounded(data)
        return data
    # PyYAML raises the built-in errors for values that do not fit their tags.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InvalidSetting(f"this is not YAML: {error}") from None
    except RecursionError:
        raise InvalidSetting("this is nested too deeply") from None


def _configs(data: Any, reset: bool) -> tuple[DBCacheConfig, CalibratorConfig | None]:
    if not isinstance(data, Mapping):
        raise WrongType(f"a mapping with the section {SECTION} is expected, not {data!r}")
    entries = without_others(data)
    sections = [name for name, value in entries.items() if isinstance(value, Mapping)]
    check_names("a configuration", sections, (SECTION,), "section")
    if SECTION in entries:
        section = entries.pop(SECTION)
        if entries:
            raise WrongType(f"{', '.join(map(str, entries))} beside {SECTION}: what is to be read stands inside it")
        if not isinstance(section, Mapping):
            raise WrongType(f"{SECTION} must be a mapping of fields, not {section!r}")
        entries = dict(section)
    values, forecast = from_keywords(entries, "DBCacheConfig")
    if "steps_computation_mask" in values:
        steps = values.get("num_inference_steps")
        values["steps_computation_mask"] = named_mask(values["steps_computation_mask"], steps)
    return (DBCacheConfig().reset() if reset else DBCacheConfig()).update(**values), forecast
