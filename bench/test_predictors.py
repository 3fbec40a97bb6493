"""What a forecast adds to a reused step: ``pytest bench/test_predictors.py -s``.

The residual of a reused step is made of those kept, and added to what enters the range; with plain reuse the latter is
all. Kinds are timed in turns, so that all meet the same weather on the machine.
"""

import statistics
import time

import pytest
import torch

from dithooks.engine.anchor import Anchor, weighted_sum
from dithooks.environment.machine import machine
from dithooks.predictors.polynomial import Linear, Reuse, Taylor
from dithooks.predictors.predictor import Moment

ROUNDS = 30
KINDS = {"Reuse": Reuse(), "Linear": Linear(), "Taylor(2)": Taylor(2)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.inference_mode()
def test_a_reused_step_of_flux_size(dtype, benchmark):
    """4,096 tokens of 3,072 channels, as in a picture of 1,024 × 1,024."""
    h = torch.randn(1, 4096, 3072).to(dtype)
    moments = [Moment(step, 1 - step / 28) for step in (7, 5, 4)]
    anchors = [Anchor.keep(moment, (), [torch.randn(1, 4096, 3072).to(dtype)], None, None) for moment in moments]
    times = {kind: [] for kind in KINDS}

    def turn():
        for kind, predictor in KINDS.items():
            begin = time.perf_counter()
            weights = predictor.weights(moments, Moment(9, 1 - 9 / 28))
            (delta,) = weighted_sum(anchors[: len(weights)], weights)
            _ = h + delta
            times[kind].append(time.perf_counter() - begin)

    benchmark.pedantic(turn, rounds=ROUNDS, warmup_rounds=3)
    plain = statistics.median(times["Reuse"])
    ratios = {
        kind: statistics.median(b / a for a, b in zip(times["Reuse"], each, strict=True))
        for kind, each in times.items()
    }
    benchmark.extra_info.update(ratios=ratios, reuse_ms=1e3 * plain)
    shown = ", ".join(f"{kind} {ratio:.2f}×" for kind, ratio in ratios.items())
    print(f"\n{dtype}: Reuse {1e3 * plain:.1f} ms for {h.nbytes / 2**20:.0f} MiB; {shown}; {machine()}")
