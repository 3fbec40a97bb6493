"""PyTorch and its accelerator, examined in another process: importing PyTorch may fail, or end the process.

This file imports Python's standard library only, and nothing of this package, as the other process runs this very file;
a second one, whose path it is given, knows where PyTorch has its accelerators.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

Answer = dict[str, Any]
SECONDS = 300  # PyTorch's import may take, from a cold network drive


def installed(package: str) -> str | None:
    """The version of a package, if it is installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def backends() -> list[dict[str, str]]:
    """The plug-ins that ``import torch`` loads."""
    plugins = importlib.metadata.entry_points(group="torch.backends")
    return [
        {"name": each.name, "distribution": each.dist.name, "version": each.dist.version}
        for each in plugins
        if each.dist is not None
    ]


def ask_torch(environment: Mapping[str, str] | None = None) -> Answer:
    """Run :func:`probe` in another process and return its answer, or ``{"error": …}``."""
    from . import accelerators  # not in the other process, which has no package

    code = "import runpy, sys; runpy.run_path(sys.argv[1])['probe'](*sys.argv[2:])"
    mark = f"dithooks-env-{os.getpid()}: "
    command = [sys.executable, "-c", code, __file__, mark, accelerators.__file__]
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **(environment or {})},
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it takes more than {SECONDS} s"}
    marked = [line.removeprefix(mark) for line in done.stdout.splitlines() if line.startswith(mark)]
    answer: Answer = json.loads(marked[-1]) if marked else {"error": ended(done.returncode)}
    errors = [line.strip() for line in done.stderr.splitlines() if re.match(r"\s*\w*(Error|Exception): ", line)]
    if "error" in answer and errors and errors[-1] not in answer["error"]:
        answer["error"] = f"{errors[-1]}; {answer['error']}"
    return answer


def ended(code: int) -> str:
    """The end of a process in words, from its return code."""
    if code >= 0:
        return f"the process ends with exit code {code}"
    names = {each.value: each.name for each in signal.Signals}
    return f"the process is killed by {names.get(-code, f'signal {-code}')}"


def probe(mark: str, file: str) -> None:
    """Import PyTorch and print :func:`seen_by_torch`, or the error, in a line that begins with a mark."""
    try:
        answer = seen_by_torch(file)
    except BaseException as error:  # a plug-in may end the process, too
        answer = {"error": chain(error)}
    print(mark + json.dumps(answer), flush=True)


def chain(error: BaseException | None) -> str:
    """The texts of an exception and its causes, the first cause first."""
    texts: list[str] = []
    while error is not None:
        text = " ".join(str(error).split())
        texts.append(f"{type(error).__name__}: {text}" if text else type(error).__name__)
        error = error.__cause__ or error.__context__
    return "; ".join(reversed(texts))


def seen_by_torch(file: str) -> Answer:
    """The version, the build and the accelerator of PyTorch, which is found by the functions of a file."""
    import torch

    distributed = torch.distributed
    answer: Answer = {
        "version": torch.__version__,
        "git": torch.version.git_version,
        "build": {"CUDA": torch.version.cuda, "ROCm": torch.version.hip, "debug": torch.version.debug},
        "threads": torch.get_num_threads(),
        "distributed": [
            name
            for name in getattr(getattr(distributed, "Backend", None), "backend_list", [])
            if name not in ("undefined", "fake") and distributed.is_backend_available(name)
        ],
    }
    if installed("torch_npu") or installed("torch-npu"):
        answer["torch_npu"] = {"error": None}
        try:
            importlib.import_module("torch_npu")
        except BaseException as error:
            answer["torch_npu"]["error"] = chain(error)
    answer["accelerator"] = accelerator(runpy.run_path(file))
    return answer


def accelerator(finding: Mapping[str, Any]) -> Answer | None:
    """The accelerator and its devices; names and memory by the accelerator's own module."""
    kind = finding["current_accelerator"]()
    if kind is None:
        return None
    module, devices = finding["device_module"](kind), []
    for index in range(finding["device_count"]()):
        device: Answer = {"name": None, "free": None, "total": None}
        try:
            device["name"] = module.get_device_name(index)
            device["free"], device["total"] = module.mem_get_info(index)
        except (AttributeError, RuntimeError) as error:
            device["error"] = chain(error)
        devices.append(device)
    return {"type": kind.type, "devices": devices}


def loads(library: str) -> str | None:
    """The reason why a library cannot be loaded, None if it can; in another process, as loading may have effects."""
    code = "import ctypes, sys\ntry: ctypes.CDLL(sys.argv[1])\nexcept OSError as error: print(error)"
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True, check=False)
    if done.returncode:
        return ended(done.returncode)
    return done.stdout.strip() or None
