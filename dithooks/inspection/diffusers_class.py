"""A class of diffusers as a subject of inspection: a tiny random model, with the numbers of blocks of the real one."""

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
    """A target to inspect, such as ``of_transformer("FluxTransformer2DModel")``.

    Args:
        title: the heading of its report.
        target: as for :func:`~dithooks.dit_cache`.
        run: calls the target once.
        variable: the name of the target in the lines to paste.
        counts: the real numbers of blocks by path of list, if the target is a tiny stand-in; empty if it is real.
        source: the origin of these numbers.
        notes: further lines for the report.
        explicit: whether ``blocks`` has to be given to :func:`~dithooks.dit_cache`, as the real target has more lists.
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
    """The subject for a transformer class, or for one of its variants (``Class#variant``).

    Args:
        name: one of :func:`dithooks.tiny.names`.
        counts: the real numbers of blocks; by default, those of the class's default configuration.
        source: the origin of these numbers.

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
        title: the pipeline's class and its origin.
        components: the transformer class of each component, by the component's name.
        counts: the real numbers of blocks, by component and by path of list from there; by default, those of the
            classes' default configurations.
        source: the origin of these numbers.

    Raises:
        TargetError: no component is a transformer that denoises.
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
        by_path = default_counts(models[part].model) if counts is None else counts[part]
        numbers |= {f"{part}.{path}": number for path, number in by_path.items()}
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
        TargetError: there is none; the message lists the components.
    """
    components, others = {}, {}
    for name, parameter in inspect.signature(cls).parameters.items():
        classes = list(dict.fromkeys(_classes(parameter.annotation)))
        known = next((cls for cls in classes if of_class(cls)), None)
        if known is not None:
            components[name] = known
        elif not name.startswith(OTHERS) and any(cls.endswith(("Model", "UNet", "Prior")) for cls in classes):
            others[name] = " or ".join(classes)
    if not components:
        has = ", ".join(f"{name}: {classes}" for name, classes in others.items()) or "nothing of the kind"
        raise TargetError(
            f"{cls.__name__} names no transformer class that is known here ({has}): look at one of your own with "
            "dithooks inspect FILE.py:FACTORY"
        )
    return components


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the warnings and logs of diffusers and transformers in the block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def tiny(name: str) -> Any:
    """Build the tiny model of a class, with inputs for it.

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
    """The number of blocks of each list in the default configuration of a model's class.

    Arguments without a default are taken from the model. The result is ``{}`` if no model can be made in this way, or
    if it is smaller than the tiny one.

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
            counts = counts_of(type(model), given)
        except Exception:  # a constructor may raise anything for an incomplete configuration
            continue
        if sum(counts.values()) > sum(here.values()) or (counts == here and not given):
            return counts
    return {}


def counts_of(cls: type[nn.Module], config: Mapping[str, Any]) -> dict[str, int]:
    """The number of blocks of each list of a class with a configuration; no weights are allocated."""
    with torch.device("meta"), quiet():
        return _counts(cls(**config))


def _counts(model: nn.Module) -> dict[str, int]:
    return {listed.path: len(listed.blocks) for owner in owners_of(model) for listed in owner.lists}


def _has_default(parameter: inspect.Parameter) -> bool:
    return parameter.default is not inspect.Parameter.empty


def _classes(annotation: object) -> Iterable[str]:
    """The names of the classes in an annotation: a class, a string, a union or a list of them."""
    if isinstance(annotation, type):
        yield annotation.__name__
    elif isinstance(annotation, (str, typing.ForwardRef)):
        yield from re.findall(r"\w+", annotation if isinstance(annotation, str) else annotation.__forward_arg__)
    else:
        for inner in typing.get_args(annotation):
            yield from _classes(inner)
