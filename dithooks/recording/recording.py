"""The recording of a run: inner products of every range's residuals, and the time of each block."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..config.provenance import PlanTarget
from ..config.safe_json import parsed
from ..errors import InvalidSetting, WrongType
from ..storage.archive import read_arrays
from ..storage.replacement import replacing
from ..validation import check_bool, check_choice, check_count, check_number, check_text, shown
from .solver_trace import SolverTrace

Floats = NDArray[np.float64]  # on the host: what counts are small differences of large products
SCHEMA = 1
MOST_STEPS = 10_000  # of a schedule; ten times as many as any sampler takes
HEAD_BYTES = 2**20  # of the head's text: the paths of a hundred thousand blocks
LARGEST_NUMBER = 1e30  # of recorded numbers: beyond it, squares leave the range of doubles
_ARRAYS = ("ranges", "grams", "norms", "steps", "times", "block_ms")


@dataclass(frozen=True, eq=False)
class Trace:
    """One transformer of a recorded run, with T steps, B blocks, and R ranges that can be cached.

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


@dataclass(frozen=True, eq=False, repr=False)
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
        solver: samples of what the scheduler was given and has returned at each step; :func:`search` fits weights to
            them. ``None``: there is no scheduler that can be watched, or its steps are of a kind that cannot be fitted.
        unsolved: why ``solver`` is ``None``; empty where it is not.

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
    solver: SolverTrace | None = field(default=None, repr=False)
    unsolved: str = ""

    def __repr__(self) -> str:
        made, drawn = self.made, f"{self.samples} sample{'s' * (self.samples != 1)}"
        return f"<Recording of {made.model}, {made.blocks} blocks, {made.steps} steps, {drawn}>"

    @property
    def steps(self) -> int:
        """Number of steps of the schedule."""
        return self.made.steps

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recording to a file, ``.npz``, without its results; it replaces the file once it is whole.

        Raises:
            OSError: the file cannot be written; a :class:`.FileError`.
        """
        head = {"schema": SCHEMA, "kind": "Recording", "made": asdict(self.made), "sigmas": self.sigmas}
        head |= {name: getattr(self, name) for name in (*_NUMBERS, "sensitivity")}
        head["traces"] = [{name: getattr(trace, name) for name in _PLAIN} for trace in self.traces]
        arrays = {f"{n}.{name}": getattr(trace, name) for n, trace in enumerate(self.traces) for name in _ARRAYS}
        arrays |= (
            {} if self.solver is None else {f"solver.{name}": getattr(self.solver, name) for name in SOLVER_ARRAYS}
        )
        head |= {"unsolved": self.unsolved, "is_solved": self.solver is not None}
        head |= {"latent_numbers": 0 if self.solver is None else self.solver.numbers}
        if self.solver is not None and self.solver.apart is not None:
            head |= {"conditional": self.solver.conditional, "in_batch": self.solver.in_batch}
            arrays["solver.apart"] = self.solver.apart
        arrays |= {f"{n}.inputs.{name}": a for n, trace in enumerate(self.traces) for name, a in trace.inputs.items()}
        with replacing(path) as draft, draft.open("wb") as file:  # given a name, NumPy would add an ending to it
            np.savez_compressed(file, head=np.array(json.dumps(head)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recording:
        """Read a file that :meth:`save` wrote: a regular file of at most 8 GiB, and as much unpacked.

        Raises:
            OSError: the file cannot be opened; a :class:`.FileError`.
            ValueError: the file is none of these, or of another version.
        """
        try:
            stored = read_arrays(path)
            if (text := stored.get("head")) is None or text.dtype.kind != "U" or text.nbytes > 4 * HEAD_BYTES:
                raise InvalidSetting("it has no head")
            head = parsed(str(text), "Recording")
            if not isinstance(head, dict) or (head.get("kind"), head.get("schema")) != ("Recording", SCHEMA):
                found = head if not isinstance(head, dict) else f"{head.get('kind')} {head.get('schema')}"
                raise InvalidSetting(f"it is {shown(found)}: a Recording of schema {SCHEMA} is expected")
            return cls._read(head, stored)
        except KeyError as error:
            why = f"it lacks {shown(error.args[0])}"
        except (ValueError, TypeError, AttributeError) as error:
            why = str(error)
        raise InvalidSetting(f"{os.fspath(path)} is no file that Recording.save wrote ({why}): record the run again")

    @classmethod
    def _read(cls, head: dict[str, Any], stored: dict[str, Any]) -> Recording:
        made = PlanTarget(**head["made"])
        if made.steps > MOST_STEPS:
            raise InvalidSetting(f"made.steps={made.steps}: at most {MOST_STEPS:,} are read")
        traces = []
        for number, plain in enumerate(_listed("traces", head["traces"])):
            where = f"traces[{number}]"
            arrays: dict[str, Any] = {n: _numbers(f"{where}: {n}", stored[f"{number}.{n}"]) for n in _ARRAYS}
            start = f"{number}.inputs."
            inputs = {name.removeprefix(start): array for name, array in stored.items() if name.startswith(start)}
            blocks = tuple(_listed(f"{where}: blocks", plain["blocks"]))
            traces.append(Trace(**{**plain, "blocks": blocks}, **arrays, inputs=inputs))
            _check(traces[-1], where, made.steps)
        if not traces:
            raise InvalidSetting("traces is empty")
        for name in _NUMBERS:
            (check_number if name.endswith("_ms") else check_count)(name, head[name], 0)
        series: dict[str, Any] = {
            "sigmas": _series("sigmas", head["sigmas"], made.steps, -LARGEST_NUMBER),
            "sensitivity": _series("sensitivity", head.get("sensitivity"), made.steps, 0, strictly=True),
        }  # the latter is not in files of earlier versions
        latents = check_count("latent_numbers", head.get("latent_numbers", 0), 0)  # not in files of earlier versions
        solver = _read_solver(stored, made.steps, latents) if head.get("is_solved") is True else None
        if solver is not None and "solver.apart" in stored:  # not in files of earlier versions
            solver = _with_guidance(solver, stored["solver.apart"], head)
        unsolved = check_text("unsolved", head.get("unsolved", ""), empty=True)
        numbers = {name: head[name] for name in _NUMBERS}
        return cls(tuple(traces), made, **numbers, **series, solver=solver, unsolved=unsolved)


def _listed(name: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise WrongType(f"{name} must be a list, not {shown(value)}")
    return value


def _series(name: str, values: Any, steps: int, least: float, strictly: bool = False) -> tuple[float, ...] | None:
    """The numbers of a schedule, one for each of its steps, or ``None``."""
    if values is None:
        return None
    found = enumerate(_listed(name, values))
    numbers = tuple(check_number(f"{name}[{step}]", value, least, strictly=strictly) for step, value in found)
    if len(numbers) != steps:
        raise InvalidSetting(f"{name} has {len(numbers)} values for {steps} steps")
    return numbers


def _numbers(where: str, array: NDArray[Any]) -> NDArray[Any]:
    """An array with numbers of this library's dtypes, all of them finite."""
    whole = where.endswith((": ranges", ": steps", ": places"))
    if array.dtype.kind not in ("iu" if whole else "iuf"):
        raise InvalidSetting(f"{where} is of {array.dtype}, and should be of {'whole ' * whole}numbers")
    with np.errstate(over="ignore"):
        numbers = array.astype(np.int64 if whole else np.float64)
    if not (np.abs(numbers) <= LARGEST_NUMBER).all():  # nor is NaN
        raise InvalidSetting(f"{where} has numbers that are not finite, or beyond {LARGEST_NUMBER:g}")
    return numbers


def _read_solver(stored: dict[str, Any], steps: int, numbers: int) -> SolverTrace:
    """The solver's steps; files of earlier versions have none."""
    arrays: dict[str, Any] = {name: _numbers(f"solver: {name}", stored[f"solver.{name}"]) for name in SOLVER_ARRAYS}
    outputs, places = arrays["outputs"], arrays["places"]
    if outputs.ndim != 3 or not outputs.size:
        raise InvalidSetting(f"solver: outputs is of shape {outputs.shape}, and should be (steps, pictures, numbers)")
    shapes = {"outputs": (steps, *outputs.shape[1:]), "latents": outputs.shape, "gains": (steps,)}
    for name, shape in (shapes | {"places": outputs.shape[2:]}).items():
        if arrays[name].shape != shape:
            raise InvalidSetting(f"solver: {name} is of shape {arrays[name].shape}, and should be {shape}")
    if (places < 0).any() or (np.diff(places) <= 0).any():
        raise InvalidSetting("solver: places must rise, from 0 on")
    if numbers and places[-1] >= numbers:
        raise InvalidSetting(f"solver: places reach {places[-1]}, beyond latent_numbers, {numbers}")
    for name in ("outputs", "latents"):
        arrays[name] = arrays[name].astype(np.float32)
    return SolverTrace(**arrays, numbers=numbers)


def _with_guidance(solver: SolverTrace, array: NDArray[Any], head: dict[str, Any]) -> SolverTrace:
    """The solver's steps with the direction of guidance."""
    apart = _numbers("solver: apart", array).astype(np.float32)
    if apart.shape != solver.outputs.shape:
        raise InvalidSetting(f"solver: apart is of shape {apart.shape}, and should be {solver.outputs.shape}")
    number, in_batch = check_count("conditional", head["conditional"], 0), check_bool("in_batch", head["in_batch"])
    if number > int(in_batch):
        raise InvalidSetting(f"conditional={number}: it should be the first of two calls, or a half of a batch")
    return replace(solver, apart=apart, conditional=number, in_batch=in_batch)


def _check(trace: Trace, where: str, total: int) -> None:
    """Check a trace that was read, of a schedule of so many steps.

    Raises:
        TypeError, ValueError: a type is wrong, shapes do not match, or values are none that a run has.
    """
    check_text(f"{where}: path", trace.path, empty=True)
    check_choice(f"{where}: axis", trace.axis, ("sigma", "timestep", "step"))
    for path in trace.blocks:
        check_text(f"{where}: a path in blocks", path)
    for name in ("second", "calls"):
        check_count(f"{where}: {name}", getattr(trace, name), 0)
    for name in ("branches", "call_ms", "share"):
        if check_number(f"{where}: {name}", getattr(trace, name), 0) > LARGEST_NUMBER:
            raise InvalidSetting(f"{where}: {name} is beyond {LARGEST_NUMBER:g}")
    blocks, steps, ranges = len(trace.blocks), trace.steps.size, len(np.atleast_1d(trace.ranges))
    shapes = {"ranges": (ranges, 2), "grams": (ranges, steps, steps), "norms": (blocks, steps), "steps": (steps,)}
    for name, shape in (shapes | {"times": (steps,), "block_ms": (blocks,)}).items():
        if (found := getattr(trace, name).shape) != shape:
            raise InvalidSetting(f"{where}: {name} is of shape {found}, and should be {shape}")
    if not steps or trace.steps[0] < 0 or trace.steps[-1] >= total or (np.diff(trace.steps) <= 0).any():
        raise InvalidSetting(f"{where}: steps must rise from one to the next, within the {total} of the schedule")
    first, last = trace.ranges[:, 0], trace.ranges[:, 1]
    if (first < 0).any() or (first > last).any() or (last >= blocks).any():
        raise InvalidSetting(
            f"{where}: ranges has blocks that are none of {blocks}, or a range that ends before it begins"
        )
    for name in ("norms", "block_ms"):
        array = getattr(trace, name)
        if (array < 0).any() or ((array > 0) & (array < 1 / LARGEST_NUMBER)).any():
            raise InvalidSetting(f"{where}: {name} has numbers below 0, or nearer to it than {1 / LARGEST_NUMBER:g}")
    for name, array in trace.inputs.items():
        if array.dtype.kind not in "biuf":
            raise InvalidSetting(f"{where}: inputs[{shown(name)}] is of {array.dtype}, and should be of numbers")


SOLVER_ARRAYS = ("outputs", "latents", "gains", "places")
_NUMBERS = ("samples", "runs", "run_ms", "recorded_ms")
_PLAIN = ("path", "blocks", "axis", "branches", "call_ms", "share", "second", "calls")
