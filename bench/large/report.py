"""The figures as they come in: one file of JSON, written again after every row, and one page of Markdown."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

import torch

from dithooks.environment.machine import device_name, machine, versions
from dithooks.storage.replacement import write_text

SCHEMA = 1
PACKAGES = ("torch", "triton", "diffusers", "cache-dit", "transformers", "numpy", "dithooks")
NOT_REACHED, MEASURED, FAILED = "not reached", "measured", "failed"
COLUMNS = {
    "seconds": "seconds",
    "speedup": "speed-up",
    "limit": "limit: blocks",
    "ratio_to_limit": "of it",
    "limit_by_time": "limit: blocks by their time",
    "ratio_to_limit_by_time": "of it",
    "limit_with_rest": "limit: with the rest",
    "ratio_to_limit_with_rest": "of it",
    "host_reads": "host reads",
    "host_waits": "waits reported",
    "peak_above_plain_bytes": "memory above plain, MB",
    "compile_seconds": "compiling, s",
    "graphs": "graphs",
    "breaks": "breaks",
    "relative_error": "off plain, relative",
    "runs": "runs",
}
NOTES = """`limit: blocks` is all block executions over those that were counted, every one for the same; `by their
time` weighs each block by its time in an uncached run without compiling; `with the rest` also counts what is done
outside of the blocks at every step (Amdahl). `host reads`: what the host read from the device in a run, as PyTorch's
dispatch sees it; `waits reported`: what the device's own module warned of. Weights are random: errors say that
something is reused and that nothing is broken, not how good a picture is. All methods but MagCache and TaylorSeer run
the first block at every step, and all blocks at every second; a plan chooses for itself, for as many executions."""


def new_row(name: str, library: str, what: str) -> dict[str, Any]:
    """A row that nothing is known of yet."""
    return {"name": name, "library": library, "what": what, "status": NOT_REACHED, "why": "it was not begun"}


class Report:
    """What is known so far.

    Args:
        folder: of the files, ``accelerator_<device>[_tiny].json`` and ``.md``; ``None``: nothing is written.
        device: what is measured.
        size: ``"full"`` or ``"tiny"``.
        minutes: that there are.
    """

    def __init__(self, folder: Path | None, device: torch.device, size: str, minutes: float) -> None:
        self.folder = folder
        self.stem = f"accelerator_{device.type}" + ("" if size == "full" else f"_{size}")
        self.found: dict[str, Any] = {
            "schema": SCHEMA,
            "kind": "accelerator",
            "device": device.type,
            "device_name": device_name(device),
            "machine": machine(device),
            "versions": {**versions(*PACKAGES), "cuda": torch.version.cuda, "cudnn": cudnn()},
            "size": size,
            "minutes": minutes,
            "seconds": 0.0,
            "parts": {},
        }
        self.before = self._read()

    def part(self, name: str, what: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A part that is to be measured now, with all of its rows; of an earlier run it is forgotten."""
        part = {"what": what, "date": datetime.date.today().isoformat(), "status": NOT_REACHED, "why": "", "rows": rows}
        self.found["parts"][name] = part
        return part

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Of this run."""
        return [row for part in self.found["parts"].values() for row in part["rows"]]

    def write(self, seconds: float) -> None:
        """Both files. What an earlier run on the same has measured, and this not, stays."""
        self.found["seconds"] = round(seconds, 1)
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {**self.found, "parts": {**self.before, **self.found["parts"]}}
        texts = {".json": json.dumps(found, indent=1, allow_nan=False, default=str) + "\n", ".md": page(found) + "\n"}
        for ending, text in texts.items():
            write_text(self.folder / f"{self.stem}{ending}", text)

    def _read(self) -> dict[str, Any]:
        """Parts that an earlier run on this very device, with these very versions, has left."""
        path = None if self.folder is None else self.folder / f"{self.stem}.json"
        if path is None or not path.exists():
            return {}
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
            same = all(before[key] == self.found[key] for key in ("schema", "device_name", "versions", "size"))
            parts: dict[str, Any] = before["parts"]
            return parts if same else {}
        except (ValueError, KeyError, TypeError):
            return {}


def cudnn() -> int | None:
    """Its version, where there is one."""
    version = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return None if version is None else int(version)


def page(found: dict[str, Any]) -> str:
    """The same in Markdown."""
    packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    size = "" if found["size"] == "full" else f" --size {found['size']}"
    lines = [
        f"# On {found['device_name']}",
        "",
        f"By `python bench/accelerator.py --device {found['device']}{size} --minutes {found['minutes']:g}`, on "
        f"{found['machine']}; {packages}. {found['seconds']:.0f} seconds in all.",
        "",
        *NOTES.splitlines(),
    ]
    for name, part in found["parts"].items():
        lines += ["", f"## {name}: {part['what']}", "", f"{part['date']}; {told(part)}", ""]
        used = [key for key in COLUMNS if any(row.get(key) is not None for row in part["rows"])]
        lines.append(" | ".join(["| row", "steps", *(COLUMNS[key] for key in used), "|"]).replace(" | |", " |"))
        lines.append("|---" * (len(used) + 2) + "|")
        for row in part["rows"]:
            cells = [f"**{row['name']}** ({row['library']}: {row['what']})", row.get("steps", "")]
            if "seconds" in row:
                cells += [shown(key, row.get(key)) for key in used]
                cells[1] += "" if row["status"] == MEASURED else f" {row['status']}: {row['why']}"
            else:
                cells[1] = f"{row['status']}: {row['why']}"
                cells += [""] * len(used)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def told(part: dict[str, Any]) -> str:
    """What is known of a part, but for its rows."""
    facts = part.get("facts", {})
    text = "; ".join(f"{name.replace('_', ' ')} {shown(name, value)}" for name, value in facts.items())
    state = part["status"] if part["status"] == MEASURED else f"{part['status']}: {part['why']}"
    return f"{state}. {text}".rstrip()


def shown(name: str, value: Any) -> str:
    """A figure as a table has it."""
    if value is None:
        return "–"
    if name.endswith("_bytes"):
        return f"{value / 1e6:,.0f}"
    if isinstance(value, float):
        return f"{value:.3f}" if 0.01 <= abs(value) < 100 else f"{value:.3g}"
    return str(value)
