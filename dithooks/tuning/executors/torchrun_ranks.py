"""A search over the ranks of ``torch.distributed``, each of which has a model of its own: ``torchrun search.py``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch.distributed as dist
from torch import nn

from ...config.cache_plan import CachePlan
from ...engine.rank_consensus import shared_by_ranks
from ...errors import InvalidSetting
from ...recording.image_metrics import samples_of
from ...recording.rank_broadcast import broadcast_from_rank_0
from ..evaluation import Evaluator
from ..timed_run import picture_mismatch
from .executor import ExecutorResult, plan_key


@dataclass(frozen=True)
class Ranks:
    """All ranks call :func:`search`, record, and run plans of their own; the first one decides."""

    def check(self, models: Sequence[nn.Module]) -> None:
        """See whether there are ranks, and each has a whole model.

        Raises:
            ValueError: there are none, or they share the model.
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
        """See whether all ranks draw the same, and give them the first one's pictures to compare with."""
        reference = broadcast_from_rank_0(evaluator.reference)
        told = None
        if results is not None and reference is not None:
            try:
                told = picture_mismatch(samples_of(results), reference, "from the first")
            except (TypeError, ValueError) as error:  # all have to hear of it
                told = str(error)
        if problems := [f"rank {rank}: {each}" for rank, each in enumerate(_gathered(told)) if each]:
            raise InvalidSetting(
                f"run does not draw the same on all ranks: {'; '.join(problems)}. With executor='torchrun' each rank "
                "runs plans for all, so prompts, seeds and weights have to be the same on every one"
            )
        return _RankGroup(replace(evaluator, reference=reference))


class _RankGroup:
    def __init__(self, evaluator: Evaluator) -> None:
        self._verifier = evaluator
        self.size, self.seconds, self.run_equivalents = dist.get_world_size(), evaluator.seconds, 0.0

    def run(self, plans: Sequence[CachePlan]) -> dict[str, ExecutorResult]:
        """The first rank's plans, one each. What stops one stops all, so that none waits for it."""
        texts = broadcast_from_rank_0([plan.to_json() for plan in plans])
        chosen = [CachePlan.from_json(text) for text in texts]
        mine = chosen[dist.get_rank()] if dist.get_rank() < len(chosen) else None
        found: ExecutorResult | str | None = None
        try:
            found = None if mine is None else self._verifier(mine)
        except KeyboardInterrupt:
            found = "stopped"
        except Exception as error:
            found = error
        told = _gathered(_sendable(found))
        if "stopped" in told:
            raise KeyboardInterrupt
        return {plan_key(plan): each for plan, each in zip(chosen, told, strict=False)}

    def close(self) -> None:
        """Nothing: the ranks are the caller's."""


def _gathered(value: Any) -> list[Any]:
    """Each rank's, on all of them."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box


def _sendable(found: Any) -> Any:
    """An error may hold anything: others get its text."""
    if not isinstance(found, Exception):
        return found
    kind = next((each for each in (ValueError, TypeError) if isinstance(found, each)), RuntimeError)
    said = str(found) if isinstance(found, kind) else f"{type(found).__name__}: {found}"
    return kind(f"rank {dist.get_rank()}: {said}")
