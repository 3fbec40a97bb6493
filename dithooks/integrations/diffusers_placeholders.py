"""The classes that stand in diffusers for those whose packages are not installed."""

from __future__ import annotations

import importlib.util


def missing_packages(kind: type) -> list[str]:
    """Return the packages that a class of diffusers needs and that are not installed; empty if none is."""
    needed: list[str] = getattr(kind, "_backends", [])
    return [name for name in needed if importlib.util.find_spec(name) is None] or list(needed)
