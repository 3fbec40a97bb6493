"""Requests that arrive, wait, end and are cancelled at random: each is drawn as it is alone, and its plan followed."""

import pytest

from bench.checks.rows import Drawer, Server

PAIRS = [(model, guidance) for model in ("FLUX", "Wan", "SD3") for guidance in ("one batch", "two calls")]


@pytest.mark.parametrize(("model", "guidance"), [*PAIRS, ("QwenImage", "one batch")])
def test_random_arrivals(model, guidance):
    seed = 3 + PAIRS.index((model, guidance)) if (model, guidance) in PAIRS else 0
    tally = Server(Drawer(model, guidance, seed, count=3, steps=(12,)), seed, rate=0.7).run(6)
    assert tally.drawn + tally.cancelled == 6
    assert (tally.wrong, tally.miscounted, tally.notes) == (0, 0, [])
    assert tally.run < 0.7 * tally.due


def test_thirty_two_requests_of_three_plans():
    tally = Server(Drawer("FLUX", "off", seed=5, count=3, steps=(28,)), seed=5, rate=0.6).run(32)
    assert tally.drawn + tally.cancelled == 32
    assert (tally.wrong, tally.miscounted, tally.notes) == (0, 0, [])
