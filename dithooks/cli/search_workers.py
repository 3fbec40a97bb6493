"""The executors of ``dithooks search --executor``, which run its plans."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ..errors import UsageError
from ..tuning.executors.executor import Executor
from ..tuning.executors.ray_actors import Actors, ray_module
from ..tuning.executors.torchrun_ranks import Ranks


@contextmanager
def workers(executor: str | None, count: int | None, target: str) -> Iterator[Executor | None]:
    """The executor for :func:`dithooks.search`; within the block, the ranks of torchrun are one process group.

    Args:
        executor: ``"ray"``, ``"torchrun"`` or None.
        count: the number of actors.
        target: the target to search; the definitions of a factory's module are sent to the actors.

    Raises:
        UsageError: Ray is not installed, or this was not started by torchrun.
    """
    if executor == "ray":
        try:
            ray = ray_module()
        except ModuleNotFoundError as error:
            raise UsageError(str(error)) from error
        where = target.rpartition(":")[0]
        module = sys.modules.get(Path(where).stem if where.endswith(".py") else where)
        if module is not None:  # actors may not find the module, on another machine least of all
            ray.cloudpickle.register_pickle_by_value(module)
        try:
            yield Actors(count)
        finally:
            if module is not None:
                ray.cloudpickle.unregister_pickle_by_value(module)
        return
    if executor is None:
        yield None
        return
    started = not dist.is_initialized()
    if started:
        if "RANK" not in os.environ:
            raise UsageError(
                "--executor torchrun is for a search on several ranks: start it as torchrun --nproc-per-node=N "
                "--no-python dithooks search ..."
            )
        dist.init_process_group()
    try:
        yield Ranks()
    finally:
        if started:
            dist.destroy_process_group()
