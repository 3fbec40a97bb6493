"""Do tiers draw as well as they promise? ``python -m bench.tiers --out bench/results``.

Plans for 1.5, 2 and 3 times fewer blocks are searched for from one recorded run of the calibration pictures of the
pipeline that ships, as one file of tiers. They are then measured on 144 other captions for their promise
(:func:`dithooks.promise`), and once more on 144 others again, the 64 test captions of the comparison among them, to see
whether it holds. ``tiers_captions.txt`` has those that were drawn at random from the rest of what the pipeline was
trained on. Beside that stands what the search itself promises, by the eight calibration pictures that weights were not
fitted on.

A picture's PSNR is that to its uncached twin, in floats of 0…1. The intervals are of 95 %, by bootstrap.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.compare.emoji import Emoji
from bench.compare.quality import interval, psnr
from bench.compare.subject import Case
from dithooks import PlanTiers, TargetMissed, dit_cache, promise, search
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

TARGETS = (1.5, 2.0, 3.0)
CAPTIONS, MEASURED = Path(__file__).with_name("tiers_captions.txt"), 144  # so many of them for the promise
SEED = 30_000  # of the first caption; the next has the next
ASKED = (30.0, 40.0, 50.0, 60.0, 80.0)  # dB


def drawn(subject: Emoji, cases: Sequence[Case]) -> Tensor:
    """Pictures of some cases, sixteen at a time."""
    batches = [cases[start : start + 16] for start in range(0, len(cases), 16)]
    return torch.cat([subject.pictures(subject.draw(batch)) for batch in batches])


def halves(subject: Emoji, quick: bool) -> tuple[list[Case], list[Case]]:
    """The pictures for the promise, and those that it is compared with; no caption is in both."""
    captions = CAPTIONS.read_text().splitlines()
    further = [Case(caption, SEED + n) for n, caption in enumerate(captions)]
    ours, others = further[:MEASURED], [*subject.test, *further[MEASURED:]]
    return (ours[:4], others[:4]) if quick else (ours, others)


def choices(plans: PlanTiers) -> list[dict[str, Any]]:
    """What is chosen for several levels, or what is said where nothing is good enough."""
    found = []
    for level in ASKED:
        asked = f"fastest at ≥ {level:g} dB"
        try:
            plan = plans.select(asked)
            found.append({"asked": asked, "tier": next(name for name, each in plans.plans.items() if each == plan)})
        except TargetMissed as error:
            found.append({"asked": asked, "error": str(error)})
    return found


def run(quick: bool) -> dict[str, Any]:
    """Search, promise, and compare."""
    subject = Emoji()
    calibration = subject.calibration[: 4 if quick else None]
    ours, others = halves(subject, quick)
    started = time.perf_counter()
    found = search(
        subject.pipe,
        lambda _: list(drawn(subject, calibration)),
        targets=TARGETS,
        cost="blocks",
        max_evals=1 if quick else None,
        verbose=False,
    )
    searched = time.perf_counter() - started
    plans = promise(subject.pipe, found.plans, lambda _: list(drawn(subject, ours)))
    plain = drawn(subject, others)
    tiers = []
    for name, plan in plans.plans.items():
        with dit_cache(subject.pipe, plans, tier=name):
            made = psnr(drawn(subject, others), plain)
        first = found.plans.plans[name].provenance
        tiers.append(
            {
                "tier": name,
                "fewer_blocks": plan.speedup,
                "mean_of_search": first.psnr,
                "promised_by_search": first.promised,
                "mean": plan.provenance.psnr,
                "promised": plan.provenance.promised,
                "promised_worst": plan.provenance.worst,
                "measured": interval(made),
                "measured_worst": min(made),
            }
        )
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": versions("dithooks", "torch", "diffusers"),
        "calibration": len(calibration),
        "promise": len(ours),
        "test": len(others),
        "run_equivalents": found.run_equivalents,
        "seconds": searched,
        "tiers": tiers,
        "choices": choices(plans),
    }


def page(found: dict[str, Any]) -> str:
    """The figures as tables."""
    lines = [
        "# Tiers and their promises",
        "",
        f"Written by `python -m bench.tiers` on {found['date']}, {found['machine']}. One search for "
        f"{len(found['tiers'])} targets on {found['calibration']} pictures of the pipeline that ships took "
        f"{found['run_equivalents']:.1f} uncached runs of these, the recorded one included. Promises are of "
        f"{found['promise']} other pictures (`dithooks.promise`), and are compared with what {found['test']} others "
        "come to, which nothing was made from or promised by. What is promised is a mean less its standard error; the "
        "means stand behind it. Intervals are of 95 %.",
        "",
        "| tier | fewer blocks | promised by the search | promised | measured | off by | worst: promised, measured |",
        "|---|---|---|---|---|---|---|",
    ]
    for each in found["tiers"]:
        mean, low, high = each["measured"]
        lines.append(
            f"| {each['tier']} | {each['fewer_blocks']:.2f}× | {each['promised_by_search']:.1f} dB "
            f"({each['mean_of_search']:.1f}) | {each['promised']:.1f} dB ({each['mean']:.1f}) | "
            f"{mean:.1f} dB ({low:.1f} … {high:.1f}) | {mean - each['promised']:+.2f} dB | "
            f"{each['promised_worst']:.1f}, {each['measured_worst']:.1f} dB |"
        )
    lines += ["", "| asked for | chosen |", "|---|---|"]
    for each in found["choices"]:
        lines.append(f"| `{each['asked']}` | {each.get('tier') or 'none: ' + each['error']} |")
    return "\n".join(lines) + "\n"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run, and write ``tiers.json`` and ``tiers.md``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder for the results")
    parser.add_argument("--quick", action="store_true", help="a few pictures only: does it run?")
    args = parser.parse_args(arguments)
    warnings.simplefilter("ignore", UserWarning)
    with torch.no_grad():
        found = run(args.quick)
    print(page(found))
    if args.out is not None:
        write_text(args.out / "tiers.json", json.dumps(found, indent=1) + "\n")
        write_text(args.out / "tiers.md", page(found))


if __name__ == "__main__":
    main()
