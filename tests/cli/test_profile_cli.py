"""``dithooks profile``: what the API says of a run, printed and as JSON."""

import json
import sys

import pytest
import torch

from dithooks import DitCacheConfig, Threshold, profile
from dithooks.cli.main import main
from dithooks.profiling.profile import THRESHOLDS

pytest.importorskip("diffusers")

from cli.test_search_cli import FACTORIES

from dithooks.demo import CALIBRATION, load_pipeline

DEMO = ["profile", "demo", "--steps", "10", "--prompt", "rocket", "--seed", "4"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a file of factories."""
    (tmp_path / "mine.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("mine", None)


@pytest.fixture(scope="module")
def found():
    """What the API says of the same runs: list by list, and as one range from block 1 on."""
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)

    def run():
        noise = [torch.Generator().manual_seed(4)]
        return pipe(["rocket"], num_inference_steps=10, generator=noise, output_type="pt")

    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1))
    with torch.no_grad():
        return [profile(pipe, run, own, thresholds=(0.2, 0.9)) for own in (None, config)]


@pytest.mark.parametrize("first", [None, 1])
def test_is_that_of_the_api(first, found, here, capsys):
    option = [] if first is None else ["--first", "1"]
    assert main([*DEMO, "--threshold", "0.2", "--threshold", "0.9", *option, "--json", "n.json"]) == 0
    expected = found[0 if first is None else 1]
    assert capsys.readouterr().out == f"{expected}\n"
    told = json.loads((here / "n.json").read_text())
    assert (told["model"], told["prompts"], told["steps"], told["seed"]) == ("demo", ["rocket"], 10, 4)
    assert told["thresholds"] == [0.2, 0.9]
    assert told["policy"] == str(expected.policy)
    assert len(told["branches"]) == len(expected.branches) == (4 if first is None else 2)
    for each, branch in zip(told["branches"], expected.branches, strict=True):
        assert (each["range"], each["branch"]) == (branch.range, branch.branch)
        assert each["steps"] == list(range(10))
        assert each["changes"] == pytest.approx(branch.changes, rel=1e-5)
        assert each["ratios"] == pytest.approx(branch.ratios, rel=1e-5)
        shares = [expected.reuse(threshold, branch) for threshold in (0.2, 0.9)]
        assert each["reused"] == pytest.approx(shares, rel=1e-5)
        assert shares[1] > 0
        n, skipped = branch.schedule.blocks, branch.schedule.skipped
        assert each["blocks_fewer"] == pytest.approx([n / (n - share * skipped) for share in shares], rel=1e-5)


def test_json_is_alone_on_stdout(here, capsys):
    assert main(["profile", "mine.py:toy", "--json", "-"]) == 0
    shown = capsys.readouterr()
    told = json.loads(shown.out)
    assert told["model"] == "mine.py:toy"
    assert told["thresholds"] == list(THRESHOLDS)
    assert len(told["branches"][0]["changes"]) == 5
    assert "a factory may print" in shown.err


def test_what_is_not_finite_is_none(here, capsys):
    (here / "odd.py").write_text(
        FACTORIES + "\n\ndef zeros():\n    pipe = Toy()\n    return pipe, lambda: pipe(scale=float('inf'))\n"
    )
    assert main(["profile", "odd.py:zeros", "--json", "-"]) == 0
    sys.modules.pop("odd", None)
    assert set(json.loads(capsys.readouterr().out)["branches"][0]["changes"]) == {None}


def test_prompts_of_the_demo(here, capsys):
    assert main(["profile", "demo", "--steps", "2", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["prompts"] == list(CALIBRATION)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--threshold", "0"], "--threshold is 0: it must be above 0"),
        (["demo", "--threshold", "nan"], "--threshold is nan"),
        (["demo", "--threshold", "low"], "invalid float value: 'low'"),
        (["demo", "--first", "-1"], "--first is -1: it must be 0 or more"),
        (["demo", "--first", "12"], "12"),
        (["demo", "--steps", "0"], "--steps is 0"),
        (["demo", "--prompt", "piza"], "never seen 'piza'"),
        (["demo", "--json", "no/n.json"], "no is not a folder"),
        (["mine.py:toy", "--steps", "5"], "--steps goes with the model demo only"),
        (["mine.py:no_blocks"], "no list of blocks"),
        (["mine.py:no_step"], "run made no step of the target"),
        (["mine.py:gradients"], "run made no step of the target, or with gradients"),
        (["mine.py:make"], "mine.py has no 'make'"),
        (["nothing"], "there is no model 'nothing'"),
    ],
)
def test_asked_wrongly(arguments, message, here, capsys):
    assert main(["profile", *arguments]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert sum(each.startswith("dithooks: error: ") for each in shown.err.splitlines()) == 1
    assert shown.out in ("", "a factory may print\n")


def test_faults_of_the_users_own_are_shown_as_they_are(here, capsys):
    assert main(["profile", "mine.py:fails"]) == 1
    assert "ValueError: a fault of the user's" in capsys.readouterr().err


def test_interrupted(here, capsys):
    assert main(["profile", "mine.py:interrupted_1"]) == 130
    assert capsys.readouterr().err == "dithooks: interrupted\n"


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["profile", "--help"])
    shown = capsys.readouterr().out
    assert "dithooks profile demo --threshold 0.1" in shown
    assert "path/to/file.py:factory" in shown
