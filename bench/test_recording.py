"""What a recorded run costs beside a plain one, and how long planning takes for a model of FLUX's size.

``pytest bench/test_recording.py -s``. The shipped pipeline draws one and four captions in 28 steps, plain and recorded
in turns, so that both meet the same weather on the machine; the ratio of each pair counts, and its median is the
figure: of the run itself, its first call made twice included, and of the whole of ``record``, with the Gram matrices.
All tokens are kept. FLUX.1 at 1024² has 57 blocks of 4,608 tokens of 3,072 channels in bfloat16; what a run of 50 steps
leaves of it are here random numbers, as many as ``record`` keeps by default.
"""

from __future__ import annotations

import time
from statistics import median

import numpy as np
import pytest
import torch

from dithooks import Recording, plan, record
from dithooks.config.provenance import PlanTarget
from dithooks.demo import CALIBRATION, load_pipeline
from dithooks.environment.machine import machine
from dithooks.predictors.predictor import Moment
from dithooks.recording.record import MEMORY
from dithooks.recording.recorder import BRANCHES
from dithooks.recording.recording import Trace
from dithooks.recording.token_samples import Sampled, add_grams
from dithooks.recording.token_selection import SamplePoint

PAIRS = 9
BLOCKS, STEPS, TOKENS, CHANNELS = 57, 50, 4608, 3072


@pytest.mark.parametrize("captions", [1, 4])
def test_a_recorded_run(captions: int) -> None:
    (pipe := load_pipeline()).set_progress_bar_config(disable=True)

    def run(pipe: object) -> torch.Tensor:
        seeds = [torch.Generator().manual_seed(1000 + number) for number in range(captions)]
        return pipe(CALIBRATION[:captions], generator=seeds, output_type="pt").images

    run(pipe)
    runs, wholes = [], []
    for _ in range(PAIRS):
        begun = time.perf_counter()
        run(pipe)
        plain = time.perf_counter() - begun
        begun = time.perf_counter()
        recording = record(pipe, run)
        wholes.append((time.perf_counter() - begun) / plain)
        runs.append(recording.recorded_ms / 1e3 / plain)
    print(
        f"\n{captions} captions: recorded run {median(runs):.3f} of a plain one ({min(runs):.3f} … {max(runs):.3f}), "
        f"with Gram matrices {median(wholes):.3f}; {machine()}"
    )


def test_planning_for_flux() -> None:
    rows = int(MEMORY / (STEPS * BRANCHES * (BLOCKS + 1) * CHANNELS * 2))
    ids = torch.arange(1, rows + 1)
    points = [SamplePoint(block, "in", {}, {}, ids) for block in range(BLOCKS)] + [
        SamplePoint(BLOCKS - 1, "out", {}, {}, ids)
    ]
    torch.manual_seed(0)
    base, slope = torch.randn(2, BLOCKS + 1, rows, CHANNELS)
    calls = []
    for step in range(STEPS):
        states = base + step / STEPS * slope + 0.01 * torch.randn(BLOCKS + 1, rows, CHANNELS)
        calls.append([[state] for state in states.bfloat16()])
    times = np.linspace(1, 0.02, STEPS)
    sampled = Sampled(points, [Moment(step, float(t)) for step, t in enumerate(times)], calls)
    held = sum(stream.nbytes for call in calls for point in call for stream in point)
    ranges = [(first, last) for first in range(BLOCKS) for last in range(first, BLOCKS)]
    grams, squares = np.zeros((len(ranges), STEPS, STEPS)), np.zeros((BLOCKS, STEPS))
    begun = time.perf_counter()
    add_grams(sampled, range(BLOCKS), ranges, range(STEPS), grams, squares)
    took = [time.perf_counter() - begun]
    paths = tuple(f"blocks.{number}" for number in range(BLOCKS))
    trace = Trace(
        *("", paths, np.array(ranges), grams, np.sqrt(squares), np.arange(STEPS), times, "sigma", 1.0),
        *(np.ones(BLOCKS), float(BLOCKS), rows / TOKENS, {}),
    )
    made = PlanTarget("Flux", "random", BLOCKS, "bfloat16", STEPS, None, (TOKENS, 64))
    recording = Recording((trace,), made, tuple(times), 1, 1, float(BLOCKS * STEPS), float(BLOCKS * STEPS))
    for anchors in (2, 3):
        begun = time.perf_counter()
        plan(recording, 2.0, anchors=anchors)
        took.append(time.perf_counter() - begun)
    print(
        f"\nFLUX, {rows} tokens at {BLOCKS + 1} boundaries, {held / 1e6:.0f} MB of samples a branch; {len(ranges)} "
        f"ranges: Gram matrices {took[0]:.1f} s, a plan with two anchors {took[1]:.1f} s, with three {took[2]:.1f} s; "
        f"{machine()}"
    )
    assert sum(took) < 60
