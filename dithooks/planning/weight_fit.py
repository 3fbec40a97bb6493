"""The weights that best forecast a residual from earlier ones: least squares on their inner products."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import InvalidSetting
from ..predictors.fitted import Fitted
from ..predictors.polynomial import lagrange_weights
from ..predictors.predictor import Moment

RIDGE = 1e-3


def fit(
    gram: NDArray[np.floating],
    moments: Sequence[Moment],
    computed: Sequence[int],
    anchors: int = 2,
    ridge: float = RIDGE,
) -> Fitted:
    """Fit, for each reused step, the weights with which the residuals of the last computed steps forecast its own.

    With b the last computed steps before t, G their inner products and w₀ the line through the last two (in σ), the
    weights w minimise ‖Δ_t − Σ w_k Δ_{b_k}‖² + ``ridge``·mean(G_bb)·‖w − w₀‖²: the line decides where the recorded run
    leaves the weights open.

    Args:
        gram: (T, T), ⟨Δ_s, Δ_t⟩ of the T recorded steps, summed over branches and samples.
        moments: step and time of each recorded step.
        computed: 1 for each step that is computed, 0 for each that is reused; the first is 1.
        anchors: largest number of residuals used, ≥ 1.
        ridge: strength of the pull to the line, ≥ 0.

    Raises:
        ValueError: the sizes differ, or the first step is not computed.

    Example: residuals that grow by a fixed vector lie on a line, which two of them give exactly.
        >>> steps = np.arange(1.0, 6.0)
        >>> moments = [Moment(step, 5.0 - step) for step in range(5)]
        >>> fitted = fit(np.outer(steps, steps) + 1.0, moments, (1, 1, 0, 1, 0))
        >>> [None if each is None else [round(w, 3) for w in each] for each in fitted.coefficients]
        [None, None, [2.0, -1.0], None, [1.5, -0.5]]
    """
    size = len(moments)
    if np.shape(gram) != (size, size) or len(computed) != size:
        raise InvalidSetting(f"{size} steps need a ({size}, {size}) matrix and as many bits: got {np.shape(gram)}")
    exact = np.asarray(gram, dtype=np.float64)  # neighbouring residuals are almost parallel
    coefficients: list[tuple[float, ...] | None] = []
    for step in range(size):
        if computed[step]:
            coefficients.append(None)
            continue
        last = [earlier for earlier in range(step - 1, -1, -1) if computed[earlier]][:anchors]
        line = np.zeros(len(last))
        line[:2] = lagrange_weights([moments[b] for b in last[:2]], moments[step], "sigma")
        inner = exact[np.ix_(last, last)]
        pull = ridge * float(np.trace(inner)) / max(len(last), 1)
        matrix = inner + pull * np.eye(len(last))
        aim = exact[last, step] + pull * line
        weights = np.linalg.lstsq(matrix, aim, rcond=None)[0] if np.any(matrix) else line
        coefficients.append(tuple(float(w) for w in weights))
    return Fitted(tuple(coefficients))
