"""Draw a file of prompts with a pool of actors, each of which has the pipeline and the plan."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..errors import InvalidSetting, RunMismatch, WrongType
from . import attempts as underway
from .actor import Told
from .files import Folder, locked
from .job import Job, Plan, plan_of, whole
from .job_progress import job_progress
from .job_report import Counts, JobReport
from .output import LOCK, check_same, chunk_name, drop, scan, settle
from .pool import drawn, started, strategy
from .prompts import read_prompts

FILES = 4  # for each actor at least, so that all end at about the same time
LARGEST = 32  # rows of a file, where the caller does not say: what a process that is ended loses at most


def generate(
    prompts: str | os.PathLike[str],
    out: str | os.PathLike[str],
    load: Callable[[], Any] | str,
    plan: Plan | str | os.PathLike[str] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    draw: Callable[..., Sequence[Any]] | None = None,
    encode: Callable[[Any], tuple[bytes, str]] | None = None,
    actors: int | tuple[int, int] = 1,
    num_cpus: float = 1,
    num_gpus: float = 0,
    batch_size: int = 1,
    rows_per_file: int | None = None,
    seed: int = 0,
    retry_failed: bool = False,
    verbose: bool = True,
) -> JobReport:
    """Draw every row of a prompts file, and keep each with its picture, its numbers, or its error.

    The rows are cut into chunks, which Ray Data hands to a pool of actors. An actor loads the pipeline and attaches the
    plan once, then writes a parquet file for each chunk, at once, under a name that its rows determine. So the folder
    is its own checkpoint: interrupted, the same call goes on with the rows that are missing; and where a process is
    ended, Ray starts another and hands it the chunk again. No row is lost, and none is there twice. Each row's noise
    is from a seed of its own, whatever actor draws it. Read the result with :func:`read`, or as any folder of parquet
    files.

    A prompt that fails is kept with its error: of several in one call, each is drawn by itself then. An error of the
    device itself ends the process, and a call in which three processes ended is made no more.

    Args:
        prompts: a file with a column ``prompt``, and maybe ``id`` and ``seed``: see :func:`read_prompts`. All other
            columns are carried along.
        out: a folder, which is made, or a URI that pyarrow knows; on a cluster one that every node has. A folder on a
            disk is locked meanwhile. Elsewhere let one call at a time be at it; rows that two have drawn are there once
            after the next.
        load: a function without arguments that returns the pipeline, on its device: ``dithooks.demo.load_pipeline``;
            or where to find it, ``"package.module:function"`` or ``"path/to/file.py:function"``.
        plan: what ``dit_cache`` takes, or a file that ``plan.save`` wrote, which is read here; ``None``: no cache.
        options: keyword arguments of the pipeline's call, of JSON's types: ``{"num_inference_steps": 28}``.
        draw: for other calls: ``draw(pipe, rows, **options)`` with rows as dicts of their columns; returns a sample for
            each. The default is ``pipe(prompts, generator=generators, **options)``.
        encode: makes bytes of a sample, and tells their format: ``encode(sample) -> (bytes, "jpeg")``. The default
            keeps pictures as PNG and all else as NumPy's files.
        actors: how many, or the least and the most, between which Ray Data decides.
        num_cpus: that an actor takes, and computes with.
        num_gpus: that an actor takes; 0.5 lets two share one. ``load`` has to use it.
        batch_size: prompts in one call of the pipeline.
        rows_per_file: as many are lost at most where a process is ended. Left out, four files for each actor, of 32
            rows at most, and in a folder where the job was begun, as many as then.
        seed: what the seeds of rows without one are made from, together with their ids.
        retry_failed: draw again what has failed before.
        verbose: show progress on stderr.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: no such prompts or plan.
        TypeError, ValueError: an argument is not as it has to be; the folder is another job's, or a row in it was drawn
            from another prompt or seed; the plan was made for another model.
        RuntimeError: another process is at this folder; a node has other versions of dithooks or torch; or the
            pipeline cannot be used as described. What ``load`` raises passes, with the actor's traceback as its cause.

    Warns:
        UserWarning: the folder was begun with other versions.
    """
    least, most = _pool(actors)
    _resources(num_cpus, num_gpus)
    if rows_per_file is not None:
        whole("rows_per_file", rows_per_file, 1)
    threads = max(1, int(num_cpus))
    job = Job(load, plan_of(plan), dict(options or {}), draw, encode, batch_size, seed, threads)
    table = read_prompts(prompts, seed)
    folder = Folder(os.fspath(out))
    begin = time.perf_counter()
    folder.make()
    with locked(folder, LOCK):
        chosen = settle(folder, job, rows_per_file or _fitting(table.num_rows, most, batch_size))
        folder.tidy()
        folder.tidy(underway.UNDERWAY)
        underway.clear(folder)
        there = scan(folder)
        check_same(folder, table, there, retry_failed)
        if retry_failed:
            for name in sorted({row.file for row in there.values() if row.failed}):
                drop(folder, name, {row_id for row_id, row in there.items() if row.failed})
            there = {row_id: row for row_id, row in there.items() if not row.failed}
        chunks = cut(table, set(there), rows_per_file or chosen)
        told: list[Told] = []
        if chunks:
            with (
                started(num_cpus, num_gpus),
                job_progress(sum(rows.num_rows for _, rows in chunks), verbose) as reporter,
            ):
                arguments = {"job": job, "out": os.fspath(out) if folder.local is None else folder.root}
                pool = {
                    "compute": strategy(*(min(each, len(chunks)) for each in (least, most))),
                    "num_cpus": num_cpus,
                    "num_gpus": num_gpus,
                }
                with closing(drawn(chunks, {**arguments, "reporter": reporter}, pool)) as answers:
                    told += answers
        final = scan(folder)
        if missing := [row_id for row_id in table["id"].to_pylist() if row_id not in final]:
            raise RunMismatch(f"{len(missing)} rows, {missing[0]!r} first, are not in {folder.place}: call it again")
    before = [there[row_id] for row_id in table["id"].to_pylist() if row_id in there]
    return _report(folder, table.num_rows, [row.failed for row in before], told, time.perf_counter() - begin)


def cut(table: pa.Table, done: set[Any], rows_per_file: int) -> list[tuple[str, pa.Table]]:
    """The rows that are left to do, by the names of their files.

    Cut where the whole file would be, so that a chunk that is still being drawn when its driver has ended gets the same
    name again.

    Example:
        >>> table = pa.table({"row": [0, 1, 2, 3, 4], "id": ["a", "b", "c", "d", "e"]})
        >>> [rows["id"].to_pylist() for _, rows in cut(table, {"b"}, 2)]
        [['a'], ['c', 'd'], ['e']]
    """
    chunks = []
    for start in range(0, table.num_rows, rows_per_file):
        part = table.slice(start, rows_per_file)
        left = part.filter(pa.array([row_id not in done for row_id in part["id"].to_pylist()], pa.bool_()))
        if left.num_rows:
            chunks.append((chunk_name(left), left))
    return chunks


# -- arguments and numbers --------------------------------------------------------------------------------------


def _pool(actors: object) -> tuple[int, int]:
    pair = (actors, actors) if not isinstance(actors, (tuple, list)) else tuple(actors)
    if len(pair) != 2:
        raise InvalidSetting(f"actors={actors!r}: give how many, or a pair of the least and the most")
    for each in pair:
        whole("actors", each, 1)
    if pair[0] > pair[1]:
        raise InvalidSetting(f"actors={actors!r}: the least is more than the most")
    return pair[0], pair[1]


def _resources(num_cpus: object, num_gpus: object) -> None:
    for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongType(f"{name}={value!r} must be a number")
        if not 0 <= value < math.inf:
            raise InvalidSetting(f"{name}={value} is out of range: give 0 or more")
    if isinstance(num_gpus, float) and num_gpus > 1 and not num_gpus.is_integer():
        raise InvalidSetting(f"num_gpus={num_gpus}: Ray gives a part of one, or several whole ones")


def _fitting(rows: int, actors: int, batch_size: int) -> int:
    """Rows of a file: whole batches.

    Example:
        >>> _fitting(100, 2, 4), _fitting(100_000, 2, 4), _fitting(3, 2, 4)
        (16, 32, 4)
    """
    batches = math.ceil(rows / (FILES * actors * batch_size))
    return batch_size * max(1, min(batches, LARGEST // batch_size))


def _report(folder: Folder, rows: int, before: list[bool], told: list[Told], seconds: float) -> JobReport:
    actors: dict[str, Counts] = {}
    for each in told:
        sums = actors.get(each.actor, Counts())
        counts = (sums.drawn + each.ok, sums.failed + each.failed, sums.seconds + each.seconds)
        actors[each.actor] = Counts(*counts)
    return JobReport(
        folder.place,
        rows,
        sum(each.ok for each in told),
        sum(each.failed for each in told),
        len(before),
        sum(before),
        seconds,
        sum(each.blocks_run for each in told),
        sum(each.blocks_total for each in told),
        actors,
        tuple(dict.fromkeys(remark for each in told for remark in each.remarks)),
    )
