"""The actor that draws one chunk of rows a call, and writes it to a file of its own."""

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
from .attempts import ATTEMPTS, AttemptLog
from .files import Folder
from .job import Job
from .output import FAILED, read_rows, write_rows
from .pipeline_runner import PipelineRunner, UnusableError

SHORT = 8  # characters of an actor's id that are kept


@dataclass(frozen=True)
class ChunkResult:
    """The result of a chunk: its counts; the pictures are in its file."""

    chunk: str
    actor: str
    ok: int = 0
    failed: int = 0
    seconds: float = 0.0
    blocks_run: float = 0.0
    blocks_total: float = 0.0
    remarks: list[str] = field(default_factory=list)
    problem: bytes | None = None  # a pickled exception, which ends the job


class DrawingActor:
    """A callable of Ray Data's actor pool: it has the pipeline, and is called with one chunk at a time.

    An error in loading is returned with the first chunk, so that the driver can raise it unchanged.

    Args:
        job: how rows are drawn.
        out: the output folder.
        reporter: the progress actor that calls are reported to; ``None``: there is none.
    """

    def __init__(self, job: Job, out: str, reporter: Any = None) -> None:
        self._job, self._out, self._reporter = job, out, reporter
        context = ray.get_runtime_context()
        self._actor = str(context.get_actor_id() or "")[:SHORT]
        self._painter: PipelineRunner | None = None
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
            batch: a table of one row: ``chunk``, the name of its file, and ``rows``, a table in Arrow's stream format.

        Returns:
            A :class:`ChunkResult`, as a table of one row.
        """
        chunk = batch["chunk"][0].as_py()
        try:
            if self._painter is None:
                result = ChunkResult(chunk, self._actor, problem=self._problem)
            else:
                result = self._draw(self._painter, chunk, _table(batch["rows"][0].as_py()))
        except Exception as error:
            result = ChunkResult(chunk, self._actor, problem=_pickled(error))
        return pa.table({name: pa.array([value], _KINDS[name]) for name, value in asdict(result).items()})

    def _draw(self, runner: PipelineRunner, chunk: str, rows: pa.Table) -> ChunkResult:
        attempts = AttemptLog(self._folder, chunk, self._actor)
        if self._folder.has(chunk):  # written by an attempt whose process ended before it returned
            results = read_rows(self._folder, chunk, _COUNTED).to_pylist()
            attempts.delete()
            return self._result(runner, chunk, results)
        results, prompts = [], rows.to_pylist()
        self._report(chunk, results)
        for start in range(0, len(prompts), self._job.batch_size):
            results += runner.draw(prompts[start : start + self._job.batch_size], attempts)
            self._report(chunk, results)
        results = [{**result, "actor": self._actor} for result in results]
        if attempts.crashes(_WRITING) >= ATTEMPTS:
            raise UnusableError(f"the process that wrote {self._folder.path(chunk)} ended {ATTEMPTS} times")
        attempts.begin(_WRITING)
        write_rows(self._folder, chunk, rows, results, self._job)
        attempts.delete()
        return self._result(runner, chunk, results)

    def _result(self, runner: PipelineRunner, chunk: str, results: list[dict[str, Any]]) -> ChunkResult:
        failed = sum(result["status"] == FAILED for result in results)
        seconds, run, total = (sum(result.get(name) or 0.0 for result in results) for name in _SUMMED)
        remarks = dict.fromkeys([*runner.remarks, *(each for r in results for each in r.get("remarks") or ())])
        return ChunkResult(chunk, self._actor, len(results) - failed, failed, seconds, run, total, list(remarks))

    def _loaded(self) -> PipelineRunner:
        """Load the pipeline; attempts are noted, since Ray would otherwise retry for ever what ends the process."""
        attempts = AttemptLog(self._folder, f"load-{self._actor}", self._actor)
        if (ended := attempts.crashes(_LOADING)) >= ATTEMPTS:
            raise RunMismatch(f"the process that loaded the pipeline on {platform.node()} ended {ended} times")
        attempts.begin(_LOADING)
        try:
            return PipelineRunner(self._job)
        finally:
            attempts.delete()

    def _report(self, chunk: str, results: list[dict[str, Any]]) -> None:
        """Report progress, without waiting, and without an error if that fails."""
        if self._reporter is not None:
            failed = sum(result["status"] == FAILED for result in results)
            with suppress(Exception):
                self._reporter.report.remote(chunk, self._actor, len(results), failed)


def pack_chunk(chunk: str, rows: pa.Table) -> pa.Table:
    """Pack a chunk into one row, which Ray can neither split nor mix with others.

    Example:
        >>> pack_chunk("a.parquet", pa.table({"id": [1, 2]})).column_names
        ['chunk', 'rows']
    """
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, rows.schema) as stream:
        stream.write_table(rows)
    return pa.table({"chunk": [chunk], "rows": pa.array([sink.getvalue().to_pybytes()], pa.large_binary())})


def unpack_results(batch: pa.Table) -> list[ChunkResult]:
    """Unpack what an actor has returned."""
    return [ChunkResult(**row) for row in batch.to_pylist()]


def error_of(result: ChunkResult) -> BaseException | None:
    """Return the exception that an actor met, with the actor's traceback as its cause; ``None``: there is none."""
    if result.problem is None:
        return None
    head, _, pickled = result.problem.partition(b"\n")
    text, error = json.loads(head), None
    with suppress(Exception):  # its class may exist in the actor only
        error = cloudpickle.loads(pickled)
    if not isinstance(error, BaseException) or isinstance(error, UnusableError):
        error = RunMismatch(text["message"])
    error.__cause__ = RuntimeError(f"in actor {result.actor}:\n{text['traceback']}")
    return error


def _pickled(error: BaseException) -> bytes:
    message = str(error) if isinstance(error, UnusableError) else f"{type(error).__name__}: {error}"
    text = json.dumps({"message": message, "traceback": "".join(traceback.format_exception(error))})
    data = b""
    with suppress(Exception):
        data = cloudpickle.dumps(error.with_traceback(None))  # type: ignore[no-untyped-call]
    return text.encode() + b"\n" + data


def _table(data: bytes) -> pa.Table:
    with pa.ipc.open_stream(data) as stream:
        return stream.read_all()


_WRITING, _LOADING = ("write",), ("load",)  # noted like calls of rows
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
