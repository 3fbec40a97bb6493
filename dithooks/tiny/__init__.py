"""Tiny random models of every transformer class of diffusers, with inputs, and pipelines: for experiments and tests.

They need the extra ``dithooks[diffusers]``.
"""

from .build import build, names, of_class
from .pipelines import pipeline, pipeline_names

__all__ = ["build", "names", "of_class", "pipeline", "pipeline_names"]
