"""A sampler's run that is recorded, for a plan by which those that follow are cached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ...blocks.block_lists import fingerprint
from ...config.cache_plan import CachePlan
from ...errors import DitHooksError
from ...planning.plan import plan
from ...recording.record import record, recordable
from .cached_run import CachedRun
from .model_cache import ModelCache
from .plan_folder import load_plan_file, new_plan_file
from .sampler_clock import SamplerSession


@dataclass(eq=False)
class RecordedRun(ModelCache):
    """Draws the first time without a cache, makes a plan of that run, and draws by the plan from then on.

    Args:
        target_speedup: that the plan is to have.
        name: of the plan; empty: made of the model's and the speed-up.
    """

    target_speedup: float
    name: str = ""

    def draw(self, model: nn.Module, draw: Callable[[], Any], session: SamplerSession) -> Any:
        """Draw by the plan, or record and make it."""
        file = self.file_for(model)
        if file.is_file():
            run = CachedRun(load_plan_file(file), file.name)
            run.report = self.report
            return run.draw(model, draw, session)
        drawn: list[Any] = []

        def run_once(_: nn.Module) -> list[Any]:
            drawn[:] = [draw()]
            return drawn

        try:
            recording = record(model, run_once)
            found = plan(recording, self.target_speedup, cost="blocks")
            found.save(file)
        except DitHooksError as error:
            if not drawn:
                raise
            self.report.add(f"there is NO plan, though the run was recorded: {error}", is_warning=True)
            return drawn[0]
        self.report.add(f"recorded {len(session.levels)} steps without a cache, and planned: {_summary(found, file)}")
        return drawn[0]

    def file_for(self, model: nn.Module) -> Path:
        """Return the file of the plan for a model."""
        kind = f"{type(model).__name__}-{fingerprint(recordable(model, None))[:8]}"
        return new_plan_file(self.name or f"{kind}-{self.target_speedup:g}x")


def _summary(found: CachePlan, file: Path) -> str:
    reached = "" if found.provenance.reached else ", the most that can be reached"
    return f"{found.speedup:.2f}× fewer blocks{reached}, kept in {file.name}, which the next run uses"
