"""What is left of a compiled model when a cache is attached: graphs, graph breaks, and what is compiled again later.

Run as ``python -m bench.compiled``. A FLUX transformer of 2 + 3 blocks makes two runs of ten steps, in which computed
and reused steps take turns, as every cache is told by its own means. It is compiled after the cache is attached, in
three ways: whole with ``fullgraph=True``, whole without, and block by block
(``compile_repeated_blocks(fullgraph=True)``). The backend runs graphs as they are and counts them, so nothing is
counted that the hardware would change:

- graphs: that were compiled, in both runs;
- later: those of them that were compiled in the second run, where nothing is new any more;
- breaks: places where the compiler gave up and went on in Python, as it counts them itself;
- entries: how often compiled code was entered for one step of the second run; where all of a step is compiled, and as
  one graph, it is once; where it is less, the compiler has given up on steps, which run uncompiled.

The output of the compiled run has to be that of the same cache uncompiled, to 1e-5.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.costs_peers import METHODS, Loop, Method, Missing, call, flux, quiet
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

STEPS, WITHIN = 10, 1e-5
PLAIN = Method("without a cache", "", lambda *_: None)
WAYS = {
    "whole, fullgraph": "``compile(fullgraph=True)``",
    "whole": "``compile()``",
    "blocks, fullgraph": "``compile_repeated_blocks(fullgraph=True)``",
}


class Counting:
    """A backend that runs graphs as they are, and counts."""

    def __init__(self) -> None:
        self.graphs = self.entries = 0

    def __call__(self, module: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.graphs += 1

        def entered(*args: Any) -> Any:
            self.entries += 1
            return module.forward(*args)

        return entered


def run(model: nn.Module, loop: Loop) -> Tensor:
    """The latents at the end of a run; after it, hooks are reset as diffusers' pipelines do."""
    loop.begin()
    while not loop.moved(call(model, loop.arguments())):
        pass
    model._reset_stateful_cache()
    return loop.latents


def attached(method: Method, base: nn.Module) -> tuple[nn.Module, Loop]:
    """A copy of the model with the cache on it, and the loop that it was told of."""
    model, loop = copy.deepcopy(base), Loop(STEPS)
    if method.prepare is not None:
        method.prepare(model)
    method.attach(model, "turns", loop)
    return model, loop


def compiled(model: nn.Module, way: str, backend: Counting) -> None:
    """In place."""
    if way == "blocks, fullgraph":
        model.compile_repeated_blocks(backend=backend, fullgraph=True)
    else:
        model.compile(backend=backend, fullgraph=way == "whole, fullgraph")


def measure(method: Method, way: str, base: nn.Module) -> dict[str, Any]:
    """A row: what was counted, or the first line of the error.

    Raises:
        Missing: the library is not installed.
    """
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    model, loop = attached(method, base)
    eager = [run(model, loop).clone() for _ in range(2)]
    (model, loop), backend = attached(method, base), Counting()
    found: dict[str, Any] = {"name": method.name, "library": method.library, "way": way}
    compiled(model, way, backend)
    try:
        outputs = [run(model, loop).clone()]
        before, entries = backend.graphs, backend.entries
        outputs.append(run(model, loop))
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return {**found, "error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    finally:
        breaks = dict(counters["graph_break"])
        torch._dynamo.reset()
    apart = max(float((a - b).abs().max()) for a, b in zip(eager, outputs, strict=True))
    return {
        **found,
        "graphs": backend.graphs,
        "later": backend.graphs - before,
        "breaks": sum(breaks.values()),
        "entries": (backend.entries - entries) / STEPS,
        "apart": apart,
        "reasons": sorted({" ".join(reason.partition("Explanation:")[0].split()) for reason in breaks}),
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: one table a way."""
    lines = ["# What is left of a compiled model", "", results["about"]]
    for way, how in WAYS.items():
        lines += [
            "",
            f"## {how}",
            "",
            "| | graphs | later | breaks | entries a step | as uncompiled |",
            "|---" * 6 + "|",
        ]
        for row in (each for each in results["rows"] if each["way"] == way):
            if "error" in row:
                lines.append(f"| {row['name']} | fails: {row['error'].replace('|', '/')} |||||")
                continue
            same = "yes" if row["apart"] <= WITHIN else f"no: {row['apart']:.2g} off"
            counts = (row["graphs"], row["later"], row["breaks"], f"{row['entries']:g}", same)
            lines.append(f"| {row['name']} | {' | '.join(map(str, counts))} |")
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Count graphs, graph breaks and later compilations with each cache attached; a few minutes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="the first method of each library only")
    parser.add_argument("--only", default="", help="methods whose name has this")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [each for each in METHODS if options.only in each.name]
    if options.quick:
        chosen = list({each.library: each for each in reversed(chosen)}.values())[::-1]
    with torch.no_grad(), quiet():
        measure_all(options.out, [PLAIN, *(each for each in chosen if "warm-up" not in each.name)])


def measure_all(out: Path, methods: Sequence[Method]) -> dict[str, Any]:
    """All rows, written again after each."""
    begun, base, rows = time.perf_counter(), flux(2, 3), list[dict[str, Any]]()
    known = ", ".join(f"{n} {v}" for n, v in versions("cache-dit", "diffusers", "msmodelslim").items())
    results: dict[str, Any] = {}
    for way in WAYS:
        for method in methods:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    rows.append(measure(method, way, base))
            except Missing as error:
                rows.append({"name": method.name, "library": method.library, "way": way, "error": str(error)})
            print(f"{time.perf_counter() - begun:5.0f} s  {rows[-1]}", flush=True)
            seconds = time.perf_counter() - begun
            about = f"{machine()}, {known}; FLUX of 2+3 blocks, two runs of {STEPS} steps; {seconds:.0f} s"
            results = {"about": about, "steps": STEPS, "rows": rows}
            write_text(out / "compiled.json", json.dumps(results, indent=1) + "\n")
            write_text(out / "compiled.md", table(results))
    return results


if __name__ == "__main__":
    main()
