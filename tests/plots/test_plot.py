"""What the plots say: squares are the decisions, lines the plan's weights, maps the differences; not how it looks."""

import dataclasses
import math
import pickle
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from PIL import Image
from toys import Net, Pipe, latents, prompt

from dithooks import Budget, CachePlan, DitCacheConfig, Mask, Threshold, dit_cache, plan, plot, record, search
from dithooks import frontier as predicted
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import load_plan
from dithooks.plots.step_maps import Extent, maps_of
from dithooks.plots.style import MISSING
from dithooks.recording.image_metrics import Score
from dithooks.tuning.evaluation import Evaluation
from dithooks.tuning.result import SearchResult

STEPS = 8


def cached(config, kind="single", runs=1, prompts=(None,), steps=STEPS):
    """A handle still attached, after some runs."""
    pipe = Pipe(Net(kind))
    handle = dit_cache(pipe, config)
    given = [prompt() for _ in prompts] if kind != "single" else prompts
    for _ in range(runs):
        pipe(latents(), steps=steps, prompts=given)
    return handle


def squares(panel, kind):
    """(step, block) → difference or ``None``, of the squares that are drawn as computed or reused."""
    found = {}
    for each in panel.collections:
        if isinstance(each, PolyCollection) and each.get_label() == kind:
            values = each.get_array()
            for number, path in enumerate(each.get_paths()):
                (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
                value = None if values is None else float(values[number])
                blocks = range(math.ceil(low), math.floor(high) + 1)
                found |= {(round((left + right) / 2), block): value for block in blocks}
    return found


def maps_in(figure):
    return [panel for panel in figure.axes if panel.get_ylabel() == "block"]


def expected(decisions, branch, blocks, total):
    """The same from the decisions by hand."""
    computed, reused = {}, {}
    for each in decisions:
        for block in range(total) if each.branch == branch else ():
            inside = block in blocks
            (reused if each.reuse and inside else computed)[each.step, block] = each.value if inside else None
    return computed, reused


# -- steps ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("removed", [False, True])
def test_squares_are_the_decisions(removed):
    """Block 0 of five always runs; the differences are the colours."""
    handle = cached(DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=2)))
    if removed:
        handle.remove()
    (panel,) = maps_in(plot.steps(handle))
    computed, reused = expected(handle.decisions, 0, range(1, 5), 5)
    assert squares(panel, "computed") == computed
    assert squares(panel, "reused") == reused
    assert any(value is not None for value in reused.values())
    assert len(computed) + len(reused) == STEPS * 5


def test_reused_squares_are_smaller_whatever_the_colours():
    (panel,) = maps_in(plot.steps(load_plan("2x")))
    widths = {}
    for each in panel.collections:
        widths[each.get_label()] = np.ptp(each.get_paths()[0].vertices[:, 0])
    assert widths["reused"] < 0.5 * widths["computed"] < 0.5


def test_of_many_blocks_those_that_are_alike_are_one_bar():
    """The same decisions, in as many pieces as a step has: before the range, in it, behind it."""
    net = Pipe(Net(depth=40))
    with dit_cache(net, DitCacheConfig(cache_block_start=2, compute_last=3, policy=Mask((1, 0, 0, 1)))) as handle:
        net(latents(), steps=4)
        (panel,) = maps_in(plot.steps(handle))
        computed, reused = expected(handle.decisions, 0, range(2, 37), 40)
    assert (squares(panel, "computed"), squares(panel, "reused")) == (computed, reused)
    assert sum(len(each.get_paths()) for each in panel.collections) == 4 * 3


def test_a_bar_says_how_much_the_differences_are():
    handle = cached(DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=2)))
    figure = plot.steps(handle)
    bar = figure.axes[-1]
    assert bar.get_xlabel() == "difference that decided"
    assert bar.get_xlim()[1] == pytest.approx(max(each.value for each in handle.decisions if each.value is not None))
    without = plot.steps(cached(DitCacheConfig(policy=Mask((1, 0) * 4))))
    assert len(without.axes) == 1


def test_the_last_run_is_shown_or_the_one_that_is_asked_for():
    pipe = Pipe(Net())
    handle = dit_cache(pipe, DitCacheConfig(2, 2))
    pipe(latents(), steps=8)
    pipe(latents(), steps=5)
    (last,), (first,) = maps_of(handle, None), maps_of(handle, 0)
    assert (list(last.reused), list(first.reused)) == (list(range(5)), list(range(8)))
    assert maps_of(handle, 1) == [last]
    with pytest.raises(ValueError, match=r"run=2: .* runs 0 to 1"):
        plot.steps(handle, run=2)
    with pytest.raises(ValueError, match="at least 0"):
        plot.steps(handle, run=-1)


def test_each_branch_of_each_list_is_a_panel():
    """Two lists of five, as ranges of their own, and two calls a step."""
    config = DitCacheConfig(
        cache_block_start=1, policy=Mask((1, 0) * 4), overrides={"singles": {"policy": Mask((1, 0, 0, 0) * 2)}}
    )
    handle = cached(config, "two_lists", prompts=(0, 1))
    panels = maps_in(plot.steps(handle))
    assert [panel.get_title(loc="left") for panel in panels] == [
        "transformer.blocks, branch 0: 4 of 8 steps reused",
        "transformer.blocks, branch 1: 4 of 8 steps reused",
        "transformer.singles, branch 0: 6 of 8 steps reused",
        "transformer.singles, branch 1: 6 of 8 steps reused",
    ]
    told = [each for each in handle.decisions if each.range == "transformer.singles"]
    assert squares(panels[3], "reused") == expected(told, 1, range(1, 5), 5)[1]


@pytest.mark.parametrize("branches", [1, 2])
def test_ranges_of_the_same_blocks_are_one_map(branches):
    """Blocks 1 and 2 by one mask, and block 4 by another; 0 and 3 always run."""
    bits = {1: (1, 0, 0, 1, 0, 0, 1, 0), 4: (1, 0, 1, 1, 0, 1, 0, 0)}
    bits |= {2: bits[1]}
    further = DitCacheConfig(cache_block_start=4, policy=Mask(bits[4]))
    config = DitCacheConfig(cache_block_start=1, cache_num_blocks=2, policy=Mask(bits[1]), more_ranges=(further,))
    handle = cached(config, "swapped", prompts=range(branches))
    piece = TransformerPlan("transformer", 1, 2, 5, bits[1], tuple(None if bit else (1.0,) for bit in bits[1]), None)
    weights = tuple(None if bit else (1.0,) for bit in bits[4])
    behind = replace(piece, first=4, blocks=1, steps=bits[4], coefficients=weights)
    plan = load_plan("2x")
    plan = replace(
        plan,
        made=replace(plan.made, steps=STEPS),
        pieces=(replace(piece, more_ranges=(behind,)),),
    )
    reused = {(step, block) for block, own in bits.items() for step in range(STEPS) if not own[step]}
    every = {(step, block) for step in range(STEPS) for block in range(5)}
    for source, number, name in ((handle, branches, "transformer.blocks"), (plan, 1, "transformer")):
        panels = maps_in(plot.steps(source))
        assert len(panels) == number
        for branch, panel in enumerate(panels):
            assert set(squares(panel, "reused")) == reused
            assert set(squares(panel, "computed")) == every - reused
            shown = f", branch {branch}" if number > 1 else ""
            assert panel.get_title(loc="left") == f"{name}{shown}: 5 and 4 of 8 steps reused"


def test_of_a_removed_handle_with_several_ranges():
    config = DitCacheConfig(policy=Mask((1, 0) * 4), overrides={"singles": {"policy": Mask((1, 0, 0, 0) * 2)}})
    handle = cached(config, "two_lists", prompts=(0,))
    attached, ranges = maps_of(handle, None), handle.ranges
    handle.remove()
    assert maps_of(handle, None) == attached
    assert handle.ranges == ranges
    assert [(each.range, each.first, each.blocks) for each in ranges] == [
        (each.name, each.extent.first, each.extent.number) for each in attached
    ]


@pytest.mark.parametrize(
    ("config", "extent"),
    [
        (DitCacheConfig(1, 2), Extent(0, 5, 5)),
        (DitCacheConfig(1, 2, 2, 2), Extent(2, 2, 5)),
        (DitCacheConfig(1, 2, 1, compute_last=1), Extent(1, 3, 5)),
        (DitCacheConfig(1, 2, overrides={"transformer": {"cache_block_start": 3}}), Extent(3, 2, 5)),
        (DitCacheConfig(99, 2, 1), Extent(1, 4, 5)),  # nothing was reused
    ],
)
@pytest.mark.filterwarnings("ignore:.*nothing will be reused:UserWarning")
def test_a_removed_handle_tells_its_only_range(config, extent):
    handle = cached(config)
    attached = maps_of(handle, None)
    handle.remove()
    assert maps_of(handle, None) == attached
    assert attached[0].extent == extent


def test_a_plan_is_shown_as_planned():
    """Of two experts, each at its own steps; the first has a range in the middle."""
    first, second = (None, None, (1.5, -0.5), None, None, None), (*[None] * 4, (1.0,), (1.0,))
    pieces = (
        TransformerPlan("transformer", 1, 2, 4, (1, 1, 0, 1, 1, 1), first, None, "step", (0, 3)),
        TransformerPlan("transformer_2", 0, 3, 3, (1, 1, 1, 1, 0, 0), second, None, "step", (3, 6)),
    )
    shipped = load_plan("2x")
    figure = plot.steps(CachePlan(pieces, replace(shipped.made, steps=6, blocks=7), shipped.provenance))
    one, two = maps_in(figure)
    assert set(squares(one, "reused")) == {(2, 1), (2, 2)}
    assert set(squares(one, "computed")) == {(s, b) for s in range(3) for b in range(4)} - {(2, 1), (2, 2)}
    assert set(squares(two, "reused")) == {(s, b) for s in (4, 5) for b in range(3)}
    for panel in (one, two):
        assert panel.get_xlim() == pytest.approx((-0.7, 5.7))  # both are in view


def test_differences_that_are_not_finite_have_no_colour():
    handle = cached(DitCacheConfig(cache_block_start=1, policy=Threshold(0.3, max_warmup_steps=2)))
    handle.remove()
    odd = tuple(each._replace(value=math.inf if each.step == 4 else each.value) for each in handle.decisions)
    handle._last = dataclasses.replace(handle._last, decisions=odd)
    (panel,) = maps_in(plot.steps(handle))
    assert {**squares(panel, "computed"), **squares(panel, "reused")}[4, 2] is None


def test_what_steps_refuses():
    with pytest.raises(TypeError, match="handle that dit_cache returns, or a CachePlan"):
        plot.steps(DitCacheConfig(1, 2))
    with pytest.raises(ValueError, match="no call has been decided"):
        plot.steps(dit_cache(Net(), DitCacheConfig(1, 2)))
    with pytest.raises(ValueError, match="a plan has no runs"):
        plot.steps(load_plan("2x"), run=0)


# -- coefficients -----------------------------------------------------------------------------------------------


def lines_of(panel):
    return {line.get_label(): line for line in panel.lines}


@pytest.mark.parametrize("branch", [0, 1, None])
@pytest.mark.parametrize("name", ["2x", "3x"])
def test_lines_are_the_weights_of_the_plan(name, branch):
    """Of each branch of guidance, as the plans that ship have weights for each; of all, where they have none."""
    found = load_plan(name)
    (piece,) = found.pieces
    coefficients, title = piece.coefficients, "transformer: output"
    if branch is None:
        found = replace(found, pieces=(replace(piece, branches=(), others=()),))
    else:
        coefficients, title = piece.branches[branch].coefficients, f"transformer, branch {branch}: output"
    panels = plot.coefficients(found).axes
    assert len(panels) == (1 if branch is None else 2)
    panel = panels[branch or 0]
    assert panel.get_title(loc="left") == title
    lines = lines_of(panel)
    for anchor, label in enumerate(["newest anchor", "the one before", "third last"][: piece.predictor.anchors]):
        weights = [None if each is None or len(each) <= anchor else each[anchor] for each in coefficients]
        drawn = [None if math.isnan(height) else height for height in lines[label].get_ydata()]
        assert drawn == weights
        assert list(lines[label].get_xdata()) == list(piece.sigmas)
    refreshes = [line.get_xdata()[0] for line in panel.lines if "computed" in line.get_label()]
    assert refreshes == [s for s, bit in zip(piece.sigmas, piece.steps, strict=True) if bit]
    left, right = panel.get_xlim()
    assert left > right  # σ falls, and the run goes from left to right
    assert panel.get_xlabel() == "noise level σ"


def test_without_sigmas_steps_are_the_axis_and_wide_ones_are_logarithmic():
    shipped = load_plan("2x")
    bare = replace(shipped.pieces[0], sigmas=None, others=())
    panel, *_ = plot.coefficients(replace(shipped, pieces=(bare,))).axes
    assert panel.get_xlabel() == "sampling step"
    assert list(lines_of(panel)["newest anchor"].get_xdata()) == list(range(28))
    assert panel.get_xlim()[0] < panel.get_xlim()[1]
    wide = replace(shipped.pieces[0], sigmas=tuple(np.geomspace(80, 0.002, 28)), others=())
    panel, *_ = plot.coefficients(replace(shipped, pieces=(wide,))).axes
    assert panel.get_xscale() == "log"


def test_of_a_recording_a_plan_is_made(small):
    recording, found = small
    own = plan(recording, 1.6, cost="blocks", anchors=1)
    (panel,) = plot.coefficients(recording, 1.6, cost="blocks", anchors=1).axes
    drawn = [None if math.isnan(height) else (height,) for height in lines_of(panel)["newest anchor"].get_ydata()]
    assert drawn == list(own.pieces[0].coefficients)
    assert plot.coefficients(found).axes[0].get_title(loc="left") == (
        plot.coefficients(found.plan).axes[0].get_title(loc="left")
    )
    with pytest.raises(TypeError, match="a CachePlan, a SearchResult or a Recording"):
        plot.coefficients([1.0])


# -- frontier ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small():
    """A recording of a toy, and a search in it."""
    torch.manual_seed(0)
    pipe, start = Pipe(Net(depth=3)), latents()
    with torch.no_grad():
        run = lambda pipe: list(pipe(start))  # noqa: E731
        recording = record(pipe, run)
        return recording, search(pipe, run, 1.6, recording=recording, cost="blocks", verbose=False)


def marks(panel):
    return {tuple(place) for each in panel.collections for place in np.asarray(each.get_offsets()).tolist()}


def test_marks_are_what_was_measured(small):
    _, found = small
    (panel,) = plot.frontier(found).axes
    assert marks(panel) == {(each.speedup, each.psnr) for each in found.evaluations}
    chosen = lines_of(panel)["chosen"]
    best = [each for each in found.evaluations if each.plan.pieces == found.plan.pieces]
    assert (list(chosen.get_xdata()), list(chosen.get_ydata())) == ([best[0].speedup], [best[0].psnr])
    assert list(lines_of(panel)["target"].get_xdata()) == [1.6]
    lowest = sorted(min(line.get_ydata()) for line in panel.lines if line.get_label() == "_worst")
    assert lowest == sorted(each.score.worst for each in found.evaluations)
    assert panel.get_xlabel() == "speed-up, times fewer blocks run"
    assert panel.get_title(loc="right") == "upper right is better"  # more of both is


def evaluated(found, *points):
    """A result whose plans were as fast and as good as this; the first is chosen."""
    evaluations = []
    for number, (speed, psnr) in enumerate(points):
        score = None if psnr is None else Score(psnr, psnr, 0.0)
        piece = replace(found.plan.pieces[0], path=f"transformer{number}" if number else "transformer")
        own = replace(found.plan, pieces=(piece,))
        evaluations.append(Evaluation(own, 1.0, speed, score, 0.7, "" if score else "WiringError: not followed"))
    return SearchResult(evaluations[0].plan, True, tuple(evaluations), found.recording, 1.0, 1.0)


def test_the_chosen_of_several_searches_are_joined_in_order(small):
    _, found = small
    several = [evaluated(found, point) for point in ((3.0, 30.0), (1.5, 60.0), (2.0, 40.0))]
    (panel,) = plot.frontier(*several).axes
    assert list(lines_of(panel)["chosen"].get_xdata()) == [1.5, 2.0, 3.0]
    assert panel.get_xlabel() == "speed-up, measured"


def test_plans_that_failed_are_left_out_and_identical_pictures_are_on_top(small):
    _, found = small
    (panel,) = plot.frontier(evaluated(found, (1.5, math.inf), (2.0, 40.0), (0.0, None), (2.0, -math.inf))).axes
    assert marks(panel) == {(1.5, 45.0), (2.0, 40.0)}
    assert "at 45: identical" in panel.get_ylabel()
    with pytest.raises(ValueError, match=r"none of the plans could be run .WiringError: not followed"):
        plot.frontier(evaluated(found, (0.0, None)))


def test_plans_of_outputs_have_a_label_of_their_own(small):
    """Of the same blocks as those of residuals."""
    outputs = load_plan("2x")
    residuals = replace(outputs, pieces=tuple(replace(each, payload="residual", others=()) for each in outputs.pieces))
    score = Score(40.0, 38.0, 0.0)
    tried = tuple(Evaluation(each, 1.0, 2.0, score, 0.5) for each in (outputs, residuals))
    (panel,) = plot.frontier(SearchResult(outputs, True, tried, small[0], 1.0, 1.0)).axes
    labels = [each.get_text() for each in panel.get_legend().get_texts()]
    assert labels == ["output, 3 anchors", "blocks 0–11, 3 anchors", "chosen", "target"]


def test_a_recording_is_a_line_of_what_is_predicted(small):
    recording, found = small
    figure = plot.frontier(recording, cost="blocks", anchors=1, label="one")
    again = plot.frontier(recording, cost="blocks", label="two", ax=figure.axes[0])
    assert again is figure
    lines = lines_of(figure.axes[0])
    for label, anchors in (("one", 1), ("two", 2)):
        ways = [way for way in predicted(recording, cost="blocks", anchors=anchors) if way[1] > 0]
        assert np.transpose(lines[label].get_data()).tolist() == [list(way) for way in ways]
    assert lines["one"].get_color() != lines["two"].get_color()
    assert lines["one"].get_marker() != lines["two"].get_marker()
    assert again.axes[0].get_title(loc="right") == "lower right is better"  # much faster, small error
    part = Figure().subfigures(1, 2)[1]
    assert plot.frontier(recording, cost="blocks", ax=part.subplots()) is part.get_figure()
    gone = Figure().subplots()
    gone.remove()
    with pytest.raises(ValueError, match="in no figure any more"):
        plot.frontier(recording, cost="blocks", ax=gone)
    for wrong in ((), (found, recording), (found.plan,)):
        with pytest.raises(TypeError, match="results of searches, or recordings"):
            plot.frontier(*wrong)


# -- pictures ---------------------------------------------------------------------------------------------------


def images(figure):
    return [panel.images[0].get_array() for panel in figure.axes if panel.images]


def below(figure):
    return [panel.get_xlabel() for panel in figure.axes if panel.images and panel.get_xlabel()]


def pair(*shape):
    plain = torch.rand(*shape)
    return plain, (plain + 0.05 * torch.randn(*shape)).clamp(0, 1)


def test_the_difference_map_is_numpys():
    plain, other = pair(2, 3, 6, 4)
    figure = plot.pictures(plain, other, ["one", "two"], factor=4)
    shown = images(figure)
    assert len(shown) == 6
    for number in range(2):
        a, b = (each[number].numpy().transpose(1, 2, 0) for each in (plain, other))
        np.testing.assert_array_equal(shown[3 * number], a)
        np.testing.assert_array_equal(shown[3 * number + 1], b)
        np.testing.assert_allclose(shown[3 * number + 2], 4 * np.abs(a - b).mean(axis=-1), rtol=1e-6)
    decibels = [-10 * math.log10(float((a - b).square().mean())) for a, b in zip(plain, other, strict=True)]
    assert below(figure) == [f"{each:.1f} dB" for each in decibels]
    assert "difference\n× 4" in [text.get_text() for text in figure.texts]
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == ["one", "two"]


def test_the_factor_holds_nearly_all_pixels():
    plain = torch.full((1, 3, 20, 20), 0.5)
    other = plain.clone()
    other[..., :10] += 0.09  # × 10 is within the scale, × 20 is not
    assert "difference\n× 10" in [text.get_text() for text in plot.pictures(plain, other).texts]
    same = plot.pictures(plain, plain)
    assert below(same) == ["identical"]
    assert "difference\n× 1" in [text.get_text() for text in same.texts]


def test_tensors_arrays_bytes_and_pil_pictures_are_the_same():
    plain, other = ((each * 255).round() / 255 for each in pair(2, 3, 6, 4))
    arrays = [each.permute(0, 2, 3, 1).numpy() for each in (plain, other)]
    whole = [(each * 255).round().astype(np.uint8) for each in arrays]
    forms = [
        (plain, other),
        arrays,
        whole,
        [[Image.fromarray(each) for each in batch] for batch in whole],
        (list(plain), list(other)),
        (plain, arrays[1]),
        (plain.bfloat16().float(), other.bfloat16().float()),
    ]
    first = images(plot.pictures(*forms[0], factor=1))
    for form in forms[1:]:
        for one, two in zip(first, images(plot.pictures(*form, factor=1)), strict=True):
            np.testing.assert_allclose(one, two, atol=5e-3 if form is forms[-1] else 1e-6)


def test_a_channel_is_taken_for_grey_and_small_pictures_are_not_turned():
    grey = torch.rand(1, 1, 5, 4)
    (shown, *_) = images(plot.pictures(grey, grey))
    np.testing.assert_array_equal(shown, grey[0, 0].numpy()[..., None].repeat(3, axis=-1))
    narrow = torch.rand(1, 3, 5, 3)  # whose width could be channels
    np.testing.assert_array_equal(images(plot.pictures(narrow, narrow))[0], narrow[0].numpy().transpose(1, 2, 0))
    array = np.random.default_rng(0).random((1, 3, 5, 3), dtype=np.float32)
    np.testing.assert_array_equal(images(plot.pictures(array, array))[0], array[0])


def test_of_videos_some_frames_are_shown():
    plain, other = pair(2, 9, 3, 6, 4)
    figure = plot.pictures(plain, other, ["first", "second"], frames=3)
    assert [panel.get_title() for panel in figure.axes if panel.get_title()] == ["frame 0", "frame 4", "frame 8"] * 2
    np.testing.assert_array_equal(images(figure)[3], plain[0, 4].numpy().transpose(1, 2, 0))
    np.testing.assert_array_equal(images(figure)[10], other[1, 0].numpy().transpose(1, 2, 0))
    assert {"first", "second"} <= {text.get_text() for text in figure.texts}
    short = plot.pictures(plain[:1, :2], other[:1, :2], frames=5)
    assert len(images(short)) == 2 * 3
    clips = [[Image.new("RGB", (4, 6)) for _ in range(9)]]
    assert len(images(plot.pictures(clips, clips))) == 4 * 3


def test_more_than_fit_side_by_side_go_on_below():
    plain, other = pair(5, 3, 6, 6)
    figure = plot.pictures(plain, other, columns=2)
    assert [panel.get_position().x0 for panel in figure.axes[0:13:3]] == pytest.approx(
        [figure.axes[0].get_position().x0, figure.axes[3].get_position().x0] * 2 + [figure.axes[0].get_position().x0]
    )
    assert figure.axes[0].get_position().y0 > figure.axes[6].get_position().y0 > figure.axes[12].get_position().y0


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ((torch.rand(2, 3, 4, 4), torch.rand(3, 3, 4, 4)), ValueError, "2 samples and cached 3"),
        ((torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 5)), ValueError, r"reference\[0\] is 4×4, and cached\[0\] 5×4"),
        ((torch.rand(1, 2, 3, 4, 4), torch.rand(1, 3, 3, 4, 4)), ValueError, "2 frames.*3 frames"),
        ((torch.rand(3, 4, 4), torch.rand(3, 4, 4)), ValueError, "a single one goes into a list"),
        ((torch.rand(1, 5, 4, 4), torch.rand(1, 5, 4, 4)), ValueError, r"reference has a picture of shape .5, 4, 4"),
        ((torch.randn(1, 3, 4, 4) * 3, torch.rand(1, 3, 4, 4)), ValueError, "reference has values from -"),
        ((torch.rand(1, 3, 4, 4), torch.full((1, 3, 4, 4), math.nan)), ValueError, "cached has values from nan"),
        ((torch.ones(1, 3, 4, 4, dtype=torch.int64),) * 2, ValueError, "reference is of int64"),
        (([], []), ValueError, "reference is empty"),
        (([[]], [[]]), ValueError, "no frames"),
        (("one", "two"), TypeError, "must be a tensor, an array, or a list"),
        ((torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), ["a", "b"]), ValueError, "2 captions for 1"),
        ((torch.rand(1, 3, 4, 4), torch.rand(1, 3, 4, 4), "a"), TypeError, "captions must be a string for each"),
    ],
)
def test_what_pictures_refuses(given, error, said):
    with pytest.raises(error, match=said):
        plot.pictures(*given)


def test_numbers_out_of_range_are_refused():
    picture = torch.rand(1, 3, 4, 4)
    for wrong in ({"factor": 0}, {"columns": 0}, {"frames": 0}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}=0"):
            plot.pictures(picture, picture, **wrong)


# -- all of them ------------------------------------------------------------------------------------------------


def figures(small):
    torch.manual_seed(0)
    recording, found = small
    picture = torch.rand(2, 3, 8, 8)
    budget = cached(DitCacheConfig(policy=Budget(2.0)))
    return [
        plot.steps(budget), plot.steps(load_plan("2x")), plot.coefficients(load_plan("2x")), plot.frontier(found),
        plot.frontier(recording, cost="blocks"), plot.pictures(picture, picture, ["a long caption", ""]),
    ]  # fmt: skip


def test_nothing_is_drawn_with_pyplot_and_notebooks_show_it(small):
    for figure in figures(small):
        assert isinstance(figure, Figure)
        assert figure._repr_png_()[:4] == b"\x89PNG"
    code = "import sys, dithooks.plot as p, dithooks.demo as d; p.steps(d.load_plan('2x'))._repr_png_()"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_type_is_of_nine_points_or_more_and_nothing_is_cut_off(small):
    """Of the texts that are seen, where they are drawn."""
    for figure in figures(small):
        buffer = BytesIO()
        figure.savefig(buffer, format="png")
        assert figure.get_size_inches()[0] == 4.7
        box = figure.bbox
        for text in figure.findobj(lambda each: hasattr(each, "get_fontsize") and hasattr(each, "get_text")):
            if text.get_text().strip() and text.get_visible() and text.get_window_extent().width:
                assert text.get_fontsize() >= 9, text
        tight = figure.get_tightbbox()
        assert tight.x0 >= -0.02
        assert tight.y0 >= -0.02
        assert tight.x1 * figure.dpi <= box.x1 + 2
        assert tight.y1 * figure.dpi <= box.y1 + 2


def test_the_same_figure_gives_the_same_file(small, tmp_path):
    for number, (one, two) in enumerate(zip(figures(small), figures(small), strict=True)):
        for ending in ("svg", "png"):
            files = [tmp_path / f"{name}{number}.{ending}" for name in "ab"]
            for figure, path in zip((one, two), files, strict=True):
                plot.save(figure, path)
            assert files[0].read_bytes() == files[1].read_bytes()
    svg = (tmp_path / "a1.svg").read_text()
    assert "<text" not in svg
    assert "<dc:date" not in svg
    ids = [each.get("id") for each in ElementTree.fromstring(svg).iter() if each.get("id")]
    assert len(ids) == len(set(ids))


def test_other_formats_and_a_copy_can_be_saved(tmp_path):
    figure = plot.steps(load_plan("2x"))
    for ending in ("pdf", "jpg", "webp"):
        plot.save(figure, tmp_path / f"map.{ending}")
    assert pickle.loads(pickle.dumps(figure))._repr_png_()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="not supported"):
        plot.save(figure, tmp_path / "map.xyz")


def test_without_matplotlib_it_is_said_how_to_get_it(monkeypatch):
    figure = plot.steps(load_plan("2x"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    picture = torch.rand(1, 3, 4, 4)
    for draw in (
        lambda: plot.steps(load_plan("2x")),
        lambda: plot.coefficients(load_plan("2x")),
        lambda: plot.pictures(picture, picture),
        lambda: plot.save(figure, "never.svg"),
    ):
        with pytest.raises(ModuleNotFoundError, match=r'pip install "dithooks\[plot\]"') as caught:
            draw()
        assert str(caught.value) == MISSING


@pytest.mark.slow
def test_the_pictures_of_the_documentation_can_be_made_again(tmp_path):
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "bench.pictures", "--quick", "--out", str(tmp_path)]
    subprocess.run(command, check=True, cwd=root, capture_output=True)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in (root / "docs/pictures").iterdir()}
