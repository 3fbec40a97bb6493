"""Do steps of half a price pay? Modes of a step beside "computed" and "reused": ``python -m bench.modes``.

At a step of a run with guidance by two calls, a cache may compute both calls, or neither. In between lie:

- *conditional only*: the call with the prompt is computed, and the one without is taken to be as far from it as it was
  at the last step with both (δ = v_c − v_u is held): half a step's price;
- *tail*: the residual of the first blocks is forecast, and the last third, or sixth, of the blocks computed.

Each is tried at equal numbers of block executions. Computed steps of the plan make room for as many steps of the mode
as they cost. Either all steps that are not left out are chosen together, as if each were computed, and those become
steps of the mode where that costs least (*chosen among the computed*); then later sums may use what they gave. Or the
computed ones are chosen, and steps of the mode put into the middle of the longest stretches between them, and are used
by no sum but their own (*put between*).

All is fitted in closed loop on calibration pictures, as :func:`dithooks.search` does: sums of three outputs where
nothing is computed, corrections after each stretch and at every step of a mode. *Weights of their own* gives both calls
weights of their own: δ of the last two steps with both joins the sums. What is measured is the PSNR of test pictures to
those drawn with everything computed, and the difference to the plan without modes by picture, with a 95 % interval.
Writes ``modes.json`` and ``modes.md``.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from bench.compare.quality import interval, psnr
from bench.compare.subject import Case, Subject, lists
from bench.compare.sweep import subject_named
from dithooks import DitCacheConfig, Linear, Mask, dit_cache, timestep_scope
from dithooks.environment.machine import machine
from dithooks.planning.schedule_solver import Schedules
from dithooks.storage.replacement import write_text

LATE = {"emoji": 0.5, "video": 5.0}  # the late error weights that searches choose on these
FEWER = (2.0, 3.0)
ANCHORS, RIDGE_FORECAST, RIDGE_CORRECTION, EMPHASIS = 3, 3e-4, 1e-2, 0.25
GROUP = 8  # test pictures in a batch
FULL, NONE, COND, TAIL = "F", "N", "C", "T"
Floats = NDArray[np.float64]


class InFront(nn.Module):
    """Stands for the transformer, and computes of each step what its mode says; both calls' outputs are kept.

    Args:
        inner: the transformer; the call with the prompt comes first.
        modes: of each step.
    """

    def __init__(self, inner: nn.Module, modes: str) -> None:
        super().__init__()
        self.inner, self.modes, self.calls = inner, modes, 0
        self.conditional = self.apart = torch.zeros(0)
        self.differences: list[Tensor] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def forward(self, *args: Any, **given: Any) -> tuple[Tensor]:
        step, is_second = divmod(self.calls, 2)
        self.calls += 1
        mode, count = self.modes[step], len(self.modes)
        if mode == NONE and TAIL not in self.modes:
            return (self.conditional,)  # of the right form; the solver is given another
        if mode == COND and is_second:
            return (self.conditional - self.apart,)
        # With tails, steps at which nothing is computed are run as well, so that the cache can follow; for nothing.
        with (
            timestep_scope(step, branch=is_second, sigma=1 - step / count, steps=count)
            if TAIL in self.modes
            else nullcontext()
        ):
            output: Tensor = self.inner(*args, **given)[0]
        if not is_second:
            self.conditional = output
        elif mode == FULL:
            self.apart = self.conditional - output
            self.differences.append(self.apart)
        return (output,)


class Following:
    """Stands for the scheduler, and is asked for what the steps are given."""

    def __init__(self, inner: Any, at_step: Callable[[Any, Tensor, Any, Tensor], Tensor]) -> None:
        self.inner, self.at_step = inner, at_step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def step(self, output: Tensor, timestep: Any, sample: Tensor, **given: Any) -> Any:
        return self.inner.step(self.at_step(self.inner, output, timestep, sample), timestep, sample, **given)


@contextmanager
def in_place(pipe: Any, transformer: nn.Module, scheduler: Any) -> Iterator[None]:
    """Have a pipeline use others."""
    kept = pipe.transformer, pipe.scheduler
    pipe.register_modules(transformer=transformer)
    pipe.scheduler = scheduler
    try:
        yield
    finally:
        pipe.register_modules(transformer=kept[0])
        pipe.scheduler = kept[1]


def dry(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
    """The latents that would follow."""
    made: Tensor = copy.deepcopy(scheduler).step(output, timestep, sample, return_dict=False)[0]
    return made


def response(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> tuple[Tensor, float]:
    """A and B of the step: the latents that follow are A + B·output."""
    still = dry(scheduler, torch.zeros_like(output), timestep, sample)
    moved = dry(scheduler, output, timestep, sample) - still
    return still, float((moved * output).sum() / (output * output).sum())


@dataclass
class Reference:
    """A run with everything computed: guided outputs, δ, latents after each step, B of each, and what was drawn."""

    outputs: list[Tensor] = field(default_factory=list)
    apart: list[Tensor] = field(default_factory=list)
    gains: list[float] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, subject: Subject, cases: Sequence[Case]) -> Reference:
        """Draw the cases in one batch."""
        made = cls()

        def note(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
            still, gain = response(scheduler, output, timestep, sample)
            made.outputs.append(output.clone())
            made.gains.append(gain)
            made.latents.append(still + gain * output)
            return output

        front = InFront(subject.pipe.transformer, FULL * subject.steps)
        with in_place(subject.pipe, front, Following(subject.pipe.scheduler, note)):
            subject.draw(cases)
        made.apart = front.differences
        return made


@dataclass(frozen=True)
class Trial:
    """One plan: how it is shown, the mode of each step, and what its sums may be made of.

    Args:
        label: in the table.
        modes: of each step.
        keeps: whether later sums may use what a step of a mode gave.
        own: whether both calls have weights of their own.
        tail: blocks that are computed at steps of the mode "tail".
    """

    label: str
    modes: str
    keeps: bool = True
    own: bool = False
    tail: int = 0

    def cost(self, blocks: int) -> float:
        """In computed steps."""
        shares = {FULL: 1.0, NONE: 0.0, COND: 0.5, TAIL: self.tail / blocks}
        return sum(shares[mode] for mode in self.modes)


Weights = dict[int, Floats]


def run(
    subject: Subject, cases: Sequence[Case], trial: Trial, times: Floats, fitted: Weights, reference: Reference | None
) -> Tensor:
    """Draw with a plan; with a reference of the same cases, find its weights, and put them into ``fitted``."""
    modes, step = trial.modes, -1
    kept: list[tuple[int, Tensor]] = []  # guided outputs, the newest first
    apart: list[Tensor] = []  # δ of steps with both calls
    front = InFront(subject.pipe.transformer, modes)

    def combined(scheduler: Any, output: Tensor, timestep: Any, sample: Tensor) -> Tensor:
        nonlocal step
        step += 1
        mode, parts, start, ridge = modes[step], list[Tensor](), np.zeros(0), RIDGE_CORRECTION
        if mode == NONE:
            parts, ridge = [each for _, each in kept[:ANCHORS]], RIDGE_FORECAST
            start = line(times, step, [at for at, _ in kept[:ANCHORS]])
        elif step and (mode != FULL or modes[step - 1] != FULL):
            parts = [output, *(each for _, each in kept[: ANCHORS - 1])]
            start = np.eye(len(parts))[0]
        if parts and trial.own:
            parts += [front.apart] * (mode == FULL) + apart[:2]
            start = np.pad(start, (0, len(parts) - len(start)))
        if mode == FULL or (mode != NONE and trial.keeps):
            kept.insert(0, (step, output.clone()))
        if mode == FULL:
            apart.insert(0, front.apart)
        if not parts:
            return output
        if reference is not None:
            still, gain = response(scheduler, parts[0], timestep, sample)
            fitted[step] = solved(parts, (reference.latents[step] - still) / gain, start, ridge)
        total = sum(float(weight) * part for weight, part in zip(fitted[step], parts, strict=True))
        assert isinstance(total, Tensor)
        return total

    blocks = sum(map(len, lists(subject.pipe.transformer)))
    policy = Mask(tuple(int(mode == FULL) for mode in modes))
    config = DitCacheConfig(
        cache_block_start=0, cache_num_blocks=blocks - trial.tail, policy=policy, predictor=Linear()
    )
    with (
        dit_cache(subject.pipe, config) if trial.tail else nullcontext(),
        in_place(subject.pipe, front, Following(subject.pipe.scheduler, combined)),
    ):
        return subject.draw(cases)


def line(times: Floats, step: int, known: Sequence[int]) -> Floats:
    """The weights of the line through the last two outputs."""
    weights = np.zeros(len(known))
    weights[0] = 1.0
    if len(known) > 1:
        ratio = (times[step] - times[known[0]]) / (times[known[0]] - times[known[1]])
        weights[:2] = 1 + ratio, -ratio
    return weights


def solved(parts: Sequence[Tensor], aim: Tensor, start: Floats, ridge: float) -> Floats:
    """The weights whose sum is nearest to the aim; pictures count by a power of their error."""
    known = torch.stack([part.reshape(len(part), -1).double() for part in parts]).numpy()
    wanted = aim.reshape(len(aim), -1).double().numpy()
    errors = np.square(np.tensordot(start, known, 1) - wanted).mean(1)
    counts = np.clip(errors / errors.mean(), 1e-3, 1e3) ** EMPHASIS
    matrix = np.einsum("jsd,ksd,s->jk", known, known, counts, optimize=True)
    pull = ridge * np.trace(matrix) / len(start)
    right = np.einsum("ksd,sd,s->k", known, wanted, counts, optimize=True) + pull * start
    return np.asarray(np.linalg.solve(matrix + pull * np.eye(len(start)), right))


def trials(
    reference: Reference, times: Floats, late: float, guidance: float, computed: int, blocks: int
) -> list[Trial]:
    """The plan without modes, and those with some, all of as many block executions."""
    moved = np.abs(reference.gains) * late ** (1 - times / times[0])
    outputs, apart = gram(reference.outputs), gram(reference.apart)
    schedules = Schedules(outputs[None], times, moved[None], ANCHORS)
    plain = spelled(schedules.best(computed), {}, NONE)
    found = [Trial("no modes", plain), Trial("no modes, weights of their own", plain, own=True)]
    for count in (2, 4):
        together = schedules.best(computed + count // 2)
        held = cheapest(together, apart, moved * (guidance - 1), count)
        for own in (False, True):
            label = f"{count} conditional only, chosen among the computed" + ", weights of their own" * own
            found.append(Trial(label, spelled(together, held, COND), own=own))
        fewer = schedules.best(computed - count // 2)
        label = f"{count} conditional only, put between"
        found.append(Trial(label, spelled(fewer, between(fewer, count), COND), keeps=False))
    for part, less in ((3, 1), (3, 2), (6, 1)):
        tail, count = blocks // part, less * part
        together = schedules.best(computed - less + count)
        label = f"{count} with a tail of {tail} of {blocks} blocks"
        chosen = spelled(together, spared(schedules, together, count), TAIL)
        found.append(Trial(f"{label}, chosen among the computed", chosen, tail=tail))
        fewer = schedules.best(computed - less)
        put = spelled(fewer, between(fewer, count), TAIL)
        found.append(Trial(f"{label}, put between", put, keeps=False, tail=tail))
    return found


def spelled(computed: Sequence[int], some: dict[int, None], mode: str) -> str:
    """The mode of each step: ``mode`` at some."""
    return "".join(mode if step in some else (NONE, FULL)[bit] for step, bit in enumerate(computed))


def gram(tensors: Sequence[Tensor]) -> Floats:
    flat = torch.stack([each.flatten() for each in tensors]).double()
    return np.asarray((flat @ flat.T).numpy())


def cheapest(computed: Sequence[int], apart: Floats, moved: Floats, count: int) -> dict[int, None]:
    """So many of the computed steps, for which holding the last δ costs least in all; exact."""
    steps = [step for step, bit in enumerate(computed) if bit]
    ways: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {(steps[0], 0): (0.0, ())}  # last with both, taken
    for step in steps[1:]:
        onward: dict[tuple[int, int], tuple[float, tuple[int, ...]]] = {}
        for (last, taken), (cost, chosen) in ways.items():
            error = moved[step] ** 2 * (apart[step, step] - 2 * apart[step, last] + apart[last, last])
            for key, way in (
                ((step, taken), (cost, chosen)),
                ((last, taken + 1), (cost + float(error), (*chosen, step))),
            ):
                if key[1] <= count:
                    onward[key] = min(onward.get(key, way), way)
        ways = onward
    return dict.fromkeys(min(way for (_, taken), way in ways.items() if taken == count)[1])


def spared(schedules: Schedules, computed: Sequence[int], count: int) -> dict[int, None]:
    """So many of the computed steps, taken one after another, that the schedule misses least."""
    chosen: dict[int, None] = {}
    left = list(computed)
    for _ in range(count):
        without = {
            step: float(schedules.cost([*left[:step], 0, *left[step + 1 :]])[0])
            for step, bit in enumerate(left)
            if bit and step > 1
        }
        step = min(without, key=lambda each: without[each])
        left[step] = 0
        chosen[step] = None
    return chosen


def between(computed: Sequence[int], count: int) -> dict[int, None]:
    """The middles of the longest stretches of reused steps, one after another."""
    ends = [step for step, bit in enumerate(computed) if bit] + [len(computed)]
    for _ in range(count):
        first, last = max(pairwise(ends), key=lambda pair: pair[1] - pair[0])
        ends = sorted([*ends, (first + last) // 2])
    return {step: None for step in ends[:-1] if not computed[step]}


def measure(name: str, calibration: int, test: int) -> list[dict[str, Any]]:
    """A row for each trial on a model."""
    subject: Any = subject_named(name)
    cases, tested = subject.calibration[:calibration], subject.test[:test]
    groups = [tested[first : first + GROUP] for first in range(0, len(tested), GROUP)]
    wanted = subject.pictures(torch.cat([subject.draw(group) for group in groups]))
    reference = Reference.of(subject, cases)
    times = np.asarray(subject.pipe.scheduler.sigmas[: subject.steps], dtype=np.float64)
    blocks = sum(map(len, lists(subject.pipe.transformer)))
    rows: list[dict[str, Any]] = []
    for fewer in FEWER:
        base: Floats | None = None
        for trial in trials(reference, times, LATE[name], subject.guidance, round(subject.steps / fewer), blocks):
            weights: Weights = {}
            run(subject, cases, trial, times, weights, reference)
            made = torch.cat([run(subject, group, trial, times, weights, None) for group in groups])
            values = np.asarray(psnr(subject.pictures(made), wanted))
            base = values if base is None else base
            rows.append(
                {
                    "model": name,
                    "fewer": subject.steps / trial.cost(blocks),
                    "plan": trial.label,
                    "modes": trial.modes,
                    "psnr": [round(float(each), 3) for each in values],
                    "difference": list(interval(values - base)),
                }
            )
            print(name, f"{rows[-1]['fewer']:.2f}x", trial.label, trial.modes, f"{values.mean():.2f} dB", flush=True)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| model | fewer blocks | plan | PSNR, mean | worst | to no modes |",
        "|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        mean, low, high = row["difference"]
        change = f"{mean:+.1f} ({low:+.1f} … {high:+.1f})" if any(row["difference"]) else "–"
        lines.append(
            f"| {row['model']} | {row['fewer']:.2f}× | {row['plan']} | {np.mean(row['psnr']):.1f} | "
            f"{min(row['psnr']):.1f} | {change} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(LATE), help="default: all")
    parser.add_argument("--calibration", type=int, default=16, help="pictures (default: %(default)s)")
    parser.add_argument("--test", type=int, default=24, help="pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="two pictures each")
    options = parser.parse_args(arguments)
    if options.quick:
        options.calibration = options.test = 2
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for name in options.models:
        rows += measure(name, options.calibration, options.test)
        write(rows, options)


def write(rows: Sequence[dict[str, Any]], options: argparse.Namespace) -> None:
    """Write the rows so far."""
    about = {"machine": machine(), "calibration": options.calibration, "test": options.test}
    options.out.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "rows": rows}).replace('{"model"', '\n{"model"')
    write_text(options.out / "modes.json", text + "\n")
    intro = (
        f"# Modes of a step\n\nPSNR in dB to the run with everything computed, of {options.test} test pictures; plans "
        f"are fitted on {options.calibration} others. Differences by picture, with a 95 % interval. On {machine()}.\n\n"
    )
    write_text(options.out / "modes.md", intro + table(rows) + "\n")


if __name__ == "__main__":
    main()
