"""cache-dit's ``summary``: which steps were reused, and by which differences."""

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
    """One list of blocks in the last run; those that are called ``cfg_…`` are of a step's second call.

    Args:
        blocks: the list's path.
        cached_steps: steps at which it was reused, and
        residual_diffs: the difference that decided, by step as a string.
        cfg_cached_steps: see above.
        cfg_residual_diffs: see above.
        accumulated_cached_steps: number of the first, and
        cfg_accumulated_cached_steps: of the second.
        accumulated_executed_steps: steps of the run.
        accumulated_transformer_executed_steps: calls in it.
        cache_options: ``cache_config`` and ``calibrator_config``, as they hold for the list.
        branches: the same for each call of a step, however many there are.
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
    """What the last run reused, list by list; printed as a table in Markdown.

    Args:
        pipe_or_adapter: a pipeline, a transformer or an adapter that was enabled.
        details: a row for each list of blocks and each call of a step, and the figures by step; else one row for all.
        logging: ``False``: print nothing.

    Returns:
        One entry for each list that was called; where nothing was, or nothing is enabled, one that is empty.
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
    """What was asked for, and how many steps it reused, in short, for logs and names of files.

    Args:
        stats_or_others: what :func:`summary` takes or returns, or what :func:`load_configs` takes.

    Returns:
        Of several lists of blocks, the first; nothing, where nothing is enabled.

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
