"""Check the cache in DiffSynth-Studio's own pipelines: ``python -m bench.checks.diffsynth --out bench/results``.

Makes an environment with the real package, in ``--environment`` or a temporary folder, and runs tiny random
transformers of its classes in its pipelines, with ``diffsynth_steps`` and ``dit_cache``, on a CPU. Each is compared,
bit for bit, with a cache written by hand over the same blocks. Writes ``engines_diffsynth.json`` and ``.md``.

Exit codes: 0 all hold, or the package cannot be had, which is said; 1 one does not hold, or an import breaks.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from bench.checks.engine_report import report
from bench.checks.peer_environment import main_of

REQUIREMENTS = ["diffsynth==2.1.12", "torchvision==0.28.0", "einops==0.8.1", "ftfy==6.3.1", "wcwidth"]
PACKAGES = ("diffsynth", "torch", "torchvision", "einops", "transformers", "ftfy")
COLUMNS = {
    "pipeline": "pipeline",
    "ranges": "blocks left out",
    "calls": "calls",
    "reused": "reused",
    "by_hand": "by hand",
    "ok": "the same to the last bit, and nothing left",
}
REMARKS = (
    "Tiny random transformers of the package's own classes in its own pipelines, 10 steps, every other one reused from "
    "the second on; `with diffsynth_steps(pipe), dit_cache(pipe, config): pipe(...)`. Real are DiffSynth-Studio, "
    "torchvision and all else that is imported; stand-ins are torchvision's schemas, whose compiled code is for "
    "another PyTorch, ModelScope's hub, which nothing is loaded from, and the encoders.",
)


def check(out: Path | None) -> int:
    """Run all cases, and report them."""
    from bench.checks import diffsynth_cases

    cases: dict[str, Any] = {what: case.run for what, case in diffsynth_cases.CASES.items()}
    return report("diffsynth", "In DiffSynth-Studio", PACKAGES, COLUMNS, cases, REMARKS, out)


if __name__ == "__main__":
    sys.exit(main_of("bench.checks.diffsynth", __doc__, "DiffSynth-Studio", REQUIREMENTS, check))
