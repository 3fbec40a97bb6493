"""Pictures of what the cache does; they need the extra ``dithooks[plot]``, which is matplotlib.

Each function returns a ``matplotlib.figure.Figure``, which a notebook shows, and which ``figure.savefig`` or
:func:`save` write: 450 pixels wide on a page, with type of 9 points, and colours that all can tell apart.

Example:
    >>> from dithooks import plot
    >>> from dithooks.demo import load_plan
    >>> figure = plot.steps(load_plan("2x"))
    >>> print(*figure.get_size_inches()[:1])
    4.7
"""

from .report.plots.grid import pictures
from .report.plots.quality import frontier
from .report.plots.steps import steps
from .report.plots.style import save
from .report.plots.weights import coefficients

__all__ = ["coefficients", "frontier", "pictures", "save", "steps"]
