"""Whole tiny pipelines that read texts: a transformer, text encoders, their tokenizers and a VAE, all of them random.

They are built from the facts in ``pipelines.json``. Under ``"parts"`` stands what a class of a part needs beyond its
defaults, whatever the pipeline. Under ``"pipelines"``, each has its components: ``[class, more of its config]`` of a
model or a scheduler, ``{"tokenizer": kind, "length": …}``, or what stands for itself. A transformer begins with what
``models.json`` says of it. ``"call"`` holds the arguments of a short call, besides the prompt.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .build import drawn, facts
from .tokenizers import VOCABULARY, tokenizer

_FILE = Path(__file__).parent / "pipelines.json"


class TinyPipeline(NamedTuple):
    """A pipeline of diffusers, and arguments of a short call, besides the prompt."""

    pipe: Any
    call: dict[str, Any]


def pipeline_names() -> tuple[str, ...]:
    """Return the classes of the pipelines that can be built.

    Example:
        >>> "FluxPipeline" in pipeline_names()
        True
    """
    return tuple(_facts()["pipelines"])


def pipeline(name: str, seed: int = 0) -> TinyPipeline:
    """Build a tiny pipeline in float32 on the CPU, which ``save_pretrained`` writes to a folder as any other.

    What it draws is noise that depends on the prompt. Equal names and seeds give equal weights.

    Raises:
        KeyError: there is no such name.
        ModuleNotFoundError: diffusers or transformers is not installed.

    Example:
        >>> pipe, call = pipeline("FluxPipeline")
        >>> pipe.set_progress_bar_config(disable=True)
        >>> pipe("a cat", **call).images[0].size
        (16, 16)
    """
    known = _facts()
    if name not in known["pipelines"]:
        raise KeyError(f"{name} is none of pipeline_names()")
    diffusers = importlib.import_module("diffusers")
    components = dict(known["pipelines"][name])
    call = components.pop("call")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        parts = {place: _part(entry, known["parts"], seed + n) for n, (place, entry) in enumerate(components.items())}
        return TinyPipeline(getattr(diffusers, name)(**parts), call)


def _facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def _part(entry: Any, known: dict[str, Any], seed: int) -> Any:
    """Return the component that an entry stands for."""
    if isinstance(entry, dict) and "tokenizer" in entry:
        return tokenizer(entry["tokenizer"], **{name: each for name, each in entry.items() if name != "tokenizer"})
    if not isinstance(entry, list) or not entry or not isinstance(entry[0], str):
        return entry
    cls_name, given = entry[0], entry[1] if len(entry) > 1 else {}
    config = {**facts().get(cls_name, {}).get("config", {}), **known.get(cls_name, {}), **given}
    cls = _class(cls_name)
    made = _text_encoder(cls, config) if hasattr(cls, "config_class") else cls(**config)
    return drawn(made.eval(), seed) if isinstance(made, nn.Module) else made


def _class(name: str) -> Any:
    """Return a class of diffusers or transformers, or of a module that is named, too."""
    module, _, short = name.rpartition(".")
    for library in (module,) if module else ("diffusers", "transformers"):
        found = getattr(importlib.import_module(library), short, None)
        if isinstance(found, type):
            return found
    raise KeyError(f"neither diffusers nor transformers has {name}")


def _text_encoder(cls: Any, config: dict[str, Any]) -> nn.Module:
    """Build a model of transformers."""
    text = config.get("text_config")
    sized = (
        {**config, "text_config": {"vocab_size": VOCABULARY, **text}} if text else {"vocab_size": VOCABULARY, **config}
    )
    made: nn.Module = cls(cls.config_class(**sized))
    return made
