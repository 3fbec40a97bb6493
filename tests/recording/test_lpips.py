"""LPIPS: its arithmetic by hand, the samples that it is measured of, and what is said where its package is missing."""

import math
from importlib.util import find_spec

import learned_metric
import numpy as np
import pytest
import torch

from dithooks.errors import MissingPackage
from dithooks.recording import lpips
from dithooks.recording.image_metrics import check_metrics, compare

GREY = pytest.approx(0, abs=1e-6)


@pytest.fixture
def _installed(tmp_path, monkeypatch):
    learned_metric.installed(tmp_path, monkeypatch)


def flat(*colour, shape=(16, 12)):
    return np.broadcast_to(np.array(colour, np.float32), (*shape, len(colour))).copy()


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


@pytest.mark.usefixtures("_installed")
class TestSamples:
    """Red and green 0.8 and 0.9, or the other way round, are directions (0.6, 0.8) and (0.8, 0.6): 0.12 apart."""

    @pytest.mark.parametrize(
        "form",
        [
            lambda picture: picture,
            lambda picture: np.rint(200 * picture),  # 160 and 180 of 255
            lambda picture: 2 * picture - 1,
            lambda picture: np.moveaxis(picture, -1, 0),
            lambda picture: np.concatenate([picture, picture[..., :1]], -1),  # transparency, which is left out
        ],
        ids=["in 0…1", "in 0…255", "in −1…1", "channels first", "with transparency"],
    )
    def test_pictures(self, form):
        # A corner that differs in no direction says what the scale is
        one, other = flat(0.8, 0.9, 0.1), flat(0.9, 0.8, 0.1)
        found = compare([form(one), form(one)], [form(one), form(other)], ("lpips",))
        if form(one).max() > 1:  # 160 and 180 are 0.627 and 0.706: (0.525, 0.851)
            low, high = 2 * 160 / 255 - 1, 2 * 180 / 255 - 1
            apart = (high - low) / math.hypot(low, high)
        else:
            apart = 0.2
        assert found.lpips == pytest.approx((0 + 3 * apart**2) / 2, rel=1e-4)

    def test_a_video_has_the_mean_of_its_frames(self):
        one, other = flat(0.8, 0.9, 0.0), flat(0.9, 0.8, 0.0)
        found = compare([np.stack([one, one, other, one])], [np.stack([one, other, one, one])], ("psnr", "lpips"))
        assert found.lpips == pytest.approx(0.12 / 2, rel=1e-4)

    def test_grey_pictures_have_three_equal_channels(self):
        assert compare([flat(0.9)[..., 0]], [flat(0.8)[..., 0]], ("lpips",)).lpips == GREY
        assert compare([flat(0.9)[..., 0]], [flat(0.2)[..., 0]], ("lpips",)).lpips == pytest.approx(1.5, rel=1e-3)

    def test_batches_are_no_larger_than_they_may_be(self, monkeypatch):
        """And each picture has its own distance all the same."""
        seen, real = [], lpips.distance
        monkeypatch.setattr(lpips, "distance", lambda known, a, b: seen.append(a.shape) or real(known, a, b))
        monkeypatch.setattr(lpips, "BATCH", 2 * 64 * 96)
        one, other = (torch.tensor(each).reshape(1, 3, 1, 1) for each in ([0.8, 0.9, 0], [0.9, 0.8, 0]))
        a = torch.cat([one, other, one, other, one]).expand(-1, -1, 48, 96)
        made = lpips.lpips(a, one.expand(5, -1, 48, 96))
        assert [shape[0] for shape in seen] == [2, 2, 1]
        assert made.tolist() == pytest.approx([0, 0.12, 0, 0.12, 0], abs=1e-6)

    def test_only_where_it_is_named(self, monkeypatch):
        monkeypatch.setattr(lpips, "features", None)
        assert compare([flat(0.8, 0.9, 0.0)], [flat(0.9, 0.8, 0.0)], ("psnr", "ssim")).lpips is None

    def test_latents_have_none(self):
        """Nor has a sample that is not finite."""
        latents = np.random.default_rng(0).normal(size=(16, 16, 3)) * 9
        assert compare([latents + 1], [latents], ("lpips",)).lpips is None
        assert compare([np.full((4, 4, 3), np.nan)], [np.zeros((4, 4, 3))], ("lpips",)).lpips is None


class TestMetrics:
    def test_without_the_package(self, monkeypatch):
        learned_metric.missing(monkeypatch)
        with pytest.raises(MissingPackage, match=r"needs stlpips-pytorch, .*: pip install 'dithooks\[lpips\]'"):
            check_metrics(("psnr", "lpips"))
        assert check_metrics(["psnr", "ssim"]) == ("psnr", "ssim")

    @pytest.mark.parametrize(("metrics", "said"), [("lpips", "names of metrics"), (3, "names"), (("fid",), "'fid'")])
    def test_what_are_none(self, metrics, said):
        with pytest.raises((TypeError, ValueError), match=said):
            check_metrics(metrics)


@pytest.mark.skipif(find_spec("stlpips_pytorch") is None, reason="needs stlpips-pytorch")
def test_what_the_authors_network_says():
    """Of a ramp, and of the same one darker and turned: figures of ``stlpips_pytorch.stlpips.LPIPS`` itself."""
    ramp = torch.linspace(0, 1, 64).expand(1, 3, 64, 64)
    made = lpips.lpips(ramp.expand(3, -1, -1, -1), torch.cat([ramp, ramp / 2, ramp.mT]))
    assert made.tolist() == pytest.approx((0, 0.268161, 0.359589), abs=1e-5)
