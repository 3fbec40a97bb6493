"""A pipeline with a plan attached, which draws rows and returns a result for each, whatever fails."""

from __future__ import annotations

import gc
import inspect
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..environment.machine import empty_cache, synchronize
from ..environment.torch_api import AcceleratorError, OutOfMemoryError
from ..errors import WrongType
from ..handle import CacheHandle, dit_cache
from ..stats.warning_collector import collect_warnings
from ..validation import shown
from .attempts import ATTEMPTS, AttemptLog
from .job import Job
from .output import FAILED, OK
from .samples import encoded, samples_in

Rows = Sequence[dict[str, Any]]
CUT_OFF = 2000  # characters of an error that are kept
DEVICE_FAILED = 17  # exit code of a process


class UnusableError(Exception):
    """An error that no row can be drawn with: it ends the job, and is not kept row by row."""


class PipelineRunner:
    """A pipeline that is loaded once, with the plan attached, and draws rows.

    Args:
        job: settings of the job.

    Raises:
        TypeError, ValueError: the plan is of another model, or the pipeline takes other arguments.
    """

    def __init__(self, job: Job) -> None:
        self._job = job
        self.pipe = job.pipeline()
        if hasattr(self.pipe, "set_progress_bar_config"):
            self.pipe.set_progress_bar_config(disable=True)
        if job.draw is None:
            _check_call(self.pipe, job)
        self.remarks: list[str] = []
        self.handle: CacheHandle | None = None
        if job.plan is not None:
            with collect_warnings(self.remarks):
                self.handle = dit_cache(self.pipe, job.plan)

    def draw(self, rows: Rows, attempts: AttemptLog) -> list[dict[str, Any]]:
        """Draw rows in one call, and where that fails or ends the process, one by one.

        Args:
            rows: rows with ``id``, ``prompt``, ``seed`` and the columns carried along.
            attempts: the log in which calls are noted.

        Returns:
            What the output keeps of each row: its status, and the picture or the error.

        Raises:
            UnusableError: other rows would fail, too.
        """
        missing = [row for row in rows if row["prompt"] is None]
        if missing:
            rest = iter(self.draw([row for row in rows if row["prompt"] is not None], attempts))
            return [_failed("ValueError: the prompt is null") if row["prompt"] is None else next(rest) for row in rows]
        if not rows:
            return []
        ids = [row["id"] for row in rows]
        ended = attempts.crashes(ids)
        if ended and len(rows) > 1:
            return self._singly(rows, attempts)
        if ended >= ATTEMPTS:
            return [_failed(f"the process that drew it ended {ended} times{attempts.last_error(ids)}")]
        attempts.begin(ids)
        results: list[dict[str, Any]] | str
        try:
            results = self._call(rows)
        except UnusableError:
            attempts.returned(ids)
            raise
        except Exception as error:  # as a text: an exception holds on to all that the call had in memory
            results = _text(error)
            if _is_device_error(error):
                attempts.note_error(ids, results)
                os._exit(DEVICE_FAILED)  # nothing can be drawn on the device any more: Ray starts another process
        attempts.returned(ids)
        if not isinstance(results, str):
            return results
        self._clean()
        return self._singly(rows, attempts) if len(rows) > 1 else [_failed(results)]

    def _singly(self, rows: Rows, attempts: AttemptLog) -> list[dict[str, Any]]:
        return [result for row in rows for result in self.draw([row], attempts)]

    def _call(self, rows: Rows) -> list[dict[str, Any]]:
        job, remarks, before = self._job, list[str](), self._counts()
        draw = _by_call if job.draw is None else job.draw
        begin = time.perf_counter()
        with torch.no_grad(), collect_warnings(remarks):
            samples = _listed(draw(self.pipe, [dict(row) for row in rows], **job.options))
            if len(samples) != len(rows):
                raise UnusableError(
                    f"{len(rows)} prompts drew {len(samples)} samples: one for each is expected; give a function as "
                    "draw that returns as many"
                )
            synchronize()
        seconds = time.perf_counter() - begin
        run, total = (after - former for after, former in zip(self._counts(), before, strict=True))
        made = [(job.encode or encoded)(sample) for sample in samples]
        shared = {"status": OK, "seconds": seconds / len(rows), "remarks": remarks or None}
        if self.handle is not None:
            shared |= {"blocks_run": run / len(rows), "blocks_total": total / len(rows)}
        return [{**shared, "picture": data, "format": kind} for data, kind in made]

    def _counts(self) -> tuple[int, int]:
        if self.handle is None:
            return 0, 0
        stats = self.handle.stats
        return stats.blocks_run, stats.blocks_total

    def _clean(self) -> None:
        """Drop all that a failed call has left, in the cache and in memory."""
        if self.handle is not None:
            self.handle.reset()
        gc.collect()
        empty_cache()


def generators_of(rows: Rows) -> list[torch.Generator]:
    """Return a generator for each row, from its seed; on the host, so that the noise is the same on every device.

    Example:
        >>> generators_of([{"id": 0, "prompt": "taxi", "seed": 7}])[0].initial_seed()
        7
    """
    return [torch.Generator("cpu").manual_seed(row["seed"]) for row in rows]


def _by_call(pipe: Callable[..., Any], rows: Rows, **options: Any) -> list[Any]:
    """Call the pipeline as those of diffusers are called."""
    return samples_in(pipe([row["prompt"] for row in rows], generator=generators_of(rows), **options))


def _check_call(pipe: Any, job: Job) -> None:
    """Check that the pipeline takes the arguments of the call: else every row would fail."""
    if not callable(pipe):
        raise WrongType(f"load returned {type(pipe).__name__}, which cannot be called: give a function as draw")
    takes = inspect.signature(pipe).parameters
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in takes.values()):
        return
    if strange := [name for name in ("generator", *job.options) if name not in takes]:
        remedy = "give a function as draw that makes the noise" if strange[0] == "generator" else "see to options"
        raise WrongType(f"{type(pipe).__name__} takes no {shown(strange[0])}, only {', '.join(takes)}: {remedy}")


def _listed(samples: Any) -> list[Any]:
    try:
        return list(samples)
    except TypeError:
        raise UnusableError(f"draw returned {type(samples).__name__}: a list of samples is expected") from None


def _is_device_error(error: BaseException) -> bool:
    """Whether an error is the device's own, after which this process can draw nothing more; lack of memory is not."""
    return isinstance(error, AcceleratorError) and not isinstance(error, OutOfMemoryError)


def _failed(text: str) -> dict[str, Any]:
    return {"status": FAILED, "error": text}


def _text(error: BaseException) -> str:
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= CUT_OFF else f"{text[:CUT_OFF]}..."
