"""The bench of tiers: no picture is in two of its sets, and its page says what was found."""

import pytest
from config.test_plan_tiers import PLANS

pytest.importorskip("diffusers")

from bench import tiers
from bench.compare.emoji import CALIBRATION, TEST, Emoji


def test_no_caption_stands_twice():
    """Not in what is searched by, promised by and compared with."""
    ours, others = tiers.halves(Emoji(), quick=False)
    captions = [case.prompt for case in (*ours, *others)]
    assert len({*captions, *CALIBRATION}) == len(captions) + len(CALIBRATION)
    assert set(TEST) <= {case.prompt for case in others}
    assert (len(ours), len(others)) == (144, 144)
    assert len({case.seed for case in (*ours, *others)}) == 288


def test_what_is_chosen():
    """35 dB is just too much for the fast one; 80 dB for all."""
    found = {each["asked"]: each for each in tiers.choices(PLANS)}
    assert found["fastest at ≥ 30 dB"]["tier"] == "fast"
    assert found["fastest at ≥ 40 dB"]["tier"] == "medium"
    assert found["fastest at ≥ 60 dB"]["tier"] == "high"
    assert "the best is 'high'" in found["fastest at ≥ 80 dB"]["error"]


def test_the_page():
    row = {
        "tier": "2x",
        "fewer_blocks": 2.0,
        "mean_of_search": 47.0,
        "promised_by_search": 45.04,
        "mean": 41.5,
        "promised": 41.0,
        "promised_worst": 30.0,
        "measured": [40.5, 40.0, 41.0],
        "measured_worst": 29.0,
    }
    found = {"date": "2026-11-30", "machine": "CPU", "calibration": 16, "promise": 144, "test": 144}
    found |= {"run_equivalents": 9.5, "tiers": [row], "choices": [{"asked": "x", "error": "none fits"}]}
    page = tiers.page(found)
    assert "| 2x | 2.00× | 45.0 dB (47.0) | 41.0 dB (41.5) | 40.5 dB (40.0 … 41.0) | -0.50 dB | 30.0, 29.0 dB |" in page
    assert "| `x` | none: none fits |" in page
