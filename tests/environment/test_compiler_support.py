"""Releases of PyTorch whose compiler cannot take a cache are refused in words; others are not even asked."""

import os
import re
from pathlib import Path

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache
from dithooks.environment import compiler_support
from dithooks.environment.compiler_support import refusing_compiled
from dithooks.environment.measured_releases import COMPILED_BLOCKS, COMPILED_MODELS, MEASURED, release_of, unmeasured
from dithooks.errors import InvalidSetting

WRAPPERS = os.path.join("site-packages", "torch", "_dynamo", "eval_frame.py")
OLD = """
def wrapper(callback):
    def _fn(function):
        callback
        return function()
    return _fn
"""


def wrapped(callback):
    """A wrapper such as the compiler of PyTorch 2.6 puts around a function, in a file of that name."""
    names = {}
    exec(compile(OLD, WRAPPERS, "exec"), names)
    return names["wrapper"](callback)


COMPILES, DISABLES = wrapped(lambda *_: None), wrapped(None)


def of_release(monkeypatch, release):
    monkeypatch.setattr(compiler_support, "RELEASE", release)


def begin():
    return "begun"


class TestWholeModels:
    def test_a_release_that_compiles_them_gets_the_function_itself(self, monkeypatch):
        of_release(monkeypatch, (2, 8))
        assert refusing_compiled(begin, lambda: True) is begin

    @pytest.mark.parametrize("release", [(2, 1), (2, 6), (2, 7)])
    def test_compiled_code_is_refused_by_its_wrapper_on_the_stack(self, monkeypatch, release):
        of_release(monkeypatch, release)
        checked = refusing_compiled(begin, lambda: False)
        assert checked() == "begun"
        with pytest.raises(InvalidSetting, match=r"torch 2\.8 compiles models as a whole"):
            COMPILES(checked)

    def test_behind_the_librarys_own_wrapper_too(self, monkeypatch):
        of_release(monkeypatch, (2, 7))
        checked = refusing_compiled(begin, lambda: False)
        with pytest.raises(InvalidSetting):
            COMPILES(lambda: DISABLES(checked))

    def test_what_the_user_keeps_out_of_the_compiler_is_not_compiled(self, monkeypatch):
        of_release(monkeypatch, (2, 7))
        checked = refusing_compiled(begin, lambda: False)
        assert COMPILES(lambda: DISABLES(lambda: DISABLES(checked))) == "begun"


class TestBlocks:
    def test_compiled_blocks_work_from_their_first_release_on(self, monkeypatch):
        of_release(monkeypatch, COMPILED_BLOCKS)
        assert refusing_compiled(begin, lambda: True)() == "begun"

    def test_compiled_blocks_are_refused_before(self, monkeypatch):
        of_release(monkeypatch, (2, 5))
        with pytest.raises(InvalidSetting, match=r"torch 2\.6 their blocks one by one") as caught:
            refusing_compiled(begin, lambda: True)()
        assert torch.__version__ in str(caught.value)
        assert len(str(caught.value)) <= 300


class Adds(nn.Module):
    def forward(self, hidden_states, timestep):
        return hidden_states + 1


class Four(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Adds() for _ in range(4))

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            hidden_states = block(hidden_states, timestep)
        return hidden_states


def test_a_cached_model_with_compiled_blocks_says_so_and_runs_uncompiled(monkeypatch):
    of_release(monkeypatch, (2, 5))
    model, x, t = Four(), torch.zeros(1, 2), torch.tensor([0.9])
    with dit_cache(model, DitCacheConfig(1, 2)):
        for block in model.blocks:
            block._compiled_call_impl = block._call_impl  # as block.compile() sets it
        with pytest.raises(InvalidSetting, match="cannot compile this with a cache"):
            model(x, t)
        for block in model.blocks:
            block._compiled_call_impl = None
        assert model(x, t).tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize(
    ("version", "release"),
    [("2.13.0+cpu", (2, 13)), ("0.42.1", (0, 42)), ("2.1.0.post17", (2, 1)), ("", None), (None, None)],
)
def test_the_release_of_a_version(version, release):
    assert release_of(version) == release


def test_versions_that_were_not_measured_are_named_with_the_range():
    installed = {"python": "3.11.7", "torch": "2.0.1", "diffusers": "0.43.0", "numpy": "3.0"}
    assert list(unmeasured(installed)) == [
        "torch 2.0.1 was not measured with dithooks, 2.1 to 2.15 was",
        "diffusers 0.43.0 was not measured with dithooks, 0.38 to 0.42 was",
    ]


@pytest.mark.parametrize(
    ("version", "around"), [("2.11.0", "2.10 and 2.13"), ("2.12.1+cpu", "2.10 and 2.13"), ("2.14.0", "2.13 and 2.15")]
)
def test_a_version_between_those_that_were_measured_was_not_measured_itself(version, around):
    said = f"torch {version} was not measured itself with dithooks, {around} were"
    assert list(unmeasured({"torch": version})) == [said]


def test_the_page_on_versions_lists_those_that_were_measured():
    page = (Path(__file__).parents[2] / "docs" / "versions.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+\.\d+)\.\d+ \| [^|]+ \| (none|\d+\.\d+)", page, re.M)
    assert [release_of(torch) for torch, _ in rows] == list(MEASURED["torch"])
    assert {release_of(diffusers) for _, diffusers in rows if diffusers != "none"} == set(MEASURED["diffusers"])


def test_blocks_compile_no_later_than_models():
    assert COMPILED_BLOCKS <= COMPILED_MODELS
