"""The actor: draws one chunk of rows a call, and writes it to a file of its own."""

from __future__ import annotations

import json
import platform
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import ray
import torch
from ray import cloudpickle

from ..errors import RunMismatch
from .attempts import ATTEMPTS, Underway
from .files import Folder
from .job import Job
from .output import FAILED, read_rows, write_rows
from .painter import Painter, UnusableError

SHORT = 8  # characters of an actor's id that tell it from the others


@dataclass(frozen=True)
class Told:
    """What an actor returns of a chunk, in place of its pictures."""

    chunk: str
    actor: str
    ok: int = 0
    failed: int = 0
    seconds: float = 0.0
    blocks_run: float = 0.0
    blocks_total: float = 0.0
    remarks: list[str] = field(default_factory=list)
    problem: bytes | None = None  # an exception, which ends the job


class Drawer:
    """Of an actor pool of Ray Data: has the pipeline, and is called with one chunk at a time.

    An error in loading is not raised but told with the first chunk, so that the driver can raise it as it is.

    Args:
        job: how rows are drawn.
        out: the folder.
        reporter: an actor that is told of each call; ``None``: nobody.
    """

    def __init__(self, job: Job, out: str, reporter: Any = None) -> None:
        self._job, self._out, self._reporter = job, out, reporter
        context = ray.get_runtime_context()
        self._actor = str(context.get_actor_id() or "")[:SHORT]
        self._painter: Painter | None = None
        self._problem: bytes | None = None
        try:
            torch.set_num_threads(job.threads)
            job.check_versions()
            self._folder = Folder(out)
            self._painter = self._loaded()
        except Exception as error:
            self._problem = _pickled(error)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Draw a chunk.

        Args:
            batch: of one row: ``chunk``, its file's name, and ``rows``, a table in Arrow's stream format.

        Returns:
            :class:`Told`, as a table of one row.
        """
        chunk = batch["chunk"][0].as_py()
        try:
            if self._painter is None:
                told = Told(chunk, self._actor, problem=self._problem)
            else:
                told = self._draw(self._painter, chunk, _table(batch["rows"][0].as_py()))
        except Exception as error:
            told = Told(chunk, self._actor, problem=_pickled(error))
        return pa.table({name: pa.array([value], _KINDS[name]) for name, value in asdict(told).items()})

    def _draw(self, painter: Painter, chunk: str, rows: pa.Table) -> Told:
        underway = Underway(self._folder, chunk, self._actor)
        if self._folder.has(chunk):  # of an attempt whose process ended between the file and the answer
            results = read_rows(self._folder, chunk, _COUNTED).to_pylist()
            underway.over()
            return self._told(painter, chunk, results)
        results, every = [], rows.to_pylist()
        self._report(chunk, results)
        for start in range(0, len(every), self._job.batch_size):
            results += painter.draw(every[start : start + self._job.batch_size], underway)
            self._report(chunk, results)
        results = [{**result, "actor": self._actor} for result in results]
        if underway.ended(_WRITING) >= ATTEMPTS:
            raise UnusableError(f"the process that wrote {self._folder.path(chunk)} ended {ATTEMPTS} times")
        underway.begin(_WRITING)
        write_rows(self._folder, chunk, rows, results, self._job)
        underway.over()
        return self._told(painter, chunk, results)

    def _told(self, painter: Painter, chunk: str, results: list[dict[str, Any]]) -> Told:
        failed = sum(result["status"] == FAILED for result in results)
        seconds, run, total = (sum(result.get(name) or 0.0 for result in results) for name in _SUMMED)
        remarks = dict.fromkeys([*painter.remarks, *(each for r in results for each in r.get("remarks") or ())])
        return Told(chunk, self._actor, len(results) - failed, failed, seconds, run, total, list(remarks))

    def _loaded(self) -> Painter:
        """A pipeline whose loading ends the process would be loaded for ever: noted as calls are."""
        underway = Underway(self._folder, f"load-{self._actor}", self._actor)
        if (ended := underway.ended(_LOADING)) >= ATTEMPTS:
            raise RunMismatch(f"the process that loaded the pipeline on {platform.node()} ended {ended} times")
        underway.begin(_LOADING)
        try:
            return Painter(self._job)
        finally:
            underway.over()

    def _report(self, chunk: str, results: list[dict[str, Any]]) -> None:
        """Fire and forget: whoever does not hear it does not matter."""
        if self._reporter is not None:
            failed = sum(result["status"] == FAILED for result in results)
            with suppress(Exception):
                self._reporter.report.remote(chunk, self._actor, len(results), failed)


def packed(chunk: str, rows: pa.Table) -> pa.Table:
    """A chunk as one row, which Ray can neither split nor mix with others.

    Example:
        >>> packed("a.parquet", pa.table({"id": [1, 2]})).column_names
        ['chunk', 'rows']
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return pa.table({"chunk": [chunk], "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def unpacked(batch: pa.Table) -> list[Told]:
    """What actors have returned."""
    return [Told(**row) for row in batch.to_pylist()]


def problem_of(told: Told) -> BaseException | None:
    """The exception that an actor met, with its traceback as the cause; ``None``: none."""
    if told.problem is None:
        return None
    text, error = json.loads(told.problem.partition(b"\n")[0]), None
    with suppress(Exception):  # of a class that only the actor has
        error = cloudpickle.loads(told.problem.partition(b"\n")[2])
    if not isinstance(error, BaseException) or isinstance(error, UnusableError):
        error = RuntimeError(text["said"])
    error.__cause__ = RuntimeError(f"in actor {told.actor}:\n{text['traceback']}")
    return error


def _pickled(error: BaseException) -> bytes:
    said = str(error) if isinstance(error, UnusableError) else f"{type(error).__name__}: {error}"
    text = json.dumps({"said": said, "traceback": "".join(traceback.format_exception(error))})
    data = b""
    with suppress(Exception):
        data = cloudpickle.dumps(error.with_traceback(None))  # type: ignore[no-untyped-call]
    return text.encode() + b"\n" + data


def _table(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as stream:
        return stream.read_all()


_WRITING, _LOADING = ("write",), ("load",)  # steps that are noted as calls are
_SUMMED = ("seconds", "blocks_run", "blocks_total")
_COUNTED = ("status", "remarks", *_SUMMED)
_KINDS = {
    "chunk": pa.string(),
    "actor": pa.string(),
    "ok": pa.int64(),
    "failed": pa.int64(),
    **{name: pa.float64() for name in _SUMMED},
    "remarks": pa.list_(pa.string()),
    "problem": pa.large_binary(),
}
