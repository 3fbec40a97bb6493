"""The configuration of a cache: which blocks, when to reuse, and what to add."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch

from ..errors import InvalidSetting, WrongType
from ..policies.interval import Interval
from ..policies.policy import Policy
from ..predictors.polynomial import Reuse
from ..predictors.predictor import Predictor
from ..validation import check_bool, check_choice, check_count, located, named_beside, set_field, shown
from .codec import JsonFile, arguments_of, plain
from .transformer_plan import PAYLOADS, Payload


@dataclass(frozen=True, repr=False)
class DitCacheConfig(JsonFile):
    """Which blocks to cache, when to reuse their residual, and what to add in their place.

    On a computed step all blocks run, and the range's residual (output of its last block minus input of its first) is
    kept. On a reused step the blocks of the range do not run, and a weighted sum of the residuals is added instead.

    Args:
        cache_step_start: steps before this one are computed. With ``cache_step_interval``, it is short for
            ``policy=Interval(cache_step_start, cache_step_interval)``, and 0 where it is left out.
        cache_step_interval: the steps from one refresh to the next; the steps in between are reused.
        cache_block_start: first block of the range, ≥ 0, counted over the model's block list (or lists, in order).
            The blocks before it always run, and a policy that measures a change measures it there.
        cache_num_blocks: number of blocks in the range, ≥ 1; ``None``: all from the first on.
        fingerprint: fingerprint of the model that the numbers were chosen for; attaching to another model is refused.
            ``None`` fits every model. ``handle.config`` has it filled in.
        compute_last: the last so many blocks always run, where ``cache_num_blocks`` is ``None``.
        policy: when to reuse: :class:`Interval`, :class:`Mask`, :class:`Threshold`, :class:`Budget`,
            :class:`MagnitudeRatio`, :class:`EasyCache` or :class:`Uncached`.
        predictor: what to add: :class:`Reuse`, :class:`Linear`, :class:`Taylor` or :class:`Fitted`.
        cache_dtype: dtype of the residuals that are kept, ``"float32"`` or ``"bfloat16"``, also as PyTorch's;
            ``None``: that of the activations. ``"float16"`` is refused: residuals of large models exceed its range.
        cache_device: ``"cpu"`` keeps residuals in the host's memory, with copies that do not wait; ``None``: where the
            activations are.
        free_at_end: free residuals when a run's last step is over, if its number of steps is known. ``False``: when
            the next run begins.
        payload: the forecast of a reused step: ``"residual"``, of the range, or ``"output"``, of the whole
            transformer, whose call is then left out altogether. The range then is the whole transformer
            (``cache_block_start`` 0, no ``cache_num_blocks``), and measuring policies measure its latents. The target
            has to be a pipeline or a module that holds the transformer.
        look_at: the streams that a policy which looks decides by, named as the blocks' arguments are:
            ``("hidden_states", "audio_hidden_states")``. The one that changes most counts, relative to itself.
            ``None``: where the model returns several tensors (video and audio), the streams that become these; else
            ``hidden_states``, and where no stream has that name, all. Policies that do not look take no notice of it.
        more_ranges: further ranges of the same blocks, each a configuration of its own, or a mapping of its fields: so
            that at some steps the last blocks run, and the first do not. No block is in two of them. A policy that
            looks decides on a range behind another one by what enters it, as what comes before it may be left out.
        overrides: the fields that differ for a transformer or one of its block lists, by name: ``{"transformer_2":
            {"cache_block_start": 2}, "single_transformer_blocks": {"policy": {"residual_diff_threshold": 0.12}}}``.
            A policy or predictor given as a mapping changes the fields that it names. Where a list is named, each list
            of its transformer is a range of its own, whose blocks count from 0.

    Raises:
        TypeError: a field is of the wrong type.
        ValueError: a field is out of its range, or two fields exclude each other.

    Example:
        >>> config = DitCacheConfig(cache_step_start=2, cache_step_interval=3, cache_block_start=0, cache_num_blocks=4)
        >>> config.when
        Interval(start=2, interval=3)
        >>> from dithooks import Linear, Threshold
        >>> config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1), predictor=Linear())
        >>> DitCacheConfig.from_json(config.to_json()) == config
        True
    """

    _schemas: ClassVar[tuple[int, ...]] = (1, 2)  # 1: four numbers and a fingerprint
    _required: ClassVar[tuple[str, ...]] = (
        "cache_step_start",
        "cache_step_interval",
        "cache_block_start",
        "cache_num_blocks",
    )

    cache_step_start: int | None = None
    cache_step_interval: int | None = None
    cache_block_start: int = 0
    cache_num_blocks: int | None = None
    fingerprint: str | None = None
    compute_last: int = field(default=0, kw_only=True)
    policy: Policy | None = field(default=None, kw_only=True)
    predictor: Predictor = field(default=Reuse(), kw_only=True)
    cache_dtype: str | torch.dtype | None = field(default=None, kw_only=True)
    cache_device: str | None = field(default=None, kw_only=True)
    free_at_end: bool = field(default=True, kw_only=True)
    payload: Payload = field(default="residual", kw_only=True, metadata={"written": "where given"})
    look_at: tuple[str, ...] | None = field(default=None, kw_only=True, metadata={"written": "where given"})
    more_ranges: tuple[DitCacheConfig, ...] = field(default=(), kw_only=True, metadata={"written": "where given"})
    overrides: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, kw_only=True, hash=False)

    def __post_init__(self) -> None:
        least = {"cache_block_start": 0, "compute_last": 0}
        if all(each is None for each in (self.policy, self.cache_step_start, self.cache_step_interval)):
            raise WrongType(
                "nothing says when to reuse: give policy=Threshold(0.08) or another one, or cache_step_interval=2"
            )
        if self.policy is None:
            if self.cache_step_interval is None:
                raise WrongType(
                    f"cache_step_start={shown(self.cache_step_start)} alone: give cache_step_interval as well, the "
                    "steps from one refresh to the next, such as 2"
                )
            if self.cache_step_start is None:
                set_field(self, "cache_step_start", 0)
            least |= {"cache_step_start": 0, "cache_step_interval": 1}
        elif self.cache_step_start is not None or self.cache_step_interval is not None:
            raise InvalidSetting(
                "cache_step_start and cache_step_interval say when, and so does policy: give one of both"
            )
        if self.cache_num_blocks is not None:
            least["cache_num_blocks"] = 1
        for name, bound in least.items():
            set_field(self, name, check_count(name, getattr(self, name), bound))
        if self.cache_num_blocks is not None and self.compute_last:
            raise InvalidSetting("cache_num_blocks and compute_last both say where the range ends: give one of both")
        for name, kind in (("policy", Policy), ("predictor", Predictor)):
            part = getattr(self, name)
            if not isinstance(part, kind) and not (name == "policy" and part is None):
                raise WrongType(f"{name} must be a {kind.__name__} such as {_SUCH_AS[name]}, not {shown(part)}")
        if isinstance(self.cache_dtype, torch.dtype):
            set_field(self, "cache_dtype", str(self.cache_dtype).removeprefix("torch."))
        if self.cache_dtype is not None and self.cache_dtype not in tuple(DTYPES):
            raise InvalidSetting(f"cache_dtype={shown(self.cache_dtype)}: there are {', '.join(DTYPES)}, or None")
        if self.cache_device not in (None, "cpu"):
            raise InvalidSetting(
                f"cache_device={shown(self.cache_device)}: there are 'cpu' and None, the activations' own"
            )
        check_bool("free_at_end", self.free_at_end)
        check_choice("payload", self.payload, PAYLOADS)
        if self.payload == "output" and (self.cache_block_start, self.cache_num_blocks, self.compute_last) != (
            0,
            None,
            0,
        ):
            raise InvalidSetting(
                "payload='output' leaves the whole transformer out: leave cache_block_start, cache_num_blocks and "
                "compute_last out"
            )
        if self.payload != "output" and self.when.has_conditional:
            raise InvalidSetting(
                f"policy has conditional steps, and payload={shown(self.payload)}: one branch alone is computed where "
                "the whole transformer is left out, so give payload='output', or leave conditional out"
            )
        if self.look_at is not None:
            set_field(self, "look_at", _streams(self.look_at))
        self._check_more_ranges()
        if self.fingerprint is not None and not isinstance(self.fingerprint, str):
            raise WrongType(f"fingerprint must be a string or None, not {shown(self.fingerprint)}")
        if not isinstance(self.overrides, Mapping) or not all(
            isinstance(name, str) and isinstance(changes, Mapping) for name, changes in self.overrides.items()
        ):
            raise WrongType("overrides must be a mapping of names to mappings of fields, {'transformer_2': {...}}")
        set_field(self, "overrides", plain(self.overrides))
        self._check_overrides()

    @classmethod
    def _from_part(cls, data: Any) -> DitCacheConfig:
        """Read one of several ranges, which may be a mapping of its fields."""
        if not isinstance(data, dict) or "kind" in data:
            return cls._from_data(data)
        return cls(**arguments_of(cls, data, "it"))

    @property
    def when(self) -> Policy:
        """The policy; two numbers are an :class:`Interval`."""
        if self.policy is not None:
            return self.policy
        assert self.cache_step_start is not None
        assert self.cache_step_interval is not None
        return Interval(self.cache_step_start, self.cache_step_interval)

    @property
    def dtype(self) -> torch.dtype | None:
        """``cache_dtype`` as a PyTorch dtype."""
        return None if self.cache_dtype is None else DTYPES[str(self.cache_dtype)]

    def overridden(self, name: str) -> DitCacheConfig:
        """The configuration of one transformer or list that ``overrides`` names, without overrides of its own.

        Raises:
            TypeError, ValueError: a field of the entry is unknown or invalid; the message names the entry.
        """
        changes = dict(self.overrides[name])
        try:
            known = [each.name for each in fields(self) if each.name not in ("overrides", "fingerprint")]
            if unknown := set(changes).difference(known):
                raise InvalidSetting(f"no such field: {named_beside(unknown, known)}")
            for part, former in (("policy", self.when), ("predictor", self.predictor)):
                if isinstance(changes.get(part), Mapping):
                    changes[part] = _changed(former, part, changes[part])
            # Of two fields that exclude each other, the one that is named holds.
            if changes.get("policy") is not None:
                changes = {"cache_step_start": None, "cache_step_interval": None, **changes}
            elif {"cache_step_start", "cache_step_interval"} & set(changes):
                changes = {"policy": None, **changes}
            if changes.get("cache_num_blocks") is not None:
                changes = {"compute_last": 0, **changes}
            elif changes.get("compute_last"):
                changes = {"cache_num_blocks": None, **changes}
            return replace(self, **{"overrides": {}, **changes})
        except (TypeError, ValueError) as error:
            raise located(f"overrides[{shown(name)}]", error) from None

    @property
    def ranges(self) -> tuple[DitCacheConfig, ...]:
        """The configuration of each range, the first block's first; usually of this one alone."""
        own = replace(self, more_ranges=(), overrides={}) if self.more_ranges else self
        return tuple(sorted((own, *self.more_ranges), key=lambda each: each.cache_block_start))

    def _check_more_ranges(self) -> None:
        """Refuse ranges that share blocks, and such as forecast outputs or have further ranges of their own."""
        entries: Any = self.more_ranges
        if not isinstance(entries, (tuple, list)) or not all(isinstance(e, (DitCacheConfig, Mapping)) for e in entries):
            raise WrongType(f"more_ranges must be a tuple of DitCacheConfig, not {shown(entries)}")
        given = tuple(
            each if isinstance(each, DitCacheConfig) else _made_of(each, f"more_ranges[{place}]")
            for place, each in enumerate(entries)
        )
        set_field(self, "more_ranges", given)
        if not given:
            return
        if self.payload == "output" or any(each.payload == "output" for each in given):
            raise InvalidSetting("more_ranges and payload='output' exclude each other: it leaves all blocks out")
        for each in given:
            _refuse_of_whole({name: getattr(each, name) for name in _OF_WHOLE})
        for before, each in pairwise(self.ranges):
            number, start = before.cache_num_blocks, each.cache_block_start
            if number is None or start < before.cache_block_start + number:
                end = (
                    "with the last block"
                    if number is None
                    else f"at block {shown(before.cache_block_start + number - 1)}"
                )
                raise InvalidSetting(
                    f"more_ranges: the range from block {shown(start)} on begins before another one ends, {end}: give "
                    "each its cache_num_blocks, so that no block is in two; more_ranges=() leaves this range alone"
                )

    def _check_overrides(self) -> None:
        """Refuse invalid overrides. A list's entry is valid also if it is so only on top of its transformer's entry."""
        for name in self.overrides:
            try:
                self.overridden(name)
            except (TypeError, ValueError):
                rest = {key: changes for key, changes in self.overrides.items() if key != name}
                for other in rest:
                    base = replace(self, overrides={other: rest[other]}).overridden(other)
                    with suppress(TypeError, ValueError):
                        replace(base, overrides={name: self.overrides[name]})
                        break
                else:
                    raise

    def __str__(self) -> str:
        """Name the fields that differ from their defaults."""
        return f"DitCacheConfig({', '.join(f'{name}={value}' for name, value in self._unusual())})"

    def __repr__(self) -> str:
        return f"DitCacheConfig({', '.join(f'{name}={value!r}' for name, value in self._unusual())})"

    def _unusual(self) -> list[tuple[str, Any]]:
        """Return the fields that differ from their defaults, with their values."""
        defaults = {each.name: {} if each.default is MISSING else each.default for each in fields(self)}
        values = [(name, getattr(self, name)) for name in defaults]
        return [(name, value) for name, value in values if value != defaults[name]]


def _streams(names: Any) -> tuple[str, ...]:
    """The names of streams, each given once."""
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        raise WrongType(f'look_at must be a tuple of streams\' names, ("hidden_states",), or None, not {shown(names)}')
    if not names or len(set(names)) < len(names):
        raise InvalidSetting(f"look_at={shown(names)}: name each stream once, and at least one; None leaves the choice")
    return tuple(names)


def _made_of(fields_of_range: Mapping[str, Any], where: str) -> DitCacheConfig:
    """The configuration that a mapping of fields stands for."""
    known = [each.name for each in fields(DitCacheConfig) if each.name not in _OF_WHOLE]
    _refuse_of_whole(fields_of_range)  # before it is made: a mapping may hold itself
    if unknown := set(fields_of_range).difference(known, _OF_WHOLE):
        raise InvalidSetting(f"{where} has no field {named_beside(unknown, known)}")
    try:
        return DitCacheConfig(**fields_of_range)
    except (TypeError, ValueError) as error:
        raise located(where, error) from None


def _refuse_of_whole(fields_of_range: Mapping[str, Any]) -> None:
    """Refuse one of several ranges that is given what belongs to all of them."""
    given = [name for name in _OF_WHOLE if not _is_empty(fields_of_range.get(name))]
    if given:
        raise InvalidSetting(f"one of more_ranges has {given[0]} of its own: give that to the whole configuration")


def _is_empty(value: object) -> bool:
    return value is None or (isinstance(value, (tuple, list, Mapping)) and not value)


def _changed(part: Policy | Predictor, name: str, changes: Mapping[str, Any]) -> Any:
    """The policy or predictor with some of its fields changed."""
    if "kind" in changes:
        raise InvalidSetting(f"give the {name} itself, or a mapping of the fields that differ")
    known = [each.name for each in fields(part)]  # type: ignore[arg-type]
    if unknown := set(changes).difference(known):
        raise InvalidSetting(f"{type(part).__name__} has no field {named_beside(unknown, known)}")
    return replace(part, **changes)  # type: ignore[type-var]


_OF_WHOLE = ("more_ranges", "overrides", "fingerprint")  # what one of several ranges has none of
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_SUCH_AS = {"policy": "Threshold(0.08)", "predictor": "Linear()"}
