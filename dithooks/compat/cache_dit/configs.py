"""What users of cache-dit write: its configurations, field by field, and its older flat keywords."""

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


class CacheType(Enum):
    """What cache-dit does to the blocks; here there is ``DBCache``, and ``NONE`` for nothing."""

    NONE = "NONE"
    DBCache = "DBCache"
    DBPrune = "DBPrune"

    def __str__(self) -> str:
        return self.value


def caching_type(value: CacheType | str | None) -> CacheType:
    """What a ``cache_type`` asks for; ``None`` is the default, ``DBCache``.

    Raises:
        ValueError: there is no such type, or it is ``DBPrune``, which is not available.
    """
    names = {each.value.lower(): each for each in CacheType}
    found = CacheType.DBCache if value is None else names.get(str(value).lower())
    if found is None:
        raise InvalidSetting(f"cache_type={value!r}: there are 'DBCache' and 'NONE'")
    if found is CacheType.DBPrune:
        raise InvalidSetting("cache_type=DBPrune is not available: blocks are cached here, not pruned; take DBCache")
    return found


def check_names(owner: str, names: Iterable[object], known: Collection[str], what: str = "field") -> None:
    """Refuse names that are not known.

    Raises:
        TypeError: naming the first such, and the known name that comes nearest.
    """
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise WrongType(f"{owner} has no {what} {name!r}: {hint}")


def check_fields(cls: type, names: Iterable[object]) -> None:
    """Refuse names that are not fields of a dataclass.

    Raises:
        TypeError: naming the first such, and the field that comes nearest.

    Example:
        >>> check_fields(DBCacheConfig, ["Fn_compute_block"])
        Traceback (most recent call last):
        TypeError: DBCacheConfig has no field 'Fn_compute_block': did you mean 'Fn_compute_blocks'?
    """
    check_names(cls.__name__, names, [each.name for each in dataclasses.fields(cls)])


C = TypeVar("C", bound="Fields")


class Fields:
    """What the configurations have in common: no field but the known ones is ever set, and ``None`` means not given."""

    _STAYS: ClassVar[tuple[str, ...]] = ()  # when a configuration is emptied

    def __new__(cls: type[C], *args: Any, **values: Any) -> C:
        check_fields(cls, values)
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        check_fields(type(self), (name,))
        super().__setattr__(name, value)

    def update(self: C, **values: Any) -> C:
        """Set the fields whose values are not ``None``.

        Raises:
            TypeError: there is no such field; none is set then.
        """
        check_fields(type(self), values)
        vars(self).update({name: value for name, value in values.items() if value is not None})
        return self

    def empty(self: C, **values: Any) -> C:
        """Set all fields to ``None``, which stands for "as it was" in a refresh or modifier, then :meth:`update`."""
        check_fields(type(self), values)
        vars(self).update({name: None for name in vars(self) if name not in self._STAYS})
        return self.update(**values)

    def reset(self: C, **values: Any) -> C:
        """The same as :meth:`empty`."""
        return self.empty(**values)

    def as_dict(self) -> dict[str, Any]:
        """All fields and their values, copied."""
        return copy.deepcopy(vars(self))


def filled(config: Fields) -> dict[str, Any]:
    """All fields and their values, the default in place of ``None``."""
    return vars(type(config)().update(**vars(config)))


@dataclass
class BasicCacheConfig(Fields):
    """When and where to cache, in the words of cache-dit 1.5.3; :func:`translate` says what each field becomes here.

    Args:
        cache_type: ``DBCache``; or ``NONE``, nothing.
        Fn_compute_blocks: the first so many blocks always run, and decide, ≥ 1.
        Bn_compute_blocks: the last so many blocks always run.
        residual_diff_threshold: reuse below this change of what the first blocks do; ≥ 1: always, ≤ 0: never.
        max_accumulated_residual_diff_threshold: the changes may add up to this much; ``None``: as they like.
        max_warmup_steps: steps before this one are computed,
        warmup_interval: or only every so many of them.
        max_cached_steps: reused steps, at most; below 0: as many as they like.
        max_continuous_cached_steps: the same, in a row.
        enable_separate_cfg: whether conditional and unconditional are two calls of the model.
        cfg_compute_first: whether the unconditional call is the first of the two.
        cfg_diff_compute_separate: whether each of the two decides by its own change.
        num_inference_steps: of the run.
        steps_computation_mask: 1 for each step that is computed, else 0; or a policy of :func:`steps_mask` by its name.
        steps_computation_policy: at the mask's 0, ``"static"``: reuse, ``"dynamic"``: decide by the change.
        force_refresh_step_hint: this step is computed, and, with
        force_refresh_step_policy: ``"repeat"``, every so many steps; ``"once"``: only this one.

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
        """In short, for logs and names of files."""
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
    """What is added on a reused step: a forecast from the residuals kept, where enabled, else the last of them.

    Args:
        enable_calibrator: whether to forecast. Here that holds for all streams of the model, or for none.
        enable_encoder_calibrator: whether to forecast the stream of the prompt, too; see above.
        calibrator_type: ``"taylorseer"``.
        calibrator_cache_type: ``"residual"``.
        calibrator_kwargs: ``{"n_derivatives": n}``, where no ``taylorseer_order`` says so.

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
        """In short, for logs and names of files."""
        return "CalibratorBase"


@dataclass
class TaylorSeerCalibratorConfig(CalibratorConfig):
    """The forecast of TaylorSeer: a Taylor polynomial in steps.

    Args:
        taylorseer_order: of the polynomial; 0: none, the last residual is added.

    The other fields are those of :class:`CalibratorConfig`, enabled.

    Example:
        >>> TaylorSeerCalibratorConfig(taylorseer_order=2).strify()
        'T1O2'
    """

    enable_calibrator: bool | None = True
    enable_encoder_calibrator: bool | None = True
    taylorseer_order: int | None = 1

    def strify(self, *, details: bool = False) -> str:
        """In short, for logs and names of files; ``details``: in full."""
        if not self.taylorseer_order:
            return "NONE"
        return f"TaylorSeer_O({self.taylorseer_order})" if details else f"T1O{self.taylorseer_order}"
