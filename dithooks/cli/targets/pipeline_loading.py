"""A pipeline of diffusers by its folder or id: looked at first, loaded when all else is known to be right."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...environment.machine import accelerator
from ...errors import TargetError

DEMO = "demo"
SHIPPED = "EmojiPipeline"  # of dithooks.demo
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Named:
    """A pipeline that is there to be loaded.

    Args:
        title: what was asked for.
        kind: its class.
        source: folder or id; ``None``: the pipeline that ships.
    """

    title: str
    kind: Any = field(repr=False)
    source: str | None

    @property
    def takes(self) -> Mapping[str, Any]:
        """What its call takes, with the defaults; the empty parameter where one has none."""
        parameters = inspect.signature(self.kind.__call__).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {each.name: each.default for each in parameters if each.kind in plain and each.name != "self"}

    @property
    def video(self) -> bool:
        """Whether it draws more than one frame, by what its call takes."""
        return bool({"num_frames", "video_length", "num_videos_per_prompt"} & set(self.takes))

    def load(self, device: torch.device, dtype: torch.dtype, quiet: bool = False) -> Any:
        """Its weights, on a device.

        Raises:
            TargetError: a component is missing or cannot be loaded, or the device's memory does not hold it.
        """
        try:
            pipe = self._load(dtype, quiet)
            pipe.set_progress_bar_config(disable=quiet)
            return pipe if device.type == "cpu" else pipe.to(device)
        except torch.OutOfMemoryError as error:
            raise TargetError(f"{self.title} does not fit into the memory of {device}: {_line(error)}") from error
        except (OSError, ValueError, ImportError) as error:  # diffusers' own words for what is missing
            raise TargetError(f"{self.title} cannot be loaded: {_line(error)}") from error

    def _load(self, dtype: torch.dtype, quiet: bool) -> Any:
        if self.kind.__name__ == SHIPPED:
            from ...demo import WEIGHTS, load_pipeline

            pipe = load_pipeline(self.source or WEIGHTS)
            return pipe if dtype == torch.float32 else pipe.to(dtype)
        newer = not _diffusers().__version__.startswith("0.")  # before, it has the longer name, and says otherwise
        with _bars(not quiet), warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            return self.kind.from_pretrained(self.source, **{"dtype" if newer else "torch_dtype": dtype})


def find_pipeline(name: str) -> Named:
    """What a name means: ``demo``, the folder of a saved pipeline, or an id of the Hugging Face Hub.

    No weights are loaded; of an id, its ``model_index.json`` is fetched.

    Raises:
        TargetError: no pipeline, one that lacks a component, or one whose class is not known here.
    """
    if name == DEMO:
        return Named(name, _shipped(), None)
    folder = Path(name)
    if folder.is_dir():
        index = _index(folder)
        _check_parts(name, folder, index)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        index = _fetched(name)
    else:
        raise TargetError(
            f"there is no folder {name}: give {DEMO}, the folder of a pipeline, or an id such as owner/name"
        )
    return Named(name, _class(name, index.get("_class_name")), name)


def load_shipped() -> Any:
    """The demo's pipeline, in float32 on the CPU.

    Raises:
        TargetError: a package that it needs is missing.
    """
    _shipped()
    from ...demo import load_pipeline

    return load_pipeline()


def device_of(name: str) -> torch.device:
    """A device by its name, or, for ``"auto"``, the accelerator that is there, else the CPU.

    Raises:
        TargetError: it is not there.
    """
    there = accelerator()
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise TargetError(  # without its plug-in, PyTorch has no npu, not even by name
            f"--device is {name}, which PyTorch does not know here: give auto, cpu, or an accelerator by its name "
            "(cuda, cuda:1, npu, xpu, mps); dithooks env says more"
        ) from error
    if device.type == "cpu":
        return device
    if there is None or device.type != there.type:
        raise TargetError(
            f"--device is {name}, but PyTorch sees {there or 'no accelerator'} here: dithooks env says more"
        )
    if (device.index or 0) >= (count := torch.accelerator.device_count()):
        raise TargetError(f"--device is {name}, but there are {count}, from {device.type}:0 on")
    return device


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """A dtype by its name; left out, float32 on the CPU and bfloat16 elsewhere."""
    return DTYPES[name or ("float32" if device.type == "cpu" else "bfloat16")]


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Whether diffusers and transformers show how far the loading is."""
    loggings = [importlib.import_module("diffusers.utils.logging")]
    if importlib.util.find_spec("transformers") is not None:
        loggings.append(importlib.import_module("transformers.utils.logging"))
    on = [each for each in loggings if not shown and each.is_progress_bar_enabled()]
    for each in on:
        each.disable_progress_bar()
    try:
        yield
    finally:
        for each in on:
            each.enable_progress_bar()


def _index(folder: Path) -> Mapping[str, Any]:
    path = folder / "model_index.json"
    if not path.is_file():
        single = (folder / "config.json").is_file()
        said = (
            "it holds a single model (config.json): give the folder of its pipeline" if single else "it is no pipeline"
        )
        raise TargetError(f"{folder} has no model_index.json: {said}")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TargetError(f"{path} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise TargetError(f"{path} holds no JSON object")
    return index


def _check_parts(title: str, folder: Path, index: Mapping[str, Any]) -> None:
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None or name.startswith("_"):
            continue
        if not (folder / name).is_dir():
            raise TargetError(f"{title} lacks the component {name!r} ({entry[1]}): there is no folder {folder / name}")


def _fetched(name: str) -> Mapping[str, Any]:
    diffusers = _diffusers()
    try:
        index: Mapping[str, Any] = diffusers.DiffusionPipeline.load_config(name)
    except Exception as error:  # whatever the network, the hub and its client have to say
        root: BaseException = error
        while root.__context__ is not None:  # what the client says first is that there is no such file
            root = root.__context__
        because = f"{_line(error)} ({_line(root)})" if root is not error else _line(error)
        raise TargetError(f"{name} is no folder here, and could not be fetched from the hub: {because}") from error
    return index


def _class(title: str, name: object) -> Any:
    if name == SHIPPED:
        return _shipped()
    if not isinstance(name, str):
        raise TargetError(f"{title} names no class of diffusers ({name!r} in its model_index.json)")
    diffusers = _diffusers()
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise TargetError(f"{title} is a {name}, which diffusers {diffusers.__version__} does not have")
    if backends := getattr(kind, "_backends", None):  # a stand-in for a class that cannot be imported
        lacking = [each for each in backends if importlib.util.find_spec(each) is None] or backends
        raise TargetError(f"{title} is a {name}, which needs {' '.join(lacking)} (pip install {' '.join(lacking)})")
    return kind


def _shipped() -> Any:
    try:
        return importlib.import_module("dithooks.demo.pipeline").EmojiPipeline
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package == "dithooks":
            raise  # a fault of ours, not a package that is missing
        raise TargetError(f'the demo needs {package}: pip install "dithooks[demo]"') from error


def _diffusers() -> Any:
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        if error.name != "diffusers":
            raise
        raise TargetError('pipelines need diffusers: pip install "dithooks[diffusers]"') from error


def _line(error: BaseException) -> str:
    """The first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
