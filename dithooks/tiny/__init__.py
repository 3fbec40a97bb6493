"""Tiny random models of every transformer class that diffusers has, with inputs: for trying things out, and for tests.

They need the extra ``dithooks[diffusers]``.
"""

from .build import build, names, of_class

__all__ = ["build", "names", "of_class"]
