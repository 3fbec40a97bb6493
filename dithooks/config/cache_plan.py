"""A plan: which blocks to cache, when to reuse and what to add, for every step of a run of one model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from html import escape
from typing import ClassVar

from ..environment.file_schemas import PLAN
from ..errors import InvalidSetting, WrongType
from ..markup import step_squares, table
from ..policies.uncached import Uncached
from ..predictors.polynomial import Reuse
from ..validation import set_field, shown
from .cache_config import DitCacheConfig
from .hub_file import HubFile
from .provenance import PlanTarget, Provenance
from .transformer_plan import TransformerPlan


@dataclass(frozen=True, repr=False)
class CachePlan(HubFile):
    """The result of a search: which steps of a run are computed, which are reused, and with which weights.

    ``dit_cache`` takes it as it takes a configuration. In a run with another number of steps, or at other noise levels,
    the steps are resampled (:class:`Mask`). Where the plan was fitted for several numbers of steps, as ``search`` does
    with ``steps``, its weights are carried over; else the line through the last residuals takes their place
    (:class:`Fitted`), with one warning.

    Args:
        pieces: one plan for each transformer that is cached.
        made: the model and the run that the plan was made for.
        provenance: how the plan was found, and what was measured of it.

    Raises:
        TypeError, ValueError: a field is of the wrong type, or does not fit the others.

    Example:
        >>> weights = (None, (1.0,), None, (1.5, -0.5))
        >>> piece = TransformerPlan("", 0, 3, 4, (1, 0, 1, 0), weights, (1.0, 0.75, 0.5, 0.25))
        >>> made = PlanTarget("Model", "0123456789abcdef", 4, "float32", 4, None, (64, 48))
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

    _schemas: ClassVar[tuple[int, ...]] = PLAN
    _file: ClassVar[str] = "plan.json"

    pieces: tuple[TransformerPlan, ...]
    made: PlanTarget
    provenance: Provenance

    def __post_init__(self) -> None:
        pieces = tuple(self.pieces) if isinstance(self.pieces, (tuple, list)) else (None,)
        for name, kind, parts in (
            ("pieces", TransformerPlan, pieces),
            ("made", PlanTarget, (self.made,)),
            ("provenance", Provenance, (self.provenance,)),
        ):
            if not all(isinstance(part, kind) for part in parts):
                kinds = f"a tuple of {kind.__name__}" if name == "pieces" else f"a {kind.__name__}"
                raise WrongType(f"{name} must be {kinds}, not {shown(getattr(self, name))}")
        if not pieces:
            raise InvalidSetting("pieces is empty: a plan caches one transformer at least")
        set_field(self, "pieces", pieces)
        paths = Counter(piece.path for piece in self.pieces)
        if twice := sorted(path for path, count in paths.items() if count > 1):
            raise InvalidSetting(f"pieces has several of {shown(twice[0])}: give one of each transformer")
        for piece in self.pieces:
            if len(piece.steps) != self.made.steps:
                raise InvalidSetting(
                    f"{shown(piece.path)} has {len(piece.steps)} steps, but made.steps={self.made.steps}"
                )
        if (total := sum(piece.total for piece in self.pieces)) > self.made.blocks:
            raise InvalidSetting(f"pieces are of {total} blocks together, but made.blocks={self.made.blocks}")

    @property
    def _schema(self) -> int:
        """Return the first schema where it has all that the plan says, so that earlier versions read the file."""
        is_first = all(
            piece.payload == "residual"
            and piece.corrections is None
            and not (piece.branches or piece.others or piece.more_ranges)
            for piece in self.pieces
        )
        return 1 if is_first and not self.provenance.elsewhere else 2

    @property
    def config(self) -> DitCacheConfig:
        """The plan as a configuration: that of the first piece, with the others as overrides."""
        return self.config_for_paths({piece.path: piece for piece in self.pieces})

    @property
    def speedup(self) -> float:
        """How many times fewer blocks run: all block executions over those that are left.

        It counts the transformers that are cached, with the same number of calls at every step.
        """
        counts = [piece.executions for piece in self.pieces]
        total = sum(every for every, _ in counts)
        left = total - sum(left_out for _, left_out in counts)
        return total / left

    def config_for_paths(
        self, pieces: Mapping[str, TransformerPlan | None], bare: Collection[str] = ()
    ) -> DitCacheConfig:
        """The plan as a configuration, with the paths that the transformers have in the model at hand.

        Args:
            pieces: the plan of each transformer, by its path; ``None`` leaves it uncached.
            bare: paths of those without lists of blocks.
        """
        settings = {path: _UNCACHED if piece is None else piece.settings for path, piece in pieces.items()}
        for path in bare:
            settings[path] = {**settings[path], "cache_block_start": 0, "payload": "output"}  # no range can be named
        base = settings.pop("" if "" in settings else next(iter(settings)))
        if "more_ranges" in base:  # the others have their own, or none
            settings = {path: {"more_ranges": (), **given} for path, given in settings.items()}
        return DitCacheConfig(**base, fingerprint=self.made.fingerprint, overrides=settings)

    def mismatch_warnings(self, dtype: str | None, scheduler: str | None) -> list[str]:
        """Return a warning for each of dtype and scheduler that differs from the plan's; ``None`` is not compared.

        Example:
            >>> made = PlanTarget("Model", "f", 1, "float32", 1, "Euler", ())
            >>> found = Provenance("2025-01-31", {}, "CPU", 1, 1.0, "by hand", 1.0, 0.0)
            >>> plan = CachePlan((TransformerPlan("", 0, 1, 1, (1,), (None,), None),), made, found)
            >>> plan.mismatch_warnings("float32", "Euler"), len(plan.mismatch_warnings("bfloat16", "Heun"))
            ([], 2)
        """
        made, messages = self.made, []
        if dtype is not None and dtype.removeprefix("torch.") != made.dtype:
            messages.append(
                f"the plan was made with weights in {made.dtype}, and the model's are in {dtype.removeprefix('torch.')}"
                ": it is used all the same, but speed-up and error may differ from what was found"
            )
        if scheduler is not None and made.scheduler is not None and scheduler != made.scheduler:
            messages.append(
                f"the plan was made with {made.scheduler}, and the scheduler here is {scheduler}: it is used all the "
                "same, but speed-up and error may differ from what was found"
            )
        return messages

    def __repr__(self) -> str:
        made = self.made
        return f"<CachePlan for {made.model}, {made.steps} steps: {self.speedup:.2f}× fewer blocks>"

    def _repr_html_(self) -> str:
        """Return a table for a notebook, with the steps of each transformer as squares."""
        first, *_, last = str(self).splitlines()
        rows = [
            [piece.path or "blocks", piece.blocks_shown, step_squares(piece.picture), piece.reused_shown]
            for piece in self.pieces
        ]
        steps = table(["transformer", "blocks", "steps", "reused"], rows)
        measured = ", ".join(self._measured()) or "nothing measured"
        return f"<b>{escape(first)}</b>{steps}{self.speedup:.2f}× fewer blocks; {escape(measured)}<br/>{escape(last)}"

    def _measured(self) -> list[str]:
        """Return what was measured, each with its unit."""
        found = self.provenance
        seen = (
            (found.measured_speedup, "{:.2f}× as fast"),
            (found.psnr, "PSNR {:.2f} dB"),
            (found.worst, "worst {:.2f} dB"),
            (found.relative_l1, "relative L1 {:.3g}"),
            (found.ssim, "SSIM {:.4f}"),
            (found.lpips, "LPIPS {:.4f}"),
        )
        return [text.format(value) for value, text in seen if value is not None]

    def __str__(self) -> str:
        """Summarise the plan in a few lines, with the steps as :attr:`TransformerPlan.picture` draws them."""
        made, found = self.made, self.provenance
        steps = f"{made.steps} steps" + ("" if made.scheduler is None else f" of {made.scheduler}")
        size = f", latents {'×'.join(map(str, made.size))}" if made.size else ""
        measured = self._measured()
        target = f"a target of {found.target:g}×{'' if found.reached else ', which was not reached'}"
        return "\n  ".join(
            [
                f"CachePlan for {made.model}, {made.blocks} blocks in {made.dtype}, {steps}{size}",
                *map(str, self.pieces),
                f"{self.speedup:.2f}× fewer blocks run; predicted: {found.predicted_speedup:.2f}× as fast, "
                f"error {found.predicted_error:.3g}",
                *([f"measured: {', '.join(measured)}"] if measured else []),
                *map(str, found.elsewhere),
                f"found {found.method} for {target}, from {found.samples} sample{'s' * (found.samples != 1)} on "
                f"{found.machine}, {found.date}",
            ]
        )


_UNCACHED = {"cache_num_blocks": None, "payload": "residual", "policy": Uncached(), "predictor": Reuse()}
