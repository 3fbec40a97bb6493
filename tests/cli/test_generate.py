"""``dithooks generate``: what it writes is what the API draws, with every way to cache; errors are one line."""

import json
import math
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dithooks import Budget, CachePlan, DitCacheConfig, Linear, Mask, Threshold, dit_cache, search
from dithooks.cli import generation as generating
from dithooks.cli import media as pictures
from dithooks.cli.main import main
from dithooks.cli.targets import pipeline_loading as loading
from dithooks.errors import TargetError, UsageError
from dithooks.stats.warning_collector import collect_warnings

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import pipelines
import transformers
from PIL import Image

from dithooks.demo import WEIGHTS, load_pipeline

LETTERS = "abcdefghijklmnopqrstuvwxyz"
PICTURE = ["--size", "16x16", "--steps", "6", "--set", "max_sequence_length=8", "--quiet"]
VIDEO = ["--size", "16x16", "--steps", "6", "--frames", "5", "--quiet"]


def save_flux(folder):
    """A FLUX that reads letters."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    vocabulary = {word: number for number, word in enumerate(words)}
    made, _ = pipelines.flux()
    diffusers.FluxPipeline(
        scheduler=made.scheduler,
        vae=made.vae,
        transformer=made.transformer,
        text_encoder=transformers.CLIPTextModel(config).eval(),
        tokenizer=transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=8),
        text_encoder_2=t5("T5"),
        tokenizer_2=tokenizer(),
    ).save_pretrained(folder)


def save_wan(folder):
    made, _ = pipelines.wan()
    diffusers.WanPipeline(
        tokenizer=tokenizer(),
        text_encoder=t5("UMT5"),
        vae=made.vae,
        scheduler=made.scheduler,
        transformer=made.transformer,
    ).save_pretrained(folder)


def t5(kind):
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=40, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2
    )
    return getattr(transformers, f"{kind}EncoderModel")(config).eval()


def tokenizer():
    letters = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((letter, -1.0) for letter in f"▁{LETTERS}")]
    return transformers.T5TokenizerFast(vocab=letters, extra_ids=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a pipeline that draws pictures, one that draws videos, and one that takes no text."""
    torch.manual_seed(0)
    where = tmp_path_factory.mktemp("saved")
    save_flux(where / "flux")
    save_wan(where / "wan")
    pipelines.dit()[0].save_pretrained(where / "dit")
    return where


@pytest.fixture(scope="module")
def plans(saved):
    """A plan for each, in a file."""
    for name, prompt in (("flux", "a cat"), ("wan", "a cat")):
        pipe = load(saved / name)
        with torch.no_grad(), collect_warnings([]):
            found = search(pipe, lambda pipe, name=name, prompt=prompt: drawn(pipe, name, prompt), 1.8,
                           cost="blocks", max_evals=1, verbose=False)  # fmt: skip
        found.plan.save(saved / f"{name}.json")
    return saved


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(folder):
    with collect_warnings([]):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, name, prompt, seed=0):
    """What the API draws, as a list of frames."""
    more = {"num_frames": 5} if name == "wan" else {"max_sequence_length": 8}
    noise = torch.Generator().manual_seed(seed)
    out = pipe(prompt, width=16, height=16, num_inference_steps=6, generator=noise, output_type="pil", **more)
    return out.frames[0] if name == "wan" else out.images


def read(path):
    """All frames of a file."""
    with Image.open(path) as file:
        frames = []
        for number in range(getattr(file, "n_frames", 1)):
            file.seek(number)
            frames.append(np.asarray(file.convert("RGB")))
    return frames


def same(path, frames):
    found = read(path)
    return len(found) == len(frames) and all(
        np.array_equal(a, np.asarray(b)) for a, b in zip(found, frames, strict=True)
    )


def files(folder):
    return sorted(path.name for path in folder.iterdir())


# -- pictures ---------------------------------------------------------------------------------------------------


def test_without_a_cache(saved, here, capsys):
    assert (
        main(["generate", str(saved / "flux"), "--prompt", "a cat", "--seed", "3", *PICTURE, "--out", "cat.png"]) == 0
    )
    assert files(here) == ["cat.json", "cat.png"]
    assert same("cat.png", drawn(load(saved / "flux"), "flux", "a cat", 3))
    told = json.loads((here / "cat.json").read_text())
    assert (told["pipeline"], told["steps"], told["setting"], told["blocks_run"]) == ("FluxPipeline", 6, None, None)
    assert told["call"] == {"num_inference_steps": 6, "width": 16, "height": 16, "max_sequence_length": 8}
    (result,) = told["results"]
    assert {name: result[name] for name in ("file", "prompt", "seed", "frames", "size")} == {
        "file": "cat.png", "prompt": "a cat", "seed": 3, "frames": 1, "size": [16, 16]
    }  # fmt: skip
    assert told["seconds"] == pytest.approx(result["seconds"])
    assert result["seconds"] > 0
    assert (told["device"], told["dtype"], told["not_taken"], told["remarks"]) == ("cpu", "float32", [], [])
    assert {"torch", "diffusers", "dithooks"} <= set(told["versions"])
    shown = capsys.readouterr().out
    assert "cat.png: 'a cat', seed 3" in shown
    assert "drawn without a cache" in shown


def test_with_a_plan(plans, here, capsys):
    """Which says itself how many steps there are."""
    arguments = [each for each in PICTURE if each not in ("--steps", "6")]
    command = ["generate", str(plans / "flux"), "--prompt", "a dog", "--plan", str(plans / "flux.json"), *arguments]
    assert main(command) == 0
    pipe = load(plans / "flux")
    plain = drawn(pipe, "flux", "a dog")
    plan = CachePlan.load(plans / "flux.json")
    with dit_cache(pipe, plan) as cache:
        assert same("generated.png", drawn(pipe, "flux", "a dog"))
        stats = cache.stats
    assert not same("generated.png", plain)
    told = json.loads((here / "generated.json").read_text())
    assert (told["blocks_run"], told["blocks_total"]) == (stats.blocks_run, stats.blocks_total)
    assert told["bytes_peak"] == stats.bytes_peak > 0
    assert told["decisions"]["reasons"] == stats.reasons
    assert list(told["decisions"]["steps"].values()) == [piece.picture for piece in plan.pieces]
    assert (told["setting"]["target"], told["setting"]["file"]) == (1.8, str(plans / "flux.json"))
    assert told["steps"] == 6
    assert "plan flux: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("option", "config"),
    [
        ([], DitCacheConfig(policy=Budget(1.5), predictor=Linear())),
        (["--policy-free"], DitCacheConfig(policy=Mask((1, 0, 1, 1, 0, 1)), predictor=Linear())),
    ],
    ids=["live", "spread"],
)
def test_with_a_speedup(option, config, saved, here):
    command = ["generate", str(saved / "flux"), "--prompt", "a cat", "--target", "1.5", *option, *PICTURE]
    assert main(command) == 0
    pipe = load(saved / "flux")
    with collect_warnings([]), dit_cache(pipe, config) as cache:
        assert same("generated.png", drawn(pipe, "flux", "a cat"))
    told = json.loads((here / "generated.json").read_text())
    assert told["blocks_total"] / told["blocks_run"] == pytest.approx(1.5)
    assert told["blocks_run"] == cache.stats.blocks_run
    assert told["setting"]["policy"] == str(config.when)
    (steps,) = told["decisions"]["steps"].values()
    assert len(steps) == 6
    assert steps[0] == "●"


def test_a_configuration_from_a_file(saved, here):
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(10.0, max_warmup_steps=2))
    config.save("config.json")
    assert main(["generate", str(saved / "flux"), "--prompt", "a cat", "--plan", "config.json", *PICTURE]) == 0
    told = json.loads((here / "generated.json").read_text())
    assert told["setting"]["policy"] == str(config.when)
    assert told["decisions"]["reasons"] == {"warm-up": 2, "reuse": 4}


def test_several_are_drawn_one_by_one(saved, here):
    """Each as if it were alone, with the cache on."""
    prompts = ["--prompt", "a cat", "--prompt", "a dog", "--count", "2", "--seed", "5", "--target", "1.5"]
    assert main(["generate", str(saved / "flux"), *prompts, *PICTURE, "--out", "x.png"]) == 0
    assert files(here) == ["x-1.png", "x-2.png", "x-3.png", "x-4.png", "x.json"]
    pipe = load(saved / "flux")
    with collect_warnings([]):
        for number, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
            with dit_cache(pipe, DitCacheConfig(policy=Budget(1.5), predictor=Linear())):
                assert same(f"x-{number + 1}.png", drawn(pipe, "flux", prompt, 5 + number))
    told = json.loads((here / "x.json").read_text())
    assert [each["seed"] for each in told["results"]] == [5, 6, 7, 8]
    assert told["blocks_total"] == 4 * 6 * 5
    assert sum(told["decisions"]["reasons"].values()) == 4 * 6
    (steps,) = told["decisions"]["steps"].values()
    assert len(steps) == 6  # of one run


def test_a_pipeline_without_text(saved, here, capsys):
    command = ["generate", str(saved / "dit"), "--set", "class_labels=[7]", "--steps", "4", "--quiet"]
    assert main([*command, "--prompt", "a cat", "--negative-prompt", "a dog", "--guidance", "2"]) == 0
    pipe = load(saved / "dit")
    noise = torch.Generator().manual_seed(0)
    assert same("generated.png", pipe([7], num_inference_steps=4, guidance_scale=2.0, generator=noise).images)
    assert json.loads((here / "generated.json").read_text())["not_taken"] == ["--negative-prompt", "--prompt"]
    shown = capsys.readouterr().err
    assert "DiTPipeline takes no --negative-prompt: drawn without it" in shown
    assert "DiTPipeline takes no --prompt: drawn without it" in shown


def test_json_is_alone_on_stdout(saved, here, capsys):
    assert main(["generate", str(saved / "flux"), "--prompt", "a cat", *PICTURE, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["results"][0]["file"] == "generated.png"
    assert files(here) == ["generated.png"]


def test_the_demo(here, capsys):
    command = ["generate", "demo", "--prompt", "rocket", "--steps", "4", "--quiet", "--json", "n.json"]
    assert main([*command, "--plan", "2x"]) == 0
    assert files(here) == ["generated.png", "n.json"]
    told = json.loads((here / "n.json").read_text())
    assert told["setting"]["name"] == "plan 2x"
    assert any("fitted for 20, 28 and 50 steps" in each for each in told["remarks"])
    assert "fitted for 20, 28 and 50 steps" in capsys.readouterr().err
    assert main(["generate", str(WEIGHTS), *command[2:], "--dtype", "bfloat16", "--out", "b.png"]) == 0
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(torch.bfloat16)
    assert same("b.png", pipe("rocket", num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images)


# -- videos -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["uncached", "plan", "live"])
def test_video(way, plans, here):
    option = {"uncached": [], "plan": ["--plan", str(plans / "wan.json")], "live": ["--target", "1.5"]}[way]
    command = ["generate", str(plans / "wan"), "--prompt", "a cat", *option, *VIDEO]
    assert main([*command, "--out", "cat.apng"]) == 0
    pipe = load(plans / "wan")
    plain = drawn(pipe, "wan", "a cat")
    if way == "uncached":
        assert same("cat.apng", plain)
        return
    config = DitCacheConfig(policy=Budget(1.5), predictor=Linear())
    with (
        collect_warnings([]),
        dit_cache(pipe, CachePlan.load(plans / "wan.json") if way == "plan" else config) as cache,
    ):
        cached = drawn(pipe, "wan", "a cat")
    assert same("cat.apng", cached)
    told = json.loads((here / "cat.json").read_text())
    assert told["blocks_run"] == cache.stats.blocks_run < cache.stats.blocks_total == told["blocks_total"]
    assert told["results"][0]["frames"] == 5


def test_gif(saved, here, capsys):
    assert main(["generate", str(saved / "wan"), "--prompt", "a cat", *VIDEO, "--out", "cat.gif", "--fps", "8"]) == 0
    with Image.open("cat.gif") as file:
        times = []
        for number in range(file.n_frames):
            file.seek(number)
            times.append(file.info["duration"])
    assert times == [120, 130, 130, 120, 120]  # hundredths of a second, together five eighths, nearly
    assert "5 frames" in capsys.readouterr().out


def test_one_frame_is_a_picture(saved, here):
    command = ["generate", str(saved / "wan"), "--prompt", "a cat", *VIDEO, "--frames", "1"]
    assert main([*command, "--out", "cat.png"]) == 0
    assert len(read("cat.png")) == 1


def test_mp4(saved, here, monkeypatch):
    """As imageio is given it: eight bits, sides even, so many frames a second."""
    seen = SimpleNamespace(frames=[], options={})

    class Writer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        append_data = seen.frames.append

    def get_writer(path, **options):
        seen.options = options
        path.write_bytes(b"video")
        return Writer()

    monkeypatch.setattr(pictures, "_lacking", lambda: "")
    monkeypatch.setitem(sys.modules, "imageio.v2", SimpleNamespace(get_writer=get_writer))
    assert main(["generate", str(saved / "wan"), "--prompt", "a cat", *VIDEO, "--fps", "24"]) == 0
    assert files(here) == ["generated.json", "generated.mp4"]
    assert seen.options["fps"] == 24
    expected = drawn(load(saved / "wan"), "wan", "a cat")
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(seen.frames, expected, strict=True))
    frames = [Image.new("RGB", (5, 3))]
    pictures.write_frames(here / "odd.mp4", frames, 8)
    assert seen.frames[-1].shape == (4, 6, 3)


def test_mp4_is_read_back(here):
    pytest.importorskip("imageio_ffmpeg")
    reader = pytest.importorskip("imageio.v2").get_reader
    frames = [Image.new("RGB", (32, 16), (value, 0, 0)) for value in (0, 120, 240)]
    pictures.write_frames(here / "red.mp4", frames, 8)
    with reader(here / "red.mp4") as file:
        found = [frame.mean((0, 1)) for frame in file]
    assert [round(each[0] / 120) for each in found] == [0, 1, 2]


def test_without_ffmpeg(saved, here, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "_lacking", lambda: "imageio-ffmpeg")
    command = ["generate", str(saved / "wan"), "--prompt", "a cat", *VIDEO]
    assert main([*command, "--out", "cat.mp4"]) == 2
    assert "cat.mp4 needs imageio-ffmpeg (pip install imageio imageio-ffmpeg)" in capsys.readouterr().err
    assert main(command) == 0
    assert files(here) == ["generated.gif", "generated.json"]


def test_more_frames_than_were_to_be_expected(here):
    """What was drawn is not lost."""
    frames = [Image.new("RGB", (4, 4), (value, 0, 0)) for value in (0, 99)]
    options = SimpleNamespace(fps=8)
    task = SimpleNamespace(prompt=None, seed=0, file=here / "x.png")
    remarks = []
    named = SimpleNamespace(takes={})
    out = SimpleNamespace(frames=[frames])
    told = generating._run(options, named, lambda: out, {}, task, torch.device("cpu"), remarks)
    assert told["file"].endswith("x.gif")
    assert len(read(here / "x.gif")) == 2
    assert "cannot hold the 2 frames" in remarks[0]


# -- what cannot be done ----------------------------------------------------------------------------------------


def refused(capsys, *arguments):
    """The line that is said."""
    assert main(["generate", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    line = [each for each in shown.err.splitlines() if each.startswith("dithooks: error: ")]
    assert len(line) == 1
    assert "Traceback" not in shown.err
    return line[0]


def test_a_plan_of_another_model(plans, here, capsys):
    for name, plan in (("flux", plans / "wan.json"), ("wan", plans / "flux.json")):
        line = refused(capsys, plans / name, "--prompt", "a cat", "--plan", plan, "--quiet")
        assert "the plan was made for another model" in line
    assert files(here) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "draws from a text: give a --prompt"),
        (["--prompt", "piza"], "never seen 'piza'; close to 'piza': pizza"),
        (["--prompt", "rocket", "--plan", "4x"], "there is no plan '4x'"),
        (["--prompt", "rocket", "--plan", "2x", "--target", "2"], "--plan goes without --target"),
        (["--prompt", "rocket", "--policy-free"], "--policy-free goes with --target"),
        (["--prompt", "rocket", "--target", "1"], "--target is 1: give a number above 1"),
        (["--prompt", "rocket", "--steps", "0"], "--steps is 0: it must be 1 or more"),
        (["--prompt", "rocket", "--count", "0"], "--count is 0"),
        (["--prompt", "rocket", "--frames", "0"], "--frames is 0"),
        (["--prompt", "rocket", "--seed", "-1"], "--seed is -1"),
        (["--prompt", "rocket", "--seed", str(2**62)], "below 2**62"),
        (["--prompt", "rocket", "--guidance", "nan"], "--guidance is nan"),
        (["--prompt", "rocket", "--fps", "0"], "--fps is 0: it must be from 1 to 100"),
        (["--prompt", "rocket", "--size", "big"], "--size is big: give width and height in pixels"),
        (["--prompt", "rocket", "--size", "0x8"], "--size is 0x8"),
        (["--prompt", "rocket", "--dtype", "int8"], "invalid choice: 'int8'"),
        (
            ["--prompt", "rocket", "--device", "toaster"],
            "--device is toaster, which PyTorch does not know here: give auto, cpu",
        ),
        (["--prompt", "rocket", "--set", "latents"], "--set is latents: give NAME=VALUE"),
        (["--prompt", "rocket", "--set", "latent=1"], "takes no latent: do you mean latents?"),
        (["--prompt", "rocket", "--steps", "4", "--set", "num_inference_steps=5"], "is given already, by another"),
        (["--prompt", "rocket", "--set", "generator=1"], "--set generator is given already"),
        (["--prompt", "rocket", "--out", "a.xyz"], "a.xyz has an ending that no picture format knows"),
        (["--prompt", "rocket", "--out", "a.mp4"], "a.mp4 is of a video, but pictures will be drawn"),
        (["--prompt", "rocket", "--out", "no/a.png"], "no is not a folder"),
        (["--prompt", "rocket", "--json", "no/a.json"], "no is not a folder"),
        (["--prompt", "rocket", "--json", "generated.png"], "two results would go to generated.png"),
    ],
)
def test_asked_wrongly(arguments, message, here, capsys):
    assert message in refused(capsys, "demo", *arguments, "--quiet")
    assert files(here) == []


def test_a_plan_is_not_overwritten(plans, here, capsys):
    shutil.copy(plans / "flux.json", here / "cat.json")
    line = refused(capsys, plans / "flux", "--prompt", "a cat", "--plan", "cat.json", "--out", "cat.png")
    assert "cat.json would be overwritten" in line
    assert files(here) == ["cat.json"]


def test_what_the_pipeline_itself_refuses(saved, here, capsys):
    line = refused(capsys, saved / "wan", "--prompt", "x", "--size", "17x3", "--steps", "2", "--frames", "5", "--quiet")
    assert "have to be divisible by 16" in line


def test_a_video_into_a_picture(saved, here, capsys):
    line = refused(capsys, saved / "wan", "--prompt", "x", "--out", "x.png")
    assert "x.png cannot hold a video: give a file that ends in .mp4" in line


@pytest.mark.parametrize("what", ["nothing", "single", "folder", "weights", "class", "json", "list", "null", "code"])
def test_folders_that_are_no_pipeline(what, saved, here, capsys):
    folder = here / "mine"
    shutil.copytree(saved / "flux", folder)
    index = folder / "model_index.json"
    said = json.loads(index.read_text())
    message = {
        "nothing": "has no model_index.json: it is no pipeline",
        "single": "it holds a single model (config.json): give the folder of its pipeline",
        "folder": "lacks the component 'vae' (AutoencoderKL)",
        "weights": "cannot be loaded: Error no file named diffusion_pytorch_model.bin",
        "class": "is a NoSuchPipeline, which diffusers",
        "json": "model_index.json cannot be read",
        "list": "model_index.json holds no JSON object",
        "null": "cannot be loaded: Pipeline",
        "code": "names no class of diffusers (['pipeline', 'Mine'] in its model_index.json)",
    }[what]
    if what in ("nothing", "single"):
        index.unlink()
    if what == "single":
        shutil.copy(folder / "transformer" / "config.json", folder)
    if what == "folder":
        shutil.rmtree(folder / "vae")
    if what == "weights":
        for file in (folder / "transformer").glob("*.safetensors"):
            file.unlink()
    changed = {"class": {"_class_name": "NoSuchPipeline"}, "code": {"_class_name": ["pipeline", "Mine"]}}
    changed["null"] = {"text_encoder": [None, None]}
    if what in changed:
        index.write_text(json.dumps(said | changed[what]))
    if what in ("json", "list"):
        index.write_text("{" if what == "json" else "[]")
    assert message in refused(capsys, "mine", "--prompt", "a cat", *PICTURE)
    assert files(here) == ["mine"]


def test_the_hub(here, monkeypatch, capsys, saved):
    def unreachable(name):
        try:
            raise ConnectionError("no network")
        except ConnectionError:
            raise OSError(f"{name} does not appear to have a file\nmodel_index.json") from None

    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", unreachable)
    line = refused(capsys, "nobody/nothing", "--prompt", "a cat")
    assert "nobody/nothing is no folder here, and could not be fetched from the hub: nobody/nothing does not" in line
    assert line.endswith("(no network)")
    assert "there is no folder nothing: give demo, the folder of a pipeline" in refused(capsys, "nothing")
    index = json.loads((saved / "flux" / "model_index.json").read_text())
    monkeypatch.setattr(diffusers.DiffusionPipeline, "load_config", lambda name: index)
    named = loading.find_pipeline("somebody/flux")
    assert (named.kind, named.source, named.video) == (diffusers.FluxPipeline, "somebody/flux", False)
    assert named.takes["num_inference_steps"] == 28


def test_missing_packages(monkeypatch, capsys):
    with monkeypatch.context() as patch:
        for name in list(sys.modules):
            if name.partition(".")[0] == "diffusers":
                patch.setitem(sys.modules, name, None)
        patch.delitem(sys.modules, "dithooks.demo.pipeline", raising=False)
        assert refused(capsys, "demo") == 'dithooks: error: the demo needs diffusers: pip install "dithooks[demo]"'
        assert refused(capsys, "some/one") == (
            'dithooks: error: pipelines need diffusers: pip install "dithooks[diffusers]"'
        )


def test_interrupted(saved, here, monkeypatch, capsys):
    draw, calls = generating._run, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*arguments)

    monkeypatch.setattr(generating, "_run", interrupted)
    command = ["generate", str(saved / "flux"), "--prompt", "a cat", "--count", "3", *PICTURE]
    assert main(command) == 130
    assert files(here) == ["generated-1.png", "generated.json"]
    assert "dithooks: interrupted: 1 of 3 are written" in capsys.readouterr().err
    assert json.loads((here / "generated.json").read_text())["interrupted"]
    calls.append(1)
    calls[:] = [1]
    (here / "generated.json").unlink()
    assert main(command) == 130  # before anything is there
    assert files(here) == ["generated-1.png"]


def test_devices(monkeypatch):
    assert loading.device_of("cpu") == torch.device("cpu")
    monkeypatch.setattr(loading, "accelerator", lambda: None)
    assert loading.device_of("auto") == torch.device("cpu")
    with pytest.raises(
        UsageError, match=r"--device is npu, (but PyTorch sees no accelerator|which PyTorch does not know) here"
    ):
        loading.device_of("npu")
    monkeypatch.setattr(loading, "accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(loading, "device_count", lambda: 2)
    assert loading.device_of("auto") == torch.device("xpu")
    assert loading.device_of("xpu:1") == torch.device("xpu", 1)
    with pytest.raises(UsageError, match="--device is xpu:2, but there are 2, from xpu:0 on"):
        loading.device_of("xpu:2")
    with pytest.raises(UsageError, match="--device is cuda, but PyTorch sees xpu here"):
        loading.device_of("cuda")
    assert loading.dtype_of(None, torch.device("xpu")) == torch.bfloat16
    assert loading.dtype_of("float16", torch.device("cpu")) == torch.float16


# -- out of arrays ----------------------------------------------------------------------------------------------


def test_arrays_are_pictures():
    ramp = np.linspace(0, 1, 8 * 8 * 3, dtype=np.float32).reshape(8, 8, 3)
    expected = (ramp * 255).round().astype(np.uint8)
    for given in (
        SimpleNamespace(images=ramp[None]),
        (torch.from_numpy(ramp).permute(2, 0, 1)[None],),
        [ramp],
        SimpleNamespace(images=[Image.fromarray(expected)]),
        SimpleNamespace(image=[Image.fromarray(expected)]),  # as Kandinsky 5 calls it
    ):
        ((frame,),) = pictures.frames_of(given)
        assert np.array_equal(np.asarray(frame), expected)
    ((frame,),) = pictures.frames_of([2 * ramp - 1])
    assert np.abs(np.asarray(frame).astype(int) - expected).max() <= 1
    video = torch.from_numpy(ramp).permute(2, 0, 1).expand(1, 5, 3, 8, 8)  # as Wan gives it with "pt"
    for name in ("frames", "video"):
        (frames,) = pictures.frames_of(SimpleNamespace(**{name: video}))
        assert len(frames) == 5
    for given in ([ramp * 7 - 3], [ramp[0, 0]], [ramp[None].repeat(2, 0).transpose(1, 2, 3, 0)], "text", None):
        with pytest.raises(TargetError, match="neither pictures nor videos"):
            pictures.frames_of(given)


def test_frames_take_the_time_they_are_given():
    assert pictures._durations(4, 25) == [40] * 4
    assert sum(pictures._durations(49, 16)) == pytest.approx(1000 * 49 / 16, abs=5)
    assert min(pictures._durations(9, 100)) == 20  # faster ones are slowed down by what shows them
    assert math.isclose(sum(pictures._durations(24, 24)), 1000)


def test_help(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    shown = capsys.readouterr().out
    assert "dithooks generate demo --prompt" in shown
    assert "130  interrupted; what was done by then is written" in shown
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "dithooks generate path/to/pipeline" in capsys.readouterr().out
