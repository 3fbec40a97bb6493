"""Many machines, with Ray: prompts drawn by actors that each have the pipeline and the plan (``dithooks[ray]``).

:func:`generate` draws a file of prompts to a folder of parquet files, and goes on where it was interrupted;
:func:`read` reads the folder, and :func:`decoded` makes pictures of its bytes. :class:`Actors` sets the actors on which
a search runs its plans.
"""

from importlib import import_module

for _package in ("ray", "pyarrow"):
    try:
        import_module(_package)
    except ModuleNotFoundError as _error:
        raise ModuleNotFoundError(
            f"dithooks.ray needs {_package}, which is not installed: pip install 'dithooks[ray]'", name=_package
        ) from _error

from ..tuning.executors.ray_actors import Actors  # noqa: E402
from .job_driver import generate  # noqa: E402
from .job_report import JobReport  # noqa: E402
from .prompts import read_prompts  # noqa: E402
from .results import read  # noqa: E402
from .samples import decoded  # noqa: E402

__all__ = ["Actors", "JobReport", "decoded", "generate", "read", "read_prompts"]
