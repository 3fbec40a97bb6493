"""The run that was recorded, to be made again: with and without a cache, here or in another process."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..blocks.adapter import BlockAdapter
from ..blocks.discovery import Blocks
from ..blocks.registry import chains_of
from ..recording.image_metrics import compare
from ..recording.input_check import same_inputs
from ..recording.stopwatch import caught_up

SAME = 40.0  # dB: one run to another of the same


@dataclass(frozen=True, eq=False)
class Drawing:
    """Draws, and says how many seconds it took.

    Args:
        run: as for :func:`search`.
        blocks: as for :func:`dit_cache`.
        path: of the transformer whose calls are watched.
        inputs: what it was given in the recorded run; ``None``: not watched.
        second: number of the first call of its second step.
        calls: that it had.
    """

    run: Callable[[Any], Any]
    blocks: Blocks
    path: str
    inputs: Mapping[str, NDArray[np.float32]] | None
    second: int
    calls: int

    def __call__(self, target: object) -> tuple[Any, float]:
        """What one run draws with a target, and its seconds.

        Raises:
            ValueError: it draws something else than what was recorded.
        """
        pipe = target.target if isinstance(target, BlockAdapter) else target
        watch = nullcontext()
        if self.inputs is not None:
            chains = [chain for chain, _ in chains_of(target, self.blocks)]
            named = {chain.path: chain.owner for chain in chains}
            owner = named.get(self.path, chains[0].owner)  # recorded by another way to the same model
            watch = same_inputs(owner, self.inputs, self.second, self.calls)  # type: ignore[assignment]
        with watch:
            begun = time.perf_counter()
            results = self.run(pipe)
            caught_up()
            return results, time.perf_counter() - begun


def unlike(
    now: Sequence[NDArray[np.float32]], then: Sequence[NDArray[np.float32]], whose: str = "from one time to the other"
) -> str | None:
    """In which way two runs without a cache do not draw the same; ``None``: they do. ``whose`` says which two.

    Example:
        >>> unlike([np.zeros((2, 2))], [np.full((2, 2), 0.5)])
        '6.0 dB from one time to the other'
    """
    try:
        psnr = compare(now, then).psnr
    except ValueError as error:
        return str(error)
    return None if psnr >= SAME else f"{psnr:.1f} dB {whose}"
