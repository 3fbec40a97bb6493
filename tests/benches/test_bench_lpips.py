"""The learned metric of the comparison: of which tensors it is taken, and what is kept where it is not installed."""

import learned_metric
import pytest
import torch

from bench.compare import quality


def test_grey_pictures_and_clips(monkeypatch):
    """A grey one has three equal channels; a clip has the mean of its frames, each told apart."""
    seen = []

    def brightness(a, b):
        seen.append(a)
        return (a - b).mean((1, 2, 3))

    monkeypatch.setattr(quality.learned, "lpips", brightness)
    grey = torch.rand(4, 1, 8, 8)
    assert quality.lpips(grey, grey - 0.5) == pytest.approx((0.5,) * 4)
    assert torch.equal(seen[0], torch.cat([grey, grey, grey], dim=1))
    clips = torch.zeros(2, 3, 3, 8, 8)
    clips[1] += torch.tensor([1.0, 2, 6])[:, None, None, None]
    assert quality.lpips(clips, torch.zeros_like(clips)) == (0, 3)


def test_without_the_package_nothing_is_measured(monkeypatch):
    """Everything else is."""
    learned_metric.missing(monkeypatch)
    picture = torch.rand(1, 3, 32, 32)
    found = quality.compare(picture, picture, picture, picture)
    assert found.lpips is None
    assert found.psnr == (quality.EQUAL,)
