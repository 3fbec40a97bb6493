"""Executors by name."""

from __future__ import annotations

from ...errors import InvalidSetting, WrongType
from ...validation import shown
from .executor import Executor
from .ray_actors import Actors
from .torchrun_ranks import Ranks


def executor_of(executor: str | Executor | None) -> Executor | None:
    """Return an executor by its name; an executor, or ``None``, is returned as it is.

    Raises:
        TypeError, ValueError: no executor has that name, or the argument is something else.

    Example:
        >>> executor_of("ray")
        Actors(workers=None, num_cpus=1, num_gpus=None, resources={}, load=None)
        >>> executor_of("slurm")
        Traceback (most recent call last):
        ...
        dithooks.errors.InvalidSetting: executor='slurm' is not known: give 'ray' or 'torchrun', or leave ...
    """
    if isinstance(executor, str):
        if executor not in ("ray", "torchrun"):
            raise InvalidSetting(
                f"executor={shown(executor)} is not known: give 'ray' or 'torchrun', or leave it out to run plans here"
            )
        return Actors() if executor == "ray" else Ranks()
    if executor is not None and not all(callable(getattr(executor, name, None)) for name in ("check", "start")):
        raise WrongType(f"executor must be 'ray', 'torchrun' or dithooks.ray.Actors(...), not {shown(executor)}")
    return executor
