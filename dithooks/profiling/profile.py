"""The profile of a run without reuse: the changes from step to step, and the reuse that each threshold would give."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import numpy as np

from ..blocks.adapter import BlockAdapter
from ..blocks.cache_target import CacheTarget
from ..blocks.discovery import Blocks
from ..blocks.registry import chains_of
from ..config.cache_config import DitCacheConfig
from ..engine.attachment import check, prepare
from ..engine.clock import scheduler_of
from ..engine.range_settings import configure_ranges
from ..errors import InvalidSetting
from ..integrations.dispatch import BlockIntegrations
from ..markup import table
from ..planning.weight_fit import RIDGE, fit
from ..policies.threshold import Threshold
from ..predictors.fitted import Fitted
from ..predictors.predictor import Moment
from ..stats.text_table import text_table
from ..user_run import check_run
from ..validation import shown
from .change_recorder import ChangeWatch, RecordedChanges, recording

THRESHOLDS = (0.01, 0.02, 0.03, 0.05, 0.08, 0.12, 0.16, 0.24, 0.32)
QUANTILES = (0, 25, 50, 75, 95, 100)


@dataclass(frozen=True, eq=False, repr=False)
class Profile:
    """The result of :func:`profile`; printed, it is two tables.

    Args:
        branches: the branches of every range.
        thresholds: the thresholds for which reuse is predicted.
        policy: the policy of the prediction, apart from its threshold.

    Example: the ratios of a run.
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> @torch.no_grad()
        ... def run():
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> model = Model()
        >>> found = profile(model, run, DitCacheConfig(cache_block_start=1, policy=Threshold(0.1)))
        >>> len(found.ratios()[0]), found.of()[0].steps
        (5, 5)
    """

    branches: tuple[RecordedChanges, ...]
    thresholds: tuple[float, ...]
    policy: Threshold

    def of(self, range: str | None = None) -> tuple[RecordedChanges, ...]:
        """The branches of one range.

        Args:
            range: the range's path, or the end of it; None if there is only one range.

        Raises:
            InvalidSetting: there is no such range, or more than one.
        """
        paths = list(dict.fromkeys(each.range for each in self.branches))
        found = [path for path in paths if range is None or path == range or path.endswith(f".{range}")]
        if len(found) != 1:
            raise InvalidSetting(f"range={shown(range)}: there are {', '.join(paths)}")
        return tuple(each for each in self.branches if each.range == found[0])

    def ratios(self, range: str | None = None) -> tuple[tuple[float, ...], ...]:
        """The ratios γ for :class:`MagnitudeRatio`, one tuple for each branch.

        Raises:
            InvalidSetting: as :meth:`of`.
        """
        branches = self.of(range)
        steps = max(each.steps for each in branches)
        return tuple((*each.ratios, *[1.0] * (steps - each.steps)) for each in branches)

    def fitted(
        self, computed: Sequence[int], range: str | None = None, anchors: int = 2, ridge: float = RIDGE
    ) -> Fitted:
        """Fit the predictor for a mask to all branches of this run (:func:`~.weight_fit.fit`).

        Args:
            computed: the mask, 1 for each computed step.
            range: as for :meth:`of`.
            anchors: the number of anchors.
            ridge: the weight of the penalty on large weights.

        Raises:
            InvalidSetting: as :meth:`of`, or the length of the mask is not that of the run.
        """
        branches = self.of(range)
        if len(computed) != (steps := max(each.steps for each in branches)):
            raise InvalidSetting(f"a mask of {len(computed)} steps does not fit a run of {steps}")
        gram, moments = np.zeros((steps, steps), dtype=np.float32), dict[int, Moment]()
        for each in branches:
            calls = [moment.step for moment in each.moments]
            gram[np.ix_(calls, calls)] += each.deltas @ each.deltas.T
            moments |= {moment.step: moment for moment in each.moments}
        known = [step in moments for step in np.arange(steps)]
        bits = [bit or not there for bit, there in zip(computed, known, strict=True)]  # not called: no weights
        times = [moments.get(step, Moment(step, float(step), "step")) for step in np.arange(steps).tolist()]
        return fit(gram, times, [int(bit) for bit in bits], anchors, ridge)

    def reuse(self, threshold: float, branch: RecordedChanges) -> float:
        """The share of a branch's calls that a threshold is predicted to reuse."""
        made = branch.decisions(replace(self.policy, residual_diff_threshold=threshold))
        return sum(decision.reuse for decision in made) / max(len(made), 1)

    def __repr__(self) -> str:
        ranges = ", ".join(dict.fromkeys(each.range or "blocks" for each in self.branches))
        return f"<Profile of {ranges}: {len(self.branches)} branches, {len(self.branches[0].moments)} calls each>"

    def _repr_html_(self) -> str:
        """Return the two tables for a notebook."""
        (head, *rows), (thresholds, *predicted), note = self._tables()
        return f"{table(head, rows)}{table(thresholds, predicted)}{escape(note)}"

    def __str__(self) -> str:
        return self.to_text()

    def to_text(self, width: int | None = None) -> str:
        """Return the tables; those that are wider than so many columns are cut into parts."""
        changes, predicted, note = self._tables()
        return f"{_table(changes, width)}\n\n{_table(predicted, width)}\n{note}"

    def _tables(self) -> tuple[list[list[str]], list[list[str]], str]:
        """Return the changes from step to step, the reuse at each threshold, and the policy."""
        rows = list[list[str]]()
        for each in self.branches:
            changes = each.changes[np.isfinite(each.changes)]
            odd = len(each.changes) - len(changes)
            shown = [f"{q:.3f}" for q in np.percentile(changes, QUANTILES)] if len(changes) else ["–"] * len(QUANTILES)
            rows.append(
                [each.range, str(each.branch), str(len(each.moments)), *shown, *([f"{odd} not finite"] if odd else [])]
            )
        head = ["change from step to step", "branch", "calls", "min", "p25", "p50", "p75", "p95", "max"]
        predicted = list[list[str]]()
        for each in self.branches:
            shares = [self.reuse(threshold, each) for threshold in self.thresholds]
            predicted.append([each.range, str(each.branch), *(f"{share:.0%}" for share in shares)])
            n, skipped = each.schedule.blocks, each.schedule.skipped
            saved = [n / (n - share * skipped) if share < 1 or skipped < n else np.inf for share in shares]
            predicted.append(["  blocks: fewer by", "", *(f"{times:.2f}×" for times in saved)])
        thresholds = ["reused at threshold", "branch", *(f"{threshold:g}" for threshold in self.thresholds)]
        rest = str(replace(self.policy, residual_diff_threshold=1.0)).partition("=1.0")[2].strip(", )")
        with_these = rest or f"max_warmup_steps={self.policy.max_warmup_steps}"
        return [head, *rows], [thresholds, *predicted], f"(Threshold with {with_these})"


def profile(
    target: CacheTarget,
    run: Callable[..., Any],
    config: DitCacheConfig | None = None,
    *,
    thresholds: Sequence[float] = THRESHOLDS,
    blocks: Blocks = None,
    scheduler: object = None,
) -> Profile:
    """Measure how much changes from step to step in one run without reuse.

    The changes are those that :class:`Threshold` decides by, of a sample of 65,536 elements of each tensor, the same at
    every step. The prediction for a threshold assumes that reuse does not affect the changes at later steps.

    Args:
        target: as for :func:`dit_cache`; nothing may be cached in it.
        run: as for :func:`record`: a function that is given the target and makes the run without gradients,
            ``lambda pipe: pipe("a forest", num_inference_steps=28)``.
        config: the configuration whose ranges are measured; if its policy is a :class:`Threshold`, its other settings
            hold for the prediction. By default, each list of blocks is a range, and its first block decides.
        thresholds: the thresholds for which reuse is predicted.
        blocks: as for :func:`dit_cache`.
        scheduler: as for :func:`dit_cache`.

    Raises:
        DitHooksError: as :func:`dit_cache`; or ``run`` made no step of the target, or more than one run.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4, bias=False) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         x = x * timestep
        ...         for block in self.blocks:
        ...             x = block(x)
        ...         return x
        >>> model = Model()
        >>> @torch.no_grad()
        ... def run():
        ...     for t in (1.0, 0.75, 0.5, 0.25):
        ...         model(torch.ones(1, 4), t)
        >>> found = profile(model, run, DitCacheConfig(cache_block_start=1, policy=Threshold(0.1, max_warmup_steps=1)))
        >>> [f"{change:.2f}" for change in found.of()[0].changes]
        ['0.25', '0.33', '0.50']
    """
    make = check_run(run)
    policy = config.when if config is not None and isinstance(config.when, Threshold) else Threshold(0.1)
    if policy.reduce == "each":
        raise InvalidSetting(
            "a profile predicts one decision for each call, and reduce='each' makes one for each sample: profile one "
            "sample, or give reduce='max'"
        )
    chains = chains_of(target, blocks)
    if config is None:
        alone = [replace(chain, block_lists=(block_list,)) for chain, _ in chains for block_list in chain.block_lists]
        ranges = [
            (c, DitCacheConfig(cache_block_start=min(1, len(c.block_refs) - 1), policy=ChangeWatch())) for c in alone
        ]
    else:
        assigned = configure_ranges(chains, config)
        ranges = [(chain, replace(own, **_WATCHED, overrides={}, fingerprint=None)) for chain, own in assigned]
    for chain, own in ranges:
        check(chain, own, [])
    pipe = target.pipe if isinstance(target, BlockAdapter) else target
    attached = [prepare(chain, own, scheduler_of(pipe, scheduler), False, BlockIntegrations()) for chain, own in ranges]
    with recording(attached) as recorders:
        make(pipe)
    branches = [branch for recorder in recorders for branch in recorder.branches()]
    if not branches:
        raise InvalidSetting("run made no step of the target, or with gradients: draw under torch.no_grad()")
    return Profile(tuple(branches), tuple(thresholds), policy)


def _table(rows: Sequence[Sequence[object]], width: int | None) -> str:
    columns = max(len(row) for row in rows)
    return text_table([[str(cell) for cell in row] + [""] * (columns - len(row)) for row in rows], width)


_WATCHED: dict[str, Any] = {"policy": ChangeWatch(), "cache_step_start": None, "cache_step_interval": None}
