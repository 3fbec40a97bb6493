"""The pipeline that ships, its training, and ``dithooks demo``."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from PIL import Image
from safetensors.torch import load_file

import dithooks
from dithooks import PlanTiers, dit_cache
from dithooks.cli.main import main
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import CALIBRATION, PLANS, draw, load_pipeline, load_plan, train
from dithooks.demo.demonstration import PROMPTS, DemoOptions, DemoResult, psnr
from dithooks.demo.emoji import INDEX, PITCH, SHEET, SIZE, Emoji, clean, load_emoji
from dithooks.demo.model import patchify, position_ids, unpatchify
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.demo.text import CaptionEncoder
from dithooks.errors import InvalidSetting

WORDS = ["apple", "blue", "cat", "face", "green", "pizza", "red"]


def tiny_transformer() -> FluxTransformer2DModel:
    """One block of each kind, random weights: every call changes the picture."""
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )


@pytest.fixture
def tiny() -> EmojiPipeline:
    torch.manual_seed(0)
    pipe = EmojiPipeline(
        transformer=tiny_transformer().eval(),
        text_encoder=CaptionEncoder(vocabulary=WORDS, dim=32, max_length=4).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def shipped() -> EmojiPipeline:
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe: EmojiPipeline, prompt="red apple", *, seed: int = 0, steps: int = 3, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    kwargs.setdefault("output_type", "pt")
    return pipe(prompt, num_inference_steps=steps, generator=generator, **kwargs).images


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_patchify_and_back() -> None:
    pictures = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    tokens = patchify(pictures)
    assert tokens.shape == (2, 6, 48)
    assert torch.equal(unpatchify(tokens, 8, 12), pictures)
    # Token 1 is the patch right of token 0: its first value per channel is the picture's at (0, 4).
    assert tokens[0, 1].reshape(3, 4, 4)[:, 0, 0].tolist() == pictures[0, :, 0, 4].tolist()
    places, text = position_ids(8, 12, 5)
    assert places.tolist() == [[0, r, c] for r in range(2) for c in range(3)]
    assert text.shape == (5, 3)
    assert not text.any()


def test_the_noise_decides_the_picture(tiny: EmojiPipeline) -> None:
    first = sample(tiny, ["red apple", "blue cat"])
    assert first.shape == (2, 3, 32, 32)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(first, sample(tiny, ["red apple", "blue cat"]))
    assert not torch.equal(first, sample(tiny, ["red apple", "blue cat"], seed=1))
    assert not torch.equal(first[0], sample(tiny, ["green pizza", "blue cat"])[0])
    own = [torch.Generator().manual_seed(s) for s in (3, 4)]
    both = tiny(["cat", "face"], num_inference_steps=2, generator=own, output_type="pt").images
    alone = sample(tiny, "face", seed=4, steps=2)
    torch.testing.assert_close(both[1:], alone, rtol=0, atol=1e-5)


def test_kinds_of_output(tiny: EmojiPipeline) -> None:
    pictures = sample(tiny, num_images_per_prompt=2, output_type="pil")
    assert [p.size for p in pictures] == [(32, 32), (32, 32)]
    floats = sample(tiny, num_images_per_prompt=2)
    assert np.asarray(pictures[1]).tolist() == np.asarray(draw.to_images(floats)[1]).tolist()
    latents = sample(tiny, output_type="latent")
    assert latents.shape == (1, 64, 48)
    assert isinstance(tiny("cat", num_inference_steps=1, return_dict=False), tuple)


def test_given_latents_replace_the_noise(tiny: EmojiPipeline) -> None:
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    given = tiny("red apple", num_inference_steps=3, latents=noise, output_type="pt").images
    assert torch.equal(given, sample(tiny))
    with pytest.raises(ValueError, match=r"\(1, 64, 48\).*2 pictures need \(2, 64, 48\)"):
        tiny(["cat", "cat"], latents=noise)
    with pytest.raises(ValueError, match=r"\(1, 63, 48\).*1 pictures need \(1, 64, 48\)"):
        tiny("cat", latents=noise[:, 1:])


def test_the_size_follows_from_the_latents(tiny: EmojiPipeline) -> None:
    noise = torch.randn(1, 144, 48, generator=torch.Generator().manual_seed(0))
    (picture,) = tiny("red apple", num_inference_steps=3, latents=noise).images
    assert picture.size == (48, 48)
    (latents,) = tiny("red apple", num_inference_steps=3, latents=noise, output_type="latent").images
    patches = latents.reshape(12, 12, 3, 4, 4).permute(2, 0, 3, 1, 4).reshape(3, 48, 48)
    wanted = (patches / 2 + 0.5).clamp(0, 1).mul(255).round().permute(1, 2, 0)
    assert np.array_equal(np.asarray(picture), wanted.numpy())


def test_callback_sees_and_replaces_latents(tiny: EmojiPipeline) -> None:
    seen = []

    def watch(pipe, step, timestep, tensors):
        seen.append((pipe is tiny, step, float(timestep), tuple(tensors["latents"].shape)))

    untouched = sample(tiny, steps=4, callback_on_step_end=watch)
    assert [(own, step, shape) for own, step, _, shape in seen] == [(True, k, (1, 64, 48)) for k in range(4)]
    times = [t for _, _, t, _ in seen]
    assert times == sorted(times, reverse=True)
    assert torch.equal(untouched, sample(tiny, steps=4))

    def black(pipe, step, timestep, tensors):
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 3 else {}

    assert not sample(tiny, steps=4, callback_on_step_end=black).any()
    with pytest.raises(ValueError, match=r"\['prompt_embeds'\] are not on offer"):
        sample(tiny, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize(("guidance", "per_step"), [(3.0, 2), (1.0, 1), (0.0, 1)])
def test_guidance_asks_twice(tiny: EmojiPipeline, guidance: float, per_step: int) -> None:
    calls = []
    hook = tiny.transformer.register_forward_hook(lambda module, args, output: calls.append(output[0].shape))
    sample(tiny, ["cat", "face"], steps=3, guidance_scale=guidance)
    hook.remove()
    assert calls == [(2, 64, 48)] * (3 * per_step)


def test_guidance_moves_away_from_the_empty_caption(tiny: EmojiPipeline) -> None:
    outputs = []
    hook = tiny.transformer.register_forward_hook(lambda module, args, output: outputs.append(output[0]))
    noise = torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(0))
    end = tiny("cat", num_inference_steps=1, guidance_scale=2.5, latents=noise, output_type="latent").images
    hook.remove()
    cond, uncond = outputs
    torch.testing.assert_close(end, noise - (uncond + 2.5 * (cond - uncond)))  # one Euler step all the way


def test_progress_bar(tiny: EmojiPipeline, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.set_progress_bar_config(disable=False)
    sample(tiny, steps=3)
    assert "3/3" in capsys.readouterr().err


def test_unknown_word_names_close_ones(tiny: EmojiPipeline) -> None:
    with pytest.raises(ValueError, match=r"never seen 'aple', 'qqq'; close to 'aple': apple.*'qqq': nothing"):
        tiny("red aple qqq")
    with pytest.raises(ValueError, match="empty list"):
        tiny([])


def test_captions_are_cut_and_cleaned(tiny: EmojiPipeline) -> None:
    tokenize = tiny.text_encoder.tokenize
    assert (
        tokenize(["red green blue cat face pizza"]).tolist()
        == tokenize(["red green blue cat"]).tolist()
        == [[7, 5, 2, 3]]
    )
    assert tokenize(["  Red-APPLE! ", ""]).tolist() == [[7, 1, 0, 0], [0, 0, 0, 0]]
    assert clean("Cat\u2019s  Face, no. 1") == "cats face no 1"
    tokens, pooled = tiny.text_encoder(tokenize(["cat", ""]))
    assert tokens.shape == (2, 4, 32)
    assert torch.equal(pooled[0], tiny.text_encoder.token.weight[3])
    assert not pooled[1].any()


def test_saved_and_loaded(tiny: EmojiPipeline, tmp_path: Path) -> None:
    tiny.save_pretrained(tmp_path / "pipe")
    again = load_pipeline(tmp_path / "pipe")
    again.set_progress_bar_config(disable=True)
    for name in ("transformer", "text_encoder"):
        mine, theirs = getattr(tiny, name).state_dict(), getattr(again, name).state_dict()
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    # Weights mapped from a file lie at other addresses, where a matrix product may round differently.
    torch.testing.assert_close(sample(again), sample(tiny), rtol=0, atol=1e-5)
    with pytest.raises(FileNotFoundError, match=r"nowhere holds no pipeline.*dithooks\.demo\.train"):
        load_pipeline(tmp_path / "nowhere")


# --- the shipped weights ---------------------------------------------------------------------------------------------


def test_shipped_pipeline(shipped: EmojiPipeline, tmp_path: Path) -> None:
    transformer = shipped.transformer
    assert (len(transformer.transformer_blocks), len(transformer.single_transformer_blocks)) == (4, 8)
    assert transformer.dtype == shipped.text_encoder.dtype == torch.float32
    pictures = sample(shipped, ["slice of pizza", "red apple"], steps=2)
    assert torch.equal(pictures, sample(shipped, ["slice of pizza", "red apple"], steps=2))
    shipped.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(pictures, sample(again, ["slice of pizza", "red apple"], steps=2))


def test_shipped_pipeline_knows_the_words_of_its_examples(shipped: EmojiPipeline) -> None:
    assert len(PROMPTS) == 8
    assert len(set(draw.CAPTIONS)) == 16
    ids = shipped.text_encoder.tokenize([*PROMPTS, *draw.CAPTIONS])
    assert (ids[:, 0] > 0).all()


def test_shipped_pipeline_is_trained(shipped: EmojiPipeline) -> None:
    """Noise gone, and on white: what an untrained model could not do."""
    pictures = sample(shipped, ["red apple", "panda face", "smiling face with sunglasses"], steps=8)
    corners = torch.stack([pictures[:, :, y, x] for y in (0, -1) for x in (0, -1)])
    assert corners.mean() > 0.9
    assert pictures[:, :, 8:24, 8:24].mean() < 0.85


# --- the pictures it is trained on -----------------------------------------------------------------------------------


def entry(name: str, x: int, y: int, category: str = "Food & Drink", sub: str = "food", has: bool = True) -> dict:
    short = name.split()[0].lower() + "_short"
    keys = ("name", "short_names", "category", "subcategory", "sheet_x", "sheet_y", "has_img_google")
    return dict(zip(keys, (name, [short], category, sub, x, y, has), strict=True))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """A sheet of 3 by 2 cells with frames in loud colours where the border is, and an index of six entries."""
    cells = np.zeros((2 * PITCH, 3 * PITCH, 4), np.uint8)
    cells[...] = (255, 0, 255, 255)
    for y in range(2):
        for x in range(3):
            cell = cells[y * PITCH + 1 : (y + 1) * PITCH - 1, x * PITCH + 1 : (x + 1) * PITCH - 1]
            cell[...] = 0  # transparent black: must come out white
            cell[0, 0] = cell[-1, -1] = (10 * x, 10 * y, 200, 255)
            cell[16, 16] = (0, 0, 0, 128)
    sheet = io.BytesIO()
    Image.fromarray(cells).save(sheet, "png")
    index = [
        entry("RED APPLE", 2, 1),
        entry("Sark Flag", 0, 0),
        entry("CAT'S FACE", 1, 0, "Animals & Nature", "animal"),
        entry("FIRE ENGINE", 0, 1, "Travel & Places", "transport-ground"),
        entry("HOUSE", 1, 1, "Travel & Places", "place-building"),
        entry("MISSING", 2, 0, has=False),
    ]
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as tar:
        for name, data in ((INDEX, json.dumps(index).encode()), (SHEET, sheet.getvalue())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def test_archive_is_read_right(archive: Path, tmp_path: Path) -> None:
    emoji = load_emoji(archive)
    assert [e.captions for e in emoji] == [
        ("red apple", "red short"),
        ("cats face", "cats short"),
        ("fire engine", "fire short"),
    ]
    for picture, (x, y) in zip(emoji, [(2, 1), (1, 0), (0, 1)], strict=True):
        pixels = picture.pixels
        assert pixels.shape == (SIZE, SIZE, 3)
        assert pixels.dtype == np.uint8
        assert pixels[0, 0].tolist() == pixels[-1, -1].tolist() == [10 * x, 10 * y, 200]
        assert pixels[16, 16].tolist() == pytest.approx([127] * 3, abs=1)
        rest = np.ones((SIZE, SIZE), bool)
        rest[[0, -1, 16], [0, -1, 16]] = False
        assert (pixels[rest] == 255).all()

    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    for packed, unpacked in zip(emoji, load_emoji(tmp_path / "unpacked"), strict=True):
        assert packed.captions == unpacked.captions
        assert np.array_equal(packed.pixels, unpacked.pixels)


def test_missing_archive_says_how_to_fetch_it(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no\.tgz is not there.*npm pack emoji-datasource-google@16\.0\.0"):
        load_emoji(tmp_path / "no.tgz")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.fixture
def few() -> list[Emoji]:
    draw_pixels = np.random.default_rng(0)
    names = ["red apple", "cat face", "green apple", "blue pizza"]
    return [
        Emoji((name, name.split()[1]), "Food & Drink", draw_pixels.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))
        for name in names
    ]


@pytest.fixture
def gradients() -> Iterator[None]:
    with torch.enable_grad():
        yield


@pytest.fixture
def tiny_training(gradients: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "build_transformer", tiny_transformer)
    monkeypatch.setattr(train, "WIDTH", 32)


CONFIG = train.TrainConfig(steps=3, batch=4, warmup=2)


@pytest.mark.usefixtures("tiny_training")
def test_interrupted_training_ends_as_if_it_had_not_been(
    few: list[Emoji], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train.Trainer(CONFIG, few)
    start = [p.detach().clone() for p in whole.parameters]
    train.run(whole, tmp_path / "whole")
    assert any(not torch.equal(a, b) for a, b in zip(start, whole.parameters, strict=True))

    killed = train.Trainer(CONFIG, few)
    step = killed.train_step
    monkeypatch.setattr(killed, "train_step", lambda: step() if killed.step < 2 else pytest.fail("killed"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        train.run(killed, tmp_path / "killed", save_every=1)
    resumed = train.Trainer(CONFIG, few)
    resumed.load_state_dict(torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True))
    assert resumed.step == 2
    train.run(resumed, tmp_path / "killed", log_every=1)

    for mine, theirs in zip(resumed.parameters + resumed.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(mine, theirs)
    line = json.loads((tmp_path / "killed" / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 3
    assert math.isfinite(line["loss"])
    assert sorted(os.listdir(tmp_path / "killed")) == ["checkpoint.pt", "log.jsonl"]


@pytest.mark.usefixtures("tiny_training")
def test_export_holds_the_average_in_half_precision(few: list[Emoji], tmp_path: Path) -> None:
    trainer = train.Trainer(CONFIG, few)
    trainer.train_step()
    raw = [p.detach().clone() for p in trainer.parameters]
    trainer.average = [torch.full_like(p, 0.25) for p in raw]
    trainer.export(tmp_path)
    for before, after in zip(raw, trainer.parameters, strict=True):
        assert torch.equal(before, after)
    pipe = load_pipeline(tmp_path)
    assert all((p == 0.25).all() for p in [*pipe.transformer.parameters(), *pipe.text_encoder.parameters()])
    assert pipe.text_encoder.config.vocabulary == ["apple", "blue", "cat", "face", "green", "pizza", "red"]
    files = list(tmp_path.rglob("*.safetensors"))
    assert len(files) == 2
    assert {tensor.dtype for file in files for tensor in load_file(file).values()} == {torch.float16}


@pytest.mark.usefixtures("gradients")
def test_training_from_the_command_line(archive: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(archive), "--out", str(tmp_path / "run"), "--steps", "2", "--batch", "2"]
    train.main(arguments)
    state = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert state["config"] == asdict(train.TrainConfig(steps=2, batch=2))
    pipe = load_pipeline(tmp_path / "run" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert sample(pipe, "fire engine", steps=1).isfinite().all()


def test_learning_rate_rises_stays_and_falls() -> None:
    config = train.TrainConfig(steps=1000, warmup=100, decay=0.25, lr=1.0)
    assert [config.lr_at(s) for s in (0, 49, 99, 400, 750)] == [0.01, 0.5, 1.0, 1.0, 1.0]
    assert config.lr_at(875) == pytest.approx(0.5)
    assert 0 < config.lr_at(999) < 0.01


# --- the demo --------------------------------------------------------------------------------------------------------


def test_demo_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, numbers = tmp_path / "demo.png", tmp_path / "demo.json"
    arguments = ["demo", "--prompt", "red apple", "--prompt", "panda face", "--pairs", "1", "--steps", "5"]
    assert main([*arguments, "--start", "1", "--interval", "2", "--out", str(out), "--json", str(numbers)]) == 0
    shown = capsys.readouterr().out
    # Steps 0, 1 and 3 of 5 are computed; 12 blocks, asked twice a step.
    for text in ("plain", "cached", "120 of 120", "72 of 120", "dB", "of the 1.67x", str(out)):
        assert text in shown
    told = json.loads(numbers.read_text())
    assert told["prompts"] == ["red apple", "panda face"]
    assert (told["blocks_run"], told["blocks_total"]) == (72, 120)
    assert told["bytes_peak"] > 0
    assert 10 < told["psnr_min_db"] <= told["psnr_mean_db"] < 100
    assert told["speedup"] == pytest.approx(told["seconds_plain"][0] / told["seconds_cached"][0], rel=1e-2)
    assert told["share_of_allowed"] == pytest.approx(told["speedup"] * 72 / 120, abs=1e-3)
    assert (told["start"], told["interval"], told["plan"]) == (1, 2, None)
    assert (told["schedule"], told["remarks"]) == ("●●○●○", [])

    sheet = np.asarray(Image.open(out).convert("RGB")).astype(int)
    cells = [(draw.MARGIN + r * (draw.CELL + draw.GAP), draw.MARGIN + draw.LABEL_WIDTH) for r in range(2)]
    plain, cached = (sheet[top : top + draw.CELL, left : left + draw.CELL] for top, left in cells)
    assert plain.std() > 20
    assert 0 < np.abs(plain - cached).mean() < 20


def test_demo_that_reuses_nothing_draws_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["demo", "--prompt", "red apple", "--pairs", "1", "--steps", "2", "--out", str(tmp_path / "x.png")]
    assert main([*arguments, "--start", "1", "--interval", "2", "--json", "-"]) == 0
    shown = capsys.readouterr()
    assert [line for line in shown.err.splitlines() if "nothing will be reused" in line and "Warning" not in line]
    told = json.loads(shown.out)
    assert "nothing will be reused" in told["remarks"][0]
    assert told["schedule"] == "●●"
    assert told["blocks_run"] == told["blocks_total"] == 48
    assert told["psnr_db"] == [None]
    assert told["psnr_min_db"] is None


def demo(tmp_path: Path, *arguments: str) -> list[str]:
    """One picture of each kind, and JSON."""
    out = ["--out", str(tmp_path / "demo.png"), "--json", str(tmp_path / "demo.json")]
    return ["demo", "--prompt", "red apple", "--pairs", "1", *arguments, *out]


def test_demo_uses_a_plan_by_default(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(demo(tmp_path)) == 0
    plan, shown = load_plan("2x"), capsys.readouterr()
    told = json.loads((tmp_path / "demo.json").read_text())
    picture = plan.pieces[0].picture
    assert told["plan"] == {
        "name": "2x",
        "target": 2.0,
        "steps": picture,
        "predicted_speedup": plan.provenance.predicted_speedup,
    }
    assert (told["start"], told["interval"]) == (None, None)
    assert (told["schedule"], told["remarks"]) == (picture, [])
    assert told["speedup_allowed"] == pytest.approx(plan.speedup, abs=1e-3)
    assert told["psnr_min_db"] > 30
    words = " ".join(shown.out.split())
    predicted = f"predicted {plan.provenance.predicted_speedup:.2f}x, measured {told['speedup']:.2f}x"
    assert f"plan 2x: {predicted} {picture}" in words
    assert "remark" not in shown.err


def test_demo_with_a_plan_for_other_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Far from those, it is resampled: said in one line, not as a warning with its place in the source."""
    load_plan("3x").save(tmp_path / "my.json")
    assert main(demo(tmp_path, "--plan", str(tmp_path / "my.json"), "--steps", "10")) == 0
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if "this run has 10" in line]
    assert len(lines) == 1
    assert lines[0].startswith(
        "dithooks: transformer (FluxTransformer2DModel): coefficients were fitted for 20, 28 and 50 steps"
    )
    assert "Warning" not in shown.err
    told = json.loads((tmp_path / "demo.json").read_text())
    assert told["plan"]["name"] == str(tmp_path / "my.json")
    assert len(told["plan"]["steps"]) == 28
    assert len(told["schedule"]) == 10
    left_out = 2 * load_plan("3x").pieces[0].blocks * told["schedule"].count("○")
    assert told["blocks_run"] == told["blocks_total"] - left_out < told["blocks_total"]
    assert len(told["remarks"]) == 1
    assert "predicted" not in shown.out


@pytest.mark.parametrize(("option", "schedule"), [(["--start", "1"], "●●○●○●○●"), (["--interval", "3"], "●●●●●●●○")])
def test_one_of_start_and_interval_is_enough(option: list[str], schedule: str, tmp_path: Path) -> None:
    assert main(demo(tmp_path, "--steps", "8", *option)) == 0
    assert json.loads((tmp_path / "demo.json").read_text())["schedule"] == schedule


def test_plan_of_another_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan()
    replace(plan, made=replace(plan.made, fingerprint="0" * 16)).save(tmp_path / "other.json")
    assert main(demo(tmp_path, "--plan", str(tmp_path / "other.json"))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("dithooks: error: the plan was made for another model, FluxTransformer2DModel")
    assert len(shown.err.splitlines()) == 1
    assert not (tmp_path / "demo.png").exists()


def test_plan_of_another_dtype_is_used_and_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = load_plan()
    replace(plan, made=replace(plan.made, dtype="bfloat16")).save(tmp_path / "half.json")
    assert main(demo(tmp_path, "--plan", str(tmp_path / "half.json"), "--steps", "3")) == 0
    assert "dithooks: the plan was made with weights in bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["1.5x", "2x", "3x"])
def test_shipped_plans_are_for_the_shipped_pipeline(name: str, shipped: EmojiPipeline) -> None:
    plan = load_plan(name)
    assert plan == dithooks.CachePlan.load(PLANS / f"{name}.json")
    assert plan.provenance.target == float(name[:-1])
    assert plan.provenance.reached
    assert (plan.made.steps, plan.made.size, plan.made.dtype) == (28, (64, 48), "float32")
    assert plan.provenance.samples == len(CALIBRATION)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "(?!no call)")
        dithooks.dit_cache(shipped, plan).remove()


def test_plans_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no plan '4x': give a file .* ship .*: 1\.5x, 2x, 3x"):
        load_plan("4x")
    with pytest.raises(FileNotFoundError, match="no plan '2x'"):
        load_plan(tmp_path.relative_to(tmp_path) / "2x")  # a path is a file's, always
    (tmp_path / "torn.json").write_text("{")
    with pytest.raises(ValueError, match=r"torn\.json"):
        load_plan(tmp_path / "torn.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "4x"], "there is no plan '4x'"),
        (["--plan", "2x", "--start", "4"], "--plan goes without --start"),
        (["--plan", "2x", "--interval", "2"], "--plan goes without --interval"),
        (["--interval", "1"], "interval is 1: it must be 2 or more"),
        (["--prompt", "piza"], "never seen 'piza'; close to 'piza': pizza"),
        (["--prompt", "!?"], "'!?' holds no word"),
        (["--steps", "0"], "steps is 0: it must be 1 or more"),
        (["--steps", "many"], "invalid int value: 'many'"),
        (["--interval", "0"], "interval is 0"),
        (["--start", "-1"], "start is -1"),
        (["--seed", "-1"], "seed is -1"),
        (["--seed", str(2**63)], "below 2**63"),
        (["--pairs", "0"], "pairs is 0"),
        (["--guidance", "nan"], "guidance is nan"),
        (["--out", "demo.xyz"], "demo.xyz has an ending"),
        (["--out", "no/such/folder/demo.png"], "no/such/folder is not a folder"),
        (["--json", "no/such/folder/demo.json"], "no/such/folder is not a folder"),
        (["--colour"], "there is no '--colour' here"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *arguments]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["diffusers", "PIL"])
def test_missing_package_names_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dithooks, "demo", dithooks.demo)  # so that it comes back, like its entries in sys.modules
    for name in list(sys.modules):
        if name.startswith("dithooks.demo"):
            monkeypatch.delitem(sys.modules, name)
        elif name == package or name.startswith(f"{package}."):
            monkeypatch.setitem(sys.modules, name, None)
    assert main(["demo"]) == 2
    assert capsys.readouterr().err == f'dithooks: error: the demo needs {package}: pip install "dithooks[demo]"\n'


def test_help_version_and_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().err
    for arguments, text in (
        (["--help"], "examples:"),
        (["--version"], "dithooks "),
        (["demo", "--help"], "--interval"),
    ):
        with pytest.raises(SystemExit) as end:
            main(arguments)
        assert end.value.code == 0
        assert text in capsys.readouterr().out


def test_the_command_line_is_light() -> None:
    code = "import dithooks.cli.main, sys; print({'diffusers', 'rich', 'PIL', 'dithooks.demo'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


def test_numbers_of_a_result() -> None:
    plain = torch.zeros(2, 3, 2, 2)
    cached = torch.stack([plain[0], plain[0] + 0.1])
    result = DemoResult(plain, cached, (4.0, 9.0, 2.0), (2.0, 3.0, 2.0), blocks_run=30, blocks_total=60, bytes_peak=8)
    assert psnr(cached, plain) == (math.inf, pytest.approx(20.0, abs=1e-5))
    assert (result.speedup, result.allowed, result.share) == (2.0, 2.0, 1.0)
    told = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert told["psnr_db"] == [None, 20.0]
    assert (told["psnr_mean_db"], told["psnr_min_db"]) == (None, 20.0)
    with pytest.raises(ValueError, match="there is no prompt"):
        DemoOptions(prompts=())


def test_sheets_hold_every_picture() -> None:
    colors = [(40 * n, 0, 0) for n in range(1, 6)]
    pictures = [Image.new("RGB", (32, 32), color) for color in colors]
    captions = ["a very long caption of words", *"bcde"]
    sheet = draw.contact_sheet(pictures, captions, columns=2)
    assert {c for _, c in sheet.getcolors(1 << 24)} >= set(colors)
    assert sheet.width == 2 * draw.MARGIN + 2 * draw.CELL + draw.GAP
    both = draw.comparison(
        pictures, pictures[::-1], captions, plain_label=("plain", "2 s"), cached_label=("cached",), columns=2
    )
    counts = {color: count for count, color in both.getcolors(1 << 24)}
    assert [counts[color] for color in colors] == [2 * 128 * 128] * 5  # enlarged four times, once in each row
    with pytest.raises(ValueError, match="cached holds 4 pictures for 5 captions"):
        draw.comparison(pictures, pictures[:4], captions, plain_label=("a",), cached_label=("b",))
    with pytest.raises(ValueError, match="no caption"):
        draw.contact_sheet([], [])


def test_requests_have_tiers_of_their_own():
    """Of the same blocks; those of a tier with another payload cannot be in one batch with them."""
    plans = PlanTiers({name: load_plan(name) for name in ("1.5x", "2x", "3x")})
    computed = {name: sum(plan.pieces[0].steps) for name, plan in plans.plans.items()}
    (piece,) = plans.select("3x").pieces
    other = replace(plans.select("3x"), pieces=(replace(piece, payload="residual", others=()),))
    with warnings.catch_warnings(), dit_cache(load_pipeline(), plans, tier="2x") as cache:
        warnings.simplefilter("ignore")  # that nothing was drawn
        for name in computed:
            cache.request(name, plan=plans.select(name), steps=28)
        assert {name: sum(cache.forecast(name)) for name in computed} == computed
        with pytest.raises(InvalidSetting, match="plans of one batch share blocks and payload"):
            cache.request("other", plan=other, steps=28)


def test_steps_of_a_plan_of_two_ranges_are_shown_as_planned(tmp_path: Path) -> None:
    """Nothing, the last blocks and the first ones: what is computed in part is not shown as reused."""
    plan, path, ranges = load_plan("2x"), tmp_path / "ranged.json", []
    for first, steps in ((0, (1, 0, 0, 1)), (6, (1, 0, 1, 0))):
        weights = tuple(None if bit else (1.0,) for bit in steps)
        ranges.append(TransformerPlan("transformer", first, 6, 12, steps, weights, None, "step"))
    piece = replace(ranges[0], more_ranges=(ranges[1],))
    replace(plan, pieces=(piece,), made=replace(plan.made, steps=4)).save(path)
    assert main(demo(tmp_path, "--plan", str(path), "--steps", "4")) == 0
    told = json.loads((tmp_path / "demo.json").read_text())
    assert told["schedule"] == told["plan"]["steps"] == "●○◑◒"
