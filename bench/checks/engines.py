"""What the checks of servers share: an environment of their own, plans by hand, the same without a cache, the page.

Servers pin other versions of PyTorch and of each other than this project tests with, so each check makes an
environment: it sees the packages of the one that it is started from, and has a pair of pinned packages without their
dependencies, and the few small ones that importing takes. It is kept in ``build/`` for the next time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import site
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dithooks import CachePlan, PlanTiers, __version__
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.environment.machine import machine, versions
from dithooks.storage.replacement import write_text

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
INSIDE = "--inside"


Plan = tuple[Sequence[int], Sequence[Sequence[float] | None]]  # 1: computed, or 0; and the weights of reused steps
FAST: Plan = ((1, 1, 0, 0, 1, 0, 0, 1), (None, None, (1.0,), (1.5, -0.5), None, (0.75, 0.25), (1.25, -0.25), None))
HIGH: Plan = ((1, 1, 1, 0, 1, 1, 0, 1), (None, None, None, (1.5, -0.5), None, None, (1.0,), None))
TIERS = {"high": (1.3, HIGH), "fast": (1.8, FAST)}


def plans(
    model: str,
    blocks: int,
    paths: Sequence[str] = ("transformer",),
    tiers: Mapping[str, tuple[float, Plan]] = TIERS,
) -> PlanTiers:
    """Tiers as a search in diffusers leaves them: for its class of the model, which has another fingerprint."""
    made = PlanTarget("+".join([model] * len(paths)), "0" * 16, blocks * len(paths), "float32", STEPS, None, (4, 4))
    found = {}
    for name, (speed, (steps, weights)) in tiers.items():
        pieces = tuple(
            TransformerPlan(path, 1, blocks - 2, blocks, tuple(steps), tuple(weights), None) for path in paths
        )
        how = Provenance("2026-11-30", {"torch": torch.__version__}, "CPU", 1, speed, "by hand", speed, 0.0)
        found[name] = CachePlan(pieces, made, how)
    return PlanTiers(found)


class ByHand(nn.Module):
    """All blocks of a range in one, with a plan followed by hand: what a cache has to come out as.

    Args:
        blocks: of the range.
        plan: which steps are computed, and the weights of the residuals on all others, the newest first.
        place: returns step and branch of the call that is under way.
        streams: which of a block's arguments it returns, in the order of its outputs.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        plan: Plan,
        place: Callable[[], tuple[int, Any]],
        streams: Sequence[int | str] = (0,),
    ) -> None:
        super().__init__()
        self.blocks, self.plan, self.place, self.streams = nn.ModuleList(blocks), plan, place, streams
        self.kept: dict[Any, list[list[Tensor]]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        (step, branch), (steps, weights) = self.place(), self.plan
        before = [args[at] if isinstance(at, int) else kwargs[at] for at in self.streams]
        kept = self.kept.setdefault(branch, [])
        if steps[step]:
            after = before
            for block in self.blocks:
                given = dict(zip(self.streams, after, strict=True))
                called = [given.get(at, value) for at, value in enumerate(args)]
                out = block(*called, **{name: given.get(name, value) for name, value in kwargs.items()})
                after = [out] if isinstance(out, Tensor) else list(out)
            kept.insert(0, [b - a for a, b in zip(before, after, strict=True)])
        else:
            terms = list(zip(weights[step] or (), kept, strict=False))
            sums = (sum(weight * old[at] for weight, old in terms) for at in range(len(before)))
            after = [a + change for a, change in zip(before, sums, strict=True)]
        return after[0] if len(after) == 1 else tuple(after)


def by_hand(
    model: nn.Module, name: str, plan: Plan, place: Any, streams: Sequence[int | str] = (0,)
) -> Callable[[], None]:
    """Put a :class:`ByHand` in the place of all blocks of a list but the first and the last; return the way back."""
    blocks = getattr(model, name)
    setattr(model, name, nn.ModuleList([blocks[0], ByHand(list(blocks)[1:-1], plan, place, streams), blocks[-1]]))
    return lambda: setattr(model, name, blocks)


class Skipped(Exception):
    """The package is not to be had here."""


def environment(name: str, pinned: Sequence[str], small: Sequence[str]) -> Path:
    """Make an environment, or take the one that is there; return its interpreter.

    Raises:
        Skipped: a pinned package is not to be had.
        RuntimeError: another one is not, or cannot be installed.
    """
    folder = ROOT / "build" / "engines" / name
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([*pinned, *small])
    if done.exists() and done.read_text(encoding="utf-8") == wanted:
        return python
    venv.create(folder, clear=True, with_pip=True, system_site_packages=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
    write_text(packages / "outer.pth", "\n".join(lines) + "\n")
    install(python, pinned, Skipped)
    install(python, small, RuntimeError)
    write_text(done, wanted)
    return python


def install(python: Path, packages: Sequence[str], error: type[Exception]) -> None:
    """Install packages without their dependencies."""
    command = [str(python), "-m", "pip", "install", "-q", "--no-deps", *packages]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        lines = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")]
        raise error("; ".join(lines or ran.stderr.splitlines()[-1:]))


def declared(folder: Path) -> Path:
    """Write what an installation of this checkout tells others of it: the entry points of ``pyproject.toml``."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    about = folder / f"dithooks-{__version__}.dist-info"
    about.mkdir(parents=True, exist_ok=True)
    write_text(about / "METADATA", f"Metadata-Version: 2.1\nName: dithooks\nVersion: {__version__}\n")
    groups = {"console_scripts": project["scripts"], **project["entry-points"]}
    points = {group: "".join(f"{name} = {to}\n" for name, to in each.items()) for group, each in groups.items()}
    write_text(about / "entry_points.txt", "".join(f"[{group}]\n{text}" for group, text in points.items()))
    return folder


def main(
    name: str, about: str, pinned: Sequence[str], small: Sequence[str], check: Callable[[], list[dict[str, Any]]]
) -> int:
    """Run a check in an environment of its own; print, and write what came out.

    Args:
        name: of the server.
        about: a sentence for the page.
        pinned: its packages, with their versions.
        small: what importing it takes beside.
        check: returns the rows of the table: what, how, and whether it holds.
    """
    command = f"python -m bench.checks.{name}"
    parser = argparse.ArgumentParser(prog=command, description=about)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    parser.add_argument(INSIDE, type=Path, metavar="FILE", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside is not None:
        write_text(args.inside, json.dumps({"rows": check(), "versions": installed(pinned)}) + "\n")
        return 0
    try:
        python = environment(name, pinned, small)
    except Skipped as reason:
        print(f"skipped: {', '.join(pinned)} cannot be installed here ({reason})")
        return 0
    rows_file = python.parent.parent / "rows.json"
    rows_file.unlink(missing_ok=True)
    places = os.pathsep.join([str(ROOT), str(declared(python.parent.parent / "declared"))])
    ran = subprocess.run(
        [str(python), "-m", f"bench.checks.{name}", INSIDE, str(rows_file)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": places},
        check=False,
    )
    if ran.returncode or not rows_file.exists():
        print(f"{name}: ended with exit code {ran.returncode}", file=sys.stderr)
        return 1
    told = json.loads(rows_file.read_text(encoding="utf-8"))
    result = {
        "command": command,
        "machine": machine(),
        "versions": {**versions(), **told["versions"]},
        "date": datetime.date.today().isoformat(),
        "about": about,
        "rows": told["rows"],
    }
    text = page(name, result)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / f"engines_{name}.json", json.dumps(result, indent=1) + "\n")
        write_text(args.out / f"engines_{name}.md", text + "\n")
    return 1 if any(row["holds"] is False for row in result["rows"]) else 0


def installed(pinned: Sequence[str]) -> dict[str, str]:
    """The versions of packages, as installed."""
    names = [re.split(r"[=<>]", each)[0] for each in pinned]
    return {name: version(name) for name in names}


def page(name: str, result: dict[str, Any]) -> str:
    """The result in Markdown."""
    packages = ", ".join(f"{package} {number}" for package, number in result["versions"].items())
    lines = [
        f"# {TITLES[name]}",
        "",
        f"By `{result['command']}`, on {result['machine']}; {packages}; {result['date']}.",
        "",
        result["about"],
        "",
        "| what of it was run | what came out | holds |",
        "|---|---|---|",
    ]
    for row in result["rows"]:
        holds = {True: "yes", False: "**no**", None: ""}[row["holds"]]
        lines.append(f"| {row['what']} | {row['figure']} | {holds} |")
    wrong = sum(row["holds"] is False for row in result["rows"])
    return "\n".join([*lines, "", f"Result: {len(result['rows'])} rows, {wrong} do not hold."])


TITLES = {"sglang": "SGLang diffusion", "vllm_omni": "vLLM-Omni"}


def row(what: str, figure: object, holds: bool | None = None) -> dict[str, Any]:
    """A row of the table."""
    return {"what": what, "figure": str(figure), "holds": None if holds is None else bool(holds)}
