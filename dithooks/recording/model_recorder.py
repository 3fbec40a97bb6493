"""The recorder of a model as a whole, without blocks: of one whose blocks cannot be left out by themselves."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..errors import InvalidSetting
from .recorder import Recorder
from .recording import Trace
from .stopwatch import OTHER


class ModelRecorder(Recorder):
    """Records when a model is called and how long it takes; what it returns, the solver shows."""

    def trace(self) -> Trace:
        """Return what was recorded, once the run is over: one block, and no range."""
        self._fold()
        tally = self.tally
        if not tally.runs:
            raise InvalidSetting(f"{self.chain.name}: no call was seen")
        moments = [tally.moments[step] for step in tally.steps]
        call_ms = self.stopwatch.spent(OTHER) / self.calls
        return Trace(
            path=self.chain.path,
            blocks=(self.chain.path or type(self.chain.owner).__name__,),
            ranges=np.zeros((0, 2), dtype=np.int64),
            grams=np.zeros((0, len(moments), len(moments))),
            norms=np.zeros((1, len(moments))),
            steps=np.array(tally.steps, dtype=np.int64),
            times=np.array([moment.time for moment in moments]),
            axis=moments[0].axis,
            branches=self.calls / (len(moments) * tally.runs),
            block_ms=np.array([call_ms]),
            call_ms=call_ms,
            share=1.0,
            inputs=self._watched.inputs,
            second=self._watched.second,
            calls=self._watched.calls,
        )

    def driven(self) -> bool:
        """Whether a loop called blocks without the model: it has none."""
        return False

    def _observe(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at no block."""
        self._points[key] = []
