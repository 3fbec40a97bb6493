"""The measure of plans elsewhere than they were fitted: what is drawn, the plan without its fit, and the table."""

import json
from dataclasses import asdict

import pytest
import torch

pytest.importorskip("diffusers")

from bench.compare.emoji import Emoji
from bench.compare.fashion import Fashion
from bench.transfer import Row, Setting, by_the_line, former_rows, table
from dithooks import CachePlan, DitCacheConfig, Linear, Mask
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan

MADE = PlanTarget("Net", "0" * 16, 4, "float32", 4, "Euler", (8,))
FOUND = Provenance("2026-11-30", {}, "CPU", 1, 1.3, "by hand", 1.3, 0.01)
WEIGHTS = (None, None, (1.5, -0.5), None)


@pytest.mark.parametrize("kind", [Emoji, Fashion])
def test_a_size_is_drawn_with_its_own_noise(kind):
    """At the usual size it is that of the pipeline's generators, and at another one pictures have that size."""
    subject, seeds = kind(), [torch.Generator().manual_seed(7)]
    case = subject.test[0]._replace(seed=7)
    usual = subject.pipe([case.prompt], num_inference_steps=2, generator=seeds, output_type="latent").images
    assert torch.equal(subject.draw([case], 2), usual)
    Setting(1.0, 40).put(subject)
    assert subject.pictures(subject.draw([case], 2)).shape[-2:] == (40, 40)
    Setting.usual(subject).put(subject)
    assert torch.equal(subject.draw([case], 2), usual)


def test_a_plan_without_its_fit_keeps_its_schedule():
    residual = CachePlan((TransformerPlan("transformer", 1, 2, 4, (1, 1, 0, 1), WEIGHTS, None),), MADE, FOUND)
    assert by_the_line(residual) == DitCacheConfig(
        cache_block_start=1, cache_num_blocks=2, policy=Mask((1, 1, 0, 1)), predictor=Linear()
    )
    output = TransformerPlan("transformer", 0, 4, 4, (1, 1, 0, 1), WEIGHTS, None, payload="output")
    assert by_the_line(CachePlan((output,), MADE, FOUND)) == DitCacheConfig(
        policy=Mask((1, 1, 0, 1)), predictor=Linear(), payload="output"
    )


def test_rows_are_kept_and_stand_in_order(tmp_path):
    rows = [
        Row("emoji", "28 steps, guidance 5", {"mixed": [50.0, 40.0], "the line": [30.0, 31.0]}, "guidance"),
        Row("emoji", "24 steps", {"fitted there": [44.0]}),
    ]
    assert former_rows(None) == former_rows(tmp_path) == []
    (tmp_path / "transfer.json").write_text(json.dumps([asdict(row) for row in rows]))
    assert former_rows(tmp_path) == rows
    assert table(rows).splitlines()[-2:] == [
        "| emoji | 24 steps | 44.0 / 44.0 |  |  |  |  |  |",
        "| emoji | 28 steps, guidance 5 |  |  |  | 45.0 / 40.0 |  | 30.5 / 30.0 |",
    ]
