"""msmodelslim's DitCacheAdaptor: what its search finds, what its four numbers can say, and how it runs by itself.

Its search says which configurations to try, and ``dit_cache`` runs them: with equal numbers the same blocks run and the
same comes out (``bench/test_parity.py``), but models that call their blocks by keyword, or have two lists, or ask the
model twice a step, are not beyond it then.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.compare.subject import LISTS, Subject, counting, lists
from bench.peers.peer import Attached, Method, Spent, clock
from dithooks import DitCacheConfig, dit_cache

RATIOS = (1.3, 1.6, 2.0)  # 1.3 is its default and 2 the most that it takes
INTERVALS = (2, 3, 4, 5)
BY = "run by dithooks"


class Runner:
    """Draws what an adaptor has set, as its user's callback; its constructor, which wraps blocks, is left out."""

    def __init__(self, subject: Subject, ratio: float, interval: int) -> None:
        from msmodelslim.pytorch.multi_modal.dit_cache import DitCacheAdaptor, DitCacheSearchConfig

        self.subject, self.runs = subject, 0
        blocks = sum(map(len, lists(subject.pipe.transformer)))
        self.adaptor = object.__new__(DitCacheAdaptor)
        self.adaptor.search_config = DitCacheSearchConfig(ratio, blocks, subject.steps, interval)
        self.adaptor.pipeline = subject.pipe
        self.adaptor._temp_cache_dir = None

    def __call__(self, _: Any) -> list[NDArray[np.uint8]]:
        """Videos (frames, height, width, 3); a picture is one of one frame."""
        self.runs += 1
        config = self.adaptor.dit_cache_config
        cached = dit_cache(self.subject.pipe, static(config), verify=False) if self.adaptor.enable_cache else None
        with cached or nullcontext():
            pictures = self.subject.pictures(self.subject.draw(self.subject.calibration))
        frames = pictures if pictures.ndim == 5 else pictures[:, None]
        frames = frames.expand(-1, -1, 3, -1, -1).mul(255).round().byte()
        pixels: NDArray[np.uint8] = frames.permute(0, 1, 3, 4, 2).contiguous().numpy()
        return list(pixels)


def static(config: Any) -> DitCacheConfig:
    """Its four numbers are dithooks' own."""
    return DitCacheConfig(**dict(config))


@contextmanager
def searched(subject: Subject, ratio: float) -> Iterator[Attached]:
    """What its search finds at the first interval at which it does not refuse."""
    transformer, begun, runs, refusal = subject.pipe.transformer, time.perf_counter(), 0, ValueError("no interval")
    with counting(transformer) as whole:
        subject.draw(subject.calibration)
    for interval in INTERVALS:
        runner = Runner(subject, ratio, interval)
        try:
            with counting(transformer) as work, elsewhere():
                found = static(runner.adaptor.search(runner, prompts_num=len(subject.calibration)))
        except ValueError as error:
            refusal = error
            continue
        finally:
            runs += runner.runs
        spent = Spent(work.executions(whole) / len(whole.done), time.perf_counter() - begun, runs)
        with dit_cache(subject.pipe, found):
            yield Attached(shown=in_words(found), spent=spent, by=BY)
        return
    raise refusal


def in_words(config: DitCacheConfig) -> str:
    last = config.cache_block_start + (config.cache_num_blocks or 0) - 1
    return (
        f"blocks {config.cache_block_start}–{last}, every {config.cache_step_interval} steps "
        f"from step {config.cache_step_start}"
    )


@contextmanager
def elsewhere() -> Iterator[None]:
    """In a folder that is gone in the end: the adaptor keeps its videos where it is called."""
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            yield
        finally:
            os.chdir(here)


@contextmanager
def every(subject: Subject, interval: int) -> Iterator[Attached]:
    """Its four numbers, all blocks and from the first step."""
    config = DitCacheConfig(0, interval, 0, sum(map(len, lists(subject.pipe.transformer))))
    with dit_cache(subject.pipe, config):
        yield Attached(shown=in_words(config), by=BY)


@contextmanager
def native(subject: Subject, interval: int) -> Iterator[Attached]:
    """By itself, as its user writes it; it can't be taken off again."""
    from msmodelslim.pytorch.multi_modal.dit_cache import DitCacheAdaptor, DitCacheSearchConfig

    transformer = subject.pipe.transformer
    name = next(name for name in LISTS if hasattr(transformer, name))
    blocks = len(getattr(transformer, name))
    config = DitCacheSearchConfig(dit_block_num=blocks, num_sampling_steps=subject.steps)
    adaptor = DitCacheAdaptor(subject.pipe, config, dit_block_path=f"transformer.{name}")
    numbers = {"cache_step_start": 0, "cache_step_interval": interval, "cache_block_start": 0}
    adaptor.update_cache_config(**numbers, cache_num_blocks=blocks)
    with clock(subject, lambda now: DitCacheAdaptor.set_timestep_idx(now.step)):
        yield Attached(shown=f"transformer.{name}, every {interval} steps")


def methods() -> list[Method]:
    """Its search, its static intervals, and these by itself."""
    library = f"msmodelslim {version('msmodelslim')}"
    return [
        Method(library, "search", "cache_ratio", RATIOS, searched),
        Method(library, "all blocks", "interval", INTERVALS, every),
        Method(library, "all blocks, by itself", "interval", INTERVALS[:2], native),
    ]
