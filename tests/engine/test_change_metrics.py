"""How much has changed: against NumPy, by pieces, and where there are no numbers."""

import math

import pytest
import torch
from policies_by_hand import (
    rate_by_hand,
    ratio_by_hand,
)

from dithooks.engine import change_metrics
from dithooks.engine.change_metrics import OutputChangeEstimate, RelativeChange

pytestmark = pytest.mark.core


def look(gauge, seen):
    return gauge.look([seen])


def note(gauge, seen, output):
    gauge.note([seen], None if output is None else [output])


SHAPES = [(3, 7, 5), (1, 4, 6), (2, 3, 4, 5, 6), (4, 9)]


@pytest.mark.parametrize("how", ["mean", "max"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
class TestGauges:
    """The sums are of up to 720 numbers in float32: well within 1e-5."""

    def test_change(self, shape, dtype, how):
        gauge = RelativeChange(how)
        scale = torch.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))  # samples that differ
        one, two, three = (torch.randn(shape) for _ in range(3))
        one, two, three = (one * scale).to(dtype), (one * scale + 0.3 * two).to(dtype), (three * 2).to(dtype)
        assert look(gauge, one) is None
        note(gauge, one, one)
        seen = look(gauge, two)
        assert (seen.shape, seen.dtype) == ((), torch.float32)
        assert float(seen) == pytest.approx(ratio_by_hand(two, one, how), rel=1e-5)
        note(gauge, two, None)  # reused: the reference stays
        assert float(look(gauge, three)) == pytest.approx(ratio_by_hand(three, one, how), rel=1e-5)
        note(gauge, three, three)
        assert float(look(gauge, two)) == pytest.approx(ratio_by_hand(two, three, how), rel=1e-5)
        assert gauge.nbytes == three.numel() * three.element_size()
        gauge.clear()
        assert (look(gauge, two), gauge.nbytes) == (None, 0)

    def test_rate(self, shape, dtype, how):
        gauge = OutputChangeEstimate(how)
        wide = (*shape[:-1], shape[-1] + 2)  # the output may have another form
        scale = torch.arange(1.0, shape[0] + 1).reshape(-1, *[1] * (len(shape) - 1))
        x = [(torch.randn(shape) * scale).to(dtype) for _ in range(6)]
        y = [(torch.randn(wide) / scale).to(dtype) for _ in range(6)]
        note(gauge, x[0], y[0])
        assert look(gauge, x[1]) is None  # a rate takes two
        note(gauge, x[1], y[1])
        seen = look(gauge, x[2])
        assert (seen.shape, seen.dtype) == ((), torch.float32)
        assert float(seen) == pytest.approx(rate_by_hand(x[2], x[1], x[1], y[1], x[0], y[0], how), rel=1e-5)
        note(gauge, x[2], None)  # reused: from here the next change of the input is counted
        assert float(look(gauge, x[3])) == pytest.approx(
            rate_by_hand(x[3], x[2], x[1], y[1], x[0], y[0], how), rel=1e-5
        )
        note(gauge, x[3], None)
        note(gauge, x[4], y[4])
        assert float(look(gauge, x[5])) == pytest.approx(
            rate_by_hand(x[5], x[4], x[4], y[4], x[1], y[1], how), rel=1e-5
        )
        gauge.clear()
        assert (look(gauge, x[2]), gauge.nbytes) == (None, 0)
        note(gauge, x[2], y[2])
        assert look(gauge, x[3]) is None


class TestSeveralStreams:
    """Each is compared with itself; the one that changed most counts."""

    SCALES = (1000.0, 0.001)  # the second is smaller by far, and changes more

    def moved(self):
        before = [scale * torch.randn(2, 6, 3) for scale in self.SCALES]
        parts = zip(before, self.SCALES, (0.01, 0.5), strict=True)
        return before, [old + share * scale * torch.randn(2, 6, 3) for old, scale, share in parts]

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_change(self, how):
        before, now = self.moved()
        gauge = RelativeChange(how)
        gauge.note(before, before)
        wanted = [ratio_by_hand(*pair, how) for pair in zip(now, before, strict=True)]
        assert wanted[1] > 10 * wanted[0]
        assert float(gauge.look(now)) == pytest.approx(wanted[1], rel=1e-5)

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_ranks_that_have_some_of_the_tokens_each(self, how):
        """With ``"mean"`` as if one had them all; with ``"max"`` the largest of any rank's samples."""
        before, now = self.moved()
        ranks = []
        for tokens in (slice(0, 2), slice(2, 6)):
            gauge = RelativeChange(how)
            gauge.note([each[:, tokens] for each in before], [each[:, tokens] for each in before])
            ranks.append(gauge.counting(gauge.sums([each[:, tokens] for each in now])))
        seen = torch.stack(ranks).permute(2, 0, 1)  # sums, ranks, streams
        got = float(gauge.largest(seen.sum(1) if how == "mean" else seen))
        if how == "mean":
            assert got == pytest.approx(ratio_by_hand(now[1], before[1], how), rel=1e-5)
        else:
            parts = [ratio_by_hand(now[1][:, each], before[1][:, each], how) for each in (slice(0, 2), slice(2, 6))]
            assert got == pytest.approx(max(parts), rel=1e-5)

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_one_that_stands_still(self, how):
        """It says nothing, unless nothing else is there; what is no number is not overlooked for it."""
        (before, _), (now, _) = self.moved()
        nothing, gauge = torch.zeros(2, 3), RelativeChange(how)
        gauge.note([nothing, before], [nothing, before])
        assert float(gauge.look([nothing, now])) == pytest.approx(ratio_by_hand(now, before, how), rel=1e-5)
        assert math.isnan(float(gauge.look([nothing, now * math.nan])))
        assert math.isinf(float(gauge.look([nothing + 1, now])))
        gauge.note([nothing, nothing], [nothing, nothing])
        assert math.isnan(float(gauge.look([nothing, nothing])))
        rate, x = OutputChangeEstimate(how), [torch.randn(2, 3) for _ in range(3)]
        y = [torch.randn(2, 3) for _ in range(2)]
        for n in (0, 1):
            rate.note([before, x[n]], [before + n, y[n]])  # the first one's output moves, for another reason
        wanted = rate_by_hand(x[2], x[1], x[1], y[1], x[0], y[0], how)
        assert float(rate.look([before, x[2]])) == pytest.approx(wanted, rel=1e-4)


class TestGaugesAtTheEdge:
    @pytest.mark.parametrize("how", ["mean", "max"])
    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("where", ["now", "before"])
    def test_what_is_no_number_gives_none(self, how, bad, where):
        now, before = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
        (now if where == "now" else before)[1, 2, 3] = bad
        gauge = RelativeChange(how)
        note(gauge, before, before)
        assert not math.isfinite(float(look(gauge, now)))

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_a_reference_of_zeros(self, how):
        gauge = RelativeChange(how)
        note(gauge, torch.zeros(2, 3), torch.zeros(2, 3))
        assert math.isnan(float(look(gauge, torch.zeros(2, 3))))
        assert math.isinf(float(look(gauge, torch.ones(2, 3))))
        note(gauge, torch.tensor([[0.0], [1.0]]), torch.ones(2, 1))
        assert math.isfinite(float(look(gauge, torch.ones(2, 1)))) == (how == "mean")

    @pytest.mark.parametrize("how", ["mean", "max"])
    def test_another_shape_is_not_compared(self, how):
        gauge, rate = RelativeChange(how), OutputChangeEstimate(how)
        note(gauge, torch.ones(2, 3), torch.ones(2, 3))
        assert look(gauge, torch.ones(2, 4)) is None
        note(rate, torch.ones(2, 3), torch.ones(2, 3))
        note(rate, torch.rand(2, 3), torch.rand(2, 3))
        assert look(rate, torch.ones(2, 4)) is None
        assert look(rate, torch.ones(2, 3)) is not None

    def test_halves_are_summed_in_float32(self):
        """60 000 ones: in float16 or bfloat16 they would add up to 2048 or 256, or to infinity."""
        for dtype in (torch.float16, torch.bfloat16):
            gauge = RelativeChange("mean")
            before = torch.full((1, 60000), 8.0, dtype=dtype)
            note(gauge, before, before)
            assert float(look(gauge, before + 1)) == pytest.approx(1 / 8, rel=1e-6)

    def test_differences_are_taken_in_float32(self):
        """60000 − (−60000) is beyond float16."""
        gauge = RelativeChange("max")
        before = torch.tensor([[60000.0]], dtype=torch.float16)
        note(gauge, before, before)
        assert float(look(gauge, -before)) == 2

    def test_by_pieces(self, monkeypatch):
        monkeypatch.setattr(change_metrics, "PIECE", 10)
        now, before = torch.randn(3, 17), torch.randn(3, 17)
        for how in ("mean", "max"):
            gauge = RelativeChange(how)
            note(gauge, before, before)
            assert float(look(gauge, now)) == pytest.approx(ratio_by_hand(now, before, how), rel=1e-5)

    def test_an_input_that_stands_still_gives_no_rate(self):
        gauge, x = OutputChangeEstimate("mean"), torch.randn(2, 3)
        note(gauge, x, torch.randn(2, 3))
        note(gauge, x, torch.randn(2, 3))
        assert not math.isfinite(float(look(gauge, x + 1)))
