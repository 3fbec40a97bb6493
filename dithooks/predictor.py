"""What: the residual to add on a reused step, from the stored ones."""

from __future__ import annotations

from torch import Tensor

from .state import Anchor


class Reuse:
    """Δ̂_t is the last stored residual, unchanged."""

    def predict(self, anchor: Anchor, step: int, sigma: float | None) -> tuple[Tensor | None, ...]:
        """One residual per stream; ``None`` for a stream that the range does not return."""
        return anchor.deltas
