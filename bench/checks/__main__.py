"""Check on an accelerator what cannot be checked without: ``python -m bench.checks --out bench/results``.

Takes the accelerator that PyTorch sees, or ``--device``; where there is none it says so and ends with exit code 0.
``--device cpu`` goes through the same checks, as far as a CPU has anything to check. The pipeline that ships is drawn
with, so nothing is downloaded; it is small, and its speed-ups on a fast device are mostly those of the host's work.

Writes ``checks_<device>.json`` and ``.md``, which name the machine. Exit codes: 0 all checks hold, or no
accelerator; 1 one does not.
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch

from dithooks.environment.machine import accelerator, machine, versions
from dithooks.storage.replacement import write_text


def main() -> int:
    """Run the checks and print, or write, what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.checks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", help="such as cuda, npu, xpu, mps; cpu to go through the motions")
    parser.add_argument("--only", action="append", metavar="CHECK", help="one of the checks; repeatable")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    args = parser.parse_args()
    device = accelerator() if args.device is None else torch.device(args.device)
    if device is None:
        print("There is no accelerator here, or PyTorch does not see it (`dithooks env` tells): nothing was checked.")
        print("`--device cpu` goes through the same checks on the CPU.")
        return 0
    found = run(device, args.only)
    text = page(found)
    print(text)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        write_text(args.out / f"checks_{device.type}.json", json.dumps(found, indent=1) + "\n")
        write_text(args.out / f"checks_{device.type}.md", text + "\n")
    return 1 if any(check["ok"] is False for check in found["checks"].values()) else 0


def run(device: torch.device, only: list[str] | None = None) -> dict[str, Any]:
    """The figures of every check; of one that fails with an error, the error."""
    from bench.checks.demo import CHECKS

    checks = {}
    for check in CHECKS:
        if only and check.__name__ not in only:
            continue
        print(f"{check.__name__} …", file=sys.stderr, flush=True)
        try:
            with torch.no_grad():
                figures = check(device)
        except Exception as error:
            traceback.print_exc()
            figures = {"ok": False, "error": f"{type(error).__name__}: {error}"}
        what = " ".join((check.__doc__ or "").split())
        checks[check.__name__] = {"what": what, "ok": figures.pop("ok"), "figures": figures}
    return {
        "machine": machine(device),
        "device": device.type,
        "versions": versions("torch_npu", "diffusers"),
        "date": datetime.date.today().isoformat(),
        "checks": checks,
    }


def page(found: dict[str, Any]) -> str:
    """The same in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"# On {found['device']}",
        "",
        f"By `python -m bench.checks --device {found['device']}`, on {found['machine']}; {packages}; {found['date']}.",
        "",
        "| check | holds | figures |",
        "|---|---|---|",
    ]
    for name, check in found["checks"].items():
        figures = "; ".join(f"{key}: {shown(value)}" for key, value in check["figures"].items())
        holds = {True: "yes", False: "**no**", None: "not tried"}[check["ok"]]
        lines.append(f"| **{name}**: {check['what']} | {holds} | {figures} |")
    return "\n".join(lines)


def shown(value: Any) -> str:
    """A figure as a table has it."""
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str({True: "yes", False: "no", None: "–"}.get(value, value))


if __name__ == "__main__":
    sys.exit(main())
