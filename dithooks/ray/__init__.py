"""On many machines, with Ray: prompts drawn by actors that each have the pipeline and the plan: ``dithooks[ray]``.

:func:`generate` draws a file of prompts to a folder of parquet files, and goes on where it was interrupted;
:func:`read` reads them, and :func:`decoded` makes pictures of what they hold. :class:`Actors` says on what actors a
search runs its plans.
"""

from ..search.by_ray import Actors
from .driver import generate
from .prompts import read_prompts
from .reading import read
from .report import Report
from .samples import decoded

__all__ = ["Actors", "Report", "decoded", "generate", "read", "read_prompts"]
