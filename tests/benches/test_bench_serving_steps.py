"""The bench of the server that batches by step: what it compares, worked out by hand, and its page."""

from itertools import accumulate

import pytest

pytest.importorskip("diffusers")

from bench import serving_steps
from bench.serving_steps import OURS, SINGLE, STATIC, UNCACHED, WAYS, Run, Static, compared, page, poisson, serve
from dithooks import CachePlan, DitCacheConfig, Mask, handle_of
from dithooks.blocks.block_lists import fingerprint
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import load_pipeline
from dithooks.recording.record import recordable

# One minute each: 100 pictures of which half of the blocks run, 50 of which all do; of 60 s, 48 in blocks.
RUNS = {
    OURS: Run(OURS, 100, 60.0, 60.0, 40.0, 3000, 100, [float(n) for n in range(1, 101)]),
    UNCACHED: Run(UNCACHED, 50, 60.0, 60.0, 48.0, 3000, 200, [2.0] * 50),
    SINGLE: Run(SINGLE, 100, 60.0, 60.0, 40.0, 3000, 1500, [192.0] * 100),
    STATIC: Run(STATIC, 100, 60.0, 60.0, 40.0, 3000, 200, [3.0] * 100),
}


def test_what_a_run_comes_to():
    row = RUNS[OURS].row
    assert row["pictures_per_second"] == pytest.approx(100 / 60)
    assert row["cpu_per_picture"] == pytest.approx(0.6)
    assert (row["p50"], row["p95"]) == (50.5, 96.0)
    assert (row["blocks_per_picture"], row["rows_per_call"]) == (30, 30)


def test_what_the_plan_allows():
    """Blocks are 80 % of the time, half of them is left: 60 % of the time, which is 1.67 × as fast."""
    found = compared(RUNS)
    assert found["blocks_left"] == pytest.approx(0.5)
    assert found["allowed"] == pytest.approx(1 / 0.6)
    assert found["faster"] == found["faster_by_cpu"] == pytest.approx(2.0)
    assert found["of_allowed"] == pytest.approx(1.2)
    assert found["p95_over_single"] == pytest.approx(0.5)


def test_how_many_arrive():
    """One of two cores was taken: at most 100 pictures a minute could be drawn, and 50 are."""
    base = Run(UNCACHED, 50, 60.0, 60.0, 48.0, 3000, 200, [2.0] * 50)
    assert serving_steps.rates_of(base, 2) == pytest.approx({"saturated": 4 * 100 / 60, "busy": 40 / 60})


def test_arrivals_are_those_of_a_poisson_process():
    """Of their rate; as many in one half of the time as in the other, but for chance; and the same each time."""
    gaps = poisson(4.0, 20_000, 1)
    assert sum(gaps) / len(gaps) == pytest.approx(0.25, rel=0.03)
    assert sum(gap > 0.25 for gap in gaps) / len(gaps) == pytest.approx(0.3679, abs=0.01)  # 1 / e
    times = list(accumulate(gaps))
    assert sum(time < times[-1] / 2 for time in times) / len(times) == pytest.approx(0.5, abs=0.02)
    assert gaps == poisson(4.0, 20_000, 1) != poisson(4.0, 20_000, 2)


@pytest.fixture(scope="module")
def pipe():
    loaded = load_pipeline()
    del loaded.transformer.transformer_blocks[1:], loaded.transformer.single_transformer_blocks[1:]
    loaded.set_progress_bar_config(disable=True)
    return loaded


@pytest.mark.parametrize("way", WAYS)
def test_every_way_runs_what_its_plan_says(way, pipe, monkeypatch):
    """Of each picture two rows a step pass two blocks: at four steps, or with the plan at two of them."""
    monkeypatch.setattr(serving_steps, "STEPS", 4)
    chains = recordable(pipe, None)
    made = PlanTarget("Emoji", fingerprint(chains), 2, "float32", 4, None, (64, 48))
    piece = TransformerPlan("", 0, 2, 2, (1, 0, 1, 0), (None, (1.0,), None, (1.0,)), None)
    plan = CachePlan((piece,), made, Provenance("2026-11-30", {}, "CPU", 1, 2.0, "by hand", 2.0, 0.01))
    monkeypatch.setattr(serving_steps, "load_plan", lambda _: plan)
    run = serve(way, pipe, [0.0, 0.01, 0.0])
    assert (run.pictures, len(run.latencies)) == (3, 3)
    assert run.row["blocks_per_picture"] == (4 if way == UNCACHED else 2) * 2 * 2
    assert 0 < run.row["share_in_blocks"] < 1
    assert min(run.latencies) > 0


def test_static_batches_end_when_they_are_closed(pipe, monkeypatch):
    monkeypatch.setattr(serving_steps, "STEPS", 4)
    server = Static(pipe, DitCacheConfig(policy=Mask((1, 0, 1, 0))))
    asked = [server.submit("sun", seed, steps=4) for seed in range(3)]
    server.close()
    assert [each.result(0).size for each in asked] == [(32, 32)] * 3
    assert handle_of(pipe.transformer) is None


def test_the_page():
    load = {
        "name": "saturated",
        "rate": 4.0,
        "ways": {way: run.row for way, run in RUNS.items()},
        "ratios": compared(RUNS),
        "range": [1.1, 1.3],
    }
    figures = {
        "command": "python -m bench.serving_steps",
        "machine": "a machine",
        "versions": {"diffusers": "0"},
        "requests": 100,
        "rounds": 3,
        "loads": [load],
        "shares": {"blocks": 0.75},
    }
    text = page(figures)
    assert "## Saturated: 4.00 arrivals per second" in text
    assert f"| {OURS} | 1.67 | 0.600 | 50.50 | 96.00 | 30 | 30.0 |" in text
    assert "the plan allows 1.67 ×. Reached of that: 1.20 (1.10 … 1.30 by round)" in text
    assert "| blocks | 75.0% |" in text
