"""Pipelines that actors load in the tests of ``dithooks.ray``: small ones, that fail in every way when told to."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace

import ray
import torch
from toys import Ladder


class Slides:
    """Draws (8, 8, 3) pictures by four steps of a model of five blocks, and does what prompts of one word say.

    A word holds as long as a file of that name stands in ``folder``. Every call leaves a line in its ``log``.
    """

    def __init__(self) -> None:
        self.transformer = Ladder(5)

    def __call__(self, prompts, generator, folder, broken=None):
        folder = Path(folder)
        with (folder / "log").open("a") as file:
            file.write(f"{os.getpid()} {'+'.join(prompts)}\n")
        for word in prompts:
            if word in ERRORS and (folder / word).exists():
                ERRORS[word](folder)
        h = torch.stack([torch.rand(8, 8, 3, generator=each) for each in generator])
        for step in range(4):
            h = self.transformer(h, torch.tensor(1 - step / 4)) % 1
        return SimpleNamespace(images=list((h / h.amax()).numpy()))


def _ended(folder):
    os.kill(os.getpid(), signal.SIGKILL)


def _full(folder):
    raise torch.OutOfMemoryError("no memory left")


def _device(folder):
    (folder / "device").unlink()  # the next process fares better
    raise torch.AcceleratorError("the device has failed")


def _wrong(folder):
    raise LookupError("nothing to draw")


ERRORS = {"ended": _ended, "full": _full, "device": _device, "wrong": _wrong}


def load_slides():
    """The pipeline, as ``generate`` takes a function or where to find it."""
    return Slides()


def load_nothing():
    """As where weights are not there."""
    raise FileNotFoundError("there are no weights")


def resources(pipe, rows):
    """Draws what Ray has given the actor: processors, and parts of a GPU."""
    given = ray.get_runtime_context().get_assigned_resources()
    own = [given.get("CPU", 0), given.get("GPU", 0), torch.get_num_threads()]
    return [torch.tensor([*own, ord(row["letter"])], dtype=torch.float64) for row in rows]


def one_too_many(pipe, rows):
    """Draws another picture than asked."""
    return [torch.zeros(4)] * (len(rows) + 1)
