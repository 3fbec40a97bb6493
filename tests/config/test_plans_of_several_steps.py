"""Plans that were fitted for several numbers of steps: their form, their files, and what is refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from dithooks import CachePlan
from dithooks.config.provenance import Elsewhere, PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.errors import InvalidSetting, WrongType
from dithooks.policies.history import Schedule


def piece(steps, *others, **given):
    bits = tuple(step % 2 == 0 for step in range(steps))
    weights = tuple(None if bit else (1.0,) for bit in bits)
    sigmas = tuple(1 - step / steps for step in range(steps))
    return TransformerPlan("", 0, 3, 4, bits, weights, sigmas, others=others, **given)


FOUND = Provenance("2025-01-31", {"torch": "2.6.0"}, "CPU", 1, 1.5, "by search", 1.55, 0.02)
MADE = PlanTarget("Model", "0123456789abcdef", 4, "float32", 4, None, (64, 48))


def test_a_plan_without_others_is_written_as_before():
    text = CachePlan((piece(4),), MADE, FOUND).to_json()
    assert json.loads(text)["schema"] == 1
    assert "others" not in text
    assert "elsewhere" not in text


def test_a_plan_with_others_in_a_file():
    found = replace(FOUND, elsewhere=(Elsewhere(4, 50.25, 48.0), Elsewhere(6, math.inf), Elsewhere(8, None)))
    plan = CachePlan((piece(4, piece(6), piece(8)),), MADE, found)
    data = json.loads(plan.to_json())
    assert data["schema"] == 2
    assert [len(other["steps"]) for other in data["pieces"][0]["others"]] == [6, 8]
    assert CachePlan.from_json(plan.to_json()) == plan
    assert str(plan).split("\n")[3:6] == [
        "  at 4 steps: PSNR 50.25 dB; 48.00 dB with weights of the other numbers of steps",
        "  at 6 steps: PSNR inf dB",
        "  at 8 steps: it cannot be run",
    ]


def test_as_a_configuration():
    plan = CachePlan((piece(4, piece(6)),), MADE, FOUND)
    assert plan.config.when.for_run(Schedule(6)).steps == (1, 0, 1, 0, 1, 0)
    assert [len(other.coefficients) for other in plan.config.predictor.others] == [6]
    assert type(plan.config).from_json(plan.config.to_json()) == plan.config


@pytest.mark.parametrize(
    ("others", "error", "match"),
    [
        (1, WrongType, "others must be a tuple of TransformerPlan"),
        ((piece(4),), InvalidSetting, r"others are of \[4\] steps, beside 4"),
        ((piece(6), piece(6)), InvalidSetting, "one of each number"),
        ((replace(piece(6), path="other"),), InvalidSetting, "one of others has path='other', and not ''"),
        ((replace(piece(6), first=1),), InvalidSetting, "one of others has first=1, and not 0"),
        ((replace(piece(6), sigmas=None),), InvalidSetting, "sigmas is missing"),
        ((piece(6, piece(8)),), InvalidSetting, "others"),
        (tuple(piece(steps) for steps in range(5, 22)), InvalidSetting, "at most 16"),
    ],
)
def test_others_that_do_not_fit(others, error, match):
    with pytest.raises(error, match=match):
        replace(piece(4), others=others)


@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ([1], WrongType, "others"),
        ([{"steps": [1]}], InvalidSetting, "lacks"),
        ("x", WrongType, "others must be"),
        (None, WrongType, "others must be"),
    ],
)
def test_a_file_with_other_things(value, error, match):
    data = json.loads(CachePlan((piece(4, piece(6)),), MADE, FOUND).to_json())
    data["pieces"][0]["others"] = value
    with pytest.raises(error, match=match):
        CachePlan.from_json(json.dumps(data))


@pytest.mark.parametrize("given", [{"steps": 0}, {"psnr": "x"}, {"left_out": math.nan}, {"psnr": -math.inf}])
def test_what_is_no_measure(given):
    with pytest.raises((InvalidSetting, WrongType)):
        Elsewhere(**{"steps": 4, "psnr": 40.0, **given})


def test_what_is_no_list_of_measures():
    with pytest.raises(WrongType, match="elsewhere must be a tuple of Elsewhere"):
        replace(FOUND, elsewhere=(40.0,))
