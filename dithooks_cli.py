"""The ``dithooks`` command, where the package itself may not be importable.

Importing ``dithooks`` imports PyTorch, and that fails where an accelerator's plug-in is installed without its driver or
toolkit. ``dithooks env`` reports such faults: hence this file outside of the package.
"""

from __future__ import annotations

import importlib.util
import sys


def main() -> int:
    """Run the command line of this process and return its exit code: that of the command, 1 without PyTorch."""
    if sys.argv[1:2] == ["env"]:
        _without_init()
    else:
        try:
            import torch  # noqa: F401 before the package, to distinguish its failures from this package's
        except (Exception, SystemExit) as error:  # some plug-ins end the process
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"dithooks: error: PyTorch cannot be imported ({reason}): see `dithooks env`", file=sys.stderr)
            return 1
    from dithooks.cli.main import main as run

    return run()


def _without_init() -> None:
    """Make the package importable without running its ``__init__``, which imports PyTorch."""
    package = importlib.util.find_spec("dithooks")
    assert package is not None
    sys.modules["dithooks"] = importlib.util.module_from_spec(package)


if __name__ == "__main__":
    sys.exit(main())
