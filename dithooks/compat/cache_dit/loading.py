"""cache-dit's configurations, read from a file or a mapping."""

from __future__ import annotations

import importlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

from ...config.safe_json import bounded, read_file, strict
from ...errors import InvalidSetting, WrongType, shortened
from ...validation import shown
from .configs import CalibratorConfig, DBCacheConfig, check_names
from .masks import named_mask
from .modifiers import ELSEWHERE, from_keywords, without_others

T = TypeVar("T")
Configs = tuple[DBCacheConfig, CalibratorConfig | None]
Source = str | os.PathLike[str] | Mapping[str, Any]
SECTION = "cache_config"
YAML_BYTES = 2**14  # 16 KiB: PyYAML takes a quarter of a second for them
BRACKETS = 200  # that are opened in a file of YAML: PyYAML takes a time that grows with the square of their depth


@overload
def load_configs(path_or_dict: Source, return_dict: Literal[True] = True, reset: bool = False) -> dict[str, Any]: ...


@overload
def load_configs(
    path_or_dict: Source, return_dict: bool, reset: bool = False
) -> dict[str, Any] | tuple[DBCacheConfig, CalibratorConfig | None, Any, Any, Any]: ...


def load_configs(
    path_or_dict: Source, return_dict: bool = True, reset: bool = False
) -> dict[str, Any] | tuple[DBCacheConfig, CalibratorConfig | None, Any, Any, Any]:
    """Read keywords for :func:`enable_cache`: ``enable_cache(pipe, **load_configs("cache.yaml"))``.

    Args:
        path_or_dict: as for :func:`load_cache_config`; sections of other libraries' work may stand beside.
        return_dict: whether to return a dict, rather than a tuple of its values.
        reset: as for :func:`load_cache_config`.

    Returns:
        ``cache_config`` and ``calibrator_config``; and ``parallelism_config``, ``attention_backend`` and
        ``quantize_config`` as they stand in the file, ``None`` if they do not: :func:`enable_cache` refuses them.

    Raises:
        FileNotFoundError, ImportError, TypeError, ValueError: as :func:`load_cache_config`.

    Example:
        >>> found = load_configs({"cache_config": {"max_warmup_steps": 4}, "attention_backend": "flash"})
        >>> found["cache_config"].max_warmup_steps, found["attention_backend"], found["quantize_config"]
        (4, 'flash', None)
    """

    def both(data: Any) -> tuple[Configs, dict[str, Any]]:
        entries = dict(_mapping(data))
        others = {name: entries.pop(name, None) for name in ELSEWHERE}
        return _configs(entries, reset), others

    (cache_config, calibrator_config), others = _read(path_or_dict, both)
    if not return_dict:
        parallelism, attention, quantisation = others.values()
        return cache_config, calibrator_config, parallelism, attention, quantisation
    return {"cache_config": cache_config, "calibrator_config": calibrator_config, **others}


def load_cache_config(path_or_dict: Source, reset: bool = False) -> Configs:
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
    return _read(path_or_dict, lambda data: _configs(without_others(_mapping(data)), reset))


def _read(path_or_dict: Source, change: Callable[[Any], T]) -> T:
    """Return what a function makes of the content of a file, or of a mapping."""
    if isinstance(path_or_dict, Mapping):
        return change(path_or_dict)
    if not isinstance(path_or_dict, (str, os.PathLike)):
        raise WrongType(f"path_or_dict must be the path of a file, or a mapping, not {shown(path_or_dict)}")
    path = Path(path_or_dict)
    is_json = path.suffix.lower() == ".json"
    if is_json:
        return read_file(path, lambda text: change(_from_json(text)))
    return read_file(path, lambda text: change(_from_yaml(text, path)), YAML_BYTES)


def _from_json(text: str) -> Any:
    try:
        return strict(text)
    except ValueError as error:
        raise InvalidSetting(f"this is not JSON: {error}") from None


def _from_yaml(text: str, path: Path) -> Any:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise ImportError(f"{path}: YAML is read with PyYAML: pip install pyyaml, or write the file as JSON") from None
    if text.count("[") + text.count("{") > BRACKETS:
        raise InvalidSetting(f"it opens more than {BRACKETS} brackets")
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_nodes(node)
        data = loader.construct_document(node)
        bounded(data)
        return data
    # PyYAML raises the built-in errors for values that do not fit their tags.
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
        raise InvalidSetting(f"this is not YAML: {error}") from None
    except RecursionError:
        raise InvalidSetting("this is nested too deeply") from None


def _check_nodes(root: Any) -> None:
    """Refuse names that stand there twice, and merged mappings, which may grow without end."""
    nodes, seen = [root], {id(root)}
    for node in nodes:
        inner = node.value if isinstance(node.value, list) else []
        pairs = [part for part in inner if isinstance(part, tuple)]
        names = Counter(name.value for name, _ in pairs if isinstance(name.value, str))
        if twice := [name for name, count in names.items() if count > 1]:
            raise InvalidSetting(f"{shown(twice[0])} stands there twice")
        if any(name.tag.endswith(":merge") for name, _ in pairs):
            raise InvalidSetting("it merges mappings by <<: write them out")
        for part in inner:
            for each in part if isinstance(part, tuple) else (part,):
                if id(each) not in seen:
                    seen.add(id(each))
                    nodes.append(each)


def _mapping(data: Any) -> Mapping[str, Any]:
    if not isinstance(data, Mapping):
        raise WrongType(f"a mapping with the section {SECTION} is expected, not {shown(data)}")
    return data


def _configs(entries: dict[str, Any], reset: bool) -> Configs:
    sections = [name for name, value in entries.items() if isinstance(value, Mapping)]
    check_names("a configuration", sections, (SECTION,), "section")
    if SECTION in entries:
        section = entries.pop(SECTION)
        if entries:
            others = shortened(", ".join(map(str, entries)), 80)
            raise WrongType(f"{others} beside {SECTION}: what is to be read stands inside it")
        if not isinstance(section, Mapping):
            raise WrongType(f"{SECTION} must be a mapping of fields, not {shown(section)}")
        entries = dict(section)
    values, forecast = from_keywords(entries, "DBCacheConfig")
    if "steps_computation_mask" in values:
        steps = values.get("num_inference_steps")
        values["steps_computation_mask"] = named_mask(values["steps_computation_mask"], steps)
    return (DBCacheConfig().reset() if reset else DBCacheConfig()).update(**values), forecast
