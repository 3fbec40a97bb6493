"""Do steps pay that compute a part? Plans with and without them, at equal block executions: ``python -m bench.modes``.

Of each kind of plan one is made for each late error weight, from the same recording, and its weights are fitted in
closed loop on the calibration pictures. The best of them there draws the test pictures. The kinds are

- *residual* and *output*: a step computes everything, or nothing, and the one or the other is forecast;
- *tail*: all blocks are in two ranges with a schedule each, so that the last blocks may run alone;
- *conditional*: outputs are forecast, and at some steps the branch of guidance with the prompt is computed alone, and
  the other taken to be as far from it as it was at the last step with both. *Priced alone*: the error of what is held
  counts at its step, and not in the forecasts that are made of it.

What is measured is the PSNR of the test pictures to those drawn with everything computed, and the difference by picture
to the better of the first two kinds, with a 95 % interval. Writes ``modes.json`` and ``modes.md``; rows that are there
stay, unless they are measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.compare.quality import interval, psnr
from bench.compare.subject import Case
from bench.compare.sweep import subject_named
from dithooks import CachePlan, dit_cache, record
from dithooks.environment.machine import machine
from dithooks.planning.candidate import Variant
from dithooks.planning.plan import build_plan, make_planner
from dithooks.recording.image_metrics import samples_of
from dithooks.storage.replacement import write_text
from dithooks.tuning.evaluation import Evaluation, Evaluator, Fit
from dithooks.tuning.timed_run import TimedRun

MODELS = ("emoji", "fashion", "video")
TARGETS = (2.0, 2.5, 3.0)
LATE = (0.2, 0.5, 1.5, 5.0)
CONDITIONAL = Variant(3, payload="output", space="output", mode="conditional")
KINDS = {
    "residual": Variant(3),
    "output": Variant(3, payload="output"),
    "tail": Variant(3, mode="tail"),
    "conditional": CONDITIONAL,
    "conditional, priced alone": CONDITIONAL._replace(carries=False),
}
GROUP = 8  # test pictures in a batch


class Trials:
    """A model that was recorded, and the pictures that it is tested on.

    Args:
        name: of the model.
        calibration: pictures that weights are fitted on.
        test: others.
    """

    def __init__(self, name: str, calibration: int, test: int) -> None:
        self.subject: Any = subject_named(name)
        cases, tested = self.subject.calibration[:calibration], self.subject.test[:test]
        self.groups = [tested[first : first + GROUP] for first in range(0, len(tested), GROUP)]
        self.wanted = self._drawn()

        def run(pipe: object) -> list[Any]:
            return list(self.subject.pictures(self.subject.draw(cases)).numpy())

        self.recording = record(self.subject.pipe, run)
        trace = self.recording.traces[0]
        timed = TimedRun(run, None, trace.path, trace.inputs, trace.second, trace.calls)
        reference, executions = samples_of(self.recording.results), float(len(trace.blocks) * trace.calls)
        solver = self.recording.solver
        self._evaluator = Evaluator(self.subject.pipe, timed, reference, None, executions, solver=solver, fit=Fit.ALL)

    def best(self, kind: str, target: float) -> Evaluation | None:
        """Return the best plan of a kind on the calibration pictures, its weights fitted; ``None``: there is none."""
        tried, planner = [], make_planner(self.recording, "blocks", None)
        for late in LATE:
            candidate = planner.candidate(target, KINDS[kind]._replace(late_error_weight=late))
            if candidate.choices and candidate.reaches:
                tried.append(self._evaluator(build_plan(planner, candidate, target, "by bench.modes")))
        scored = [(each.score.soft, number) for number, each in enumerate(tried) if each.score is not None]
        return tried[max(scored)[1]] if scored else None

    def psnr(self, found: CachePlan) -> list[float]:
        """Return the PSNR of each test picture."""
        with dit_cache(self.subject.pipe, found):
            return [float(each) for each in psnr(self._drawn(), self.wanted)]

    def _drawn(self) -> torch.Tensor:
        groups: Sequence[Sequence[Case]] = self.groups
        drawn: torch.Tensor = self.subject.pictures(torch.cat([self.subject.draw(group) for group in groups]))
        return drawn


def measure(trials: Trials, name: str, kind: str, target: float) -> dict[str, Any]:
    """Return the row of a kind of plan on a model."""
    row: dict[str, Any] = {"model": name, "target": target, "kind": kind}
    found = trials.best(kind, target)
    if found is None:
        return row
    piece = found.plan.pieces[0]
    blocks = [[each.first, each.first + each.blocks - 1] for each in piece.ranges]
    values = [round(each, 3) for each in trials.psnr(found.plan)]
    return row | {"fewer": found.plan.speedup, "steps": piece.picture, "blocks": blocks, "psnr": values}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows in Markdown, each compared with the better kind that computes everything or nothing."""
    lines = [
        "| model | fewer blocks | plan | steps | PSNR, mean | worst | to the better of the first two |",
        "|---|---:|---|---|---:|---:|---|",
    ]
    for row in rows:
        group = [each for each in rows if (each["model"], each["target"]) == (row["model"], row["target"])]
        whole = [each for each in group if each["kind"] in ("residual", "output") and "psnr" in each]
        if "psnr" not in row or not whole:
            lines.append(f"| {row['model']} | {row['target']:g}× | {row['kind']} | there is none | | | |")
            continue
        base = max(whole, key=lambda each: float(np.mean(each["psnr"])))
        mean, low, high = interval(np.subtract(row["psnr"], base["psnr"]))
        change = "–" if row in whole else f"{mean:+.1f} ({low:+.1f} … {high:+.1f})"
        lines.append(
            f"| {row['model']} | {row['fewer']:.2f}× | {_shown(row)} | {row['steps']} | {np.mean(row['psnr']):.1f} | "
            f"{min(row['psnr']):.1f} | {change} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=list(MODELS), help="default: all")
    parser.add_argument("--kind", action="append", choices=list(KINDS), help="repeatable (default: all)")
    parser.add_argument("--target", action="append", type=float, help="repeatable (default: 2, 2.5 and 3)")
    parser.add_argument("--calibration", type=int, default=16, help="pictures (default: %(default)s)")
    parser.add_argument("--test", type=int, default=24, help="pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    about = {"machine": machine(), "calibration": options.calibration, "test": options.test}
    file = options.out / "modes.json"
    rows = json.loads(file.read_text())["rows"] if file.exists() else []
    for name in options.models:
        trials = Trials(name, options.calibration, options.test)
        for target in options.target or TARGETS:
            for kind in options.kind or KINDS:
                row = measure(trials, name, kind, target)
                rows = [each for each in rows if _key(each) != _key(row)] + [row]
                rows.sort(key=_key)
                write(rows, about, options.out)
                print(name, f"{target:g}x", kind, row.get("steps"), np.mean(row.get("psnr", np.nan)), flush=True)


def write(rows: Sequence[dict[str, Any]], about: dict[str, Any], folder: Path) -> None:
    """Write the rows so far."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "rows": rows}, ensure_ascii=False).replace('{"model"', '\n{"model"')
    write_text(folder / "modes.json", text + "\n")
    intro = (
        f"# Steps that compute a part\n\nPSNR in dB to the run with everything computed, of {about['test']} test "
        f"pictures; plans are fitted on {about['calibration']} others, and the best of {len(LATE)} late error weights "
        "there is tested. ● is computed, ○ reused; ◑ computes the last blocks alone, ◒ the first, ◐ one branch of "
        "guidance alone; where the best plan of a price has no such step, it is of whole steps, priced in the solver's "
        "space. Differences by picture, with a 95 % interval. `python -m bench.modes`, on "
        f"{about['machine']}.\n\n"
    )
    write_text(folder / "modes.md", intro + table(rows) + "\n")


def _shown(row: dict[str, Any]) -> str:
    """Return the kind of a plan; one of conditional steps may have none, and is priced in the solver's space then."""
    has_none = row["kind"].startswith("conditional") and "◐" not in row["steps"]
    return f"{row['kind']}: no such step" if has_none else str(row["kind"])


def _key(row: dict[str, Any]) -> tuple[int, float, int]:
    return MODELS.index(row["model"]), row["target"], list(KINDS).index(row["kind"])


if __name__ == "__main__":
    main()
