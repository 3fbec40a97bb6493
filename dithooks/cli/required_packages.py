"""Packages that a command needs: PyTorch, and optional ones, with what to install where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import BrokenPyTorch, UsageError


def check_pytorch() -> None:
    """Import PyTorch before anything that needs it, to tell its failures from those of this package.

    Raises:
        BrokenPyTorch: PyTorch cannot be imported; ``dithooks env`` says why.
    """
    try:
        import torch  # noqa: F401
    except (Exception, SystemExit) as error:  # some plug-ins of accelerators end the process
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BrokenPyTorch(f"PyTorch cannot be imported ({reason}): see `dithooks env`") from error


@contextmanager
def extra_needed(subject: str, install: str) -> Iterator[None]:
    """Name the package to install where an import in the block fails.

    Args:
        subject: what needs the package, with its verb, such as ``"the demo needs"``.
        install: what pip is to install.

    Raises:
        UsageError: a package is missing.

    Example:
        >>> with extra_needed("this example needs", '"dithooks[demo]"'):
        ...     import package_of_nobody
        Traceback (most recent call last):
        dithooks.errors.UsageError: this example needs package_of_nobody: pip install "dithooks[demo]"
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "dithooks":
            raise  # a fault of this package, which no installation would cure
        raise UsageError(f"{subject} {package}: pip install {install}") from error
