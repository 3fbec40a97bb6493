"""A user's own factory as a target: ``package.module:factory`` or ``path/to/file.py:factory``.

The factory takes no arguments and returns a pair. Its first part is a model, a pipeline or a ``BlockAdapter``. Its
second part is how to call it: a dict of keyword arguments, a tuple of positional ones, or a function without arguments
or of one, the pipeline.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ...blocks.adapter import BlockAdapter
from ...errors import TargetError
from ...inspection.diffusers_class import Subject
from ...integrations.diffusers_bars import hidden_loading_bars
from ...progress_bars import is_terminal
from ...validation import shown
from ..user_errors import call_user

STEPS = "num_inference_steps"  # the argument of a pipeline
RETURNS = "a pair: the target, and a dict of keyword arguments, a tuple of positional ones or a function that runs it"


def of_factory(spelled: str) -> Subject:
    """Call a factory and return its target with a function that runs it. Errors inside the factory pass unchanged.

    Before each run, the random generators among its arguments are set back to the state that the factory left.

    Raises:
        TargetError: there is no such factory, or it returns something else.
    """
    target, given = _made(spelled)
    return Subject(spelled, target, _run(spelled, target, given), "target")


def of_factory_with_steps(spelled: str) -> tuple[Any, Callable[[int], object]]:
    """Call a factory and return its target with a function that runs it in a number of steps.

    Raises:
        TargetError: there is no such factory, or what it returns takes no number of steps.
    """
    target, given = _made(spelled)
    called: Any = target.target if isinstance(target, BlockAdapter) else target
    if isinstance(given, dict) and STEPS in given:
        restore = _generators_restored(given)

        def draw(steps: int) -> object:
            restore()
            return call_user(called, **given | {STEPS: steps})

        return target, draw
    if isinstance(given, (dict, tuple)) or not _takes(inspect.signature(given), called, 1):
        raise TargetError(
            f"what {spelled} returned takes no number of steps, so several --steps cannot be tried: return a dict with "
            f"{STEPS}, or a function of two arguments, the pipeline and the number of steps"
        )
    return target, lambda steps: call_user(given, called, steps)


def _made(spelled: str) -> tuple[Any, Any]:
    """Call a factory and return its pair."""
    where, _, name = spelled.rpartition(":")
    module = _file(Path(where)) if where.endswith(".py") else _module(where)
    factory = getattr(module, name, None)
    if not callable(factory):
        has = "has no" if factory is None else f"has a {type(factory).__name__}, not a function,"
        raise TargetError(f"{where} {has} {shown(name)}: give FILE.py:FACTORY or MODULE:FACTORY")
    with hidden_loading_bars() if not is_terminal() else nullcontext():
        made = call_user(factory)
    if not isinstance(made, tuple) or len(made) != 2 or not (isinstance(made[1], (dict, tuple)) or callable(made[1])):
        got = f"({', '.join(type(part).__name__ for part in made)})" if isinstance(made, tuple) else type(made).__name__
        raise TargetError(f"{spelled} returned {got}: it has to return {RETURNS}")
    return made


def _run(spelled: str, target: Any, given: Any) -> Callable[[], object]:
    called: Any = target.target if isinstance(target, BlockAdapter) else target
    if not isinstance(given, (dict, tuple)):
        return _function(spelled, called, given)
    args, kwargs = ((), given) if isinstance(given, dict) else (given, {})
    restore = _generators_restored(given)

    def run() -> object:
        restore()
        return call_user(called, *args, **kwargs)

    return run


def _function(spelled: str, called: Any, function: Callable[..., object]) -> Callable[[], object]:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a function that is not written in Python may have no signature
        return lambda: call_user(function)
    if _takes(signature):
        return lambda: call_user(function)
    if _takes(signature, called):
        return lambda: call_user(function, called)
    raise TargetError(f"{spelled} returned a function of {signature}: it takes no argument, or one, the pipeline")


def _takes(signature: inspect.Signature, *args: object) -> bool:
    try:
        signature.bind(*args)
    except TypeError:
        return False
    return True


def _generators_restored(given: object) -> Callable[[], None]:
    """A function that sets the generators among the arguments back to their state of now."""
    states = [(generator, generator.get_state()) for generator in _generators(given)]

    def restore() -> None:
        for generator, state in states:  # the run before has advanced them
            generator.set_state(state)

    return restore


def _generators(value: object) -> Iterator[torch.Generator]:
    """All generators in an argument, at any depth of lists and mappings."""
    if isinstance(value, torch.Generator):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for item in value.values() if isinstance(value, Mapping) else value:
            yield from _generators(item)


def _module(name: str) -> ModuleType:
    if os.getcwd() not in sys.path:  # as `python -m` does, and a console script does not
        sys.path.insert(0, os.getcwd())
    try:
        return call_user(importlib.import_module, name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise TargetError(
            f"there is no module {shown(error.name)} here: give FILE.py:FACTORY or MODULE:FACTORY"
        ) from error
    except ValueError:
        raise TargetError(f"{shown(name)} is no module: give FILE.py:FACTORY or MODULE:FACTORY") from None


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise TargetError(f"there is no file {path}: give FILE.py:FACTORY or MODULE:FACTORY")
    if str(path.parent.resolve()) not in sys.path:  # as for a script, so that it can import its neighbours
        sys.path.insert(0, str(path.parent.resolve()))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses look their module up
    call_user(spec.loader.exec_module, module)
    return module
