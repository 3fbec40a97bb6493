"""The pool of actors of Ray Data, which hands every chunk to one of them."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
import ray.data

from ..errors import InvalidSetting
from ..integrations.ray_data_loggers import quiet_ray_data
from .actor import ChunkResult, DrawingActor, error_of, pack_chunk, unpack_results


@contextmanager
def ray_session(num_cpus: float, num_gpus: float) -> Iterator[None]:
    """Use the running Ray, or start one, and stop it in the end.

    Raises:
        ValueError: Ray was started here, and has no room for an actor.
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


def draw_chunks(
    chunks: list[tuple[str, pa.Table]], arguments: dict[str, Any], pool: dict[str, Any]
) -> Generator[ChunkResult, None, None]:
    """Draw every chunk with an actor; yield the results as they come.

    Args:
        chunks: rows, by the names of their files.
        arguments: arguments of :class:`DrawingActor`.
        pool: arguments of ``map_batches``: the strategy, and the resources of an actor.

    Raises:
        Exception: an actor met an error that ends the job.
    """
    tables = [pack_chunk(name, rows) for name, rows in chunks]
    # A batch is one chunk. With GPUs Ray Data requires a batch size, and from blocks of several rows it may mix chunks.
    data = ray.data.from_arrow(tables).map_batches(
        DrawingActor, batch_size=1, batch_format="pyarrow", fn_constructor_kwargs=arguments, **pool
    )
    data.context.enable_progress_bars = False
    data.context.print_on_execution_start = False
    with quiet_ray_data():
        for batch in data.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            for result in unpack_results(batch):
                if (error := error_of(result)) is not None:
                    raise error
                yield result


def pool_strategy(least: int, most: int) -> Any:
    """Return the strategy of a pool of so many actors."""
    if least == most:  # one chunk at a time each: in the end none waits behind another
        return ray.data.ActorPoolStrategy(size=most, max_tasks_in_flight_per_actor=1)
    return ray.data.ActorPoolStrategy(min_size=least, max_size=most)  # Ray Data decides by the chunks that wait
