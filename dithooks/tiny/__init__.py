"""Tiny random models of every transformer class of diffusers, with inputs: for experiments and tests.

They need the extra ``dithooks[diffusers]``.
"""

from .build import build, names, of_class

__all__ = ["build", "names", "of_class"]
