"""A search over the ranks of ``torch.distributed``, each of which has a model of its own: ``torchrun search.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from ...config.cache_plan import CachePlan
from ...errors import InvalidSetting, WrongType
from ...integrations.shared_model import shared_by_ranks
from ...recording.image_metrics import samples_of
from ...recording.rank_broadcast import broadcast_from_rank_0
from ..evaluation import Evaluator
from ..timed_run import picture_mismatch
from .executor import ExecutorResult, plan_key


@dataclass(frozen=True)
class Ranks:
    """An executor whose ranks all call :func:`search`, record, and run plans of their own; rank 0 decides."""

    def check(self, models: Sequence[nn.Module]) -> None:
        """Check that ``torch.distributed`` is initialized, and that each rank has a whole model.

        Raises:
            ValueError: it is not, or the ranks share the model.
        """
        if not dist.is_available() or not dist.is_initialized():
            raise InvalidSetting(
                "executor='torchrun', but torch.distributed is not initialized: start the program with torchrun, and "
                "call torch.distributed.init_process_group() before the search"
            )
        for model in models:
            if how := shared_by_ranks(model):
                raise InvalidSetting(
                    f"executor='torchrun' gives each rank plans of its own, but {type(model).__name__} is one "
                    f"model of all ranks: {how}. Leave executor out: then all ranks run each plan together"
                )

    def start(self, evaluator: Evaluator, results: Any, most: int) -> _RankGroup:
        """Check that all ranks draw the same, and give them rank 0's pictures to compare with."""
        reference = broadcast_from_rank_0(evaluator.reference)
        mismatch = None
        if results is not None and reference is not None:
            try:
                mismatch = picture_mismatch(samples_of(results), reference, "from the first")
            except (TypeError, ValueError) as error:  # raised on every rank, below
                mismatch = str(error)
        if problems := [f"rank {rank}: {each}" for rank, each in enumerate(_gathered(mismatch)) if each]:
            raise InvalidSetting(
                f"run does not draw the same on all ranks: {'; '.join(problems)}. With executor='torchrun' each rank "
                "runs plans for all, so prompts, seeds and weights have to be the same on every one"
            )
        return _RankGroup(replace(evaluator, reference=reference))


class _RankGroup:
    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator
        self.size, self.seconds, self.run_equivalents = dist.get_world_size(), evaluator.seconds, 0.0

    def run(self, plans: Sequence[CachePlan]) -> dict[str, ExecutorResult]:
        """Run rank 0's plans, one on each rank. An interrupt on one rank stops all, so that none waits for it."""
        texts = broadcast_from_rank_0([plan.to_json() for plan in plans])
        chosen = [CachePlan.from_json(text) for text in texts]
        results = self._shared(self._evaluator, chosen)
        return {plan_key(plan): result for plan, result in zip(chosen, results, strict=False)}

    def run_here(self, evaluator: Evaluator, plan: CachePlan) -> ExecutorResult:
        """Run a plan on rank 0, with another evaluator; the others receive what it has found."""
        result: ExecutorResult = self._shared(evaluator, [plan])[0]
        return result

    def _shared(self, evaluator: Evaluator, plans: Sequence[CachePlan]) -> list[Any]:
        mine = plans[dist.get_rank()] if dist.get_rank() < len(plans) else None
        result: ExecutorResult | str | None = None
        try:
            result = None if mine is None else evaluator(mine)
        except KeyboardInterrupt:
            result = "stopped"
        except Exception as error:
            result = error
        results = _gathered(_sendable(result))
        if "stopped" in results:
            raise KeyboardInterrupt
        return results

    def close(self) -> None:
        """Do nothing: the ranks are the caller's."""


def _gathered(value: Any) -> list[Any]:
    """Return the values of all ranks, on each of them."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _sendable(result: Any) -> Any:
    """Return a result, or for an error, which may hold anything, a plain one with its text."""
    if not isinstance(result, Exception):
        return result
    kind = next(
        (kind for kind in (InvalidSetting, WrongType, ValueError, TypeError) if isinstance(result, kind)), RuntimeError
    )
    text = str(result) if isinstance(result, kind) else f"{type(result).__name__}: {result}"
    return kind(f"rank {dist.get_rank()}: {text}")
