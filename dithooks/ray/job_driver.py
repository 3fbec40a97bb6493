"""The driver of a job: it draws a file of prompts with a pool of actors."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from ..errors import InvalidSetting, RunMismatch, WrongType
from ..validation import shown
from .actor import ChunkResult
from .attempts import FOLDER as ATTEMPTS_FOLDER
from .attempts import forget_attempts
from .files import Folder, locked
from .job import Job, Plan, check_whole, read_plan
from .job_progress import job_progress
from .job_report import ActorCounts, JobReport
from .output import LOCK, check_same, chunk_name, claim_folder, drop_rows, scan_rows
from .pool import draw_chunks, pool_strategy, ray_session
from .prompts import read_prompts

FILES = 4  # for each actor at least, so that all actors end at about the same time
LARGEST = 32  # rows of a file by default: a process that ends loses as many at most


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
    """Draw every row of a prompts file, and keep each with its picture and numbers, or its error.

    The rows are cut into chunks, which Ray Data hands to a pool of actors. An actor loads the pipeline and attaches the
    plan once, then writes one parquet file for each chunk, under a name that its rows determine. So the folder is its
    own checkpoint: after an interrupt, the same call goes on with the missing rows; and where a process ends, Ray
    starts another and hands it the chunk again. No row is lost, and none is kept twice. Each row's noise comes from a
    seed of its own, whatever actor draws it. Read the result with :func:`read`, or as any folder of parquet files.

    A prompt that fails is kept with its error; if a call of several prompts fails, each is drawn by itself. An error of
    the device itself ends the process, and a call in which three processes ended is given up.

    Args:
        prompts: a file with a column ``prompt``, and maybe ``id`` and ``seed``: see :func:`read_prompts`. All other
            columns are carried along.
        out: a folder, which is made if it does not exist, or a URI that pyarrow knows; on a cluster one that every node
            reaches. A folder on a disk is locked meanwhile. Elsewhere, make one call at a time: of rows that two calls
            have drawn, the next call drops one.
        load: a function without arguments that returns the pipeline, on its device, such as
            ``dithooks.demo.load_pipeline``; or its place, ``"package.module:function"`` or
            ``"path/to/file.py:function"``.
        plan: a plan or configuration, or a file that ``plan.save`` wrote, which is read here; ``None``: no cache.
        options: keyword arguments of the pipeline's call, of JSON's types: ``{"num_inference_steps": 28}``.
        draw: a function for pipelines that are called otherwise: ``draw(pipe, rows, **options)``, with each row as a
            dict of its columns, returns a sample for each row. The default is
            ``pipe(prompts, generator=generators, **options)``.
        encode: a function that turns a sample into bytes and their format: ``encode(sample) -> (bytes, "jpeg")``. The
            default keeps pictures as PNG and all else as NumPy's files.
        actors: number of actors, or the least and the most, between which Ray Data decides.
        num_cpus: CPUs of each actor; it computes with as many threads.
        num_gpus: GPUs of each actor; with 0.5, two share one. ``load`` has to use it.
        batch_size: prompts in one call of the pipeline.
        rows_per_file: rows of a file, which are lost at most where a process ends. Left out, each actor gets four files
            or more, of 32 rows at most; a job that goes on keeps its number.
        seed: the seeds of rows that have none are made from this seed and their ids.
        retry_failed: draw again the rows that failed before.
        verbose: show progress on stderr.

    Returns:
        A report of what this call did.

    Raises:
        FileNotFoundError: no such prompts or plan.
        TypeError, ValueError: an argument is of the wrong type or range; the folder is another job's, or a row in it
            was drawn from another prompt or seed; or the plan was made for another model.
        RuntimeError: another process uses this folder; a node has other versions of dithooks or torch; or the pipeline
            cannot be used as described. An error that ``load`` raises is raised here, with the actor's traceback as its
            cause.

    Warns:
        UserWarning: the job was begun with other versions.
    """
    least, most = _pool(actors)
    _resources(num_cpus, num_gpus)
    if rows_per_file is not None:
        check_whole("rows_per_file", rows_per_file, 1)
    threads = max(1, int(num_cpus))
    job = Job(load, read_plan(plan), dict(options or {}), draw, encode, batch_size, seed, threads)
    table = read_prompts(prompts, seed)
    folder = Folder(os.fspath(out))
    begin = time.perf_counter()
    folder.make()
    with locked(folder, LOCK):
        chosen = claim_folder(folder, job, rows_per_file or _fitting(table.num_rows, most, batch_size))
        folder.tidy()
        folder.tidy(ATTEMPTS_FOLDER)
        forget_attempts(folder)
        there = scan_rows(folder)
        check_same(folder, table, there, retry_failed)
        if retry_failed:
            for name in sorted({row.file for row in there.values() if row.failed}):
                drop_rows(folder, name, {row_id for row_id, row in there.items() if row.failed})
            there = {row_id: row for row_id, row in there.items() if not row.failed}
        chunks = cut(table, set(there), rows_per_file or chosen)
        results: list[ChunkResult] = []
        if chunks:
            with (
                ray_session(num_cpus, num_gpus),
                job_progress(sum(rows.num_rows for _, rows in chunks), verbose) as reporter,
            ):
                arguments = {"job": job, "out": os.fspath(out) if folder.local is None else folder.root}
                pool = {
                    "compute": pool_strategy(*(min(each, len(chunks)) for each in (least, most))),
                    "num_cpus": num_cpus,
                    "num_gpus": num_gpus,
                }
                with closing(draw_chunks(chunks, {**arguments, "reporter": reporter}, pool)) as answers:
                    results += answers
        final = scan_rows(folder)
        if missing := [row_id for row_id in table["id"].to_pylist() if row_id not in final]:
            raise RunMismatch(
                f"{len(missing)} rows, {shown(missing[0])} first, are not in {folder.place}: call it again"
            )
    before = [there[row_id] for row_id in table["id"].to_pylist() if row_id in there]
    return _report(folder, table.num_rows, [row.failed for row in before], results, time.perf_counter() - begin)


def cut(table: pa.Table, done: set[Any], rows_per_file: int) -> list[tuple[str, pa.Table]]:
    """Cut the rows that are left to draw into chunks, by the names of their files.

    The cuts are those of the whole file, so that a chunk that is still being drawn when its driver ends gets the same
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
        raise InvalidSetting(f"actors={shown(actors)}: give how many, or a pair of the least and the most")
    for each in pair:
        check_whole("actors", each, 1)
    if pair[0] > pair[1]:
        raise InvalidSetting(f"actors={shown(actors)}: the least is more than the most")
    return pair[0], pair[1]


def _resources(num_cpus: object, num_gpus: object) -> None:
    for name, value in (("num_cpus", num_cpus), ("num_gpus", num_gpus)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise WrongType(f"{name}={shown(value)} must be a number")
        if not 0 <= value < math.inf:
            raise InvalidSetting(f"{name}={value} is out of range: give 0 or more")
    if isinstance(num_gpus, float) and num_gpus > 1 and not num_gpus.is_integer():
        raise InvalidSetting(f"num_gpus={num_gpus}: Ray gives a part of one, or several whole ones")


def _fitting(rows: int, actors: int, batch_size: int) -> int:
    """Return the default number of rows of a file: whole batches.

    Example:
        >>> _fitting(100, 2, 4), _fitting(100_000, 2, 4), _fitting(3, 2, 4)
        (16, 32, 4)
    """
    batches = math.ceil(rows / (FILES * actors * batch_size))
    return batch_size * max(1, min(batches, LARGEST // batch_size))


def _report(folder: Folder, rows: int, before: list[bool], results: list[ChunkResult], seconds: float) -> JobReport:
    actors: dict[str, ActorCounts] = {}
    for each in results:
        sums = actors.get(each.actor, ActorCounts())
        counts = (sums.drawn + each.ok, sums.failed + each.failed, sums.seconds + each.seconds)
        actors[each.actor] = ActorCounts(*counts)
    return JobReport(
        folder.place,
        rows,
        sum(each.ok for each in results),
        sum(each.failed for each in results),
        len(before),
        sum(before),
        seconds,
        sum(each.blocks_run for each in results),
        sum(each.blocks_total for each in results),
        actors,
        tuple(dict.fromkeys(remark for each in results for remark in each.remarks)),
    )
