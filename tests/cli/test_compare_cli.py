"""``dithooks compare``: the same runs with and without a cache, what is said of them, and the picture."""

import json
import math
import re
import shutil
import sys
from dataclasses import replace

import learned_metric
import numpy as np
import pytest
import torch

from dithooks import (
    Budget,
    CachePlan,
    DitCacheConfig,
    Linear,
    PlanTiers,
    Threshold,
    dit_cache,
    plan,
    progress_bars,
    record,
)
from dithooks.cli import cache_settings as settings
from dithooks.cli import compare_output as compare_show
from dithooks.cli import comparison as comparing
from dithooks.cli.comparison import Comparison, Outcome
from dithooks.cli.main import main
from dithooks.errors import UsageError
from dithooks.recording.image_metrics import Score, compare, samples_of
from dithooks.stats.types import CacheStats

pytest.importorskip("diffusers")

from cli.test_search_cli import FACTORIES
from PIL import Image

from dithooks.demo import load_pipeline
from dithooks.demo.outcome import PROMPTS

DEMO = ["compare", "demo", "--steps", "6", "--prompt", "cat face", "--prompt", "taxi", "--pairs", "1", "--quiet"]
MORE = """

class Latents(Toy):
    def __call__(self, **given):
        return [100 * each for each in super().__call__(**given)]

def latents():
    return Latents(), {"generator": torch.Generator().manual_seed(7)}

def restless():
    noise = torch.Generator().manual_seed(7)
    return Toy(), lambda pipe: pipe(generator=noise)

def video():
    def run(pipe):
        (x,) = pipe(generator=torch.Generator().manual_seed(7))
        frames = torch.sigmoid(x).reshape(1, 1, 4, 8).repeat(5, 3, 1, 1)
        return frames[None] * torch.linspace(0, 1, 5).reshape(1, 5, 1, 1, 1)
    return Toy(), run

def other():
    made = Toy()
    return made, lambda: Toy()(generator=torch.Generator().manual_seed(7))

def stops():
    raise KeyboardInterrupt
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a file of factories."""
    (tmp_path / "mine.py").write_text(FACTORIES + MORE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def searched(tmp_path_factory):
    """A plan for the model of the factories."""
    where = tmp_path_factory.mktemp("searched")
    (where / "mine.py").write_text(FACTORIES)
    path, options = list(sys.path), ["--max-evals", "1", "--cost", "blocks", "--target", "1.8", "--quiet"]
    with torch.no_grad():
        assert main(["search", f"{where / 'mine.py'}:toy", *options, "--out", str(where / "plan.json")]) == 0
    sys.path[:] = path
    sys.modules.pop("mine", None)
    return where / "plan.json"


@pytest.fixture
def toy_plan(searched, here):
    """The same in the current folder, with another way to cache."""
    shutil.copy(searched, here)
    DitCacheConfig(cache_block_start=1, policy=Threshold(0.2, max_warmup_steps=2)).save("other.json")


@pytest.fixture(scope="module")
def six(tmp_path_factory):
    """A plan for the demo in six steps."""
    pipe, file = load_pipeline(), tmp_path_factory.mktemp("plans") / "six.json"
    pipe.set_progress_bar_config(disable=True)
    with torch.no_grad():
        recording = record(pipe, lambda pipe: pipe("rocket", num_inference_steps=6), num_inference_steps=6)
    plan(recording, 1.5).save(file)
    return file


def draw(pipe):
    noise = [torch.Generator().manual_seed(n) for n in range(2)]
    return pipe(["cat face", "taxi"], num_inference_steps=6, generator=noise, output_type="pt")


# -- what is measured -------------------------------------------------------------------------------------------


def test_numbers_are_those_of_the_api(six, here, capsys):
    assert main([*DEMO, "--plan", str(six), "--target", "2", "--out", "c.png", "--json", "n.json"]) == 0
    told = json.loads((here / "n.json").read_text())
    assert told["prompts"] == ["cat face", "taxi"]
    assert (told["steps"], told["seed"], told["guidance"], told["pairs"]) == (6, 0, 3.0, 1)
    assert told["uncached"]["psnr_of_another_run"] == "inf"
    assert len(told["uncached"]["seconds"]) == 1
    assert [each["name"] for each in told["settings"]] == ["plan six", "live 2x"]
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    reference = samples_of(draw(pipe))
    configs = (CachePlan.load(six), DitCacheConfig(policy=Budget(2.0), predictor=Linear()))
    for each, config in zip(told["settings"], configs, strict=True):
        with dit_cache(pipe, config) as cache:
            score = compare(samples_of(draw(pipe)), reference)
        assert each["psnr"] == pytest.approx(score.psnr, rel=1e-5)
        assert each["worst"] == pytest.approx(score.worst, rel=1e-5)
        assert each["relative_l1"] == pytest.approx(score.relative_l1, rel=1e-5)
        assert each["ssim"] == (None if score.ssim is None else pytest.approx(score.ssim, rel=1e-5))
        stats = cache.stats
        assert (each["blocks_run"], each["blocks_total"]) == (stats.blocks_run, stats.blocks_total)
        assert each["bytes_peak"] == stats.bytes_peak
        assert each["decisions"]["reasons"] == stats.reasons
        assert each["speedup"] == pytest.approx(told["uncached"]["seconds"][0] / each["seconds"][0], rel=1e-2)
    assert told["settings"][0]["decisions"]["steps"] == {"transformer": configs[0].pieces[0].picture}
    shown = capsys.readouterr().out
    assert re.search(r"uncached +[\d.]+ +1\.00x +144 of 144 ", shown)
    assert re.search(rf"plan six +[\d.]+ +[\d.]+x +{told['settings'][0]['blocks_run']} of 144 +[\d.]+ dB", shown)
    assert f"plan six, transformer: {configs[0].pieces[0].picture}" in shown
    assert shown.endswith("the others below: c.png\n")
    with Image.open("c.png") as sheet:
        assert sheet.width > sheet.height / 2
        pixels = np.asarray(sheet)
    # The first picture of the first row, enlarged five times: its pixels are on the sheet
    picture = (reference[0].transpose(1, 2, 0) * 255).clip(0, 255).round().astype(np.uint8).repeat(5, 0).repeat(5, 1)
    views = np.lib.stride_tricks.sliding_window_view(pixels, picture.shape)[28]
    assert any(np.array_equal(each[0], picture) for each in views)


def test_json_is_alone_on_stdout(toy_plan, here, capsys):
    command = ["compare", "mine.py:toy", "--plan", "plan.json", "--pairs", "2", "--quiet", "--json", "-"]
    assert main(command) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert len(told["settings"][0]["seconds"]) == len(told["uncached"]["seconds"]) == 2
    assert "a factory may print" in shown.err


def test_runs_go_in_turns(toy_plan, here, monkeypatch):
    """And each begins with the same noise."""
    names = []

    class Told:
        def __enter__(self):
            return lambda stage, done, total: names.append((stage, done, total))

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(progress_bars, "progress", lambda verbose: Told())
    command = ["compare", "mine.py:toy", "--plan", "plan.json", "--plan", "other.json", "--pairs", "2", "--quiet"]
    assert main(command) == 0
    a, b, c = "without a cache", "plan plan", "plan other"
    assert [name for name, _, _ in names] == [a, b, c, a, b, c, c, b, a]
    assert [(done, total) for _, done, total in names] == [(n, 9) for n in range(9)]
    starts = sys.modules["mine"].starts
    assert len(starts) == 9
    assert all(torch.equal(starts[0], each) for each in starts)


def test_settings_of_one_name_are_told_apart(toy_plan, here, capsys):
    plans = ["--plan", "plan.json", "--plan", "./plan.json", "--plan", "other.json"]
    assert main(["compare", "mine.py:toy", *plans, "--pairs", "1", "--quiet", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in told["settings"]] == ["plan plan #1", "plan plan #2", "plan other"]
    assert told["settings"][0]["psnr"] == told["settings"][1]["psnr"]
    assert told["settings"][2]["policy"] == str(Threshold(0.2, max_warmup_steps=2))


def test_a_run_that_differs_by_itself(toy_plan, here, capsys):
    assert main(["compare", "mine.py:restless", "--plan", "plan.json", "--pairs", "1", "--quiet"]) == 0
    assert re.search(r"two runs without a cache are -?[\d.]+ dB apart", capsys.readouterr().err)


def test_latents_have_no_picture(toy_plan, here, capsys):
    assert main(["compare", "mine.py:latents", "--plan", "plan.json", "--pairs", "1", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "no picture: what MODEL returns does not look like pictures" in shown.err
    assert " dB " in shown.out
    assert not (here / "compare.png").exists()


def test_a_video_shows_its_middle(toy_plan, here):
    assert main(["compare", "mine.py:video", "--plan", "plan.json", "--pairs", "1", "--quiet"]) == 0
    with Image.open("compare.png") as sheet:
        assert len(sheet.getcolors(1 << 20)) > 20


def test_pictures_of_the_demo_are_none_that_were_searched_on(here, capsys):
    assert main(["compare", "demo", "--steps", "2", "--pairs", "1", "--target", "1.5", "--quiet", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == list(PROMPTS)


# -- what is shown ----------------------------------------------------------------------------------------------


def outcome(name="plan x", samples=(), score=None, seconds=(1.0, 2.0, 4.0), speedups=(2.0, 3.0, 1.0)):
    stats = CacheStats(4, 2, 2, 30, 60, 0, 1234, {"mask": 2, "reuse": 2})
    setting = settings.CacheSetting(name, DitCacheConfig(policy=Budget(2.0)), 2.0)
    decisions = {"reasons": {}, "steps": {"": "●○"}}
    return Outcome(setting, stats, decisions, score or Score(40.0, 30.0, 0.01), list(samples), (), seconds, speedups)


def test_medians():
    each = outcome()
    found = Comparison((4.0, 2.0, 3.0), [], (each,), math.inf)
    assert each.speedup == 2.0
    assert compare_show.rows(found)[1:] == [
        ("uncached", "3.00", "1.00x", "60 of 60", "", "", "", "", "0"),
        ("plan x", "2.00", "2.00x", "30 of 60", "40.0 dB", "30.0 dB", "", "0.01", "1,234"),
    ]
    same = outcome(score=Score(math.inf, math.inf, 0.0, 1.0))
    assert compare_show.rows(Comparison((1.0,), [], (same,), math.inf))[2][4:8] == (
        "identical", "identical", "1.0000", "0"
    )  # fmt: skip
    assert same.to_dict()["psnr"] == "inf"
    broken = outcome(score=Score(-math.inf, -math.inf, math.inf))
    assert compare_show.rows(Comparison((1.0,), [], (broken,), math.inf))[2][4] == "-inf dB"


def test_a_learned_metric_has_a_column_where_it_was_measured():
    known, unknown = outcome(score=Score(40.0, 30.0, 0.01, 0.9, lpips=0.0321)), outcome("plan y")
    heads, plain, first, second = compare_show.rows(Comparison((3.0,), [], (known, unknown), math.inf))
    assert [row[heads.index("LPIPS")] for row in (plain, first, second)] == ["", "0.0321", ""]
    assert [row[heads.index("relative L1")] for row in (plain, first, second)] == ["", "0.01", "0.01"]
    assert known.to_dict()["lpips"] == 0.0321


def test_tiers_are_compared_one_by_one(toy_plan, here, capsys):
    """And generated with one of them."""
    plan = CachePlan.load("plan.json")
    slow = replace(plan, provenance=replace(plan.provenance, measured_speedup=1.2, psnr=90.0))
    PlanTiers({"fast": plan, "high": slow}).save("tiers.json")
    assert main(["compare", "mine.py:toy", "--plan", "tiers.json", "--pairs", "1", "--quiet", "--json", "-"]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)["settings"]] == [
        "plan tiers high",
        "plan tiers fast",
    ]
    assert settings.from_file("tiers.json", tier="fast").config == plan
    assert settings.from_file("tiers.json", tier="fastest at >= 80 dB").config == slow
    for tier, said in (
        (None, r"tiers.json holds the tiers high, fast: give one of them with --tier"),
        ("best", r"tiers.json: there is no tier 'best'"),
        ("fastest at ≥ 200 dB", r"tiers.json: no tier promises ≥ 200 dB .* 'high', 1.20× as fast, with 90.0 dB"),
    ):
        with pytest.raises(UsageError, match=said):
            settings.from_file("tiers.json", tier=tier)
    with pytest.raises(UsageError, match=r"plan.json: tier='high' goes with PlanTiers"):
        settings.from_file("plan.json", tier="high")


def test_the_table(capsys):
    compare_show.show(Comparison((3.0,), [], (outcome(),), math.inf))
    first, rule, plain, cached, _, steps = capsys.readouterr().out.splitlines()
    assert re.split(r"  +", first.strip()) == [head for head in compare_show.HEADS[1:] if head != "LPIPS"]
    assert set(rule) == {"─"}
    assert plain.startswith("uncached  ")
    assert len(cached) == len(first) == len(rule)
    assert steps == "plan x: ●○"


def test_the_table_on_a_narrow_terminal(monkeypatch, capsys):
    """Every head and figure is there, whole, in parts of at most 60 columns, each with the names."""
    monkeypatch.setenv("COLUMNS", "60")
    found = Comparison((3.0,), [], (outcome("plan a"), outcome("plan b")), math.inf)
    compare_show.show(found)
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 60
    text = "\n".join(lines)
    for row in compare_show.rows(found):
        assert all(re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text) for cell in row)
    assert sum(line.startswith("plan a ") for line in lines) == 2


def test_sheets():
    large, wide = np.full((3, 900, 1200), 0.5, np.float32), np.full((3, 90, 360), 0.25, np.float32)
    for sample in (large, wide, np.zeros((1, 8, 8), np.float32)):
        found = Comparison((3.0,), [sample] * 2, (outcome(samples=[sample] * 2), outcome(samples=[sample] * 2)), 1.0)
        sheet = compare_show.draw(found, ["a long caption of several words", "b"])
        assert 300 < sheet.width < 1200
        assert 300 < sheet.height < 1200
    assert compare_show.draw(Comparison((3.0,), [np.full((4, 4), 7e3, np.float32)], (outcome(),), 1.0), []) is None


# -- what cannot be done ----------------------------------------------------------------------------------------


def test_a_metric_whose_package_is_missing(monkeypatch, here, capsys):
    """It is said before anything is drawn, by both commands."""
    learned_metric.missing(monkeypatch)
    for command in ("compare", "search"):
        assert main([command, "demo", "--target", "2", "--metric", "lpips", "--quiet"]) == 2
        said = capsys.readouterr().err
        assert said == (
            "dithooks: error: LPIPS needs stlpips-pytorch, which is not installed: pip install 'dithooks[lpips]'\n"
        )


def test_a_metric_of_both_commands(monkeypatch, here, capsys):
    learned_metric.installed(here, monkeypatch)
    assert main([*DEMO, "--target", "2", "--metric", "lpips", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["settings"][0]["lpips"] > 0
    search = ["search", *DEMO[1:-3], "--quiet", "--metric", "lpips", "--max-evals", "1", "--cost", "blocks"]
    assert main(search) == 0
    assert CachePlan.load("plan.json").provenance.lpips > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo"], "there is nothing to compare with: give a --plan, or a --target such as 2"),
        (["demo", "--plan", "4x"], "there is no plan '4x'"),
        (["demo", "--plan", "mine.py"], "not a CachePlan"),
        (["demo", "--target", "0.5"], "--target is 0.5: give a number above 1"),
        (["demo", "--target", "2", "--pairs", "0"], "--pairs is 0: it must be 1 or more"),
        (["demo", "--target", "2", "--steps", "0"], "--steps is 0"),
        (["demo", "--target", "2", "--seed", "-1"], "--seed is -1"),
        (["demo", "--target", "2", "--guidance", "inf"], "--guidance is inf"),
        (["demo", "--target", "2", "--prompt", "piza"], "never seen 'piza'"),
        (["demo", "--target", "2", "--prompt", "!?"], "holds no word"),
        (["demo", "--target", "2", "--out", "x.mp4"], "x.mp4 is of a video"),
        (["demo", "--target", "2", "--out", "no/x.png"], "no is not a folder"),
        (["demo", "--target", "2", "--json", "compare.png"], "two results would go to compare.png"),
        (["demo", "--plan", "plan.json", "--json", "plan.json"], "plan.json would be overwritten"),
        (["demo", "--plan", "plan.json"], "plan plan: the plan was made for another model, Model with 4 blocks"),
        (["mine.py:toy", "--target", "2", "--steps", "5"], "--steps goes with the model demo only"),
        (["mine.py:toy", "--plan", "2x"], "there is no file 2x: give a plan that a search wrote"),
        (["FluxPipeline", "--target", "2"], "there is no model 'FluxPipeline'"),
        (["mine.py:make", "--target", "2"], "mine.py has no 'make'"),
        (["mine.py:no_blocks", "--target", "2"], "live 2x: "),
        (["mine.py:nothing_drawn", "--target", "2"], "run returned None"),
        (["mine.py:other", "--plan", "plan.json"], "plan plan: MODEL's run made no step with the cache"),
    ],
)
def test_asked_wrongly(arguments, message, toy_plan, here, capsys):
    capsys.readouterr()
    assert main(["compare", *arguments, "--quiet"]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert sum(each.startswith("dithooks: error: ") for each in shown.err.splitlines()) == 1
    assert not (here / "compare.png").exists()


def test_a_target_out_of_reach(here, capsys):
    """As near as three steps come to it, of which one is computed: 24 of 72 blocks are run."""
    assert main(["compare", "demo", "--target", "9", "--steps", "3", "--pairs", "1", "--quiet"]) == 3
    shown = capsys.readouterr()
    assert shown.err.endswith("dithooks: target 9x was not reached: live 9x ran 3.00 times fewer blocks\n")
    assert "target_speedup=9 cannot be reached" in shown.err
    assert "at most 2 of 3 steps it is 3." in shown.err
    assert "24 of 72" in shown.out


def test_interrupted(here, capsys):
    assert main(["compare", "mine.py:stops", "--target", "2", "--quiet"]) == 130
    assert capsys.readouterr().err == "dithooks: interrupted\n"


def test_faults_of_the_users_own_are_shown_as_they_are(here, capsys):
    for name, error, match in (
        ("fails", ValueError, "a fault of the user's"),
        ("fails_when_run", TypeError, "unexpected keyword argument 'strength'"),
    ):
        assert main(["compare", f"mine.py:{name}", "--target", "2", "--quiet"]) == 1
        assert f"{error.__name__}: " in (shown := capsys.readouterr().err)
        assert match in shown


def test_spread():
    assert settings.evenly_spread(2, 6).config.when.steps == (1, 0, 1, 0, 1, 0)
    assert settings.evenly_spread(9, 4).config.when.steps == (1, 0, 0, 0)
    for steps in range(1, 40):
        for target in (1.1, 1.5, 2, 2.7, 4):
            mask = settings.evenly_spread(target, steps).config.when.steps
            assert len(mask) == steps
            assert sum(mask) == max(1, math.floor(steps / target + 0.5))
    with pytest.raises(UsageError, match="--target is 1"):
        settings.evenly_spread(1, 4)


def test_outputs_are_forecast(here, capsys):
    """As the API does, with the speed-up's policy; the name and the numbers say so."""
    command = ["--target", "2", "--payload", "output", "--json", "-"]
    assert main([*DEMO, *command]) == 0
    (told,) = json.loads(capsys.readouterr().out)["settings"]
    assert (told["name"], told["payload"]) == ("live 2x, output", "output")
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    reference = samples_of(draw(pipe))
    with dit_cache(pipe, DitCacheConfig(policy=Budget(2.0), predictor=Linear(), payload="output")) as cache:
        score = compare(samples_of(draw(pipe)), reference)
    assert told["psnr"] == pytest.approx(score.psnr, abs=0.01)
    assert told["blocks_run"] == cache.stats.blocks_run < cache.stats.blocks_total == told["blocks_total"]


def test_a_payload_goes_with_a_target(toy_plan, here, capsys):
    for command in (["compare", "mine.py:toy"], ["generate", "demo", "--prompt", "taxi"]):
        assert main([*command, "--plan", "plan.json", "--payload", "output", "--quiet"]) == 2
        assert "--payload output goes with --target: a plan says itself" in capsys.readouterr().err


def test_measuring_leaves_nothing_behind(toy_plan, here):
    from dithooks.cli.targets.runnable import RunRequest, runnable

    subject = runnable(RunRequest("mine.py:toy"))
    before = list(subject.target.transformer.blocks)
    comparing.measure(subject, [settings.from_file("plan.json")], 1, lambda *_: None)
    assert all(a is b for a, b in zip(before, subject.target.transformer.blocks, strict=True))
    assert subject.device == torch.device("cpu")


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    shown = capsys.readouterr().out
    assert "dithooks compare demo --plan 2x --plan 3x --target 2" in shown
    assert "3    done, but a --target was not reached" in shown


def test_a_setting_of_several_ranges_shows_the_policy_of_each():
    further = DitCacheConfig(cache_block_start=3, policy=Threshold(0.2), predictor=Linear())
    config = DitCacheConfig(cache_num_blocks=3, policy=Budget(2.0), more_ranges=(further,))
    shown = settings.CacheSetting("both", config).to_dict()
    assert shown["policy"] == f"{Budget(2.0)}+{Threshold(0.2)}"
    assert shown["predictor"] == "Reuse()+Linear()"
