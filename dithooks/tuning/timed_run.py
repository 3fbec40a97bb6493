"""The recorded run, made again and timed: with or without a cache, in this process or another."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks.adapter import BlockAdapter
from ..blocks.discovery import Blocks
from ..environment.machine import synchronize
from ..recording.image_metrics import compare
from ..recording.input_check import SECOND, same_inputs
from ..recording.record import recordable

SAME_DB = 40.0  # PSNR of one uncached run to another, from which on they count as the same


@dataclass(frozen=True, eq=False)
class TimedRun:
    """Makes the recorded run again, and times it.

    Args:
        run: as for :func:`search`.
        blocks: as for :func:`dit_cache`.
        path: path of the transformer whose calls are checked.
        inputs: what the transformer was given in the recorded run; ``None``: its calls are not checked.
        second: number of the first call of the transformer's second step.
        calls: calls of the transformer in the recorded run.
    """

    run: Callable[[Any], Any]
    blocks: Blocks
    path: str
    inputs: Mapping[str, NDArray[np.float32]] | None
    second: int
    calls: int

    def __call__(self, target: object, leaves_out: bool = False) -> tuple[Any, float]:
        """Make the run with a target; return its results, and the seconds that it took.

        Args:
            target: as for :func:`search`.
            leaves_out: whether calls of the transformer are left out, of which only the first is sure to be made.

        Raises:
            ValueError: the transformer is not called as in the recorded run.
        """
        pipe = target.target if isinstance(target, BlockAdapter) else target
        check: AbstractContextManager[None] = nullcontext()
        if self.inputs is not None:
            chains = recordable(target, self.blocks)
            owners = {chain.path: chain.owner for chain in chains}
            owner = owners.get(self.path, chains[0].owner)  # the recording's target led to the model by another path
            first_only = {name: each for name, each in self.inputs.items() if not name.endswith(SECOND)}
            known = (first_only, 0, None) if leaves_out else (self.inputs, self.second, self.calls)
            check = same_inputs(owner, *known)
        gc.collect()  # else it may fall into one run and not into the other: a third of a second, once PyTorch is there
        with check:
            started_at = time.perf_counter()
            results = self.run(pipe)
            synchronize()
            return results, time.perf_counter() - started_at


def picture_mismatch(
    now: Sequence[NDArray[np.float32]], then: Sequence[NDArray[np.float32]], which: str = "from one time to the other"
) -> str | None:
    """Describe how the samples of two uncached runs differ; ``None``: they are the same. ``which`` names the two.

    Example:
        >>> picture_mismatch([np.zeros((2, 2))], [np.full((2, 2), 0.5)])
        '6.0 dB from one time to the other'
    """
    try:
        psnr = compare(now, then).psnr
    except ValueError as error:
        return str(error)
    return None if psnr >= SAME_DB else f"{psnr:.1f} dB {which}"
