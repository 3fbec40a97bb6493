"""Processes that are killed while they save: what is left has to be the old file, or the new one, whole."""

import os
import random
import signal
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from dithooks import CachePlan, DitCacheConfig, Mask, Recording, plot
from dithooks.cli.media import write_frames
from dithooks.cli.output_files import write_json
from dithooks.compat.msmodelslim.adaptor_configs import DitCacheConfig as SlimConfig
from dithooks.config.safe_json import read_file, strict
from dithooks.demo import load_plan
from dithooks.storage.replacement import is_draft, replacing
from dithooks.tuning.journal import Journal
from hostile_files.samples import MEASURES, PURPOSE, recording

LONGEST = 0.03  # seconds before a process is killed, counted from its first save


@dataclass(frozen=True)
class Saving:
    """A kind of file: how its first and its second state are saved, and what tells which of them a file is in."""

    file: str
    save: object  # (path, state 0 or 1)
    state: object  # (path) -> 0 or 1, or an error


def _plan_saving():
    plans = [load_plan("2x"), load_plan("3x")]
    return Saving("plan.json", lambda path, n: plans[n].save(path), lambda path: plans.index(CachePlan.load(path)))


def _config_saving():
    configs = [DitCacheConfig(policy=Mask((1, *[n] * 20_000))) for n in (0, 1)]
    return Saving(
        "c.json", lambda path, n: configs[n].save(path), lambda path: configs.index(DitCacheConfig.load(path))
    )


def _slim_saving():
    configs = [SlimConfig(n, 2, 0, 3) for n in (0, 1)]
    return Saving("s.json", lambda path, n: configs[n].save(path), lambda path: configs.index(SlimConfig.load(path)))


def _recording_saving():
    recordings = [replace(recording(20, 6), run_ms=float(n)) for n in (0, 1)]
    return Saving("r.npz", lambda path, n: recordings[n].save(path), lambda path: int(Recording.load(path).run_ms))


def _journal_saving():
    recordings = [replace(recording(20, 6), run_ms=float(n)) for n in (0, 1)]
    samples = [np.full((64, 64, 3), 0.5, np.float32)] * 4

    def save(path, n):
        path.mkdir(exist_ok=True)
        journal = Journal.open(path, PURPOSE)
        journal.keep_recording(recordings[n], samples)
        journal.keep_evaluation(f"plan {n}", MEASURES)

    def state(path):
        kept = Journal.open(path, PURPOSE)
        found = kept.recording()
        assert all((a == b).all() for a, b in zip(found.results, samples, strict=True))
        assert kept.evaluation("plan 0") == kept.evaluation("plan 1") == MEASURES
        return int(found.run_ms)

    return Saving("journal", save, state)


def _json_saving():
    numbers = [{"values": [n] * 20_000} for n in (0, 1)]
    return Saving("n.json", lambda path, n: write_json(path, numbers[n]), lambda path: _state(path, numbers))


def _state(path, numbers):
    return numbers.index(read_file(path, strict))


def _picture_saving(name, frames):
    colours = ["black", "white"]
    noise = [Image.effect_noise((200, 200), 60) for _ in range(frames)]
    pictures = [[*noise, Image.new("L", (200, 200), colour)] for colour in colours]

    def save(path, n):
        with replacing(path) as draft:
            write_frames(draft, pictures[n], 16.0)

    def state(path):
        with Image.open(path) as picture:
            picture.seek(getattr(picture, "n_frames", 1) - 1)
            picture.load()
            assert getattr(picture, "n_frames", 1) == frames + 1
            return int(np.asarray(picture.convert("L")).mean() > 127)

    return Saving(name, save, state)


def _plot_saving():
    figures = [plot.steps(load_plan(name)) for name in ("2x", "3x")]
    whole = []

    def state(path):
        if not whole:
            for n, figure in enumerate(figures):
                plot.save(figure, path.with_name(f"{n}.svg"))
                whole.append(path.with_name(f"{n}.svg").read_bytes())
        return whole.index(path.read_bytes())

    return Saving("p.svg", lambda path, n: plot.save(figures[n], path), state)


SAVINGS = {
    "plan": _plan_saving,
    "configuration": _config_saving,
    "msmodelslim's configuration": _slim_saving,
    "recording": _recording_saving,
    "journal": _journal_saving,
    "numbers of a command": _json_saving,
    "picture": lambda: _picture_saving("p.png", 0),
    "animation": lambda: _picture_saving("p.gif", 5),
    "plot": _plot_saving,
}


def in_place(saving):
    """The same, as it would be without drafts: the file is emptied, and written part by part."""
    states = {}

    def save(path, n):
        if n not in states:
            saving.save(path, n)
            states[n] = path.read_bytes()
        with path.open("wb", buffering=0) as file:
            for start in range(0, len(states[n]), part := 1 + len(states[n]) // 8):
                file.write(states[n][start : start + part])

    return replace(saving, save=save)


def killed(saving, folder, times, seed=0):
    """Kill a process that saves, again and again, and return what was wrong with the file afterwards.

    Args:
        saving: the kind of file.
        folder: where it is saved.
        times: how many processes are killed.
        seed: of the moments.
    """
    path, draw, wrong = Path(folder) / saving.file, random.Random(seed), []
    saving.save(path, 1)
    saving.save(path, 0)
    for number in range(times):
        _kill(saving, path, draw.uniform(0, LONGEST))
        try:
            saving.state(path)
        except Exception as error:
            wrong.append(f"{number}: {type(error).__name__}: {str(error)[:100]}")
            saving.save(path, 0)
        for each in Path(folder).rglob(".*"):
            if is_draft(each.name):
                each.unlink()
    return wrong


def _kill(saving, path, delay):
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(told, b".")
            for number in range(100_000):
                saving.save(path, number % 2)
        finally:
            os._exit(1)
    os.read(ready, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(ready)
    os.close(told)
    assert os.WIFSIGNALED(status), "it ended by itself, so that nothing was tried"
