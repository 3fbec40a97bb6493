"""Ray's part: a pool of actors, and every chunk to one of them. What is scheduled when is left to Ray Data."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
import ray.data

from ..errors import InvalidSetting
from .actor import Drawer, Told, packed, problem_of, unpacked


@contextmanager
def started(num_cpus: float, num_gpus: float) -> Iterator[None]:
    """Ray, as it runs already, or for as long as this lasts.

    Raises:
        ValueError: it was started here, and has no place for an actor.
    """
    if ray.is_initialized():
        yield
        return
    ray.init(logging_level=logging.WARNING)
    try:
        there = ray.cluster_resources()  # type: ignore[no-untyped-call]
        for name, needed, argument in (("CPU", num_cpus, "num_cpus"), ("GPU", num_gpus, "num_gpus")):
            if needed > there.get(name, 0):
                raise InvalidSetting(
                    f"{argument}={needed:g}, and Ray has {there.get(name, 0):g} {name} here: give less, or connect to "
                    "a cluster with ray.init(address=...) first"
                )
        yield
    finally:
        ray.shutdown()


def drawn(
    chunks: list[tuple[str, pa.Table]], arguments: dict[str, Any], pool: dict[str, Any]
) -> Generator[Told, None, None]:
    """Every chunk to an actor; what was told of each, as it comes.

    Args:
        chunks: rows, by the names of their files.
        arguments: of :class:`Drawer`.
        pool: of ``map_batches``: the strategy, and what an actor takes.

    Raises:
        Exception: what an actor met that ends the job.
    """
    tables = [packed(name, rows) for name, rows in chunks]
    # A batch is one chunk. (With GPUs Ray Data asks for a size of batches; with several rows a block it may mix them.)
    data = ray.data.from_arrow(tables).map_batches(
        Drawer, batch_size=1, batch_format="pyarrow", fn_constructor_kwargs=arguments, **pool
    )
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    with _quiet():
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for told in unpacked(batch):
                if (problem := problem_of(told)) is not None:
                    raise problem
                yield told


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Ray Data says of settings that are meant so."""
    names = ("progress", "execution.streaming_executor", "execution.operators.map_operator")
    loggers = [logging.getLogger(f"ray.data._internal.{name}") for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def strategy(least: int, most: int) -> Any:
    """Of a pool of so many actors."""
    if least == most:  # one chunk at a time each, so that none waits behind another in the end
        return ray.data.ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=1)
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most)  # by those that wait it is decided how many
