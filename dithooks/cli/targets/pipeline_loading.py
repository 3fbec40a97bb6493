"""A pipeline of diffusers by its folder or id: found first, and loaded once all options have been checked."""

from __future__ import annotations

import importlib
import inspect
import re
import warnings
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...environment.accelerators import device_count
from ...environment.machine import accelerator
from ...environment.torch_api import OutOfMemoryError
from ...errors import TargetError, UsageError
from ...integrations.diffusers_bars import hidden_loading_bars
from ...integrations.diffusers_placeholders import missing_import, missing_packages
from ...progress_bars import is_terminal
from ...validation import shown
from ..messages import first_line
from ..required_packages import extra_needed
from .model_code import refuse_code
from .saved_json import read_object

DEMO = "demo"
SHIPPED = "EmojiPipeline"  # of dithooks.demo
FRAMES = ("num_frames", "video_length", "frames")  # what pipelines call the number of frames
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class PipelineSource:
    """A pipeline that can be loaded, such as that of the folder ``path/to/flux``.

    Args:
        title: the name on the command line.
        kind: the class of the pipeline.
        source: its folder or id; None for the pipeline that ships.
        is_trusted: whether code that it brings may run.
    """

    title: str
    kind: Any = field(repr=False)
    source: str | None
    is_trusted: bool = False

    @property
    def takes(self) -> Mapping[str, Any]:
        """The parameters of its call, with their defaults (``inspect.Parameter.empty`` for none)."""
        parameters = inspect.signature(self.kind.__call__).parameters.values()
        plain = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        return {each.name: each.default for each in parameters if each.kind in plain and each.name != "self"}

    @property
    def video(self) -> bool:
        """Whether it draws videos, judged by the parameters of its call."""
        return bool({*FRAMES, "num_videos_per_prompt"} & set(self.takes))

    @property
    def frames(self) -> str:
        """The name of the argument for the number of frames."""
        return next((name for name in FRAMES if name in self.takes), FRAMES[0])

    def load(self, device: torch.device, dtype: torch.dtype, quiet: bool = False) -> Any:
        """Load the pipeline to a device.

        Raises:
            TargetError: a component is missing or cannot be loaded, or the device's memory does not hold it.
        """
        try:
            pipe = self._load(dtype, quiet)
            pipe.set_progress_bar_config(disable=quiet)
            return pipe if device.type == "cpu" else pipe.to(device)
        except OutOfMemoryError as error:
            raise TargetError(f"{self.title} does not fit into the memory of {device}: {first_line(error)}") from error
        except (OSError, ValueError, ImportError) as error:  # diffusers' errors for a missing component
            raise TargetError(f"{self.title} cannot be loaded: {first_line(error)}") from error
        except NameError as error:
            if (lack := missing_import(error)) is None:
                raise
            raise TargetError(f"{self.title} cannot be loaded: {lack}") from error

    def _load(self, dtype: torch.dtype, quiet: bool) -> Any:
        if self.kind.__name__ == SHIPPED:
            from ...demo import WEIGHTS, load_pipeline

            pipe = load_pipeline(self.source or WEIGHTS)
            return pipe if dtype == torch.float32 else pipe.to(dtype)
        newer = not _diffusers().__version__.startswith("0.")  # older releases know the longer name only
        hidden = hidden_loading_bars() if quiet or not is_terminal() else nullcontext()
        with hidden, warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch_dtype.*", FutureWarning)
            trust = {"trust_remote_code": True} if self.is_trusted else {}
            return self.kind.from_pretrained(self.source, **{"dtype" if newer else "torch_dtype": dtype}, **trust)


def find_pipeline(name: str, trust_code: bool = False) -> PipelineSource:
    """Find a pipeline: ``demo``, the folder of a saved pipeline, or an id of the Hugging Face Hub.

    No weights are loaded; for an id, its ``model_index.json`` is fetched.

    Args:
        name: the pipeline's name on the command line.
        trust_code: whether code that it brings may run.

    Raises:
        TargetError: there is no such pipeline, it lacks a component, its class is not known here, or it brings code
            that is not trusted.
        UsageError: a package that it needs is missing.
    """
    if name == DEMO:
        return PipelineSource(name, _shipped(), None)
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
    kind = _class(name, index.get("_class_name"))
    if not trust_code:
        refuse_code(name, index, folder if folder.is_dir() else None)
    return PipelineSource(name, kind, name, trust_code)


def load_shipped() -> Any:
    """Load the demo's pipeline, in float32 on the CPU.

    Raises:
        UsageError: a package that it needs is missing.
    """
    _shipped()
    from ...demo import load_pipeline

    return load_pipeline()


def device_of(name: str) -> torch.device:
    """The device of a name; for ``"auto"``, the accelerator of this machine, or the CPU if there is none.

    Raises:
        UsageError: there is no such device.
    """
    there = accelerator()
    if name == "auto":
        return there or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(  # without its plug-in, PyTorch has no npu, not even by name
            f"--device is {name}, which PyTorch does not know here: give auto, cpu, or an accelerator by its name "
            "(cuda, cuda:1, npu, xpu, mps); dithooks env shows more"
        ) from error
    if device.type == "cpu":
        return device
    if there is None or device.type != there.type:
        raise UsageError(
            f"--device is {name}, but PyTorch sees {there or 'no accelerator'} here: dithooks env shows more"
        )
    if (device.index or 0) >= (count := device_count()):
        raise UsageError(f"--device is {name}, but there are {count}, from {device.type}:0 on")
    return device


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of a name; for None, float32 on the CPU and bfloat16 elsewhere."""
    return DTYPES[name or ("float32" if device.type == "cpu" else "bfloat16")]


def _index(folder: Path) -> Mapping[str, Any]:
    path = folder / "model_index.json"
    index = read_object(path)
    if not path.exists():
        single = (folder / "config.json").is_file()
        reason = (
            "it holds a single model (config.json): give the folder of its pipeline" if single else "it is no pipeline"
        )
        raise TargetError(f"{folder} has no model_index.json: {reason}")
    return index


def _check_parts(title: str, folder: Path, index: Mapping[str, Any]) -> None:
    for name, entry in index.items():
        if not isinstance(entry, list) or len(entry) != 2 or entry[0] is None or name.startswith("_"):
            continue
        if not (folder / name).is_dir():
            raise TargetError(
                f"{title} lacks the component {shown(name)} ({entry[1]}): there is no folder {folder / name}"
            )


def _fetched(name: str) -> Mapping[str, Any]:
    diffusers = _diffusers()
    try:
        index: Mapping[str, Any] = diffusers.DiffusionPipeline.load_config(name)
    except Exception as error:  # any error of the network, the hub or its client
        root: BaseException = error
        while root.__context__ is not None:  # the client's own message is that there is no such file
            root = root.__context__
        because = f"{first_line(error)} ({first_line(root)})" if root is not error else first_line(error)
        raise TargetError(f"{name} is no folder here, and could not be fetched from the hub: {because}") from error
    return index


def _class(title: str, name: object) -> Any:
    if name == SHIPPED:
        return _shipped()
    if not isinstance(name, str):
        raise TargetError(f"{title} names no class of diffusers ({shown(name)} in its model_index.json)")
    diffusers = _diffusers()
    kind = getattr(diffusers, name, None)
    if not isinstance(kind, type):
        raise TargetError(f"{title} is a {name}, which diffusers {diffusers.__version__} does not have")
    if lacking := missing_packages(kind):
        raise TargetError(f"{title} is a {name}, which needs {' '.join(lacking)} (pip install {' '.join(lacking)})")
    return kind


def _shipped() -> Any:
    with extra_needed("the demo needs", '"dithooks[demo]"'):
        from ...demo.pipeline import EmojiPipeline
    return EmojiPipeline


def _diffusers() -> Any:
    with extra_needed("pipelines need", '"dithooks[diffusers]"'):
        return importlib.import_module("diffusers")
