"""Tiny random models and inputs for them, built from the facts in ``models.json``.

An entry of that file holds what the class needs beyond its defaults. A variant (``Class#variant``) holds only what
differs from the entry of its class. Inputs are written as

- ``"1x16x4"``: standard normal numbers of that shape;
- ``"1x16 int64 0..9"``: random integers, both ends included;
- ``"2 int64 = 44 239"``: these values; ``"1x8x8 = 1"``: one value everywhere; ``"scalar int64 = 3"``: no dimensions;
- ``{"tuple": [...]}``, ``{"call": "module.Class", "args": [...]}``;
- lists, dicts, numbers, ``null`` and other strings, which stand for themselves.

The first input is the main one, usually the noisy latents.
"""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

_FILE = Path(__file__).parent / "models.json"


class Tiny(NamedTuple):
    """A model and a function that makes its keyword arguments."""

    model: nn.Module
    inputs: Callable[..., dict[str, Any]]
    """``inputs(seed=0)`` makes new tensors, since some models write into theirs; equal for equal seeds."""


def names() -> tuple[str, ...]:
    """Return the names of all models that can be built: ``Class`` and ``Class#variant``.

    Example:
        >>> "FluxTransformer2DModel" in names()
        True
    """
    return tuple(facts())


def of_class(cls_name: str) -> tuple[str, ...]:
    """Return the names of a class and its variants.

    Example:
        >>> of_class("SanaTransformer2DModel")
        ('SanaTransformer2DModel', 'SanaTransformer2DModel#controlnet')
    """
    return tuple(name for name in names() if name.partition("#")[0] == cls_name)


def build(name: str, seed: int = 0) -> Tiny:
    """Build a tiny model in float32 and ``eval`` mode, with its inputs. Equal names and seeds give equal weights.

    All parameters are random: many classes initialise their gates to zero, and blocks without effect would hide every
    mistake.

    Raises:
        KeyError: there is no such name.
        ModuleNotFoundError: diffusers is not installed.

    Example:
        >>> model, inputs = build("FluxTransformer2DModel")
        >>> model(**inputs()).sample.shape
        torch.Size([1, 16, 4])
    """
    known = facts()
    if name not in known:
        raise KeyError(f"{name} is none of names(); of that class there are {of_class(name.partition('#')[0])}")
    plain, fact = known[name.partition("#")[0]], known[name]
    config = {**plain.get("config", {}), **fact.get("config", {})}
    specs = {**plain["inputs"], **fact.get("inputs", {})}
    module = importlib.import_module(plain.get("module", "diffusers"))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = drawn(getattr(module, name.partition("#")[0])(**config).eval(), seed)

    def inputs(seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        return {key: _value(spec, generator) for key, spec in specs.items()}

    return Tiny(model, inputs)


def facts() -> dict[str, Any]:
    """Return what ``models.json`` says."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def drawn(model: nn.Module, seed: int) -> nn.Module:
    """Draw weights that keep activations at their size, small non-zero biases and gates, and scales around one."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        with torch.no_grad():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                fan_in = parameter[0].numel() if parameter.shape[0] > 1 else parameter.shape[-1]
                parameter.copy_(noise / math.sqrt(fan_in))
            else:
                parameter.copy_(0.1 * noise + bool((parameter == 1).all()))
    return model


def _value(spec: Any, generator: torch.Generator) -> Any:
    """Return the value that an entry under ``inputs`` stands for."""
    if isinstance(spec, str):
        return _tensor(spec, generator) if spec[0].isdigit() or spec.startswith("scalar") else spec
    if isinstance(spec, list):
        return [_value(item, generator) for item in spec]
    if isinstance(spec, dict) and "tuple" in spec:
        return tuple(_value(item, generator) for item in spec["tuple"])
    if isinstance(spec, dict) and "call" in spec:
        module, _, cls = spec["call"].rpartition(".")
        return getattr(importlib.import_module(module), cls)(*_value(spec["args"], generator))
    if isinstance(spec, dict):  # JSON knows no integer keys
        return {int(key) if key.isdigit() else key: _value(item, generator) for key, item in spec.items()}
    return spec


def _tensor(spec: str, generator: torch.Generator) -> torch.Tensor:
    """Make the tensor of an entry such as ``"1x16x4"``."""
    head, _, values = spec.partition(" = ")
    size, *rest = head.split()
    shape = [int(n) for n in size.split("x")] if size != "scalar" else []
    dtype: torch.dtype = getattr(torch, rest[0]) if rest else torch.float32
    if values:
        numbers = torch.tensor([float(number) for number in values.split()], dtype=torch.float64).to(dtype)
        return numbers.reshape(shape) if numbers.numel() > 1 else numbers.repeat(math.prod(shape)).reshape(shape)
    if len(rest) > 1:
        low, high = rest[1].split("..")
        return torch.randint(int(low), int(high) + 1, shape, generator=generator, dtype=dtype)
    return torch.randn(shape, generator=generator, dtype=dtype)
