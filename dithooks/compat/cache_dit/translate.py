"""cache-dit's configuration, translated into this library's own."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...config.cache_config import DitCacheConfig
from ...errors import InvalidSetting, WrongType
from ...policies.history import BranchHistory, Decision, Schedule
from ...policies.mask import Mask
from ...policies.policy import Policy
from ...policies.reason import Reason
from ...policies.threshold import Threshold
from ...predictors.polynomial import Reuse, Taylor
from ...predictors.predictor import Predictor
from ...stats.user_warning import warn_user
from ...validation import check_choice, check_count, check_number, shown
from .configs import BasicCacheConfig, CacheType, CalibratorConfig, caching_type, filled
from .masks import named_mask

ALWAYS = 1e30  # every change is below it: in cache-dit, a threshold of 1 or more admits any change


@dataclass(frozen=True)
class Never(Policy):
    """A policy that computes every step.

    Args:
        because: the setting that causes it, such as ``"max_cached_steps=0"``.
    """

    because: str

    def before(self, step: int, track: BranchHistory, schedule: Schedule) -> Decision:
        return Decision(False, Reason.OFF)

    def keeps(self, step: int, anchors: int) -> bool:
        return False


def translate(
    cache_config: BasicCacheConfig, calibrator_config: CalibratorConfig | None = None
) -> DitCacheConfig | None:
    """Translate a configuration of cache-dit; a field that is ``None`` has its default.

    ============================================  ==================================================================
    ``Fn_compute_blocks``                         ``cache_block_start``
    ``Bn_compute_blocks``                         ``compute_last``
    ``residual_diff_threshold`` and limits        :class:`Threshold`; one that admits no reuse: :class:`Never`
    ``steps_computation_mask``, ``"static"``      :class:`Mask`, which no threshold and no limit changes
    ``steps_computation_mask``, ``"dynamic"``     :class:`Mask` with that :class:`Threshold`; the mask is the warm-up
    ``force_refresh_step_hint``                   a computed step; what came before it still counts for the limits
    ``cfg_diff_compute_separate``                 ``separate_branches``
    TaylorSeer of order n                         ``Taylor(n, axis="step")``; without, or of order 0: ``Reuse()``
    ============================================  ==================================================================

    ``num_inference_steps``, ``enable_separate_cfg`` and ``cfg_compute_first`` have no counterpart: the number of steps
    and the calls of a step are observed as the model runs.

    Args:
        cache_config: when and where.
        calibrator_config: the forecast.

    Returns:
        The configuration, or ``None`` for ``CacheType.NONE``: nothing is to be cached.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is out of its range, or asks for a feature that is not available.

    Example:
        >>> from dithooks.compat.cache_dit.configs import DBCacheConfig, TaylorSeerCalibratorConfig
        >>> print(translate(DBCacheConfig(Fn_compute_blocks=1), TaylorSeerCalibratorConfig()))
        ... # doctest: +NORMALIZE_WHITESPACE
        DitCacheConfig(cache_block_start=1, policy=Threshold(residual_diff_threshold=0.08),
        predictor=Taylor(order=1, axis='step'))
    """
    if not isinstance(cache_config, BasicCacheConfig):
        raise WrongType(f"cache_config must be a DBCacheConfig of {__package__}, not {shown(cache_config)}")
    given = filled(cache_config)
    if given["num_inference_steps"] is not None:
        check_count("num_inference_steps", given["num_inference_steps"], 1)
    for name in ("enable_separate_cfg", "cfg_compute_first"):
        if given[name] not in (None, True, False):
            raise WrongType(f"{name} must be True or False, not {shown(given[name])}")
    if caching_type(given["cache_type"]) is CacheType.NONE:
        return None
    return DitCacheConfig(
        cache_block_start=check_count("Fn_compute_blocks", given["Fn_compute_blocks"], 1),
        compute_last=check_count("Bn_compute_blocks", given["Bn_compute_blocks"], 0),
        policy=_when(given),
        predictor=_what(calibrator_config),
    )


def _when(given: Mapping[str, Any]) -> Policy:
    policy = check_choice("steps_computation_policy", given["steps_computation_policy"], ("dynamic", "static"))
    if given["steps_computation_mask"] is None:
        return _threshold(given)
    bits = named_mask(given["steps_computation_mask"], given["num_inference_steps"])
    threshold = None
    if policy == "dynamic":
        # The leading ones of the mask are the warm-up, so the threshold has none of its own.
        threshold = _threshold({**given, "max_warmup_steps": 0, "warmup_interval": 1})
        if isinstance(threshold, Never):
            return threshold
        bits[0] = 1  # whatever the mask has there: nothing can be reused yet
    elif (forced := _forced(given)) is not None:
        last = forced + 1 if given["force_refresh_step_policy"] == "once" else len(bits)
        bits = [bit or int(step in range(forced, last, forced)) for step, bit in enumerate(bits)]
    try:
        return Mask(tuple(bits), dynamic=threshold)
    except ValueError as error:
        raise InvalidSetting(f"steps_computation_mask: {error}") from None


def _threshold(given: Mapping[str, Any]) -> Threshold | Never:
    """:class:`Never`, where a limit leaves no step to be reused."""
    limit, total = given["residual_diff_threshold"], given["max_accumulated_residual_diff_threshold"]
    if isinstance(limit, Tensor):
        if limit.numel() != 1:
            raise InvalidSetting(f"residual_diff_threshold has {limit.numel()} elements: give one number")
        limit = limit.item()
    limit = check_number("residual_diff_threshold", limit, -math.inf)
    if total is not None:
        total = check_number("max_accumulated_residual_diff_threshold", total, -math.inf)
    # If every change is admitted, cache-dit measures none, so that none adds up.
    total = total if total is not None and total > 0 and limit < 1 else None
    most, row = (_at_most(given, name) for name in ("max_cached_steps", "max_continuous_cached_steps"))
    separate = given["cfg_diff_compute_separate"]
    if not isinstance(separate, bool):
        raise WrongType(f"cfg_diff_compute_separate must be True or False, not {shown(separate)}")
    forced = _forced(given)
    warm = check_count("max_warmup_steps", given["max_warmup_steps"], 0)
    every = check_count("warmup_interval", given["warmup_interval"], 1)
    for name, value in (("residual_diff_threshold", limit), ("max_cached_steps", most)):
        if value is not None and value <= 0:
            return Never(f"{name}={value:g}")
    if row == 0:
        return Never("max_continuous_cached_steps=0")
    return Threshold(
        limit if limit < 1 else ALWAYS,
        max_warmup_steps=warm,
        warmup_interval=every,
        max_cached_steps=most,
        max_continuous_cached_steps=row,
        max_accumulated_diff=total,
        force_refresh_step=forced,
        force_refresh=given["force_refresh_step_policy"],
        separate_branches=separate,
    )


def _at_most(given: Mapping[str, Any], name: str) -> int | None:
    """Return a limit; ``None`` if it is below 0, which means no limit."""
    count = check_count(name, given[name], -(2**63))
    return None if count < 0 else count


def _forced(given: Mapping[str, Any]) -> int | None:
    check_choice("force_refresh_step_policy", given["force_refresh_step_policy"], ("once", "repeat"))
    hint = given["force_refresh_step_hint"]
    return None if hint is None else check_count("force_refresh_step_hint", hint, 1)


def _what(config: CalibratorConfig | None) -> Predictor:
    if config is None:
        return Reuse()
    if not isinstance(config, CalibratorConfig):
        raise WrongType(f"calibrator_config must be a TaylorSeerCalibratorConfig of {__package__}, not {shown(config)}")
    given = filled(config)
    own, encoder = bool(given["enable_calibrator"]), bool(given["enable_encoder_calibrator"])
    if not own and not encoder:
        return Reuse()
    if given["calibrator_type"] != "taylorseer":
        raise InvalidSetting(
            f"calibrator_type={shown(given['calibrator_type'])} is not available: take 'taylorseer', or none"
        )
    if given["calibrator_cache_type"] != "residual":
        raise InvalidSetting(
            f"calibrator_cache_type={shown(given['calibrator_cache_type'])}: residuals are what is cached here; "
            "take 'residual'"
        )
    if strange := set(given["calibrator_kwargs"]) - {"n_derivatives"}:
        raise InvalidSetting(
            f"calibrator_kwargs has {', '.join(sorted(strange))}: TaylorSeer has an order only; leave out"
        )
    order = given.get("taylorseer_order", given["calibrator_kwargs"].get("n_derivatives", 1))
    order = check_count("taylorseer_order", order, 0)
    if own != encoder and order:
        warn_user(
            f"enable_calibrator={own} and enable_encoder_calibrator={encoder}: the forecast holds for all streams "
            f"here, or for none, and enable_calibrator says which; set both to {own} to silence this"
        )
    return Taylor(order, axis="step") if own and order else Reuse()
