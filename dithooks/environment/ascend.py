"""Ascend NPUs: whether PyTorch, torch_npu, CANN and the driver are installed, and fit each other."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from .measured_releases import ASKS_FOR_TRUST, release_of, unmeasured

SWITCH = "TORCH_DEVICE_BACKEND_AUTOLOAD"
TABLE = "https://github.com/Ascend/pytorch/blob/master/COMPATIBILITY.en.md"
# The CANN that each torch_npu was made for, by the table. A torch_npu goes with the PyTorch of its own version number,
# without the post.
CANN_OF = {
    "2.12.0": "9.1.0",
    "2.12.0rc1": "8.5.0",
    "2.11.0": "9.1.0",
    "2.11.0rc1": "8.5.0",
    "2.10.0.post4": "9.1.0",
    "2.10.0": "9.0.0",
    "2.10.0rc2": "8.5.0",
    "2.9.0.post6": "9.1.0",
    "2.9.0.post2": "9.0.0",
    "2.9.0": "8.5.0",
    "2.8.0.post4": "9.0.0",
    "2.8.0.post2": "8.5.0",
    "2.8.0": "8.3.RC1",
    "2.7.1.post8": "9.1.0",
    "2.7.1.post4": "9.0.0",
    "2.7.1.post2": "8.5.0",
    "2.7.1": "8.3.RC1",
    "2.6.0.post5": "8.5.0",
    "2.6.0.post3": "8.3.RC1",
    "2.6.0": "8.2.RC1",
    "2.5.1.post1": "8.2.RC1",
    "2.5.1": "8.1.RC1",
    "2.4.0.post4": "8.1.RC1",
    "2.4.0.post2": "8.0.0",
    "2.4.0": "8.0.RC3",
    "2.3.1.post6": "8.1.RC1",
    "2.3.1.post4": "8.0.0",
    "2.3.1.post2": "8.0.RC3",
    "2.3.1": "8.0.RC2",
    "2.2.0.post2": "8.0.RC2",
    "2.2.0": "8.0.RC1",
    "2.1.0.post17": "8.3.RC1",
    "2.1.0.post13": "8.2.RC1",
    "2.1.0.post12": "8.1.RC1",
    "2.1.0.post10": "8.0.0",
    "2.1.0.post8": "8.0.RC3",
    "2.1.0.post6": "8.0.RC2",
    "2.1.0.post4": "8.0.RC1",
    "2.1.0": "7.0.0",
}
HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")  # set by CANN's set_env.sh
INSTALLED = ("/usr/local/Ascend/cann", "/usr/local/Ascend/ascend-toolkit/latest")
LIBRARIES = {"libascendcl.so": "CANN", "libhccl.so": "CANN", "libascend_hal.so": "the NPU's driver"}
BROKEN, WARNING, NOTE = "broken", "warning", "note"
EnvReport = dict[str, Any]
Finding = tuple[str, str, str]  # its level, the fault, and the remedy


def findings(report: EnvReport) -> Iterator[Finding]:
    """The faults that a report shows, each with its level and remedy."""
    torch, npu = report["torch"], report["torch_npu"]
    plugin = " and ".join(each["distribution"] for each in report["backends"]) or "none"
    if torch["installed"] is None and not torch["imports"]:
        yield BROKEN, "PyTorch is not installed", "pip install torch"
    elif not torch["imports"] and torch["imports_without_backends"]:
        what = f"{plugin} breaks `import torch`, which loads what is installed for accelerators: {torch['error']}"
        yield BROKEN, what, remedy_of(report)
    elif not torch["imports"]:
        yield BROKEN, f"`import torch` fails: {torch['error']}", "install PyTorch again; see https://pytorch.org"
    elif npu["installed"] and npu.get("error"):
        off = report["launch"].get(SWITCH) == "0"
        what = f"torch_npu {npu['installed']} cannot be imported: {npu['error']}"
        yield (WARNING if off else BROKEN), f"{what}{f' ({SWITCH}=0 keeps it aside)' if off else ''}", remedy_of(report)
    yield from versions_of(report)
    yield from not_measured(report)
    if report["compiler"] is None:
        yield NOTE, "there is no C++ compiler: torch.compile for the CPU needs one", "install g++ or clang, or set CXX"


def not_measured(report: EnvReport) -> Iterator[Finding]:
    """The packages whose releases this library was not measured with, or that it does not take."""
    packages = report["packages"]
    diffusers = release_of(packages.get("diffusers"))
    if diffusers is not None and diffusers < ASKS_FOR_TRUST:
        what = f"diffusers {packages['diffusers']} runs code that it finds in a model's folder, without being asked to"
        yield WARNING, what, f"pip install 'diffusers>={'.'.join(map(str, ASKS_FOR_TRUST))}'"
        packages = {}
    here = {"python": report["python"]["version"], "torch": report["torch"]["installed"], **packages}
    for what in unmeasured(here):
        yield NOTE, what, "docs/versions.md says what was run"


def versions_of(report: EnvReport) -> Iterator[Finding]:
    """The versions of PyTorch, torch_npu and CANN that do not fit each other."""
    npu, torch, version = report["torch_npu"]["installed"], report["torch"]["installed"], report["cann"]["version"]
    if npu is None:
        return
    wanted, has = release(npu), release(torch or "")
    if has and wanted and wanted != has:
        what = f"torch_npu {npu} is made for torch {wanted}, and torch {torch} is installed"
        fitting = next((each for each in CANN_OF if release(each) == has), None)
        other = f", or torch_npu {fitting} with CANN {CANN_OF[fitting]}" if fitting else ""
        yield WARNING, what, f"pip install torch=={wanted}{other}; all pairs: {TABLE}"
    needed = CANN_OF.get(npu)
    if needed is None:
        yield NOTE, f"which CANN goes with torch_npu {npu} is not known here", f"see {TABLE}"
    elif version is not None and version.lower() != needed.lower():
        yield WARNING, f"torch_npu {npu} is made for CANN {needed}, and CANN {version} is here", f"all pairs: {TABLE}"


def remedy_of(report: EnvReport) -> str:
    """The remedy for a plug-in of an accelerator that cannot be loaded."""
    npu, error = report["torch_npu"]["installed"], f"{report['torch']['error']} {report['torch_npu'].get('error')}"
    without = f"on a machine without the accelerator: export {SWITCH}=0, or uninstall the package"
    if npu is None:
        return f"install what it needs; {without}"
    missing = next((name for name in LIBRARIES if name in error), None)
    home, scripts = report["cann"]["home"], report["cann"]["scripts"]
    needed = CANN_OF.get(npu, f"(which: {TABLE})")
    if missing is not None and LIBRARIES[missing] != "CANN":
        help_ = (
            f"{missing} belongs to {LIBRARIES[missing]}: install it, in a container mount /usr/local/Ascend/driver, "
            "and have its lib64/driver in LD_LIBRARY_PATH"
        )
    elif home is None and scripts:
        help_ = f"CANN is installed, but not set up in this shell: source {scripts[0]}"
    elif home is None:
        help_ = f"install CANN {needed} and source its set_env.sh"
    else:
        help_ = f"see whether CANN in {home} is whole and of version {needed}, and source its set_env.sh"
    return f"{help_}; {without}"


def release(version: str) -> str:
    """The three numbers at the beginning of a version; empty if there are none."""
    match = re.match(r"\d+\.\d+\.\d+", version)
    return match[0] if match else ""


def cann() -> EnvReport:
    """The folder of CANN, by the environment's variables, and its version."""
    by, home = next(((name, os.environ[name]) for name in HOMES if os.environ.get(name)), (None, None))
    places = [Path(place) for place in ([home] if home else INSTALLED)]
    file, version = next((entry for place in places for entry in cann_versions(place)), (None, None))
    scripts = [place.parent / "set_env.sh" for place in places] + [place / "set_env.sh" for place in places]
    return {
        "home": home,
        "set_by": by,
        "version": version,
        "file": None if file is None else str(file),
        "scripts": [str(script) for script in scripts if script.is_file()],
        "libraries": {},
    }


def cann_versions(home: Path) -> Iterator[tuple[Path, str]]:
    """The versions in the files of CANN's installer: those of each architecture, then those of its parts."""
    patterns = ("*-linux/ascend_toolkit_install.info", "*-linux/ascend_*_install.info", "ascend_*_install.info")
    for pattern in (*patterns, "version.info", "runtime/version.info", "compiler/version.info"):
        for file in sorted(home.glob(pattern)) if home.is_dir() else []:
            with suppress(OSError):  # some are the superuser's alone
                text = file.read_text(errors="replace")
                if line := re.search(r"^\s*version\s*=\s*(\S+)", text, re.IGNORECASE | re.MULTILINE):
                    yield file, line[1]
