"""What is looked at where a class is named: tiny random models, with the numbers of blocks that real ones have."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..blocks.discovery import owners_of
from ..blocks.module_paths import OTHERS, denoisers_of
from ..errors import TargetError
from ..tiny import build, names, of_class


@dataclass(frozen=True)
class Subject:
    """Something to look at.

    Args:
        title: what it is.
        target: as for :func:`~dithooks.dit_cache`.
        run: calls it once.
        variable: what it is called in the lines to paste.
        counts: real numbers of blocks by path of list, where the target is a tiny stand-in; empty where it is real.
        source: where these numbers come from.
        notes: what else is to be said.
        explicit: whether the blocks have to be named to :func:`~dithooks.dit_cache`, as the real target has more.
    """

    title: str
    target: Any
    run: Callable[[], object]
    variable: str
    counts: Mapping[str, int] = field(default_factory=dict)
    source: str = ""
    notes: tuple[str, ...] = ()
    explicit: bool = False


def of_transformer(name: str, counts: Mapping[str, int] | None = None, source: str = "") -> Subject:
    """A transformer class, or ``Class#variant``.

    Args:
        name: one of :func:`dithooks.tiny.names`.
        counts: real numbers of blocks; left out, those of the class's default configuration.
        source: where these come from.

    Raises:
        TargetError: the installed diffusers has no such class.

    Example:
        >>> of_transformer("FluxTransformer2DModel").counts
        {'transformer_blocks': 19, 'single_transformer_blocks': 38}
    """
    model, inputs = tiny(name)
    if counts is None:
        counts, source = default_counts(model), "the class's default configuration"
    others = [other for other in of_class(name.partition("#")[0]) if other != name]
    notes = (f"other ways to run it: {', '.join(others)}",) if others else ()

    def run() -> None:
        with quiet():
            model(**inputs())

    return Subject(name, model, run, "transformer", counts, source, notes)


def of_pipeline(
    title: str,
    components: Mapping[str, str],
    counts: Mapping[str, Mapping[str, int]] | None = None,
    source: str = "",
) -> Subject:
    """A stand-in for a pipeline, with tiny models for those of its components that :func:`dit_cache` would take.

    Args:
        title: the pipeline's class, and where it comes from.
        components: names of components, with the transformer class of each.
        counts: real numbers of blocks, by component and by path of list from there; left out, those of the classes'
            default configurations.
        source: where these come from.
    """
    controlled = any(name.startswith("controlnet") for name in components)
    taken = denoisers_of(SimpleNamespace(**dict.fromkeys(components, nn.Identity())))
    if not taken:
        raise TargetError(
            f"{title} has {', '.join(f'{part} ({cls})' for part, cls in components.items())}, but no transformer that "
            "denoises: name the class of the component that you want to see"
        )
    models, numbers = {}, dict[str, int]()
    for part in taken:
        controlled_variant = f"{components[part]}#controlnet"
        models[part] = tiny(controlled_variant if controlled and controlled_variant in names() else components[part])
        found = default_counts(models[part].model) if counts is None else counts[part]
        numbers |= {f"{part}.{path}": number for path, number in found.items()}
    notes = tuple(
        f"{part} ({cls}) is not cached along with it: dithooks inspect {cls} shows why"
        for part, cls in components.items()
        if part not in taken
    )

    def run() -> None:
        with quiet():
            for model, inputs in models.values():
                model(**inputs())

    target = SimpleNamespace(**{part: model for part, (model, _) in models.items()})
    explicit = not any(part.split("_")[0] == "transformer" for part in taken)
    return Subject(title, target, run, "pipe", numbers, source or "the default configuration", notes, explicit)


def components_of(cls: type) -> dict[str, str]:
    """The components of a pipeline class that are among the known transformer classes, by its annotations.

    Raises:
        TargetError: there is none; the message says what there is.
    """
    found, others = {}, {}
    for name, parameter in inspect.signature(cls).parameters.items():
        classes = list(dict.fromkeys(_classes(parameter.annotation)))
        known = next((each for each in classes if of_class(each)), None)
        if known is not None:
            found[name] = known
        elif not name.startswith(OTHERS) and any(each.endswith(("Model", "UNet", "Prior")) for each in classes):
            others[name] = " or ".join(classes)
    if not found:
        has = ", ".join(f"{name}: {classes}" for name, classes in others.items()) or "nothing of the kind"
        raise TargetError(
            f"{cls.__name__} names no transformer class that is known here ({has}): look at one of your own with "
            "dithooks inspect FILE.py:FACTORY"
        )
    return found


@contextmanager
def quiet() -> Iterator[None]:
    """What diffusers and transformers have to say about themselves is not the matter here."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def tiny(name: str) -> Any:
    """Model and inputs.

    Raises:
        TargetError: the installed diffusers has no such class.
    """
    with quiet():
        try:
            return build(name)
        except (AttributeError, ModuleNotFoundError) as error:
            diffusers = importlib.import_module("diffusers")
            raise TargetError(
                f"diffusers {diffusers.__version__} has no {name.partition('#')[0]}: install a newer one"
            ) from error


def default_counts(model: nn.Module) -> dict[str, int]:
    """Blocks per list as the class is by default; what has no default is as in the model. ``{}`` if that is no model.

    Example:
        >>> default_counts(build("LatteTransformer3DModel").model)  # by default, there is one block of each kind
        {}
    """
    config = dict(getattr(model, "config", {}))
    parameters = inspect.signature(type(model)).parameters
    bare = {name: value for name, value in config.items() if name in parameters and parameters[name].default is None}
    bare |= {name: config[name] for name in config if name in parameters and not _has_default(parameters[name])}
    here = _counts(model)
    for given in ({}, bare):
        try:
            found = counts_of(type(model), given)
        except Exception:  # whatever a constructor thinks of a configuration that leaves things out
            continue
        if sum(found.values()) > sum(here.values()) or (found == here and not given):
            return found
    return {}


def counts_of(cls: type[nn.Module], config: Mapping[str, Any]) -> dict[str, int]:
    """Blocks per list of a class with a configuration; its weights are not made."""
    with torch.device("meta"), quiet():
        return _counts(cls(**config))


def _counts(model: nn.Module) -> dict[str, int]:
    return {listed.path: len(listed.blocks) for owner in owners_of(model) for listed in owner.lists}


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty


def _classes(annotation: object) -> Iterable[str]:
    """Names of the classes in an annotation: unions, lists, and what is written as a string."""
    if isinstance(annotation, type):
        yield annotation.__name__
    elif isinstance(annotation, (str, typing.ForwardRef)):
        yield from re.findall(r"\w+", annotation if isinstance(annotation, str) else annotation.__forward_arg__)
    else:
        for inner in typing.get_args(annotation):
            yield from _classes(inner)
