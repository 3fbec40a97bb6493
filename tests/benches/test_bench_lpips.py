"""The learned metric of the comparison: its arithmetic by hand, and what is kept where it is not installed."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from bench.compare import lpips, quality


def test_a_blur_by_hand():
    """A binomial window of three at every second place, borders mirrored without being doubled."""
    picture = torch.arange(25.0).reshape(5, 5).square()
    padded = np.pad(picture.numpy(), 2, mode="reflect")
    window = np.outer([1, 2, 1], [1, 2, 1]) / 16
    wanted = [[(padded[y : y + 3, x : x + 3] * window).sum() for x in range(0, 7, 2)] for y in range(0, 7, 2)]
    made = lpips.blurred(picture.expand(1, 2, 5, 5))
    assert made.shape == (1, 2, 4, 4)
    np.testing.assert_allclose(made[0, 1], wanted, rtol=1e-6)


def test_a_distance_by_hand(monkeypatch):
    """Channels (3, 4) and (4, 3) are (0.6, 0.8) and (0.8, 0.6); with weights 1 and 2 that is 0.04 + 2 · 0.04."""
    a, b = (torch.tensor(each).reshape(1, 2, 1, 1).expand(1, 2, 3, 3) for each in ([3.0, 4.0], [8.0, 6.0]))
    monkeypatch.setattr(lpips, "features", lambda known, x: [x, a])
    weight = torch.tensor([1.0, 2.0]).reshape(1, 2, 1, 1)
    known = {"lin0.model.1.weight": weight, "lin1.model.1.weight": weight}
    assert lpips.distance(known, a, b).tolist() == pytest.approx([0.12])


def test_small_pictures_are_scaled_up_and_large_ones_left():
    """To 64 pixels a side, and from 0…1 to −1…1."""
    assert lpips.prepared(torch.ones(2, 3, 32, 28)).unique().tolist() == [1]
    assert lpips.prepared(torch.ones(2, 3, 32, 28)).shape == (2, 3, 64, 64)
    assert lpips.prepared(torch.full((1, 3, 80, 70), 0.25)).unique().tolist() == [-0.5]
    assert lpips.prepared(torch.zeros(1, 3, 80, 70)).shape == (1, 3, 80, 70)


@pytest.mark.parametrize("shapes", [((1, 1, 64, 64), (1, 1, 64, 64)), ((1, 3, 64, 64), (2, 3, 64, 64))])
def test_what_is_no_pair_of_pictures_is_refused(shapes):
    """Grey ones, and another number."""
    with pytest.raises(ValueError, match=r"two \(n, 3, height, width\)"):
        lpips.lpips(*map(torch.zeros, shapes))


def test_grey_pictures_and_clips(monkeypatch):
    """A grey one has three equal channels; a clip has the mean of its frames, each told apart."""
    seen = []

    def brightness(a, b):
        seen.append(a)
        return (a - b).mean((1, 2, 3))

    monkeypatch.setattr(lpips, "lpips", brightness)
    grey = torch.rand(4, 1, 8, 8)
    assert quality.lpips(grey, grey - 0.5) == pytest.approx((0.5,) * 4)
    assert torch.equal(seen[0], torch.cat([grey, grey, grey], dim=1))
    clips = torch.zeros(2, 3, 3, 8, 8)
    clips[1] += torch.tensor([1.0, 2, 6])[:, None, None, None]
    assert quality.lpips(clips, torch.zeros_like(clips)) == (0, 3)


def test_without_the_package_nothing_is_measured(monkeypatch):
    """Everything else is."""

    def missing(*_):
        raise ModuleNotFoundError("No module named 'stlpips_pytorch'")

    monkeypatch.setattr(lpips, "weights", missing)
    picture = torch.rand(1, 3, 32, 32)
    found = quality.compare(picture, picture, picture, picture)
    assert found.lpips is None
    assert found.psnr == (quality.EQUAL,)


@pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs stlpips-pytorch")
def test_what_the_authors_network_says():
    """Of a ramp, and of the same one darker and turned: figures of ``stlpips_pytorch.stlpips.LPIPS`` itself."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    made = lpips.lpips(ramp.expand(3, -1, -1, -1), torch.cat([ramp, ramp / 2, ramp.mT]))
    assert made.tolist() == pytest.approx((0, 0.268161, 0.359589), abs=1e-5)
