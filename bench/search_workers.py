"""What more workers do for a search: ``python -m bench.search_workers``.

A search for a plan of the pipeline that ships, in block executions, from one recording. First what the driver asks for
at once of so many workers, and how much of that no decision was made on: counted, with every plan run once, here. Then
the time, with actors of Ray next to a search here, by turns.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import ray
import torch
from torch import nn

from bench.batch import table
from dithooks import CachePlan, record, search
from dithooks.demo import CALIBRATION, load_pipeline
from dithooks.environment.machine import machine
from dithooks.storage.replacement import write_text
from dithooks.tuning.evaluation import Evaluation, Evaluator
from dithooks.tuning.executors.executor import plan_key
from dithooks.tuning.executors.ray_actors import Actors

STEPS, SEED, TARGET = 28, 1000, 2.0
KINDS = {"four plans": {"max_evals": 4}, "and 16 local moves": {"max_evals": 4, "local_moves": 16}}


def draw(pipe: Any) -> Any:
    """The calibration captions, each with a seed of its own."""
    made = [torch.Generator().manual_seed(SEED + number) for number in range(len(CALIBRATION))]
    return pipe(CALIBRATION, num_inference_steps=STEPS, generator=made, output_type="pt").images


@dataclass
class Counted:
    """Workers that are all here, and count what they are asked for."""

    size: int
    known: dict[str, Evaluation]
    seconds: float | None = None
    run_equivalents: float = 0.0
    rounds: list[int] = field(default_factory=list)

    def check(self, models: Sequence[nn.Module]) -> None:
        """Whatever they are."""

    def start(self, evaluator: Evaluator, results: Any, most: int) -> Counted:
        """Ready."""
        self.evaluator = evaluator
        return self

    def run(self, plans: Sequence[CachePlan]) -> dict[str, Any]:
        """Each once, in all searches."""
        self.rounds.append(len(plans))
        for plan in plans:
            if plan_key(plan) not in self.known:
                self.known[plan_key(plan)] = self.evaluator(plan)
        return {plan_key(plan): self.known[plan_key(plan)] for plan in plans}

    def close(self) -> None:
        """Nothing to let go."""


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write ``search_workers.md`` and ``.json``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one and two workers, once")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    pipe, known, rows, cores = load_pipeline(), dict[str, Evaluation](), [], os.cpu_count() or 1
    pipe.set_progress_bar_config(disable=True)
    recording = record(pipe, draw, probe=True)
    asked: dict[str, Any] = {"recording": recording, "cost": "blocks", "max_runs": None, "verbose": False}
    plans: dict[str, set[str]] = {}
    for kind, given in KINDS.items():
        for size in (1, 2) if options.quick else (1, 2, 4, 8):
            crew = Counted(size, known)
            found = search(pipe, draw, TARGET, executor=crew, **given, **asked)
            plans.setdefault(kind, set()).add(found.plan.to_json())
            run = sum(crew.rounds)
            rows.append([kind, size, len(found.evaluations), len(crew.rounds), run - len(found.evaluations)])
    ray.init(address="local", num_cpus=cores, include_dashboard=False, log_to_driver=False)
    spent: dict[str, list[float]] = {"here": [], f"{cores} actors": []}
    try:
        for number in range(1 if options.quick else 3):
            names = list(spent) if number % 2 == 0 else list(spent)[::-1]
            for name in names:
                executor = None if name == "here" else Actors(workers=cores)
                begin = time.perf_counter()
                found = search(pipe, draw, TARGET, executor=executor, **KINDS["and 16 local moves"], **asked)
                spent[name].append(time.perf_counter() - begin)
                plans["and 16 local moves"].add(found.plan.to_json())
    finally:
        ray.shutdown()
    assert all(len(each) == 1 for each in plans.values()), "the plans differ"
    seconds = {name: median(each) for name, each in spent.items()}
    cells = [[kind, str(size), str(n), str(rounds), str(vain)] for kind, size, n, rounds, vain in rows]
    text = f"""# What more workers do for a search

{machine()}, {cores} cores, ray {ray.__version__}. `python -m bench.search_workers`

For {TARGET:g}× on the pipeline that ships, in block executions, from one recording. The plan found is the same in each
row of a kind, bit by bit.

{table(["search", "workers", "plans decided on", "one after another", "run in vain"], cells)}

With 16 local moves, from the recording on, median of {len(spent["here"])} by turns: {seconds["here"]:.1f} s here,
{seconds[f"{cores} actors"]:.1f} s with {cores} actors on as many cores, their start and the pipeline's way to them
in it.
"""
    options.out.mkdir(parents=True, exist_ok=True)
    told = {"machine": machine(), "rows": rows, "seconds": spent}
    write_text(options.out / "search_workers.json", json.dumps(told, indent=2) + "\n")
    write_text(options.out / "search_workers.md", text)
    print(text)


if __name__ == "__main__":
    main()
