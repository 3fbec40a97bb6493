"""The report of ``dithooks env``: the packages, the accelerator that PyTorch sees, and what keeps it from working.

The report has to work where ``import torch`` fails: an accelerator's plug-in that is installed without its driver or
toolkit has that effect. So the files of this room that the report needs import Python's standard library only, and
another process imports PyTorch.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .ascend import BROKEN, HOMES, LIBRARIES, NOTE, SWITCH, WARNING, EnvReport, cann, findings
from .file_schemas import PLAN
from .measured_releases import compiled_by, release_of
from .optional_packages import missing_extras
from .torch_subprocess import ask_torch, backends, installed, loads

PACKAGES = ("diffusers", "accelerate", "peft", "torchao", "transformers", "numpy", "safetensors")
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "ASCEND_RT_VISIBLE_DEVICES", SWITCH)


def look() -> EnvReport:
    """Examine the environment and return the report, fit for JSON."""
    plugins = backends()
    asked = ask_torch()
    alone = None
    if "error" in asked and plugins and os.environ.get(SWITCH, "1") == "1":
        alone = ask_torch({SWITCH: "0"})  # if this works, a plug-in breaks it
    seen = asked if "error" not in asked else alone if alone is not None and "error" not in alone else {}
    report: EnvReport = {
        "dithooks": own_version(),
        "plan_schemas": list(PLAN),
        "python": {"version": platform.python_version(), "executable": sys.executable, "platform": platform.platform()},
        "torch": {
            "installed": installed("torch"),
            "imports": "error" not in asked,
            "error": asked.get("error"),
            "imports_without_backends": None if alone is None else "error" not in alone,
            **{name: seen.get(name) for name in ("version", "git", "build", "threads", "distributed")},
        },
        "accelerator": seen.get("accelerator"),
        "backends": plugins,
        "torch_npu": {"installed": installed("torch_npu") or installed("torch-npu"), **seen.get("torch_npu", {})},
        "cann": cann(),
        "launch": {name: value for name, value in sorted(os.environ.items()) if name in LAUNCH or "HCCL" in name},
        "packages": {name: version for name in PACKAGES if (version := installed(name))},
        "missing": [{"what": what, "install": install} for what, install in missing_extras(installed)],
        "compiler": compiler(),
    }
    if report["torch_npu"]["installed"] or report["cann"]["home"]:
        report["cann"]["libraries"] = {name: loads(name) for name in LIBRARIES}
    report["findings"] = [{"level": level, "what": what, "remedy": remedy} for level, what, remedy in findings(report)]
    report["sound"] = all(each["level"] != BROKEN for each in report["findings"])
    return report


def own_version() -> str:
    """The version of this package, without importing it."""
    package = importlib.util.find_spec("dithooks")
    source = Path(package.origin).read_text(encoding="utf-8") if package is not None and package.origin else ""
    match = re.search(r'__version__ = "([^"]+)"', source)
    return match[1] if match else "unknown"


def compiler() -> dict[str, str] | None:
    """The C++ compiler that ``torch.compile`` would find; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    path = next((path for name in names if (path := shutil.which(name))), None)
    if path is None:
        return None
    done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
    return {"path": path, "version": (done.stdout.splitlines() or ["unknown"])[0]}


def show(report: EnvReport) -> None:
    """Print a report, in colours where rich is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for name, value in rows(report):
            print(f"{name:<12}  {value}")
        for each in report["findings"]:
            print(f"\n{each['level']}: {each['what']}\n  -> {each['remedy']}")
        return
    console = Console()
    grid = Table.grid(padding=(0, 2))
    for name, value in rows(report):
        grid.add_row(f"[bold]{name}[/bold]", value.replace("[", r"\["))
    console.print(grid, highlight=False)
    colours = {BROKEN: "red", WARNING: "yellow", NOTE: "cyan"}
    for each in report["findings"]:
        console.print(f"\n[{colours[each['level']]}]{each['level']}[/]: ", end="")
        console.print(f"{each['what']}\n  -> {each['remedy']}", markup=False, highlight=False, soft_wrap=True)


def rows(report: EnvReport) -> Iterator[tuple[str, str]]:
    """The lines of a report, each with its heading; an empty heading continues the line before."""
    python, torch, npu, home = (report[name] for name in ("python", "torch", "torch_npu", "cann"))
    yield "dithooks", f"{report['dithooks']}, plans of schema {' and '.join(map(str, report['plan_schemas']))}"
    yield "Python", f"{python['version']}, {python['executable']}"
    built = ", ".join(f"{name} {value}" for name, value in (torch["build"] or {}).items() if value)
    state = "" if torch["imports"] else ", cannot be imported"
    yield "torch", f"{torch['version'] or torch['installed'] or 'none'}{f' ({built})' if built else ''}{state}"
    if (release := release_of(torch["version"] or torch["installed"])) is not None:
        yield "compiled", compiled_by(release)
    others = dict(report["packages"])
    yield "diffusers", others.pop("diffusers", None) or "none"
    yield "accelerator", "none" if report["accelerator"] is None else report["accelerator"]["type"]
    for index, device in enumerate((report["accelerator"] or {"devices": []})["devices"]):
        memory = (
            ""
            if device["total"] is None
            else f", {device['free'] / 2**30:.1f} of {device['total'] / 2**30:.1f} GiB free"
        )
        yield "", f"{index}: {device['name'] or 'no name'}{memory}"
    for each in report["backends"]:
        yield "plug-in", f"{each['distribution']} {each['version']}"
    if npu["installed"] or home["home"]:
        state = "" if npu["installed"] is None or npu.get("error", "") is None else ", cannot be imported"
        yield "torch_npu", f"{npu['installed'] or 'not installed'}{state}"
        where = f"{home['home']} ({home['set_by']})" if home["home"] else "neither " + " nor ".join(HOMES) + " is set"
        yield "CANN", f"{home['version'] or 'no version found'}: {where}"
        for name, error in home["libraries"].items():
            gone = f"{name}: cannot open shared object file" in (error or "")
            yield "", f"{name} of {LIBRARIES[name]}: {'loads' if error is None else 'not found' if gone else error}"
    for name, value in report["launch"].items():
        yield "", f"{name}={value}"
    yield "packages", ", ".join(f"{name} {version}" for name, version in others.items()) or "none"
    for number, each in enumerate(report["missing"]):
        yield "" if number else "not here", f"{each['what']}: {each['install']}"
