"""Pipelines that bring code of their own: found before anything is loaded, and refused unless it is asked for."""

import json
import os

import pytest

from dithooks.cli.targets import pipeline_loading
from dithooks.cli.targets.model_code import code_of
from dithooks.errors import TargetError

INDEX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
    "image_encoder": [None, None],
}


@pytest.fixture
def folder(tmp_path):
    """A saved pipeline without code; each test puts some in."""
    for name in ("transformer", "text_encoder", "safety_checker"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    write(tmp_path, INDEX)
    return tmp_path


def write(folder, index):
    (folder / "model_index.json").write_text(json.dumps(index))


def test_without_code(folder):
    assert list(code_of(INDEX, folder)) == []
    assert list(code_of(INDEX, None)) == []


def test_a_file_of_python_in_a_components_folder(folder):
    (folder / "transformer" / "modeling_mine.py").write_text("raise SystemExit('was run')")
    assert list(code_of(INDEX, folder)) == ["transformer/modeling_mine.py"]


def test_a_script_that_nothing_names_is_none(folder):
    (folder / "convert.py").write_text("")
    assert list(code_of(INDEX, folder)) == []


def test_a_module_of_its_own_in_the_index_even_where_the_file_is_not_here_yet(folder):
    index = {**INDEX, "transformer": ["my_transformer", "Mine"]}
    assert list(code_of(index, None)) == ["model_index.json takes 'transformer' from the module 'my_transformer'"]


@pytest.mark.parametrize("library", ["os", "my.module", "../evil", "", 3, ["a"]])
def test_what_is_no_package_known_here(folder, library):
    assert len(list(code_of({"transformer": [library, "Mine"]}, None))) == 1


def test_an_auto_map(folder):
    (folder / "text_encoder" / "config.json").write_text('{"auto_map": {"AutoModel": "mine.Model"}}')
    assert list(code_of(INDEX, folder)) == ["auto_map in text_encoder/config.json"]


@pytest.mark.parametrize("config", ["video_preprocessor_config.json", "generation_config.json"])
def test_an_auto_map_of_any_configuration(folder, config):
    (folder / "text_encoder" / config).write_text('{"auto_map": {"AutoVideoProcessor": "mine.Processor"}}')
    assert list(code_of(INDEX, folder)) == [f"auto_map in text_encoder/{config}"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes by name")
@pytest.mark.parametrize("file", ["model_index.json", "text_encoder/config.json"])
def test_a_configuration_that_is_a_pipe(folder, file):
    """Nothing waits for what nobody writes."""
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.raises(TargetError, match=rf"{file} cannot be read: .*no regular file"):
        pipeline_loading.find_pipeline(str(folder))


@pytest.mark.parametrize(
    ("text", "words"),
    [("[" * 100_000, "recursion"), ('{"a": "' + "x" * 2**25 + '"}', "at most 33,554,432"), ("[]", "no JSON object")],
    ids=["deep", "large", "list"],
)
def test_a_configuration_that_hides_what_it_says(folder, text, words):
    (folder / "text_encoder" / "config.json").write_text(text)
    with pytest.raises(TargetError, match=words):
        pipeline_loading.find_pipeline(str(folder))


def test_a_component_that_leaves_the_folder(folder):
    (found,) = code_of({"../elsewhere": ["diffusers", "FluxTransformer2DModel"]}, folder)
    assert "outside of the folder" in found


class TestFinding:
    def test_refused_in_words_and_nothing_is_loaded(self, folder, monkeypatch):
        (folder / "transformer" / "mine.py").write_text("")
        with pytest.raises(
            TargetError, match=r"brings code .* transformer/mine\.py\. Read it, then add --trust-remote"
        ):
            pipeline_loading.find_pipeline(str(folder))

    def test_trusted(self, folder, monkeypatch):
        (folder / "transformer" / "mine.py").write_text("")
        source, given = pipeline_loading.find_pipeline(str(folder), trust_code=True), []
        monkeypatch.setattr(source.kind, "from_pretrained", lambda *_, **options: given.append(options))
        source._load(pipeline_loading.DTYPES["float32"], quiet=True)
        assert given[0]["trust_remote_code"] is True

    def test_diffusers_is_not_told_to_trust_a_pipeline_without_code(self, folder, monkeypatch):
        source, given = pipeline_loading.find_pipeline(str(folder)), []
        monkeypatch.setattr(source.kind, "from_pretrained", lambda *_, **options: given.append(options))
        source._load(pipeline_loading.DTYPES["float32"], quiet=True)
        assert "trust_remote_code" not in given[0]
