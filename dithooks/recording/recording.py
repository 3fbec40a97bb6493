"""The recording of a run: inner products of every range's residuals, and the time of each block."""

from __future__ import annotations

import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.provenance import PlanTarget
from ..config.safe_json import parsed, shortened
from ..errors import InvalidSetting
from ..validation import check_count, check_number, check_text

Floats = NDArray[np.float64]  # on the host: what counts are small differences of large products
SCHEMA = 1
# Errors of NumPy, zipfile and the checks for a file that is truncated, altered, or no recording.
_GARBLED = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    OSError,
    RuntimeError,
    OverflowError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)
_ARRAYS = ("ranges", "grams", "norms", "steps", "times", "block_ms")


@dataclass(frozen=True, eq=False)
class Trace:
    """One transformer of a recorded run, with T steps, B blocks, and R ranges that its wiring allows.

    Args:
        path: path of the transformer, from the target.
        blocks: paths of the blocks, in the order of their calls.
        ranges: (R, 2), first and last block of each range.
        grams: (R, T, T), ⟨Δ_s, Δ_t⟩ of the sampled tokens, summed over branches, samples and runs.
        norms: (B, T), ‖h‖ of the sampled tokens that leave each block.
        steps: (T,), the steps of the run at which the transformer was called.
        times: (T,), σ at these steps, or what stands for it.
        axis: what ``times`` are: ``"sigma"``, ``"timestep"`` or ``"step"``.
        branches: mean number of calls of a step.
        block_ms: (B,), milliseconds of each block in one call.
        call_ms: milliseconds of one call of the transformer.
        share: share of the tokens that was sampled.
        inputs: a sample of the inputs, to check that another run draws the same (:class:`.InputSamples`).
        second: number of the first call of the second step; 0: there is none.
        calls: number of calls.
    """

    path: str
    blocks: tuple[str, ...]
    ranges: NDArray[np.int64]
    grams: Floats
    norms: Floats
    steps: NDArray[np.int64]
    times: Floats
    axis: str
    branches: float
    block_ms: Floats
    call_ms: float
    share: float
    inputs: Mapping[str, NDArray[np.float32]]
    second: int = 0
    calls: int = 0

    def gram(self, first: int, last: int) -> Floats:
        """Return the Gram matrix (T, T) of one range.

        Raises:
            ValueError: the wiring does not allow the range.
        """
        found = np.flatnonzero((self.ranges == (first, last)).all(axis=1))
        if not len(found):
            raise InvalidSetting(f"{self.path}: blocks {first} to {last} are no range that can be cached")
        gram: Floats = self.grams[found[0]]
        return gram


@dataclass(frozen=True, eq=False)
class Recording:
    """A run in which everything was computed, recorded: all that :func:`plan` needs, without the model.

    Args:
        traces: one for each transformer.
        made: model, fingerprint, scheduler and size that were recorded.
        sigmas: σ of all steps of the schedule, or what stands for it; ``None``: unknown.
        samples: number of pictures or videos that were drawn, doubled by guidance in one batch.
        runs: number of runs of the pipeline.
        run_ms: milliseconds of the whole run, without the cost of recording.
        recorded_ms: milliseconds of the whole run, with the cost of recording.
        results: results of the user's callable; they are not saved.
        sensitivity: for each step of the schedule, how much of an error made there remains at the end, relative to the
            other steps (:mod:`.sensitivity`); ``None``: not measured.

    Example:
        >>> import torch
        >>> class Model(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.blocks = torch.nn.ModuleList(torch.nn.Linear(4, 4) for _ in range(3))
        ...     def forward(self, x, timestep):
        ...         for block in self.blocks:
        ...             x = block(x * timestep)
        ...         return x
        >>> @torch.no_grad()
        ... def run(model):
        ...     return [model(torch.ones(1, 4), t) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]
        >>> from dithooks import record
        >>> found = record(Model(), run)
        >>> found.steps, found.traces[0].blocks
        (5, ('blocks.0', 'blocks.1', 'blocks.2'))
    """

    traces: tuple[Trace, ...]
    made: PlanTarget
    sigmas: tuple[float, ...] | None
    samples: int
    runs: int
    run_ms: float
    recorded_ms: float
    results: Any = field(default=None, repr=False)
    sensitivity: tuple[float, ...] | None = None

    @property
    def steps(self) -> int:
        """Number of steps of the schedule."""
        return self.made.steps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a file, ``.npz``, without its results."""
        head = {"schema": SCHEMA, "kind": "Recording", "made": asdict(self.made), "sigmas": self.sigmas}
        head |= {name: getattr(self, name) for name in (*_NUMBERS, "sensitivity")}
        head["traces"] = [{name: getattr(trace, name) for name in _PLAIN} for trace in self.traces]
        arrays = {f"{n}.{name}": getattr(trace, name) for n, trace in enumerate(self.traces) for name in _ARRAYS}
        arrays |= {f"{n}.inputs.{name}": a for n, trace in enumerate(self.traces) for name, a in trace.inputs.items()}
        with Path(path).open("wb") as file:  # given a name, NumPy would add an ending to it
            np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: the file is none of these, or of another version.
        """
        try:
            _see_size(path)
            with np.load(path, allow_pickle=False) as file:
                stored = {name: file[name] for name in file.files}
            head = parsed(str(stored["head"]), "Recording")
            kind, schema = head["kind"], head["schema"]
            if (kind, schema) == ("Recording", SCHEMA):
                return cls._read(head, stored)
        except _GARBLED as error:
            if isinstance(error, OSError) and not Path(path).is_file():
                raise
            why = shortened(error) if isinstance(error, (ValueError, TypeError)) else type(error).__name__
            raise InvalidSetting(
                f"{os.fspath(path)} is no file that Recording.save wrote ({why}): record the run again"
            ) from error
        found = (
            f"a {kind} of schema {schema}" if isinstance(kind, str) and isinstance(schema, int) else "something else"
        )
        raise InvalidSetting(f"{os.fspath(path)} is {found[:80]}: a Recording of {SCHEMA} is expected")

    @classmethod
    def _read(cls, head: dict[str, Any], stored: dict[str, Any]) -> Recording:
        traces = []
        for number, plain in enumerate(head["traces"]):
            arrays = {name: stored[f"{number}.{name}"] for name in _ARRAYS}
            start = f"{number}.inputs."
            inputs = {name.removeprefix(start): array for name, array in stored.items() if name.startswith(start)}
            traces.append(Trace(**{**plain, "blocks": tuple(plain["blocks"])}, **arrays, inputs=inputs))
            _check(traces[-1], f"traces[{number}]")
        made = PlanTarget(**{**head["made"], "size": tuple(head["made"]["size"])})
        sigmas = None if head["sigmas"] is None else tuple(check_number("a sigma", s, -1e30) for s in head["sigmas"])
        for name in _NUMBERS:
            (check_number if name.endswith("_ms") else check_count)(name, head[name], 0)
        left = head.get("sensitivity")  # there is none in files of earlier versions
        if left is not None:
            left = tuple(check_number("a sensitivity", value, 0, strictly=True) for value in left)
            if len(left) != made.steps:
                raise InvalidSetting(f"sensitivity has {len(left)} values for {made.steps} steps")
        numbers = {name: head[name] for name in _NUMBERS}
        return cls(tuple(traces), made, sigmas, **numbers, sensitivity=left)


def _see_size(path: str | os.PathLike[str]) -> None:
    """Refuse a small archive that unpacks to more than memory holds."""
    with zipfile.ZipFile(path) as file:
        unpacked = sum(each.file_size for each in file.infolist())
    if unpacked > max(BOMB * Path(path).stat().st_size, 2**26):
        raise InvalidSetting(f"it unpacks to {unpacked:,} bytes, more than {BOMB} times its size")


def _check(trace: Trace, where: str) -> None:
    """Check the types and shapes of a trace that was read.

    Raises:
        TypeError, ValueError: a type is wrong, or shapes do not match.
    """
    for name, text in (
        ("path", trace.path),
        ("axis", trace.axis),
        *(("a path in blocks", path) for path in trace.blocks),
    ):
        check_text(f"{where}: {name}", text, empty=name == "path")
    for name in ("second", "calls"):
        check_count(f"{where}: {name}", getattr(trace, name), 0)
    for name in ("branches", "call_ms", "share"):
        check_number(f"{where}: {name}", getattr(trace, name), 0)
    blocks, steps, ranges = len(trace.blocks), trace.steps.size, len(np.atleast_1d(trace.ranges))
    shapes = {"ranges": (ranges, 2), "grams": (ranges, steps, steps), "norms": (blocks, steps), "steps": (steps,)}
    for name, shape in (shapes | {"times": (steps,), "block_ms": (blocks,)}).items():
        array = getattr(trace, name)
        kinds = "iu" if name in ("ranges", "steps") else "iuf"
        if array.shape != shape or array.dtype.kind not in kinds:
            raise InvalidSetting(f"{where}: {name} is {array.dtype} {array.shape}, and should be numbers {shape}")
    if ranges and (trace.ranges.min() < 0 or trace.ranges.max() >= blocks):
        raise InvalidSetting(f"{where}: ranges has blocks that are none of {blocks}")


BOMB = 200  # no recording packs that well
_NUMBERS = ("samples", "runs", "run_ms", "recorded_ms")
_PLAIN = ("path", "blocks", "axis", "branches", "call_ms", "share", "second", "calls")
