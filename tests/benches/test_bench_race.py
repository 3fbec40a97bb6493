"""The animation of both ways to draw: at each moment the steps that are done by then, for as long as measured."""

import json
import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from bench.race import AFTER, BEFORE, GRID, LEAST, MARGIN, TOP, Times, animate, durations, main, moments, read
from dithooks.demo import load_plan

DOCS = Path(__file__).parents[2] / "docs"
PLAIN, CACHED = (0.3, 0.62, 0.95), (0.25, 0.255, 0.61)
TIMES = Times("here", (0.0, 0.0), 1, "3x", (True, False, True), PLAIN, CACHED, 50.0)


def shown(path):
    """(second, picture) of each frame, from the moment when the race begins."""
    second, found = -BEFORE, []
    with Image.open(path) as film:
        for number in range(film.n_frames):
            film.seek(number)
            found.append((second, film.convert("RGB").copy()))
            second += film.info["duration"] / 1000
    return found, second


def test_each_frame_shows_the_steps_that_are_done(tmp_path):
    """The picture after step n is a grey of its own, on either side."""
    greys = [torch.full((4, 3, 32, 32), step * 85 / 255) for step in range(4)]
    animate(TIMES, [greys, greys], tmp_path / "race.png")
    frames, end = shown(tmp_path / "race.png")
    assert end == pytest.approx(PLAIN[-1] + AFTER, abs=0.011)
    for second, picture in frames:
        now = second + 0.006  # times are of hundredths
        for left, ends in ((MARGIN, PLAIN), (MARGIN + GRID + 36, CACHED)):
            done = sum(each <= now for each in ends)
            level = picture.getpixel((left + 40, TOP + 40))
            assert max(abs(each - 85 * done) for each in level) <= 3, (second, left)


def test_no_frame_is_shorter_than_a_browser_shows():
    """Of two steps that end at nearly one time, the later moment shows both."""
    found = moments(TIMES)
    assert min(b - a for a, b in pairwise(found)) >= LEAST - 1e-9
    assert 0.255 in found
    assert 0.25 not in found
    assert found[-1] == PLAIN[-1]
    milliseconds = durations(found)
    assert all(each % 10 == 0 and each >= 10 for each in milliseconds)
    assert sum(milliseconds) == round(1000 * (BEFORE + PLAIN[-1] + AFTER))


def test_it_can_be_made(tmp_path):
    main(["--out", str(tmp_path / "race.png"), "--steps", "3", "--runs", "1"])
    times = read(tmp_path / "race.json")
    assert len(times.plain) == len(times.cached) == 3
    assert sorted(times.plain) == list(times.plain)
    with Image.open(tmp_path / "race.png") as film:
        assert film.n_frames >= 3


def test_what_is_committed_belongs_together():
    times, plan = read(DOCS / "race.json"), load_plan("3x")
    assert times.plan == "3x"
    assert times.computed == tuple(map(bool, plan.pieces[0].steps))
    assert times.runs >= 5
    assert json.loads((DOCS / "race.json").read_text())["speedup"] == round(times.plain[-1] / times.cached[-1], 3)
    assert (DOCS / "race.png").stat().st_size <= 1_000_000
    _, end = shown(DOCS / "race.png")
    assert math.isclose(end, times.plain[-1] + AFTER, abs_tol=0.02)
