"""cache-dit's configurations, field by field."""

from __future__ import annotations

import copy
import dataclasses
import difflib
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, ClassVar, TypeVar

from torch import Tensor

from ...errors import InvalidSetting, WrongType
from ...validation import shown


class CacheType(Enum):
    """cache-dit's ways to treat blocks; available here: ``DBCache``, and ``NONE`` for no cache."""

    NONE = "NONE"
    DBCache = "DBCache"
    DBPrune = "DBPrune"

    def __str__(self) -> str:
        return self.value


def caching_type(value: CacheType | str | None) -> CacheType:
    """Parse a ``cache_type``; ``None`` is the default, ``DBCache``.

    Raises:
        ValueError: there is no such type, or it is ``DBPrune``, which is not available here.
    """
    names = {each.value.lower(): each for each in CacheType}
    found = CacheType.DBCache if value is None else names.get(str(value).lower())
    if found is None:
        raise InvalidSetting(f"cache_type={shown(value)}: there are 'DBCache' and 'NONE'")
    if found is CacheType.DBPrune:
        raise InvalidSetting("cache_type=DBPrune is not available: blocks are cached here, not pruned; take DBCache")
    return found


def check_names(owner: str, names: Iterable[object], known: Collection[str], what: str = "field") -> None:
    """Refuse unknown names.

    Raises:
        TypeError: a name is unknown; the message has the nearest known name.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise WrongType(f"{owner} has no {what} {shown(name)}: {hint}")


def check_fields(cls: type, names: Iterable[object]) -> None:
    """Refuse names that are not fields of a dataclass.

    Raises:
        TypeError: a name is not a field; the message has the nearest field.

    Example:
        >>> check_fields(DBCacheConfig, ["Fn_compute_block"])
        Traceback (most recent call last):
        dithooks.errors.WrongType: DBCacheConfig has no field 'Fn_compute_block': did you mean 'Fn_compute_blocks'?
    """
    check_names(cls.__name__, names, [each.name for each in dataclasses.fields(cls)])


C = TypeVar("C", bound="Fields")


class Fields:
    """Base of the configurations: only known fields can be set, and ``None`` means not given."""

    _STAYS: ClassVar[tuple[str, ...]] = ()  # fields that keep their values when a configuration is emptied

    def __new__(cls: type[C], *args: Any, **values: Any) -> C:
        check_fields(cls, values)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check_fields(type(self), (name,))
        super().__setattr__(name, value)

    def update(self: C, **values: Any) -> C:
        """Set the fields whose values are not ``None``.

        Raises:
            TypeError: there is no such field; no field is set then.
        """
        check_fields(type(self), values)
        vars(self).update({name: value for name, value in values.items() if value is not None})
        return self

    def empty(self: C, **values: Any) -> C:
        """Set all fields to ``None``, which means "unchanged" in a refresh or modifier, then :meth:`update`."""
        check_fields(type(self), values)
        vars(self).update({name: None for name in vars(self) if name not in self._STAYS})
        return self.update(**values)

    def reset(self: C, **values: Any) -> C:
        """Do the same as :meth:`empty`."""
        return self.empty(**values)

    def as_dict(self) -> dict[str, Any]:
        """Return a copy of all fields and their values."""
        return copy.deepcopy(vars(self))


def filled(config: Fields) -> dict[str, Any]:
    """Return all fields and their values, with defaults in place of ``None``."""
    return vars(type(config)().update(**vars(config)))


@dataclass
class BasicCacheConfig(Fields):
    """When and where to cache, in the fields of cache-dit 1.5.3; :func:`translate` lists their counterparts here.

    Args:
        cache_type: ``DBCache``, or ``NONE`` for no cache.
        Fn_compute_blocks: number of first blocks that always run, and by whose change reuse is decided, ≥ 1.
        Bn_compute_blocks: number of last blocks that always run.
        residual_diff_threshold: reuse below this change of the first blocks' effect; ≥ 1: always, ≤ 0: never.
        max_accumulated_residual_diff_threshold: limit of the changes' sum since a computed step; ``None``: no limit.
        max_warmup_steps: number of first steps that are warm-up.
        warmup_interval: compute one of so many warm-up steps; 1: every one.
        max_cached_steps: limit of the reused steps; below 0: no limit.
        max_continuous_cached_steps: limit of the reused steps in a row; below 0: no limit.
        enable_separate_cfg: whether conditional and unconditional are two calls of the model.
        cfg_compute_first: whether the unconditional call is the first of the two.
        cfg_diff_compute_separate: whether each of the two decides by its own change.
        num_inference_steps: number of steps of the run.
        steps_computation_mask: 1 for each computed step, else 0; or the name of a policy of :func:`steps_mask`.
        steps_computation_policy: what to do at the mask's 0, ``"static"``: reuse, ``"dynamic"``: decide by the change.
        force_refresh_step_hint: a step that is always computed.
        force_refresh_step_policy: ``"once"``: compute that step only; ``"repeat"``: every multiple of it as well.

    Raises:
        TypeError: there is no such field.

    Example:
        >>> BasicCacheConfig(Fn_compute_blocks=1).update(max_warmup_steps=4).strify()
        'DBCache_F1B0_W4I1M0MC0_R0.08'
    """

    cache_type: CacheType | str | None = CacheType.DBCache
    Fn_compute_blocks: int | None = 8
    Bn_compute_blocks: int | None = 0
    residual_diff_threshold: float | Tensor | None = 0.08
    max_accumulated_residual_diff_threshold: float | None = None
    max_warmup_steps: int | None = 8
    warmup_interval: int | None = 1
    max_cached_steps: int | None = -1
    max_continuous_cached_steps: int | None = -1
    enable_separate_cfg: bool | None = None
    cfg_compute_first: bool | None = False
    cfg_diff_compute_separate: bool | None = True
    num_inference_steps: int | None = None
    steps_computation_mask: list[int] | str | None = None
    steps_computation_policy: str | None = "dynamic"
    force_refresh_step_hint: int | None = None
    force_refresh_step_policy: str | None = "once"

    def strify(self) -> str:
        """Write the settings as a short text, for logs and file names."""
        most, row = (max(0, count or 0) for count in (self.max_cached_steps, self.max_continuous_cached_steps))
        parts = [
            f"{self.cache_type}_F{self.Fn_compute_blocks}B{self.Bn_compute_blocks}",
            f"W{self.max_warmup_steps}I{self.warmup_interval}M{most}MC{row}",
            f"R{self.residual_diff_threshold}",
        ]
        if self.steps_computation_mask is not None:
            parts += [f"SCM{''.join(map(str, self.steps_computation_mask))}", f"{self.steps_computation_policy}"]
        if self.num_inference_steps is not None:
            parts.append(f"N{self.num_inference_steps}")
        if self.force_refresh_step_hint is not None:
            parts += [f"FR{self.force_refresh_step_hint}", f"{self.force_refresh_step_policy}"]
        if self.enable_separate_cfg is not None:
            parts.append(f"CFG{int(self.enable_separate_cfg)}")
        return "_".join(parts)


@dataclass
class DBCacheConfig(BasicCacheConfig):
    """:class:`BasicCacheConfig` under its usual name."""


@dataclass
class CalibratorConfig(Fields):
    """What a reused step adds: a forecast from the residuals kept, if enabled, else the last residual.

    Args:
        enable_calibrator: whether to forecast; here, for all streams of the model.
        enable_encoder_calibrator: whether to forecast the prompt's stream; here, ``enable_calibrator`` decides.
        calibrator_type: ``"taylorseer"``.
        calibrator_cache_type: ``"residual"``.
        calibrator_kwargs: ``{"n_derivatives": n}``, if there is no ``taylorseer_order``.

    Raises:
        TypeError: there is no such field.
    """

    _STAYS: ClassVar[tuple[str, ...]] = ("calibrator_type",)

    enable_calibrator: bool | None = False
    enable_encoder_calibrator: bool | None = False
    calibrator_type: str | None = "taylorseer"
    calibrator_cache_type: str | None = "residual"
    calibrator_kwargs: dict[str, Any] | None = field(default_factory=dict)

    def strify(self, *, details: bool = False) -> str:
        """Write the settings as a short text, for logs and file names."""
        return "CalibratorBase"

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keywords of the forecast."""
        return dict(self.calibrator_kwargs or {})


@dataclass
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """The forecast of TaylorSeer: a Taylor polynomial in steps.

    Args:
        taylorseer_order: order of the polynomial; 0: the last residual is added.

    The other fields are those of :class:`CalibratorConfig`, enabled.

    Example:
        >>> TaylorSeerCalibratorConfig(taylorseer_order=2).strify()
        'T1O2'
    """

    enable_calibrator: bool | None = True
    enable_encoder_calibrator: bool | None = True
    taylorseer_order: int | None = 1

    def strify(self, *, details: bool = False) -> str:
        """Write the settings as a short text, for logs and file names; with ``details``, a longer one."""
        if not self.taylorseer_order:
            return "NONE"
        return f"TaylorSeer_O({self.taylorseer_order})" if details else f"T1O{self.taylorseer_order}"

    def to_kwargs(self) -> dict[str, Any]:
        """Return the keywords of the forecast: ``n_derivatives`` is the order."""
        return {**super().to_kwargs(), "n_derivatives": self.taylorseer_order}
