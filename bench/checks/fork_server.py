"""A process that has imported what all tests import, and forks for each run of pytest: a few seconds less a run.

Reads one request a line, ``[folder, test, seconds of the processor]`` in JSON, and answers ``[exit code, first failed
test or null]``; the exit code is negative where a signal has ended the run.
The package is not imported here, so that each run finds the one in its folder.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import tempfile
from pathlib import Path
from typing import NoReturn

import pytest

SHARED = ("torch", "numpy", "hypothesis", "pytest_timeout", "torch.distributed")


def serve() -> None:
    """Answer requests until there are no more."""
    for name in SHARED:
        importlib.import_module(name)
    for line in sys.stdin:
        folder, test, seconds = json.loads(line)
        with tempfile.NamedTemporaryFile("w+") as output:
            child = os.fork()
            if child == 0:
                run(folder, test, seconds, output.fileno())
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            failed = [
                each for each in Path(output.name).read_text().splitlines() if each.startswith(("FAILED", "ERROR"))
            ]
        print(json.dumps([code, failed[0].split(" - ")[0].partition(" ")[2] if failed else None]), flush=True)


def run(folder: str, test: str, seconds: int, output: int) -> NoReturn:
    """Run a test file against the package in a folder, in a child process, and end it."""
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 5))
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.chdir(folder)
    sys.path.insert(0, folder)
    sys.dont_write_bytecode = True
    code = 70
    try:
        code = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "--no-header", "--tb=no", "--timeout=120", test]))
        package = sys.modules.get("dithooks")
        if package is not None and not str(package.__file__).startswith(folder):
            code = 71
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
