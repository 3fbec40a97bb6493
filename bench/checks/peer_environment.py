"""An environment of another engine: the packages that are here, and on top of them those that are named.

PyTorch versions that engines pin exclude each other, so their packages are installed without what they depend on.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

from dithooks.storage.replacement import write_text

ROOT = Path(__file__).parent.parent.parent
NOT_THERE = ("No matching distribution found", "Could not find a version", "Failed to establish a new connection")


class PackageAbsent(Exception):
    """A package that the index does not have for this machine, or no index that answers."""


def environment(folder: Path, requirements: list[str]) -> Path:
    """Make an environment, if it is not there, and return its interpreter.

    Args:
        folder: where to make it, or where it was made.
        requirements: packages with their versions.

    Raises:
        PackageAbsent: one of them cannot be had.
        RuntimeError: the installation has failed for another reason.
    """
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        own = folder / "lib" / version / "site-packages"
        write_text(own / "here.pth", sysconfig.get_path("purelib") + "\n")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *requirements]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    if done.returncode:
        if any(sign in done.stderr for sign in NOT_THERE):
            raise PackageAbsent(done.stderr.strip().splitlines()[-1])
        raise RuntimeError(f"{' '.join(command)} has failed:\n{done.stderr}")
    return python


def run_in(python: Path, module: str, *arguments: str) -> int:
    """Run a module of this repository by an environment's interpreter; return its exit code."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [str(python), "-m", module, *arguments]
    return subprocess.run(command, check=False, cwd=ROOT, env=variables).returncode


def main_of(module: str, doc: str, engine: str, requirements: list[str], check: Callable[[Path | None], int]) -> int:
    """Run a check in an environment of its own; or, with ``--here``, in this one.

    Args:
        module: the check's module, which ``python -m`` runs.
        doc: its docstring.
        engine: the engine's name, for a message.
        requirements: as for :func:`environment`.
        check: the check itself, given the folder for its results.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=doc.split("\n\n")[0])
    parser.add_argument("--environment", type=Path, help="folder of the environment; made if it is not there")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="write the results there")
    parser.add_argument("--here", action="store_true", help="the package is installed here: make no environment")
    args = parser.parse_args()
    if args.here:
        return check(args.out)
    with tempfile.TemporaryDirectory() as folder:
        try:
            python = environment(args.environment or Path(folder), requirements)
        except PackageAbsent as error:
            print(f"skipped: {engine} cannot be had here: {error}")
            return 0
        out = [] if args.out is None else ["--out", str(args.out.absolute())]
        return run_in(python, module, "--here", *out)
