"""``dithooks generate`` on saved folders of whole pipelines, one of each family, to pictures and videos."""

import json

import numpy as np
import pytest

from dithooks import DitCacheConfig, Mask
from dithooks.cli.main import main

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
from PIL import Image

from dithooks.tiny import pipeline, pipeline_names

STEPS = 4
FRAMES = ("num_frames", "video_length", "frames")
NEEDED = {"SkyReelsV2Pipeline": "ftfy", "HeliosPipeline": "ftfy", "WanVACEPipeline": "ftfy"}
IN_TILES = "AllegroPipeline"  # which decodes in tiles that are larger than a tiny video


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(name):
    """Save a pipeline to a folder; return the arguments of a call."""
    if name in NEEDED:
        pytest.importorskip(NEEDED[name])
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    made = pipeline(name)
    made.pipe.save_pretrained("saved")
    return made.call


def generate(call, *more):
    """The exit code for the arguments of a call."""
    rest = {name: value for name, value in call.items() if name not in ("width", "height", *FRAMES, "negative_prompt")}
    options = ["--size", f"{call['width']}x{call['height']}", "--steps", str(STEPS), "--prompt", "a cat", "--quiet"]
    for name in FRAMES:
        options += ["--frames", str(call[name])] if name in call else []
    if "negative_prompt" in call:
        options += ["--negative-prompt", call["negative_prompt"]]
    for name, value in rest.items():
        options += ["--set", f"{name}={json.dumps(value)}"]
    return main(["generate", "saved", *options, *more])


def read(path):
    """All frames of a file, as an array of bytes."""
    if path.suffix == ".mp4":
        with pytest.importorskip("imageio.v2").get_reader(path) as file:
            return np.stack([frame for frame in file])  # noqa: C416 (its length is infinite to list())
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))[None]


@pytest.mark.parametrize("name", sorted({*pipeline_names()} - {IN_TILES}))
def test_family(name, here):
    """The file has the size and the frames that were asked for; what is drawn differs where something is reused."""
    call = saved(name)
    asked = next((call[each] for each in FRAMES if each in call), None)
    if asked is not None:
        pytest.importorskip("imageio_ffmpeg")
    ending = "png" if asked is None else "mp4"
    DitCacheConfig(policy=Mask((1, 1, 1, 1))).save("all.json")
    DitCacheConfig(policy=Mask((1, 0, 1, 0))).save("two.json")
    drawn, told = {}, {}
    for way, more in {"plain": [], "computed": ["--plan", "all.json"], "half": ["--plan", "two.json"]}.items():
        assert generate(call, *more, "--out", f"{way}.{ending}") == 0
        drawn[way], told[way] = read(here / f"{way}.{ending}"), json.loads((here / f"{way}.json").read_text())
    assert drawn["plain"].shape == (asked or 1, call["height"], call["width"], 3)
    assert drawn["plain"].std() > 5
    assert np.array_equal(drawn["plain"], drawn["computed"])
    assert not np.array_equal(drawn["plain"], drawn["half"])
    assert told["plain"]["pipeline"] == name
    assert told["plain"]["results"][0]["frames"] == (asked or 1)
    assert told["plain"]["not_taken"] == []
    silent = "plain.mp4 is silent: the sound that LTX2Pipeline has made, too, is left out"
    assert told["plain"]["remarks"] == ([silent] if name == "LTX2Pipeline" else [])
    assert told["computed"]["blocks_run"] == told["computed"]["blocks_total"] == told["half"]["blocks_total"]
    assert told["half"]["blocks_run"] * 2 == told["half"]["blocks_total"] > 0
    assert set(told["half"]["decisions"]["steps"].values()) == {"●○●○"}


def test_a_decoder_that_needs_tiles(here, capsys):
    call = saved(IN_TILES)
    assert generate(call, "--out", "a.gif") == 2
    assert "autoencoder_kl_allegro: Decoding without tiling has not been implemented yet." in capsys.readouterr().err
    assert generate(call, "--out", "a.gif", "--tiling") == 0
    with Image.open("a.gif") as file:
        assert file.size == (call["width"], call["height"])


def test_a_pipeline_without_a_decoder_in_tiles(capsys):
    assert main(["generate", "demo", "--prompt", "cat", "--quiet", "--tiling"]) == 2
    assert "--tiling is for a VAE that can work in tiles, which EmojiPipeline does not have" in capsys.readouterr().err


def test_a_package_that_a_pipeline_needs_is_not_installed(monkeypatch, capsys):
    """Its module imports what it needs only where that is there."""
    module = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan_vace")
    monkeypatch.delattr(module, "ftfy", raising=False)
    pipeline("WanVACEPipeline").pipe.save_pretrained("saved")
    assert generate(pipeline("WanVACEPipeline").call, "--out", "a.gif") == 2
    message = f"{module.__name__} has no ftfy, as a package that it needs is not installed: pip install ftfy may do"
    assert message in capsys.readouterr().err
