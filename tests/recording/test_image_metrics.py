"""What runs return, as samples; and how near samples are, against figures by hand and NumPy written another way."""

import math
import sys

import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from dithooks.recording.image_metrics import CEILING, CHUNK, Score, compare, samples_of

PICTURE = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
UNIT = st.floats(0, 1, width=32)


def shapes(results):
    return [sample.shape for sample in samples_of(results)]


def noisy(shape, seed=0):
    return np.random.default_rng(seed).random(shape)


# -- what a run returns -----------------------------------------------------------------------------------------

RETURNED = {
    "pictures": ([Image.fromarray(PICTURE)] * 2, [(5, 4, 3)] * 2),
    "a picture": (Image.fromarray(PICTURE), [(5, 4, 3)]),
    "grey": ([Image.fromarray(PICTURE[..., 0])], [(5, 4)]),
    "of two sizes": ([PICTURE, PICTURE[:3]], [(5, 4, 3), (3, 4, 3)]),
    "a tuple": ((PICTURE, PICTURE), [(5, 4, 3)] * 2),
    "return_dict=False": (([Image.fromarray(PICTURE)] * 3,), [(5, 4, 3)] * 3),
    "return_dict=False, pt": ((torch.zeros(2, 3, 5, 4),), [(3, 5, 4)] * 2),
    "a batch": (np.zeros((2, 5, 4, 3)), [(5, 4, 3)] * 2),
    "a batch of videos": (torch.zeros(2, 7, 3, 5, 4), [(7, 3, 5, 4)] * 2),
    "latents": (torch.zeros(2, 16, 64), [(2, 16, 64)]),  # one sample: it might as well be a picture
    "a list of latents": ([torch.zeros(16, 64), torch.zeros(16, 64)], [(16, 64)] * 2),
    "videos": ([[Image.fromarray(PICTURE)] * 7] * 2, [(7, 5, 4, 3)] * 2),
    "videos as arrays": ([np.zeros((7, 5, 4, 3))] * 2, [(7, 5, 4, 3)] * 2),
    "videos as tensors": ([[torch.zeros(3, 5, 4)] * 7], [(7, 3, 5, 4)]),
    "of several calls": ([[PICTURE], [PICTURE]], [(1, 5, 4, 3)] * 2),
    "an output": (FluxPipelineOutput(images=[Image.fromarray(PICTURE)] * 2), [(5, 4, 3)] * 2),
    "an output, np": (FluxPipelineOutput(images=np.zeros((2, 5, 4, 3))), [(5, 4, 3)] * 2),
    "an output of frames": (WanPipelineOutput(frames=np.zeros((2, 7, 5, 4, 3))), [(7, 5, 4, 3)] * 2),
    "outputs": ([FluxPipelineOutput(images=[PICTURE] * 2), FluxPipelineOutput(images=[PICTURE])], [(5, 4, 3)] * 3),
}


@pytest.mark.parametrize("name", RETURNED)
def test_what_runs_return(name):
    results, expected = RETURNED[name]
    samples = samples_of(results)
    assert [sample.shape for sample in samples] == expected
    assert all(type(sample) is np.ndarray and sample.dtype == np.float32 for sample in samples)


def test_values_keep_their_scale():
    assert (samples_of([Image.fromarray(PICTURE)])[0] == PICTURE).all()
    assert (samples_of([torch.from_numpy(PICTURE)])[0] == PICTURE).all()
    assert samples_of([np.array([True, False])])[0].tolist() == [1, 0]
    paletted = Image.fromarray(PICTURE).convert("P", palette=Image.Palette.ADAPTIVE)
    assert np.abs(samples_of([paletted])[0] - PICTURE).max() < 8  # its colours, not their numbers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64])
def test_every_dtype(dtype):
    assert samples_of([torch.tensor([0, 1, 2], dtype=dtype)])[0].tolist() == [0, 1, 2]


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x], lambda x: [[x]]])
@pytest.mark.parametrize("kind", [np.asarray, torch.from_numpy])
def test_samples_are_copies(kind, wrap):
    memory = np.zeros((2, 3, 4, 4), np.float32)
    samples = samples_of(wrap(kind(memory)))
    memory += 1
    assert not any(sample.any() for sample in samples)


def test_gradients_and_strides_do_not_matter():
    with torch.enable_grad():
        tensor = torch.arange(6.0, requires_grad=True).reshape(2, 3) * 1
    assert samples_of([tensor.T])[0].tolist() == [[0, 3], [1, 4], [2, 5]]


class Ragged:
    def __array__(self, dtype=None, copy=None):
        return np.array([[1], [1, 2]], dtype=object)


@pytest.mark.parametrize(
    ("results", "error", "words"),
    [
        (None, ValueError, "returned None: it has to return what it draws"),
        ([], ValueError, "an empty list"),
        (((),), ValueError, "an empty list"),
        ([[]], ValueError, "leave it out"),
        (np.zeros((0, 3, 4, 4)), ValueError, "empty array"),
        ([np.zeros((0, 3))], ValueError, "empty array"),
        ("picture.png", TypeError, "'picture.png'.*str"),
        (["a.png", "b.png"], TypeError, "'a.png'.*a list of pictures"),
        ([b"png"], TypeError, "bytes"),
        ({"images": [PICTURE]}, TypeError, "dict"),
        (([PICTURE], None), TypeError, "NoneType"),
        (([PICTURE], [False]), TypeError, "False"),
        ((sample for sample in [PICTURE]), TypeError, "generator"),
        ([[PICTURE, PICTURE[:3]]], ValueError, r"shapes \(5, 4, 3\) and \(3, 4, 3\).*a sample of its own"),
        ([Ragged()], TypeError, "object.*one array each"),
        ([np.zeros(3, complex)], TypeError, "complex"),
        ([torch.zeros(3, dtype=torch.complex64)], TypeError, "complex"),
        (FluxPipelineOutput(images=None), TypeError, "FluxPipelineOutput"),
    ],
)
def test_what_cannot_be_compared(results, error, words):
    with pytest.raises(error, match=words):
        samples_of(results)


# -- figures ----------------------------------------------------------------------------------------------------


def score(found, reference):
    return compare([np.array(each, np.float32) for each in found], [np.array(each, np.float32) for each in reference])


@pytest.mark.parametrize(
    ("found", "reference", "psnr", "relative"),
    [
        ([0.6, 0.6], [0.5, 0.5], 20.0, 0.2),  # 10 lg (1² / 0.1²)
        ([10, 245], [0, 255], 28.130804, 20 / 255),  # 10 lg (255² / 10²)
        ([-1.6, 1.6], [-2, 2], 20.0, 0.2),  # 10 lg (4² / 0.4²)
        ([-0.9, 0.9], [-1, 1], 26.0206, 0.1),  # 10 lg (2² / 0.1²)
        ([0.5, 200.5], [0.5, 100.5], 3.0103, 100 / 101),  # 0…255, but not whole: 10 lg (100² / 5000)
        ([-5.0, -5.0], [-4, -4], 12.0412, 0.25),  # one value: that is its range
        ([0.0, 1.1], [0, 1.00005], 23.0148, 0.1),  # what a decoder leaves of 1
        ([3.0, 0.0], [0, 0], -6.5321, math.inf),  # black, and 4.5 of mean square
    ],
)
def test_figures_by_hand(found, reference, psnr, relative):
    got = score([found], [reference])
    assert got.psnr == got.worst == pytest.approx(psnr, abs=2e-3)
    assert got.relative_l1 == pytest.approx(relative, rel=2e-3)
    assert got.ssim is None


def test_the_peak_is_that_of_all_samples():
    """One sample is dark: zeros and ones, of 255."""
    got = score([[1, 0], [0, 255]], [[0, 1], [0, 255]])
    assert got.worst == pytest.approx(48.130804, abs=1e-5)
    assert got.psnr == pytest.approx((CEILING + 48.130804) / 2, abs=1e-5)


def test_latents_count_by_their_own_range():
    got = score([[-1.6, 1.6], [-16, 16]], [[-2, 2], [-20, 20]])
    assert (got.psnr, got.worst) == pytest.approx((20.0, 20.0), abs=1e-4)


def test_equal_samples():
    same = [noisy((8, 8, 3)).astype(np.float32), noisy((5, 9)).astype(np.float32)]
    got = compare(same, same)
    assert (got.psnr, got.worst, got.relative_l1) == (math.inf, math.inf, 0.0)
    assert got.ssim in (None, pytest.approx(1.0))


def test_one_equal_sample_does_not_make_the_mean_infinite():
    assert score([[0.5], [0.6]], [[0.5], [0.5]]).psnr == pytest.approx((CEILING + 20) / 2, abs=1e-4)
    assert score([[0.5], [0.5 + 1e-7]], [[0.5], [0.5]]).psnr == CEILING  # 140 dB, and not above what is equal


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_loses(bad):
    lost = score([[0.5, 0.5], [bad, 0.5]], [[0.5, 0.5], [0.5, 0.5]])
    assert lost == Score(-math.inf, -math.inf, math.inf, None)
    assert lost.psnr < score([[1e30, 1e30]] * 2, [[0.5, 0.5]] * 2).psnr


def test_the_standard_error_of_a_mean():
    """Of 20, 26 and 32 dB: they spread by 6, and their mean by 6/√3. One sample, or equal ones, have none."""
    reference = [np.zeros((2, 2)), np.zeros((2, 2)), np.ones((2, 2))]
    found = [reference[n] + sign * 10 ** (-level / 20) for n, sign, level in ((0, 1, 20), (1, 1, 26), (2, -1, 32))]
    score = compare(found, reference)
    assert (score.psnr, score.psnr_error) == (pytest.approx(26.0), pytest.approx(6 / math.sqrt(3)))
    assert compare(found[:1], reference[:1]).psnr_error is None
    assert compare(reference, reference).psnr_error is None
    assert compare([found[0] * math.nan, *found[1:]], reference).psnr_error is None


def test_a_sample_larger_than_a_chunk():
    reference = np.zeros(CHUNK + 3, np.float32)
    found = reference.copy()
    reference[-1], found[-1] = 1, 0.5
    got = compare([found], [reference])
    assert got.psnr == pytest.approx(10 * math.log10((CHUNK + 3) / 0.25))
    assert got.relative_l1 == 0.5


@pytest.mark.parametrize(
    ("found", "reference", "words"),
    [
        ([], [], "no reference"),
        ([[0.5]], [[0.5], [0.5]], "1 samples with the cache and 2 without"),
        ([[0.5], [0.5]], [[0.5], [0.5, 0.5]], r"sample 1 has shape \(1,\) with the cache and \(2,\) without"),
        ([[0.5]], [[math.nan]], "sample 0 .* is not finite"),
    ],
)
def test_what_does_not_match(found, reference, words):
    with pytest.raises(ValueError, match=words):
        score(found, reference)


@st.composite
def pairs(draw):
    sizes = draw(st.lists(hnp.array_shapes(max_dims=3, max_side=5), min_size=1, max_size=3))
    return tuple([draw(hnp.arrays(np.float32, size, elements=UNIT)) for size in sizes] for _ in range(2))


@settings(deadline=None, max_examples=60)
@given(pairs())
def test_psnr_and_l1_as_numpy_has_them(both):
    found, reference = both
    got = compare(found, reference)
    errors = [np.mean((a.astype(np.float64) - b) ** 2) for a, b in zip(found, reference, strict=True)]
    with np.errstate(divide="ignore"):
        each = np.minimum(-10 * np.log10(errors), CEILING)
    a, b = (np.concatenate([sample.ravel() for sample in each]).astype(np.float64) for each in (found, reference))
    if (a == b).all():
        assert got.psnr == got.worst == math.inf
        return
    assert got.psnr == pytest.approx(each.mean(), abs=1e-9)
    assert got.worst == pytest.approx(each.min(), abs=1e-9)
    assert got.worst <= got.psnr + 1e-9
    assert got.relative_l1 == pytest.approx(np.abs(a - b).sum() / np.abs(b).sum() if b.any() else math.inf)


@settings(deadline=None, max_examples=40)
@given(pairs(), st.floats(1.0, 4.0))
def test_worse_is_lower(both, factor):
    found, reference = ([each.astype(np.float64) for each in samples] for samples in both)
    further = [b + (a - b) * factor for a, b in zip(found, reference, strict=True)]
    near, far = compare(found, reference), compare(further, reference)
    assert far.psnr <= near.psnr + 1e-9
    assert far.relative_l1 >= near.relative_l1 - 1e-9


@settings(deadline=None, max_examples=40)
@given(hnp.arrays(np.uint8, (2, 4, 4, 3)), hnp.arrays(np.uint8, (2, 4, 4, 3)))
def test_pictures_count_the_same_in_either_scale(found, reference):
    reference[0, 0, 0] = 255  # or there may be nothing but zeros and ones
    bytes_ = compare(samples_of(found), samples_of(reference))
    floats = compare(samples_of(found / 255), samples_of(reference / 255))
    if math.isfinite(bytes_.psnr):
        assert bytes_.psnr == pytest.approx(floats.psnr, abs=1e-3)
    assert bytes_.relative_l1 == pytest.approx(floats.relative_l1, rel=1e-3)


# -- structural similarity --------------------------------------------------------------------------------------


def similarity(a, b, span, side=7):
    """Wang et al., with means over square windows that lie inside, of pictures (height, width, channels)."""
    windows = [np.lib.stride_tricks.sliding_window_view(x, (side, side), axis=(0, 1)) for x in (a, b)]
    mean_a, mean_b = (w.mean(axis=(-2, -1)) for w in windows)
    shares = side * side / (side * side - 1)
    var_a, var_b = (shares * w.var(axis=(-2, -1)) for w in windows)
    both = shares * ((windows[0] * windows[1]).mean(axis=(-2, -1)) - mean_a * mean_b)
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    top = (2 * mean_a * mean_b + c1) * (2 * both + c2)
    return (top / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))).mean()


class TestSsim:
    @pytest.fixture(autouse=True)
    def _installed(self):
        pytest.importorskip("skimage")

    @pytest.mark.parametrize("span", [1, 255, 2])
    def test_as_numpy_has_it(self, span):
        a, b = noisy((20, 16, 3)), noisy((20, 16, 3), 1)
        a = (a + b) / 2
        if span == 255:
            a, b = np.rint(a * 255), np.rint(b * 255)
        if span == 2:
            a, b = a * 2 - 1, b * 2 - 1
        assert compare([a], [b]).ssim == pytest.approx(similarity(a, b, span), abs=1e-9)

    def test_forms_of_a_picture(self):
        a, b = noisy((20, 16, 3)), noisy((20, 16, 3), 1)
        expected = similarity(a, b, 1)
        assert compare([a.transpose(2, 0, 1)], [b.transpose(2, 0, 1)]).ssim == pytest.approx(expected)
        for form in (lambda x: x[..., 0], lambda x: x[..., :1], lambda x: x[..., 0][None]):
            assert compare([form(a)], [form(b)]).ssim == pytest.approx(similarity(a[..., :1], b[..., :1], 1))

    @pytest.mark.parametrize("first", [False, True])
    def test_of_a_video_is_the_mean_over_frames(self, first):
        a, b = noisy((4, 9, 8, 3)), noisy((4, 9, 8, 3), 1)
        expected = np.mean([similarity(x, y, 1) for x, y in zip(a, b, strict=True)])
        if first:
            a, b = a.transpose(0, 3, 1, 2), b.transpose(0, 3, 1, 2)
        assert compare([a], [b]).ssim == pytest.approx(expected)

    def test_of_samples_is_the_mean(self):
        a, b = noisy((2, 9, 8, 3)), noisy((2, 9, 8, 3), 1)
        expected = (similarity(a[0], b[0], 1) + similarity(a[1][:7], b[1][:7], 1)) / 2
        assert compare([a[0], a[1][:7]], [b[0], b[1][:7]]).ssim == pytest.approx(expected)

    @pytest.mark.parametrize(("height", "side"), [(6, 5), (5, 5), (4, 3), (3, 3)])
    def test_small_pictures_take_a_smaller_window(self, height, side):
        a, b = noisy((height, 9, 3)), noisy((height, 9, 3), 1)
        assert compare([a], [b]).ssim == pytest.approx(similarity(a, b, 1, side))

    @pytest.mark.parametrize(
        "reference",
        [
            noisy((2, 9, 3)),  # too small
            noisy((16, 9, 8)),  # channels, but of no picture
            noisy(40),
            noisy((16, 64)) * 6 - 3,  # latents
            noisy((16, 1, 8, 8)) * 6 - 3,
        ],
    )
    def test_what_is_no_picture_has_none(self, reference):
        assert compare([reference], [reference]).ssim is None
        picture = np.clip(noisy((9, 9, 3)), 0, 1)
        assert compare([picture, reference], [picture, reference]).ssim is None

    def test_is_left_out_where_it_is_not_installed(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "skimage.metrics", None)
        picture = noisy((9, 9, 3))
        assert compare([picture], [picture]).ssim is None
