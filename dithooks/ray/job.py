"""The settings of a job: all that its pictures depend on, checked on the driver and sent to every actor."""

from __future__ import annotations

import functools
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config.cache_config import DitCacheConfig
from ..config.cache_plan import CachePlan
from ..config.safe_json import parsed, read_file
from ..environment.machine import versions
from ..errors import InvalidSetting, MissingFile, RunMismatch, WrongType
from ..stats.step_pictures import sign_of
from ..validation import shown

SCHEMA = 1
KINDS = ("CachePlan", "DitCacheConfig")
OWN = ("prompt", "generator", "num_images_per_prompt")  # arguments of the call that come from the rows
SAME = ("dithooks", "torch")  # packages that need the same version in actors as on the driver
LONGEST = 100  # characters of a setting in a message
Plan = CachePlan | DitCacheConfig


@dataclass(frozen=True)
class Job:
    """The settings of a job: how its rows are drawn.

    Args:
        load: a function without arguments that returns the pipeline, on its device; or where to find it,
            ``"package.module:function"`` or ``"path/to/file.py:function"``.
        plan: plan or configuration to cache with; ``None``: without a cache.
        options: keyword arguments of the pipeline's call, or of ``draw``, of JSON's types.
        draw: is called as ``draw(pipe, rows, **options)`` in place of the pipeline, and returns a sample for each row.
        encode: turns a sample into bytes and their format: ``encode(sample) -> (bytes, "jpeg")``.
        batch_size: prompts in one call.
        seed: the seeds of rows that have none are made from this seed and their ids.
        threads: threads of the processor that an actor computes with.
        home: the folder in which ``load`` is looked up, where it is a text.
        versions: versions of packages on the driver.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Example:
        >>> Job("my_model:make", options={"num_inference_steps": 28}).purpose()["options"]
        {'num_inference_steps': 28}
    """

    load: Callable[[], Any] | str
    plan: Plan | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    draw: Callable[..., Any] | None = None
    encode: Callable[[Any], tuple[bytes, str]] | None = None
    batch_size: int = 1
    seed: int = 0
    threads: int = 1
    home: str = field(default_factory=os.getcwd)
    versions: Mapping[str, str] = field(default_factory=lambda: versions_here())

    def __post_init__(self) -> None:
        if isinstance(self.load, str):
            where, _, name = self.load.rpartition(":")
            if not (where and name):
                raise InvalidSetting(f"load={shown(self.load)} names no function: give 'package.module:function'")
        elif not callable(self.load):
            raise WrongType(f"load={shown(self.load)} cannot be called: give a function that returns the pipeline")
        if self.plan is not None and not isinstance(self.plan, (CachePlan, DitCacheConfig)):
            raise WrongType(f"plan={shown(self.plan)} is no plan: give a CachePlan, a DitCacheConfig, a file, or None")
        for name in ("draw", "encode"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise WrongType(f"{name}={shown(getattr(self, name))} cannot be called: give a function, or None")
        check_whole("batch_size", self.batch_size, 1)
        check_whole("seed", self.seed)
        self._check_options()

    def _check_options(self) -> None:
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            raise WrongType(f"options={shown(self.options)} must be a dict of the call's keyword arguments by name")
        if self.draw is None and (own := sorted(set(OWN) & set(self.options))):
            raise InvalidSetting(
                f"options has {shown(own[0])}, which comes from the rows: leave it out; for several pictures of a "
                "prompt, give it several rows, or give a function as draw"
            )
        for name, value in self.options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"options[{shown(name)}]={setting_text(value)} cannot be kept beside what is drawn ({error}): give "
                    "numbers, texts, lists and dicts, or make it in a function given as draw"
                ) from None

    def purpose(self) -> dict[str, Any]:
        """Return, in JSON's types, what has to be the same where a job goes on."""
        settings = {
            "plan": None if self.plan is None else json.loads(self.plan.to_json()),
            "options": dict(self.options),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "load": function_name(self.load),
            "draw": function_name(self.draw),
            "encode": function_name(self.encode),
        }
        purpose: dict[str, Any] = json.loads(json.dumps(settings))
        return purpose

    def pipeline(self) -> Any:
        """Call ``load``, in an actor.

        Raises:
            ValueError: there is no such function.
        """
        return (self.load if callable(self.load) else _function(self.load, self.home))()

    def check_versions(self) -> None:
        """Check that this process has the driver's versions of the packages that pictures depend on.

        Raises:
            RuntimeError: it has others.
        """
        here = versions_here()
        for name in SAME:
            # Without what follows a plus: a driver without an accelerator has another build of PyTorch
            ours, theirs = (each.get(name, "none").partition("+")[0] for each in (here, self.versions))
            if ours != theirs:
                raise RunMismatch(
                    f"{platform.node()} has {name} {ours}, and the driver {theirs}: install the same on all nodes"
                )


def read_plan(plan: Any) -> Plan | None:
    """Return a plan; given a path, read it from a file that ``save`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: the file holds no plan.

    Example:
        >>> from dithooks.demo import PLANS
        >>> read_plan(PLANS / "2x.json").made.model
        'FluxTransformer2DModel'
    """
    if not isinstance(plan, (str, os.PathLike)):
        given: Plan | None = plan
        return given
    try:
        return read_file(plan, _read)
    except FileNotFoundError:
        raise MissingFile(
            f"plan={shown(os.fspath(plan))}: there is no such file: give one that plan.save(path) wrote"
        ) from None


def versions_here() -> dict[str, str]:
    """Return this process's versions of dithooks, torch, diffusers, Ray and Python."""
    from dithooks import __version__

    named = {"dithooks": __version__, "torch": str(torch.__version__), **versions("diffusers", "ray")}
    return {**named, "python": platform.python_version()}


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """Describe each setting in which two jobs differ.

    Example:
        >>> differences({"seed": 0, "plan": None}, {"seed": 1, "plan": None})
        ['seed: 0 there, 1 here']
    """
    names = dict.fromkeys([*ours, *stored])
    return [
        f"{name}: {setting_text(stored.get(name))} there, {setting_text(ours.get(name))} here"
        for name in names
        if stored.get(name) != ours.get(name)
    ]


def function_name(function: Any) -> str | None:
    """Return a function's name, the same in every process; ``None`` for ``None``.

    Example:
        >>> function_name(functools.partial(os.path.join, "a"))
        "posixpath:join('a')"
    """
    if function is None or isinstance(function, str):
        return function
    if isinstance(function, functools.partial):
        given = [repr(value) for value in function.args]
        given += [f"{name}={value!r}" for name, value in function.keywords.items()]
        text = f"{function_name(function.func)}({', '.join(given)})"
    elif hasattr(function, "__qualname__"):
        text = f"{function.__module__}:{function.__qualname__}"
    else:
        text = f"{type(function).__module__}:{type(function).__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def check_whole(name: str, value: object, least: int | None = None) -> None:
    """Check that an argument is a whole number.

    Raises:
        TypeError, ValueError: it is none, or is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType(f"{name}={shown(value)} must be a whole number")
    if least is not None and value < least:
        raise InvalidSetting(f"{name}={value} is too small: give {least} or more")


def setting_text(value: Any) -> str:
    """Return a setting's text for a message; of a plan, its model and schedule."""
    text = json.dumps(value, default=repr)
    if isinstance(value, dict) and value.get("kind") in KINDS:
        made = value.get("made") or {}
        pictures = "+".join(map(_picture, value.get("pieces", [])))
        text = f"{value['kind']} {made.get('model', '')} {pictures}".strip() if pictures else text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def _picture(piece: dict[str, Any]) -> str:
    """Return the steps of a transformer's plan, as they are in a file."""
    ranges = [each["steps"] for each in (piece, *piece.get("more_ranges", ()))]
    alone = (piece.get("conditional") or {}).get("steps", [0] * len(piece["steps"]))
    return "".join("◐" if half else sign_of(bits) for *bits, half in zip(*ranges, alone, strict=True))


def _read(text: str) -> Plan:
    data = parsed(text, "plan")
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind == "CachePlan":
        return CachePlan.from_json(text)
    if kind == "DitCacheConfig":
        return DitCacheConfig.from_json(text)
    raise InvalidSetting(f'it holds no plan: a JSON object with "kind": one of {", ".join(KINDS)} is expected')


def _function(text: str, home: str) -> Callable[[], Any]:
    where, _, name = text.rpartition(":")
    folder = home
    if where.endswith(".py"):
        path = Path(home, where)
        if not path.is_file():
            raise InvalidSetting(f"load={shown(text)}: there is no file {path} on {platform.node()}")
        folder, where = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise InvalidSetting(
            f"load={shown(text)}: there is no module {shown(error.name)} on {platform.node()}"
        ) from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidSetting(f"load={shown(text)}: {where} has no function {shown(name)}")
    made: Callable[[], Any] = function
    return made
