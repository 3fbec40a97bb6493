"""Tiers as a picture: what each promises."""

import math

import pytest
from config.test_plan_tiers import FAST, MEDIUM, SLOW, tier

from dithooks import PlanTiers

pytest.importorskip("matplotlib")

from dithooks import plot

BEATEN = tier((1, 1, 0, 0), 1.8, 44.0)


class TestTiers:
    def test_marks_are_promises(self):
        """By hand: a mark at each speed and mean, a line down to the worst, and those joined that none beats."""
        figure = plot.tiers(PlanTiers({"high": SLOW, "medium": MEDIUM, "fast": FAST, "beaten": BEATEN}))
        (panel,) = figure.axes
        marks = sorted(tuple(each.get_offsets()[0]) for each in panel.collections)
        assert marks == [(1.3, 60.0), (1.8, 44.0), (1.9, 45.0), (3.5, 34.99)]
        front, *lines = [list(zip(*line.get_data(), strict=True)) for line in panel.lines]
        assert front == [(1.3, 60.0), (1.9, 45.0), (3.5, 34.99)]
        assert sorted(lines) == [[(1.3, 20.0), (1.3, 60.0)], [(1.9, 35.0), (1.9, 45.0)], [(3.5, 30.0), (3.5, 34.99)]]
        assert sorted(text.get_text() for text in panel.texts) == ["beaten", "fast", "high", "medium"]

    def test_pictures_that_are_the_same(self):
        """They stand above the best other, which the axis says."""
        (panel,) = plot.tiers(PlanTiers({"same": tier((1, 1, 0, 1), 1.2, math.inf), "fast": FAST})).axes
        assert sorted(tuple(each.get_offsets()[0]) for each in panel.collections) == [(1.2, 39.99), (3.5, 34.99)]
        assert panel.get_ylabel().endswith("(at 40: identical)")

    def test_what_cannot_be_drawn(self):
        with pytest.raises(TypeError, match="tiers takes PlanTiers"):
            plot.tiers(SLOW)
        with pytest.raises(ValueError, match="no PSNR was measured"):
            plot.tiers(PlanTiers({"a": tier((1, 1, 0, 1), 1.2)}))
