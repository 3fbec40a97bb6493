"""The comparison's own arithmetic: what is counted, how quality is measured, and how curves are compared."""

import json
import math
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch import nn

from bench.__main__ import PARTS
from bench.__main__ import main as run_all
from bench.compare import quality
from bench.compare.curves import best_of, duels, envelope, kendall, reach
from bench.compare.emoji import Emoji
from bench.compare.report import main as report
from bench.compare.subject import counting
from bench.compare.sweep import GROUP, Row, Sweep, all_methods
from bench.peers import fewer_steps, own
from bench.peers.peer import Attached, Clock, Method


def row(library, method, value, fraction, *psnr, time=None, lpips=None):
    """A row with these figures."""
    ones = (1.0,) * len(psnr)
    figures = quality.Quality(psnr, ones, ones, lpips=lpips)
    return Row(library, method, "knob", value, "●○", fraction, fraction if time is None else time, figures)


def test_psnr_by_hand():
    """An error of 0.1 everywhere is 20 dB, of 1 in a quarter of the pixels 6.02; equal is at the bound."""
    wanted = torch.zeros(3, 1, 2, 2)
    made = torch.stack([torch.full((1, 2, 2), 0.1), torch.tensor([[[1.0, 0], [0, 0]]]), torch.zeros(1, 2, 2)])
    assert quality.psnr(made, wanted) == pytest.approx((20, 10 * math.log10(4), quality.EQUAL), abs=1e-5)


def test_relative_l1_by_hand():
    """|1 − 2| + |3 − 2| over 4."""
    assert quality.relative_l1(torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 2.0]])) == (0.5,)


def test_ssim_by_its_formula():
    """Of two constant pictures only the luminance term is left; equal ones have 1."""
    a, b, c = 0.25, 0.75, 0.01**2
    made = quality.ssim(torch.full((1, 3, 16, 16), a), torch.full((1, 3, 16, 16), b))
    assert made == pytest.approx(((2 * a * b + c) / (a * a + b * b + c),))
    picture = torch.rand(2, 3, 16, 16)
    assert quality.ssim(picture, picture) == pytest.approx((1, 1))


def test_a_clip_that_only_jumps_in_brightness():
    """A constant offset in all frames leaves motion untouched; one bad frame is the worst."""
    original = torch.rand(1, 4, 3, 12, 12, dtype=torch.float64) / 2
    offset = quality.compare(original, original, original + 0.1, original)
    assert offset.psnr == pytest.approx((20,), abs=1e-6)
    assert offset.motion_psnr[0] > 110
    broken = original.clone()
    broken[:, 2] += 0.1
    made = quality.compare(broken, original, broken, original)
    assert made.worst_frame == pytest.approx((20,), abs=1e-6)
    assert made.psnr == pytest.approx((20 + 10 * math.log10(4),), abs=1e-6)
    assert made.motion_psnr == pytest.approx((20 + 10 * math.log10(3 / 2),), abs=1e-6)
    assert made.latent_l1[0] > 0


def test_bootstrap_interval_of_a_known_spread():
    """The mean's interval of 400 draws of a standard normal is ± 1.96 / 20, about."""
    drawn = np.random.default_rng(1).standard_normal(400)
    mean, low, high = quality.interval(drawn)
    assert mean == pytest.approx(drawn.mean())
    assert (high - low) / 2 == pytest.approx(1.96 * drawn.std() / 20, rel=0.05)


class Blocks(nn.Module):
    """Two blocks, of 4·4 + 4·12 and 4·4 weights; the second layer of the first can be left out."""

    def __init__(self):
        super().__init__()
        first = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 12)})
        self.blocks = nn.ModuleList([first, nn.ModuleDict({"a": nn.Linear(4, 4)})])
        self.other = nn.Linear(4, 4)

    def forward(self, x, all_of_it=True):
        for block in self.blocks:
            x = block["a"](input=x)
            if all_of_it and "b" in block:
                block["b"](x)
        return self.other(x)


def test_blocks_count_by_the_share_of_their_multiplications():
    """A quarter of the first and all of the second is 1.25 executions; half the batch, half of that."""
    model, x = Blocks(), torch.ones(2, 3, 4)
    with counting(model) as whole:
        model(x)
    with counting(model) as part:
        model(x, all_of_it=False)
    with counting(model) as half:
        model(x[:1], all_of_it=False)
    assert whole.done == {0: 6 * 64, 1: 6 * 16}
    assert [work.executions(whole) for work in (whole, part, half)] == [2, 1.25, 0.625]
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("scale", [1, 1000])
def test_the_clock_reads_steps_and_calls(scale):
    """Two calls a step, two runs; timesteps as shares of 1000 or whole."""
    clock, read = Clock(), []
    for run in range(2):
        for timestep in (1000, 600, 200):
            for call in range(2):
                clock.tell(timestep / scale)
                read.append((clock.step, clock.call, clock.begins))
                assert clock.timestep == timestep
                assert clock.begins == (timestep == 1000 and call == 0), run
    assert (
        [each[:2] for each in read[:6]]
        == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
        == [each[:2] for each in read[6:]]
    )


def test_what_a_method_reaches_at_a_compute():
    """Between 0.4 and 0.6 lies the line; a setting that takes less and is better counts instead."""
    line = [row("theirs", "m", 1, 0.6, 40.0, 50.0), row("theirs", "m", 2, 0.4, 30.0, 40.0)]
    between = reach(line, 0.5)
    assert between.psnr.tolist() == [35, 45]
    assert between.how == "knob between 2 and 1"
    cheap = row("theirs", "m", 3, 0.3, 60.0, 60.0)
    assert reach([*line, cheap], 0.5).how == "knob 3"
    assert reach(line, 0.39) is None
    assert reach(line, 0.9).mean == 45
    assert reach([replace(line[0], quality=None, fraction=None)], 0.9) is None


def test_lpips_goes_along_the_same_line():
    """In the middle the mean of both; none where one of the two was measured without it."""
    line = [row("a", "m", 1, 0.6, 40.0, lpips=(0.1,)), row("a", "m", 2, 0.4, 30.0, lpips=(0.3,))]
    assert reach(line, 0.5).lpips.tolist() == pytest.approx([0.2])
    assert reach(line, 0.4).lpips.tolist() == [0.3]
    assert reach([line[0], row("a", "m", 2, 0.4, 30.0)], 0.5).lpips is None


def test_kendalls_tau_by_hand():
    """Two of three pairs in order; with a tie in one list, 2 / √(2 · 3)."""
    assert kendall([1, 2, 3], [10, 30, 20]) == pytest.approx(1 / 3)
    assert kendall([1, 2, 3], [3, 2, 1]) == -1
    assert kendall([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / 6**0.5)
    assert math.isnan(kendall([1], [2]))


def test_a_setting_that_leaves_nothing_out_is_no_end_of_a_line():
    """An exact run would lift the line towards it without end."""
    exact, near = row("theirs", "m", 0, 1.0, 120.0), row("theirs", "m", 1, 0.5, 30.0)
    assert reach([exact, near], 0.8).mean == 30
    assert [each.value for each in envelope([[exact, near]], "fraction")] == [1]


def test_the_best_of_every_other_library_is_met():
    """The plan at 0.5 against 41 dB of one library and the better method of the other; by case, with its interval."""
    rows = [
        row("own 1.0", "search", 2.0, 0.5, 50.0, 52.0, time=0.7),
        row("own 1.0", "other", 2.0, 0.5, 90.0, 90.0),
        row("rival 2.0", "weak", 1, 0.5, 30.0, 30.0),
        row("rival 2.0", "good", 1, 0.4, 45.0, 47.0, time=0.8),
        row("second 1", "m", 1, 0.45, 41.0, 41.0),
        Row("third 1", "m", "knob", 1, failed="ValueError: no"),
    ]
    (duel,) = duels(rows, "own", "search")
    assert (duel.target, duel.best.title, duel.ahead) == (2.0, "rival 2.0: good", (5, 5, 5))
    assert [each.mean for each in duel.others] == [46, 41]
    assert duel.apart
    (by_time,) = duels(rows, "own", "search", "time")
    assert by_time.best.mean == 41  # the good one takes more time than the plan
    near = row("rival 2.0", "near", 1, 0.4, 51.0, 49.0)
    (close,) = duels([*rows, near], "own", "search")
    assert close.ahead[0] == 1
    assert not close.apart
    assert best_of([], 0.5) is None


def test_the_envelope_leaves_out_what_is_beaten():
    """What takes more and is worse, or takes the same and is worse."""
    rows = [row("a", "m", n, fraction, value) for n, (fraction, value) in enumerate([(0.3, 30), (0.5, 29), (0.6, 40)])]
    rows.append(row("a", "n", 9, 0.6, 35.0))
    assert [each.value for each in envelope([rows[:3], rows[3:]], "fraction")] == [2, 0]


class Short(Emoji):
    """The pipeline that ships, for few and short runs."""

    steps = 4

    def __init__(self):
        super().__init__()
        self.calibration, self.test = self.calibration[:2], self.test[: GROUP + 1]


@contextmanager
def broken(subject, value):
    """A method that fails with the first picture."""
    subject.pipe.transformer.register_forward_pre_hook(lambda *_: 1 / 0)
    yield Attached()


@pytest.fixture(scope="module")
def sweep():
    with torch.no_grad():
        return Sweep(Short(), pairs=1)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_rows_of_the_real_thing(sweep):
    """The control is exact, a plan runs half of the blocks, so do half of the steps, and what fails says so."""
    control, search = (method for method in own.methods() if method.name in (own.CONTROL, own.SEARCH))
    exact = sweep.measure(control, 1)
    assert (exact.fraction, set(exact.quality.latent_l1), set(exact.quality.psnr)) == (1, {0}, {quality.EQUAL})
    found = sweep.measure(search, 2.0)
    assert found.fraction == 0.5
    assert max(found.quality.psnr) < quality.EQUAL
    assert found.shown.split()[0].count("●") == 2
    assert found.spent.runs >= 2
    assert found.spent.run_equivalents == pytest.approx(1 + (found.spent.runs - 1) / 2, abs=0.4)
    (steps,) = fewer_steps.methods()
    fewer = sweep.measure(steps, 2.0)
    assert (fewer.fraction, fewer.shown) == (0.5, "2 steps")
    failed = sweep.measure(Method("theirs", "m", "knob", (1,), broken), 1)
    assert failed.failed.startswith("ZeroDivisionError: division by zero")
    assert failed.quality is None
    assert sweep.subject.pipe.transformer is sweep.original
    assert not sweep.original._forward_pre_hooks
    for each in (exact, found, fewer, failed):
        again = Row.from_dict(json.loads(json.dumps(each.to_dict())))
        assert replace(again, quality=None) == replace(each, quality=None)
        assert (again.quality is None) == (each.quality is None)
        if each.quality is not None:
            assert again.quality.psnr == pytest.approx(each.quality.psnr, rel=1e-5)
            assert again.quality.latent_l1 == pytest.approx(each.quality.latent_l1, rel=1e-5)
            assert again.quality.lpips == (each.quality.lpips and pytest.approx(each.quality.lpips, rel=1e-5))


def test_rows_of_older_files_and_of_newer_ones():
    """Without LPIPS, with none, and with some."""
    made = row("a", "m", 1, 0.5, 40.0, 41.0, lpips=(0.12345678, 0.0))
    written = json.loads(json.dumps(made.to_dict()))
    assert written["quality"]["lpips"] == [0.123457, 0.0]
    assert Row.from_dict(written).quality.lpips == (0.123457, 0)
    none = replace(made, quality=replace(made.quality, lpips=None))
    assert Row.from_dict(json.loads(json.dumps(none.to_dict()))) == none
    del written["quality"]["lpips"]
    assert Row.from_dict(written) == none


def test_a_library_that_is_missing_is_left_out_with_its_name(monkeypatch):
    """As where cache-dit is not installed."""
    monkeypatch.setattr("bench.compare.sweep.PEERS", ("own", "with_nothing"))
    found = list(all_methods())
    assert [each.name for each in found[:-1]] == [method.name for method in own.methods()]
    assert "with_nothing is left out" in found[-1]
    assert [each.name for each in list(all_methods(["preset"]))[:-1]] == ["preset, Linear"]


def test_the_report_tells_what_is_ahead_and_what_failed(tmp_path, capsys):
    """From a file that a sweep could have written."""
    rows = [
        replace(row("dithooks 1", "search", 2.0, 0.5, 50.0, 52.0, lpips=(0.02, 0.04)), spent=own.Spent(2.5, 3.0, 4)),
        row("dithooks 1", "search", 4.0, 0.25, 30.0, 30.0, lpips=(0.3, 0.3)),
        row("dithooks 1", "interval 1", 1, 1.0, 120.0, 120.0),
        row("cache-dit 2", "m", 0.1, 0.5, 40.0, 42.0, lpips=(0.1, 0.1)),
        row("cache-dit 2", "m", 0.2, 0.25, 20.0, 20.0, lpips=(0.2, 0.2)),
        row("cache-dit 2", "n", 0.2, 0.9, 20.0, 20.0),
        Row("diffusers 3", "hook", "threshold", 0.2, failed="ValueError: a | b"),
    ]
    about = {"subject": "toy", "steps": 2, "cases": [["a", 1], ["b", 2]], "group": 4, "equal": 120.0}
    about |= {"machine": "here", "versions": {"dithooks": "1"}}
    (tmp_path / "compare_toy.json").write_text(json.dumps({"about": about, "rows": [asdict(each) for each in rows]}))
    report(["--out", str(tmp_path)])
    page = (tmp_path / "compare_toy.md").read_text()
    assert "| 2× | 2.00× | 51.0 (50.0 … 52.0) | 41.0 (40.0 … 42.0) | cache-dit 2: m, knob 0.1 | **+10.0**" in page
    assert "| yes | 0.0300, 0.1000 |" in page
    assert "| yes | 0.3000, 0.2000 |" in page
    # of the six pairs one is in the other order: 30 dB with 0.3, and 20 dB with 0.2
    assert "agrees with that by PSNR in 1 of 2 rows (Kendall τ 0.67 over 4 settings)" in page
    assert "toy: The order of methods by LPIPS" in (tmp_path / "compare.md").read_text()
    assert "| diffusers 3: hook | threshold 0.2 | ValueError: a \\| b |" in page
    assert "NOT equal" in page  # its latents' figures are ones
    table = (tmp_path / "compare_toy.csv").read_text().splitlines()
    assert table[1].startswith("dithooks 1,search,knob,2.0,0.5,0.5,51,50,52,50,1,1,0.03,,,2.5,●○,")
    for name in ("compare_toy", "schedules", "search_cost"):
        assert (tmp_path / f"{name}.svg").read_text().startswith("<?xml")
    with pytest.raises(SystemExit, match=r"run python -m bench\.compare\.sweep first"):
        report(["--out", str(tmp_path / "elsewhere")])


def test_one_command_knows_all_parts(capsys):
    """Every part is there; the list has its command."""
    assert run_all(["--list", "--only", "emoji"]) == 0
    assert "python -m bench.compare.sweep emoji --out bench-results" in capsys.readouterr().out
    for part in PARTS:
        if not part.prints:
            assert find_spec(part.command[0]) is not None, part.name
