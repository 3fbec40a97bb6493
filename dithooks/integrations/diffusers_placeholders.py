"""What stands in diffusers for packages that are not installed: classes without content, and names without a value."""

from __future__ import annotations

import importlib.util


def missing_packages(kind: type) -> list[str]:
    """Return the packages that a class of diffusers needs and that are not installed; empty if none is."""
    needed: list[str] = getattr(kind, "_backends", [])
    return [name for name in needed if importlib.util.find_spec(name) is None] or list(needed)


def missing_import(error: NameError) -> str | None:
    """Describe a name that a module of diffusers uses without having imported it; ``None``: the error is another one.

    Modules import packages that only some of their classes need only where these are installed.
    """
    module = module_of(error)
    if module is None or not error.name:
        return None
    return f"{module} has no {error.name}, as a package that it needs is not installed: pip install {error.name} may do"


def module_of(error: Exception) -> str | None:
    """Return the module of diffusers that has raised an error; ``None``: another library has."""
    where = error.__traceback__
    while where is not None and where.tb_next is not None:
        where = where.tb_next
    module = "" if where is None else str(where.tb_frame.f_globals.get("__name__", ""))
    return module if module.startswith("diffusers.") else None
