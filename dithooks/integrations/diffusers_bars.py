"""The progress bars of diffusers and transformers, hidden for a while where others are shown."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from ..blocks.adapter import BlockAdapter

LOGGINGS = ("diffusers.utils.logging", "transformers.utils.logging")


@contextmanager
def hidden_bars(target: object) -> Iterator[None]:
    """Hide the bar that a pipeline shows of its sampling steps; afterwards it is as it was.

    Args:
        target: a pipeline, or an adapter with one; another target has no bar.
    """
    pipe: Any = target.pipe if isinstance(target, BlockAdapter) else target
    if not callable(getattr(pipe, "set_progress_bar_config", None)):
        yield
        return
    pipe = getattr(pipe.set_progress_bar_config, "__self__", pipe)  # of a wrapper, the pipeline that it hands on to
    had = "_progress_bar_config" in vars(pipe)
    before = vars(pipe).get("_progress_bar_config")
    pipe.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if had:
            pipe._progress_bar_config = before
        else:
            with suppress(AttributeError):
                del pipe._progress_bar_config


@contextmanager
def hidden_loading_bars() -> Iterator[None]:
    """Hide the bars of loading, of those of the two libraries that are imported; afterwards they are as they were."""
    on = [
        module
        for module in (sys.modules.get(name) for name in LOGGINGS)
        if module is not None and module.is_progress_bar_enabled()
    ]
    hub: Any = sys.modules.get("huggingface_hub.utils")  # transformers' switch is that of the hub, too
    were_off = hub is not None and hub.are_progress_bars_disabled()
    for module in on:
        module.disable_progress_bar()
    try:
        yield
    finally:
        for module in on:
            module.enable_progress_bar()
        if were_off:
            hub.disable_progress_bars()
