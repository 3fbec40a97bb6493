"""Everything that the documentation quotes, measured again: ``python -m bench``, from the repository's root.

Each part is a command of its own, that can be run alone, and writes into a folder; what is committed is in
``bench/results``. The longest go on from what they find there, so give an empty folder to measure everything anew. A
library that is missing is left out, which is said. On two cores all of it takes {hours}. Figures on an accelerator have
a command of their own, ``python -m bench.accelerator``.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

HOURS = "some six hours"


@dataclass(frozen=True)
class Part:
    """A command, in words, and whether it knows ``--out`` and ``--quick``; tests print what they measure."""

    name: str
    what: str
    command: tuple[str, ...]
    prints: bool = False

    def line(self, out: Path, quick: bool) -> list[str]:
        """As it is run."""
        if self.prints:
            return [sys.executable, "-m", "pytest", "-q", "-s", *self.command]
        return [sys.executable, "-m", *self.command, "--out", str(out), *(["--quick"] if quick else [])]


PARTS = (
    Part("emoji", "every method on the pipeline that ships", ("bench.compare.sweep", "emoji")),
    Part("fashion", "every method on a DiT of Fashion-MNIST", ("bench.compare.sweep", "fashion")),
    Part("video", "every method on a small Wan", ("bench.compare.sweep", "video")),
    Part("share", "what share of a run is spent in blocks", ("bench.compare.share",)),
    Part("scores", "5,000 samples of the DiT, as distributions", ("bench.fashion.scores",)),
    Part("overhead", "what an attached cache costs, by library", ("bench.overhead",)),
    Part("reused-step", "what one call executes: calls, bytecodes, files, graphs", ("bench.reused_step", "--times")),
    Part("compiled", "graphs and graph breaks, by library", ("bench.compiled",)),
    Part("memory", "what is kept, by library, at the size of large models", ("bench.memory",)),
    Part("few-steps", "a pipeline distilled to few steps, next to its teacher", ("bench.few_steps.measure",)),
    Part("few-steps-plans", "what plans give at 8, 6 and 4 steps", ("bench.few_steps.plans",)),
    Part("unet", "what the UNet draws", ("bench.unet.sheet",)),
    Part("unet-plans", "what plans give a UNet", ("bench.unet.plans",)),
    Part("modes", "what steps of half a price are worth", ("bench.modes",)),
    Part("search-28", "found plans against schedules that need no search", ("bench.search", "--steps", "28")),
    Part("search-50", "the same with 50 steps", ("bench.search", "--steps", "50")),
    Part("search-cost", "what a search costs, next to msmodelslim's", ("bench.search_cost",)),
    Part("tiers", "what tiers promise, and what they draw", ("bench.tiers",)),
    Part("search-workers", "what more workers do for a search", ("bench.search_workers",)),
    Part("profile", "how much changes from step to step", ("bench.profile_demo",)),
    Part("batch", "what a batch over many actors costs beside the drawing", ("bench.batch",)),
    Part("serving-steps", "a server that batches by step, next to others, under load", ("bench.serving_steps",)),
    Part("stats", "what a cache did", ("bench.stats_demo",)),
    Part("pictures", "the pictures of the README and the documentation", ("bench.pictures",)),
    Part("policies", "policies and predictors", ("bench.policies",)),
    Part("attached", "what an attached cache costs that never reuses", ("bench/test_overhead.py",), True),
    Part("parity", "the same pictures as cache-dit and msmodelslim", ("bench/test_parity.py",), True),
    Part("recording", "what recording and planning cost", ("bench/test_recording.py",), True),
    Part("predictors", "what a forecast costs", ("bench/test_predictors.py",), True),
    Part("report", "tables and plots of the comparison", ("bench.compare.report",)),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts one after another; 1 if one failed."""
    text = (__doc__ or "").replace("{hours}", HOURS)
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=[part.name for part in PARTS], help="repeatable")
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few cases of everything, to see that it runs")
    parser.add_argument("--list", action="store_true", help="the parts and their commands; nothing is run")
    options = parser.parse_args(arguments)
    parts = [part for part in PARTS if options.only is None or part.name in options.only]
    if options.list:
        for part in parts:
            command = " ".join(["python", *part.line(options.out, options.quick)[1:]])
            print(f"{part.name:<12} {part.what}\n{'':<12} {command}")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for part in parts:
        print(f"== {part.name}: {part.what}", flush=True)
        begun = time.perf_counter()
        code = run(part, options.out, options.quick)
        print(f"== {part.name}: {'done' if code == 0 else f'exit code {code}'}, {time.perf_counter() - begun:.0f} s")
        if code:
            failed.append(part.name)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


def run(part: Part, out: Path, quick: bool) -> int:
    """One part; what a test prints is kept, too."""
    command = part.line(out, quick)
    if not part.prints:
        return subprocess.run(command, check=False).returncode
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True)
    print(done.stdout, end="")
    if done.returncode == 0:
        (out / f"{Path(part.command[0]).stem.removeprefix('test_')}.txt").write_text(done.stdout)
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
