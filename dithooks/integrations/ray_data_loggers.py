"""The loggers of Ray Data, which have private names."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

NAMES = ("progress", "execution.streaming_executor", "execution.operators.map_operator")


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """Silence Ray Data's warnings about settings that are intended."""
    loggers = [logging.getLogger(f"ray.data._internal.{name}") for name in NAMES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
