"""Plots of plans, decisions and samples; they need the extra ``dithooks[plot]``, which is matplotlib.

Each function returns a ``matplotlib.figure.Figure``, which a notebook shows, and which ``figure.savefig`` or
:func:`save` writes. A figure is 450 pixels wide on a page, with type of 9 points, and colours that colour-blind readers
can distinguish.

Example:
    >>> from dithooks import plot
    >>> from dithooks.demo import load_plan
    >>> figure = plot.steps(load_plan("2x"))
    >>> print(*figure.get_size_inches()[:1])
    4.7
"""

from .plots.coefficients import coefficients
from .plots.frontier import frontier
from .plots.image_grid import pictures
from .plots.steps import steps
from .plots.style import save
from .plots.tier_levels import tiers

__all__ = ["coefficients", "frontier", "pictures", "save", "steps", "tiers"]
