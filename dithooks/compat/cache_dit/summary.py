"""cache-dit's ``summary``: the reused steps of the last run, and the differences that decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .configs import CacheType, caching_type
from .enable import enabled
from .loading import load_configs
from .step_table import Steps, steps_of, steps_table


@dataclass(frozen=True)
class CacheStats:
    """One list of blocks in the last run; fields called ``cfg_…`` belong to the second call of each step.

    Args:
        blocks: the list's path.
        cached_steps: steps at which the list was reused.
        residual_diffs: the difference that decided, by step as a string.
        cfg_cached_steps: as ``cached_steps``, for the second call.
        cfg_residual_diffs: as ``residual_diffs``, for the second call.
        accumulated_cached_steps: number of ``cached_steps``.
        cfg_accumulated_cached_steps: number of ``cfg_cached_steps``.
        accumulated_executed_steps: number of steps of the run.
        accumulated_transformer_executed_steps: number of calls of the run.
        cache_options: the list's ``cache_config`` and ``calibrator_config``.
        branches: the same figures for every call of a step, however many there are.
    """

    blocks: str = ""
    cached_steps: list[int] = field(default_factory=list)
    residual_diffs: dict[str, float] = field(default_factory=dict)
    cfg_cached_steps: list[int] = field(default_factory=list)
    cfg_residual_diffs: dict[str, float] = field(default_factory=dict)
    accumulated_cached_steps: int = 0
    cfg_accumulated_cached_steps: int = 0
    accumulated_executed_steps: int = 0
    accumulated_transformer_executed_steps: int = 0
    cache_options: dict[str, Any] = field(default_factory=dict)
    branches: tuple[Steps, ...] = ()


def summary(pipe_or_adapter: object, details: bool = False, logging: bool = True) -> list[CacheStats]:
    """Summarise what the last run reused, list by list, and print it as a table in Markdown.

    Args:
        pipe_or_adapter: a pipeline, a transformer or an adapter that was enabled.
        details: whether the table has a row for each list of blocks and each call of a step, followed by the figures
            by step; else it has one row for all.
        logging: whether to print the table.

    Returns:
        One entry for each list that was called; a single empty entry if none was, or nothing is enabled.
    """
    found: list[CacheStats] = []
    for handle in enabled(pipe_or_adapter):
        branches = steps_of(handle.decisions)
        for path, number in handle.lists(pipe_or_adapter).items():
            options = dict(zip(("cache_config", "calibrator_config"), handle.settings.of(number), strict=True))
            if own := [each for each in branches if each.range == path]:
                found.append(_stats(own, options))
    if logging:
        print(_text(found, type(pipe_or_adapter).__name__, details))
    return found or [CacheStats()]


def strify(stats_or_others: object) -> str:
    """Write settings and the number of reused steps as a short text, for logs and file names.

    Args:
        stats_or_others: an argument or a result of :func:`summary`, or a mapping for :func:`load_configs`.

    Returns:
        The text for the first list of blocks; empty if nothing is enabled.

    Example:
        >>> strify({"Fn_compute_blocks": 1, "max_warmup_steps": 4})
        'DBCache_F1B0_W4I1M0MC0_R0.08_T0O0'
    """
    if isinstance(stats_or_others, Mapping):
        options, reused = load_configs(stats_or_others), 0
    else:
        known = isinstance(stats_or_others, (CacheStats, list))
        stats: Any = stats_or_others if known else summary(stats_or_others, logging=False)
        first = stats[0] if isinstance(stats, list) else stats
        options, reused = first.cache_options, first.accumulated_cached_steps
    config, forecast = options.get("cache_config"), options.get("calibrator_config")
    if config is None or caching_type(config.cache_type) is CacheType.NONE:
        return ""
    parts = [config.strify(), "T0O0" if forecast is None else forecast.strify()]
    return "_".join([*parts, f"S{reused}"] if reused else parts)


def _stats(branches: list[Steps], options: dict[str, Any]) -> CacheStats:
    numbered = {each.branch: each for each in branches}
    nothing = Steps(branches[0].range, 0, (), (), {})
    first, second = (numbered.get(number, nothing) for number in (0, 1))
    return CacheStats(
        blocks=branches[0].range,
        cached_steps=list(first.reused),
        residual_diffs={str(step): diff for step, diff in first.diffs.items()},
        cfg_cached_steps=list(second.reused),
        cfg_residual_diffs={str(step): diff for step, diff in second.diffs.items()},
        accumulated_cached_steps=len(first.reused),
        cfg_accumulated_cached_steps=len(second.reused),
        accumulated_executed_steps=len({step for each in branches for step in each.called}),
        accumulated_transformer_executed_steps=sum(len(each.called) for each in branches),
        cache_options=options,
        branches=tuple(branches),
    )


def _text(found: list[CacheStats], name: str, details: bool) -> str:
    rows = [row for stats in found for row in stats.branches]
    if not rows:
        return f"{name}: nothing was run with a cache"
    steps = len({step for row in rows for step in row.called})
    lines = [f"Cache steps and residual differences: {name}, {steps} steps", "", steps_table(rows, details)]
    for row in rows if details else ():
        diffs = ", ".join(f"{step}: {diff:.3f}" for step, diff in row.diffs.items()) or "none was measured"
        lines += ["", f"{row.range}, branch {row.branch}", f"reused: {list(row.reused)}", f"differences: {diffs}"]
    return "\n".join(lines)
