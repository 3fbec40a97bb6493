"""Errors that the library raises on purpose are one line for the user, whichever command meets them."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import dithooks
from dithooks import CachePlan, DitCacheConfig, dit_cache
from dithooks.cli import generation
from dithooks.cli.main import COMMANDS, main
from dithooks.cli.targets.pipeline_loading import PipelineSource
from dithooks.errors import WiringError

pytest.importorskip("diffusers")

from cli.test_search_cli import FACTORIES

CONFIG = DitCacheConfig(cache_step_start=1, cache_step_interval=2)
MODEL = """

class Collecting(Model):
    '''Uses the outputs of all its blocks, so that no range that ends before the last can be skipped.'''
    def forward(self, x, t):
        outputs = []
        for block in self.blocks:
            x = block(x, t)
            outputs.append(x)
        return x + sum(outputs)

class Pipeline(Toy):
    '''As one of diffusers.'''
    def __init__(self):
        super().__init__(Collecting)
    @classmethod
    def from_pretrained(cls, source, **options):
        return cls()
    def set_progress_bar_config(self, **options):
        pass
    def __call__(self, num_inference_steps=len(TIMES), generator=None):
        (x,) = super().__call__(generator=generator, steps=num_inference_steps)
        return [torch.sigmoid(x).reshape(1, 1, 4, 8)]

def collecting():
    return Pipeline(), {"generator": torch.Generator().manual_seed(7)}

def one_call():
    model = Collecting()
    return model, {"x": torch.ones(1, 8, 4), "t": 0.5}
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a file of factories and a way to cache all blocks."""
    (tmp_path / "collects.py").write_text(FACTORIES + MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    CONFIG.save("plan.json")
    yield tmp_path
    sys.modules.pop("collects", None)


@pytest.fixture
def mine(here):
    """The module of the factories."""
    return importlib.import_module("collects")


@pytest.fixture
def message(mine):
    """The message of the library for the model that collects the outputs of its blocks."""
    pipe, arguments = mine.collecting()
    with pytest.raises(WiringError) as caught, torch.no_grad(), dit_cache(pipe, CONFIG):
        pipe(**arguments)
    return without_numbers(str(caught.value))


def without_numbers(text):
    """A text less its numbers, which depend on the random weights."""
    return re.sub(r"\d[\d.e-]*", "#", " ".join(text.split()))


def refused(capsys, *command):
    """The one line of a command that ends with exit code 2."""
    assert main([*command]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    (line,) = captured.err.splitlines()
    return without_numbers(line)


def test_compare(message, here, capsys):
    line = refused(capsys, "compare", "collects.py:collecting", "--plan", "plan.json", "--quiet")
    assert line == f"dithooks: error: plan plan: {message}"
    assert not (here / "compare.png").exists()


def test_search(mine, here, capsys):
    """It plans only what the model allows, single blocks here: too little for the target, but it can be run."""
    command = [
        "search",
        "collects.py:collecting",
        "--cost",
        "blocks",
        "--max-evals",
        "1",
        "--out",
        "new.json",
        "--quiet",
    ]
    assert main(command) == 3
    assert "was not reached" in capsys.readouterr().err
    plan, (pipe, arguments) = CachePlan.load("new.json"), mine.collecting()
    assert [piece.blocks for piece in plan.pieces] == [1]
    with torch.no_grad(), dit_cache(pipe, plan) as cache:
        pipe(**arguments)
    assert cache.stats.reused_calls == plan.pieces[0].steps.count(0)


def test_generate(message, mine, here, monkeypatch, capsys):
    monkeypatch.setattr(generation, "find_pipeline", lambda name, trust: PipelineSource(name, mine.Pipeline, name))
    assert refused(capsys, "generate", "toy", "--plan", "plan.json", "--quiet") == f"dithooks: error: {message}"
    assert not (here / "generated.png").exists()


def test_profile(here, capsys):
    """A profile reuses nothing, so it takes this model; a range that it does not have is refused."""
    assert main(["profile", "collects.py:collecting"]) == 0
    assert "reused at threshold" in capsys.readouterr().out
    assert refused(capsys, "profile", "collects.py:collecting", "--first", "9").startswith("dithooks: error: ")


def test_inspect(here, capsys):
    """An inspection shows the reason along with the ranges; a list that the model does not have is refused."""
    assert main(["inspect", "collects.py:one_call"]) == 0
    assert "refused" in capsys.readouterr().out
    line = refused(capsys, "inspect", "collects.py:one_call", "--blocks", "blocks.0.inner")
    assert line.startswith("dithooks: error: collects.py:one_call: blocks=")


def test_inspect_where_the_blocks_are_not_called(here, capsys):
    line = refused(capsys, "inspect", "collects.py:no_step")
    assert "did not call its blocks" in line


def test_importing_the_command_line_is_cheap():
    """It imports modules of its own, and of others nothing but argparse; so does the parser."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "from dithooks.cli.main import build_parser; build_parser(); "
        "print(sorted(name for name in sys.modules if name.startswith('dithooks.') and '.cli' not in name), "
        "{'torch', 'numpy', 'json', 'subprocess'} & set(sys.modules))"
    )
    command = [sys.executable, "-I", "-c", code, str(Path(dithooks.__file__).parents[1])]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == "['dithooks.errors', 'dithooks.validation'] set()\n"


def test_every_command_has_one_form():
    for name, command in COMMANDS.items():
        assert command.SUMMARY, name
        assert command.DESCRIPTION, name
        assert command.run.__doc__, name
