"""What makes a job this job: all that a row's picture depends on, checked on the driver and sent to every actor."""

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
from ..errors import InvalidSetting, RunMismatch, WrongType

SCHEMA = 1
KINDS = ("CachePlan", "DitCacheConfig")
OWN = ("prompt", "generator", "num_images_per_prompt")  # of the call, that the rows give
SAME = ("dithooks", "torch")  # versions that actors have to have in common with the driver
LONGEST = 100  # characters of a setting in a message
Plan = CachePlan | DitCacheConfig


@dataclass(frozen=True)
class Job:
    """How rows are drawn.

    Args:
        load: a function without arguments that returns the pipeline, on its device; or where to find it,
            ``"package.module:function"`` or ``"path/to/file.py:function"``.
        plan: to cache with; ``None``: without a cache.
        options: keyword arguments of the pipeline's call, or of ``draw``, of JSON's types.
        draw: is called as ``draw(pipe, rows, **options)`` in place of the pipeline, and returns a sample for each row.
        encode: makes bytes of a sample, and tells their format: ``encode(sample) -> (bytes, "jpeg")``.
        batch_size: prompts that are drawn in one call.
        seed: what the seeds of rows that have none are made from.
        threads: of the processor that an actor computes with.
        home: the folder that ``load`` is looked up from, where it is a text.
        versions: of the driver.

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
                raise InvalidSetting(f"load={self.load!r} names no function: give 'package.module:function'")
        elif not callable(self.load):
            raise WrongType(f"load={self.load!r} cannot be called: give a function that returns the pipeline")
        if self.plan is not None and not isinstance(self.plan, (CachePlan, DitCacheConfig)):
            raise WrongType(f"plan={self.plan!r} is no plan: give a CachePlan, a DitCacheConfig, a file, or None")
        for name in ("draw", "encode"):
            if getattr(self, name) is not None and not callable(getattr(self, name)):
                raise WrongType(f"{name}={getattr(self, name)!r} cannot be called: give a function, or None")
        whole("batch_size", self.batch_size, 1)
        whole("seed", self.seed)
        self._check_options()

    def _check_options(self) -> None:
        if not isinstance(self.options, Mapping) or not all(isinstance(name, str) for name in self.options):
            raise WrongType(f"options={self.options!r} must be a dict of the call's keyword arguments by name")
        if self.draw is None and (own := sorted(set(OWN) & set(self.options))):
            raise InvalidSetting(
                f"options has {own[0]!r}, which comes from the rows: leave it out; for several pictures of a prompt, "
                "give it several rows, or give a function as draw"
            )
        for name, value in self.options.items():
            try:
                json.dumps(value, allow_nan=False)
            except (TypeError, ValueError) as error:
                raise type(error)(
                    f"options[{name!r}]={short(value)} cannot be kept beside what is drawn ({error}): give numbers, "
                    "texts, lists and dicts, or make it in a function given as draw"
                ) from None

    def purpose(self) -> dict[str, Any]:
        """What has to be the same where a job goes on, in JSON's types."""
        told = {
            "plan": None if self.plan is None else json.loads(self.plan.to_json()),
            "options": dict(self.options),
            "seed": self.seed,
            "batch_size": self.batch_size,
            "load": spelled(self.load),
            "draw": spelled(self.draw),
            "encode": spelled(self.encode),
        }
        found: dict[str, Any] = json.loads(json.dumps(told))
        return found

    def pipeline(self) -> Any:
        """What ``load`` returns; for an actor.

        Raises:
            ValueError: there is no such function.
        """
        return (self.load if callable(self.load) else _function(self.load, self.home))()

    def check_versions(self) -> None:
        """See that this process has the driver's versions, as far as pictures depend on them.

        Raises:
            RuntimeError: it has others.
        """
        here = versions_here()
        for name in SAME:
            # Less what follows a plus: a driver without an accelerator has another build of PyTorch
            ours, theirs = (each.get(name, "none").partition("+")[0] for each in (here, self.versions))
            if ours != theirs:
                raise RunMismatch(
                    f"{platform.node()} has {name} {ours}, and the driver {theirs}: install the same on all nodes"
                )


def plan_of(plan: Any) -> Plan | None:
    """A plan, given as such or as the path of a file that ``save`` wrote.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: it holds no plan.

    Example:
        >>> from dithooks.demo import PLANS
        >>> plan_of(PLANS / "2x.json").made.model
        'FluxTransformer2DModel'
    """
    if not isinstance(plan, (str, os.PathLike)):
        given: Plan | None = plan
        return given
    try:
        return read_file(plan, _read)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"plan={os.fspath(plan)!r}: there is no such file: give one that plan.save(path) wrote"
        ) from None


def versions_here() -> dict[str, str]:
    """Of this process: dithooks, torch, diffusers and Python."""
    from dithooks import __version__

    named = {"dithooks": __version__, "torch": str(torch.__version__), **versions("diffusers", "ray")}
    return {**named, "python": platform.python_version()}


def differences(stored: Mapping[str, Any], ours: Mapping[str, Any]) -> list[str]:
    """In what two settings differ, said in a few words each.

    Example:
        >>> differences({"seed": 0, "plan": None}, {"seed": 1, "plan": None})
        ['seed: 0 there, 1 here']
    """
    names = dict.fromkeys([*ours, *stored])
    return [
        f"{name}: {short(stored.get(name))} there, {short(ours.get(name))} here"
        for name in names
        if stored.get(name) != ours.get(name)
    ]


def spelled(function: Any) -> str | None:
    """What a function is called, the same in every process; ``None`` for ``None``.

    Example:
        >>> spelled(functools.partial(os.path.join, "a"))
        "posixpath:join('a')"
    """
    if function is None or isinstance(function, str):
        return function
    if isinstance(function, functools.partial):
        given = [repr(value) for value in function.args]
        given += [f"{name}={value!r}" for name, value in function.keywords.items()]
        text = f"{spelled(function.func)}({', '.join(given)})"
    elif hasattr(function, "__qualname__"):
        text = f"{function.__module__}:{function.__qualname__}"
    else:
        text = f"{type(function).__module__}:{type(function).__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", text)


def whole(name: str, value: object, least: int | None = None) -> None:
    """See that an argument is a whole number.

    Raises:
        TypeError, ValueError: it is not, or is less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise WrongType(f"{name}={value!r} must be a whole number")
    if least is not None and value < least:
        raise InvalidSetting(f"{name}={value} is too small: give {least} or more")


def short(value: Any) -> str:
    """A setting in a message; of a plan, its beginning and what tells it from others."""
    text = json.dumps(value, default=repr)
    if isinstance(value, dict) and value.get("kind") in KINDS:
        made = value.get("made") or {}
        pictures = "+".join("".join("○●"[bool(step)] for step in p["steps"]) for p in value.get("pieces", []))
        text = f"{value['kind']} {made.get('model', '')} {pictures}".strip() if pictures else text
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


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
            raise InvalidSetting(f"load={text!r}: there is no file {path} on {platform.node()}")
        folder, where = str(path.parent), path.stem
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise  # something that the module needs
        raise InvalidSetting(f"load={text!r}: there is no module {error.name!r} on {platform.node()}") from None
    function = getattr(module, name, None)
    if not callable(function):
        raise InvalidSetting(f"load={text!r}: {where} has no function {name!r}")
    made: Callable[[], Any] = function
    return made
