"""A plan: where, when and what for every step of a run, found ahead of time for one model, as one file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from itertools import pairwise
from math import inf
from pathlib import Path
from typing import Any, TypeVar

from .blocks.chain import WRAPPED, Chain, fingerprint
from .config import DitCacheConfig
from .parts import plain
from .policy.base import check_choice, check_count, check_number
from .policy.interval import Interval
from .policy.mask import Mask
from .predictor import Fitted, Reuse

SCHEMA = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Piece:
    """What a plan says of one transformer.

    Args:
        path: of the transformer, from the target; "" for the target itself.
        first: first block of the range, counted over the transformer's lists.
        blocks: number of blocks in the range.
        total: blocks of the transformer.
        steps: for each step of the run, 1: computed, 0: reused. The first is 1.
        coefficients: of each reused step, as :class:`Fitted` has them; ``None`` where the step is computed.
        sigmas: the time of each step; ``None``: not known.
        axis: what that is: ``"sigma"``, ``"timestep"`` or ``"step"``.
        called: the step of the run at which the transformer is called first, and the one after its last: (0, 14) for
            the first of two experts. The steps outside are 1. Left out: at all.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range, or does not fit the others.

    Example:
        >>> piece = Piece("transformer", 1, 4, 8, (1, 1, 0, 1), (None, None, (1.5, -0.5), None), (1.0, 0.8, 0.6, 0.3))
        >>> piece.policy
        Mask(steps=(1, 1, 0, 1), sigmas=(1.0, 0.8, 0.6, 0.3), dynamic=None)
        >>> piece.saved  # 4 of 8 blocks, at one step of four
        0.125
    """

    path: str
    first: int
    blocks: int
    total: int
    steps: tuple[int, ...]
    coefficients: tuple[tuple[float, ...] | None, ...]
    sigmas: tuple[float, ...] | None
    axis: str = "sigma"
    called: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _set(self, "path", _text("path", self.path, empty=True))
        for name, least in (("first", 0), ("blocks", 1), ("total", 1)):
            _set(self, name, check_count(name, getattr(self, name), least))
        if self.first + self.blocks > self.total:
            raise ValueError(f"first={self.first} and blocks={self.blocks} reach past the end: total={self.total}")
        steps: Any = self.steps
        steps = steps.tolist() if hasattr(steps, "tolist") else steps
        if not isinstance(steps, Iterable) or isinstance(steps, str):
            raise TypeError(f"steps must be a 1 or 0 for each step, not {self.steps!r}")
        bits = tuple(int(bit) if bit in (0, 1) else -1 for bit in steps)
        if -1 in bits or bits[:1] != (1,):
            raise ValueError(f"steps={self.steps!r}: give 1 (computed) or 0 (reused) for each step, the first a 1")
        fitted = Fitted(self.coefficients, self.sigmas)
        _set(self, "steps", bits)
        _set(self, "coefficients", fitted.coefficients)
        _set(self, "sigmas", fitted.sigmas)
        if len(self.coefficients) != len(bits):
            raise ValueError(f"coefficients has {len(self.coefficients)} entries, but there are {len(bits)} steps")
        for step, (bit, weights) in enumerate(zip(bits, self.coefficients, strict=True)):
            if bool(bit) != (weights is None):
                raise ValueError(
                    f"step {step} is {'computed (1), but has' if bit else 'reused (0), but has no'} coefficients"
                )
        check_choice("axis", self.axis, ("sigma", "timestep", "step"))
        if self.axis == "sigma" and any(sigma < 0 for sigma in self.sigmas or ()):
            raise ValueError(f"sigmas={self.sigmas}: a noise level is not negative; axis says if these are not such")
        if self.called is not None:
            _set(self, "called", _span(self.called, len(bits)))
            self._check_called()

    @property
    def policy(self) -> Mask:
        """When: the steps, with their noise levels if these can tell another run's."""
        falls = all(a > b for a, b in pairwise(self.sigmas or ()))
        return Mask(self.steps, self.sigmas if self.axis == "sigma" and falls else None)

    @property
    def predictor(self) -> Fitted:
        """What: the coefficients, and the times they were found for."""
        return Fitted(self.coefficients, self.sigmas)

    @property
    def executions(self) -> tuple[int, int]:
        """Executions of blocks in a run: all, and as many of them as are left out."""
        calls = sum(map(self._is_called, range(len(self.steps))))
        return calls * self.total, (len(self.steps) - sum(self.steps)) * self.blocks

    @property
    def saved(self) -> float:
        """Share of the transformer's block executions that are left out."""
        total, left_out = self.executions
        return left_out / total

    @property
    def settings(self) -> dict[str, Any]:
        """The fields of a configuration."""
        where = {"cache_block_start": self.first, "cache_num_blocks": self.blocks}
        return {**where, "policy": self.policy, "predictor": self.predictor}

    def _is_called(self, step: int) -> bool:
        return self.called is None or self.called[0] <= step < self.called[1]

    def _check_called(self) -> None:
        """Refuse what takes a residual of a step at which there is none."""
        computed = 0
        for step, (bit, weights) in enumerate(zip(self.steps, self.coefficients, strict=True)):
            if not self._is_called(step) and not bit:
                raise ValueError(f"called={self.called}, but steps has 0 (reused) at step {step}, outside of it")
            if len(weights or ()) > computed or (not bit and not computed):
                raise ValueError(
                    f"called={self.called}: step {step} takes {len(weights or ())} residuals, and {computed} are "
                    "computed before it"
                )
            computed += bit and self._is_called(step)

    def __str__(self) -> str:
        picture = "".join("○●"[bit] if self._is_called(step) else "·" for step, bit in enumerate(self.steps))
        reused = len(self.steps) - sum(self.steps)
        return (
            f"{self.path or 'blocks'}: {self.first} … {self.first + self.blocks - 1} of {self.total}  {picture}  "
            f"{reused} of {len(self.steps)} steps reused"
        )


@dataclass(frozen=True)
class Made:
    """What a plan was made for.

    Args:
        model: class of the transformer; of several, joined by "+".
        fingerprint: of all transformers, as ``handle.config`` has it; attaching to another model is refused.
        blocks: of all transformers together.
        dtype: of the weights: ``"bfloat16"``.
        steps: of the run.
        scheduler: its class; ``None`` where none was known.
        size: shape of the latents, without the batch.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    model: str
    fingerprint: str
    blocks: int
    dtype: str
    steps: int
    scheduler: str | None
    size: tuple[int, ...]

    def __post_init__(self) -> None:
        for name in ("model", "fingerprint", "dtype"):
            _set(self, name, _text(name, getattr(self, name)))
        _set(self, "dtype", self.dtype.removeprefix("torch."))
        for name in ("blocks", "steps"):
            _set(self, name, check_count(name, getattr(self, name), 1))
        if self.scheduler is not None:
            _text("scheduler", self.scheduler)
        size: Any = self.size
        if not isinstance(size, Iterable) or isinstance(size, str):
            raise TypeError(f"size must be the shape of the latents without the batch, not {size!r}")
        _set(self, "size", tuple(check_count("a length in size", length, 1) for length in size))


@dataclass(frozen=True)
class Provenance:
    """How a plan was found, and what was seen of it.

    Args:
        date: of the search.
        versions: of the packages it was made with.
        machine: it was made on.
        samples: recorded for it.
        target: the speed-up that was asked for.
        method: of the search.
        predicted_speedup: of a run, from measured block times.
        predicted_error: of a run's result, as the search priced it.
        measured_speedup: of a run; ``None``, here and below: not measured.
        psnr: of the pictures against those without the cache, in dB; infinite where they are the same.
        relative_l1: mean |difference| over mean |without the cache|.
        ssim: structural similarity.
        reached: whether the target was.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of range.
    """

    date: str
    versions: Mapping[str, str] = field(hash=False)
    machine: str
    samples: int
    target: float
    method: str
    predicted_speedup: float
    predicted_error: float
    measured_speedup: float | None = None
    psnr: float | None = None
    relative_l1: float | None = None
    ssim: float | None = None
    reached: bool = True

    def __post_init__(self) -> None:
        for name in ("date", "machine", "method"):
            _set(self, name, _text(name, getattr(self, name)))
        items = self.versions.items() if isinstance(self.versions, Mapping) else [(None, None)]
        if not all(isinstance(part, str) for item in items for part in item):
            raise TypeError(f"versions must be a mapping of packages to versions, not {self.versions!r}")
        _set(self, "versions", dict(self.versions))
        _set(self, "samples", check_count("samples", self.samples, 1))
        for name in ("target", "predicted_speedup"):
            _set(self, name, check_number(name, getattr(self, name), 0, strictly=True))
        _set(self, "predicted_error", check_number("predicted_error", self.predicted_error, 0))
        if self.measured_speedup is not None:
            _set(self, "measured_speedup", check_number("measured_speedup", self.measured_speedup, 0, strictly=True))
        for name, least in (("psnr", -1e6), ("relative_l1", 0), ("ssim", -1)):
            value = getattr(self, name)
            if name == "psnr" and value == inf:
                _set(self, name, inf)
            elif value is not None:
                _set(self, name, check_number(name, value, least))
        if self.ssim is not None and self.ssim > 1:
            raise ValueError(f"ssim={self.ssim:g} is out of range: it must be at most 1")
        if not isinstance(self.reached, bool):
            raise TypeError(f"reached must be True or False, not {self.reached!r}")


@dataclass(frozen=True)
class CachePlan:
    """For every step of a run, what is computed, what is reused, and with which weights: what a search has found.

    ``dit_cache`` takes it as it takes a configuration. In a run with another number of steps, or at other noise levels,
    the steps are resampled (:class:`Mask`), and the line through the last residuals takes the place of the coefficients
    (:class:`Fitted`), which is said once.

    Args:
        pieces: of each transformer that is cached, one.
        made: what for.
        provenance: how.

    Raises:
        TypeError, ValueError: a field is of the wrong type, or does not fit the others.

    Example:
        >>> piece = Piece("", 0, 3, 4, (1, 0, 1, 0), (None, (1.0,), None, (1.5, -0.5)), (1.0, 0.75, 0.5, 0.25))
        >>> made = Made("Model", "0123456789abcdef", 4, "float32", 4, None, (64, 48))
        >>> found = Provenance("2025-01-31", {"torch": "2.6.0"}, "CPU", 1, 1.5, "by hand", 1.55, 0.02, psnr=41.0)
        >>> plan = CachePlan((piece,), made, found)
        >>> plan.config.when, plan.speedup
        (Mask(steps=(1, 0, 1, 0), sigmas=(1.0, 0.75, 0.5, 0.25), dynamic=None), 1.6)
        >>> CachePlan.from_json(plan.to_json()) == plan
        True
        >>> print(plan)
        CachePlan for Model, 4 blocks in float32, 4 steps, latents 64×48
          blocks: 0 … 2 of 4  ●○●○  2 of 4 steps reused
          1.60× fewer blocks run; predicted: 1.55× as fast, error 0.02
          measured: PSNR 41.00 dB
          found by hand for a target of 1.5×, from 1 sample on CPU, 2025-01-31
    """

    pieces: tuple[Piece, ...]
    made: Made
    provenance: Provenance

    def __post_init__(self) -> None:
        pieces = tuple(self.pieces) if isinstance(self.pieces, (tuple, list)) else (None,)
        for name, kind, parts in (
            ("pieces", Piece, pieces),
            ("made", Made, (self.made,)),
            ("provenance", Provenance, (self.provenance,)),
        ):
            if not all(isinstance(part, kind) for part in parts):
                kinds = f"a tuple of {kind.__name__}" if name == "pieces" else f"a {kind.__name__}"
                raise TypeError(f"{name} must be {kinds}, not {getattr(self, name)!r}")
        if not pieces:
            raise ValueError("pieces is empty: a plan caches one transformer at least")
        _set(self, "pieces", pieces)
        paths = [piece.path for piece in self.pieces]
        if twice := sorted({path for path in paths if paths.count(path) > 1}):
            raise ValueError(f"pieces has several of {twice[0]!r}: give one of each transformer")
        for piece in self.pieces:
            if len(piece.steps) != self.made.steps:
                raise ValueError(f"{piece.path!r} has {len(piece.steps)} steps, but made.steps={self.made.steps}")
        if (total := sum(piece.total for piece in self.pieces)) > self.made.blocks:
            raise ValueError(f"pieces are of {total} blocks together, but made.blocks={self.made.blocks}")

    @property
    def config(self) -> DitCacheConfig:
        """The plan as a configuration: of the first piece, with the others as overrides."""
        return self._config({piece.path: piece for piece in self.pieces})

    @property
    def speedup(self) -> float:
        """How many times fewer blocks run: all block executions over those that are left."""
        counts = [piece.executions for piece in self.pieces]
        total = sum(every for every, _ in counts)
        left = total - sum(left_out for _, left_out in counts)
        return total / left

    def config_for(self, chains: Sequence[tuple[Chain, DitCacheConfig | None]]) -> DitCacheConfig:
        """The plan as a configuration of a model at hand. A transformer that no piece is of stays uncached.

        Args:
            chains: of the model, with a configuration of their own where an adapter has given one.

        Raises:
            ValueError: it was made for another model, or one of its transformers is not there by name, or has a
                configuration of its own.
        """
        here = fingerprint([chain for chain, _ in chains])
        if here != self.made.fingerprint:
            model = "+".join(type(chain.owner).__name__ for chain, _ in chains)
            blocks = sum(len(chain.sites) for chain, _ in chains)
            raise ValueError(
                f"the plan was made for another model, {self.made.model} with {self.made.blocks} blocks (fingerprint "
                f"{self.made.fingerprint}); here is {model} with {blocks} (fingerprint {here}): search a plan for "
                "this one, or take the numbers over with dataclasses.replace(plan.config, fingerprint=None)"
            )
        names = {_unwrapped(chain.path): chain for chain, _ in chains}
        if len(chains) == len(self.pieces) == 1:  # whatever each is called from its target
            names = {_unwrapped(self.pieces[0].path): chains[0][0]}
        found: dict[str, Piece] = {}
        for piece in self.pieces:
            if (chain := names.get(_unwrapped(piece.path))) is None:
                raise ValueError(f"the plan is for {piece.path!r}, which is none of {', '.join(map(repr, names))}")
            found[chain.path] = piece
        for chain, own in chains:
            if own is not None and chain.path in found:
                raise ValueError(f"{chain.name} has a configuration of its own in the adapter: give one of both")
        return self._config({**found, **{c.path: None for c, own in chains if own is None and c.path not in found}})

    def _config(self, named: Mapping[str, Piece | None]) -> DitCacheConfig:
        """One configuration of what holds for each transformer by its path."""
        settings = {path: _UNCACHED if piece is None else piece.settings for path, piece in named.items()}
        base = settings.pop("" if "" in settings else next(iter(settings)))
        return DitCacheConfig(**base, fingerprint=self.made.fingerprint, overrides=settings)

    def remarks(self, dtype: str | None, scheduler: str | None) -> list[str]:
        """What is to be said where a model has another dtype, or its pipeline another scheduler; ``None``: not known.

        Example:
            >>> made = Made("Model", "f", 1, "float32", 1, "Euler", ())
            >>> found = Provenance("2025-01-31", {}, "CPU", 1, 1.0, "by hand", 1.0, 0.0)
            >>> plan = CachePlan((Piece("", 0, 1, 1, (1,), (None,), None),), made, found)
            >>> plan.remarks("float32", "Euler"), len(plan.remarks("bfloat16", "Heun"))
            ([], 2)
        """
        made, said = self.made, []
        if dtype is not None and dtype.removeprefix("torch.") != made.dtype:
            said.append(
                f"the plan was made with weights in {made.dtype}, and the model's are in {dtype.removeprefix('torch.')}"
                ": it is used all the same, but speed-up and error may differ from what was found"
            )
        if scheduler is not None and made.scheduler is not None and scheduler != made.scheduler:
            said.append(
                f"the plan was made with {made.scheduler}, and the scheduler here is {scheduler}: it is used all the "
                "same, but speed-up and error may differ from what was found"
            )
        return said

    def to_json(self) -> str:
        """The plan as a JSON object with a schema version. JSON has no infinity: such a PSNR is ``"inf"``."""
        data = {"schema": SCHEMA, "kind": "CachePlan", **asdict(self)}
        if self.provenance.psnr == inf:
            data["provenance"]["psnr"] = "inf"
        return json.dumps(data, indent=2, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> CachePlan:
        """Read what :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, another kind or schema, or fields missing, unknown or out of range.
            TypeError: a field is of the wrong type.
        """
        try:
            data: Any = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"not a CachePlan: the text is not JSON ({error})") from None
        if not isinstance(data, dict) or data.get("kind") != "CachePlan":
            raise ValueError('not a CachePlan: a JSON object with "kind": "CachePlan" is expected')
        if data.get("schema") != SCHEMA:
            raise ValueError(f"CachePlan schema {data.get('schema')!r} is not known: this version reads {SCHEMA}")
        values = {name: value for name, value in data.items() if name not in ("schema", "kind")}
        _check_names(cls, values, "CachePlan")
        if not isinstance(values["pieces"], list):
            raise TypeError(f"pieces must be a list, not {values['pieces']!r}")
        pieces = tuple(_read(Piece, each, f"pieces[{number}]") for number, each in enumerate(values["pieces"]))
        found = values["provenance"]
        if isinstance(found, dict) and found.get("psnr") == "inf":
            found = {**found, "psnr": inf}
        return cls(pieces, _read(Made, values["made"], "made"), _read(Provenance, found, "provenance"))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`to_json` to a file."""
        Path(path).write_text(self.to_json() + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CachePlan:
        """Read a file that :meth:`save` wrote; errors as :meth:`from_json`, naming the path."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (ValueError, TypeError) as error:
            kind = TypeError if isinstance(error, TypeError) else ValueError  # not what is made of more than a text
            raise kind(f"{os.fspath(path)}: {error}") from None

    def __str__(self) -> str:
        """A few lines: ● is computed, ○ reused, · not called."""
        made, found = self.made, self.provenance
        steps = f"{made.steps} steps" + ("" if made.scheduler is None else f" of {made.scheduler}")
        size = f", latents {'×'.join(map(str, made.size))}" if made.size else ""
        seen = (
            (found.measured_speedup, "{:.2f}× as fast"),
            (found.psnr, "PSNR {:.2f} dB"),
            (found.relative_l1, "relative L1 {:.3g}"),
            (found.ssim, "SSIM {:.4f}"),
        )
        measured = [text.format(value) for value, text in seen if value is not None]
        target = f"a target of {found.target:g}×{'' if found.reached else ', which was not reached'}"
        return "\n  ".join(
            [
                f"CachePlan for {made.model}, {made.blocks} blocks in {made.dtype}, {steps}{size}",
                *map(str, self.pieces),
                f"{self.speedup:.2f}× fewer blocks run; predicted: {found.predicted_speedup:.2f}× as fast, "
                f"error {found.predicted_error:.3g}",
                *([f"measured: {', '.join(measured)}"] if measured else []),
                f"found {found.method} for {target}, from {found.samples} sample{'s' * (found.samples != 1)} on "
                f"{found.machine}, {found.date}",
            ]
        )


_UNCACHED = {"cache_num_blocks": None, "policy": Interval(0, 1), "predictor": Reuse()}


def _set(part: object, name: str, value: object) -> None:
    """A frozen dataclass's field, when it is made."""
    object.__setattr__(part, name, value)


def _text(name: str, value: object, empty: bool = False) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r} ({type(value).__name__})")
    if not value and not empty:
        raise ValueError(f"{name} is an empty string")
    return value


def _span(value: Any, steps: int) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise TypeError(f"called must be the first step and the one after the last, or None, not {value!r}")
    first, end = (check_count("called", step, 0) for step in value)
    if not first < end <= steps:
        raise ValueError(f"called=({first}, {end}) is out of range: there are {steps} steps, from 0 on")
    return first, end


def _unwrapped(path: str) -> str:
    """A transformer's path without wrappers of ``torch.compile``."""
    return ".".join(part for part in path.split(".") if part != WRAPPED)


def _check_names(kind: Any, values: Mapping[str, Any], where: str) -> None:
    known = {each.name: each.default is MISSING for each in fields(kind)}
    if strange := sorted(set(values) - set(known)):
        raise ValueError(f"{where} has no field {', '.join(strange)}: known are {', '.join(known)}")
    if missing := [name for name, needed in known.items() if needed and name not in values]:
        raise ValueError(f"{where} lacks {', '.join(missing)}")


def _read(kind: type[T], data: Any, where: str) -> T:
    if not isinstance(data, dict):
        raise TypeError(f"{where} must be an object with the fields of a {kind.__name__}, not {data!r}")
    _check_names(kind, data, where)
    try:
        return kind(**plain(data))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from None
