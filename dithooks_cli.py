"""The ``dithooks`` command, where the package itself may not be importable.

Importing ``dithooks`` imports PyTorch, which takes seconds, and fails where an accelerator's plug-in is installed
without its driver or toolkit. ``dithooks env`` reports such faults, and a command line that cannot be followed is
refused at once: hence this file outside of the package.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from types import ModuleType


class NoPyTorch(Exception):
    """PyTorch cannot be imported."""


def main() -> int:
    """Run the command line of this process and return its exit code: that of the command, 1 without PyTorch."""
    package = _without_init()

    def before(args: argparse.Namespace) -> None:
        if args.command != "env":
            _complete(package)

    from dithooks.cli.main import main as run

    try:
        if sys.argv[1:2] == ["--version"]:
            _complete(package)
        return run(before=before)
    except NoPyTorch as error:
        print(f"dithooks: error: PyTorch cannot be imported ({error}): see `dithooks env`", file=sys.stderr)
        return 1


def _without_init() -> ModuleType:
    """Make the package importable without running its ``__init__``, which imports PyTorch."""
    if "dithooks" in sys.modules:
        return sys.modules["dithooks"]
    package = importlib.util.find_spec("dithooks")
    assert package is not None
    sys.modules["dithooks"] = importlib.util.module_from_spec(package)
    return sys.modules["dithooks"]


def _complete(package: ModuleType) -> None:
    """Run the package's ``__init__``, if that has not been done.

    Raises:
        NoPyTorch: PyTorch cannot be imported.
    """
    try:
        import torch  # noqa: F401 before the package, to distinguish its failures from this package's
    except (Exception, SystemExit) as error:  # some plug-ins end the process
        raise NoPyTorch(" ".join(str(error).split()) or type(error).__name__) from error
    if not hasattr(package, "__version__"):
        assert package.__spec__ is not None
        assert package.__spec__.loader is not None
        package.__spec__.loader.exec_module(package)


if __name__ == "__main__":
    sys.exit(main())
