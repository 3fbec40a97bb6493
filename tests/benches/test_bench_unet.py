"""The UNet benchmark: its pictures, pipeline and training, on sizes that take no time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.compare.unet import SEED, UNet
from bench.unet import WEIGHTS, load, train
from bench.unet.data import Pictures
from bench.unet.model import MARGIN, build_scheduler, build_text, build_unet, places
from bench.unet.pipeline import UNetPipeline
from bench.video.clips import NAMES
from dithooks.demo.emoji import Emoji

WORDS = ["cat face", "taxi"]


def random(*modules: torch.nn.Module) -> None:
    """Every layer re-drawn: the last is at zero at the start, and words would do nothing."""
    seed = torch.Generator().manual_seed(1)
    for parameter in (each for module in modules for each in module.parameters()):
        parameter.data = torch.randn(parameter.shape, generator=seed) * 0.2


def tiny() -> tuple[torch.nn.Module, torch.nn.Module]:
    return build_unet((8, 8, 8), 8, 8), build_text(["cat", "face", "taxi"], 8)


@pytest.fixture
def pipe() -> UNetPipeline:
    unet, text = tiny()
    random(unet, text)
    made = UNetPipeline(unet=unet.eval(), text_encoder=text.eval(), scheduler=build_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def pictures() -> Pictures:
    """Of two emoji; each pixel of the first tells its place."""
    rows, columns = np.mgrid[:32, :32]
    first = np.stack([rows, columns, np.zeros_like(rows)], 2).astype(np.uint8)
    return Pictures(
        [Emoji(("cat face", "cat"), "", first), Emoji(("taxi",), "", np.full((32, 32, 3), 100, np.uint8))], WORDS
    )


# --- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_crops_of_larger_ones_whose_corner_is_told(pictures: Pictures) -> None:
    made, names, corners = pictures.sample(200, torch.Generator().manual_seed(0))
    values = ((made + 1) * 127.5).round().long()
    assert made.shape == (200, 3, 32, 32)
    mirrored = []
    for picture, name, (top, left) in zip(values, names, corners.tolist(), strict=True):
        row, column = 15 + top - MARGIN, 15 + left - MARGIN  # of the emoji, in the crop's pixel (15, 15)
        if name == "cat face":
            assert picture[0, 15, 15] == row
            assert picture[1, 15, 15] in (column, 31 - column)
            mirrored.append(int(picture[1, 15, 16]) < int(picture[1, 15, 15]))
        else:
            assert picture[:, 15, 15].tolist() == [100, 100, 100]
            white = (picture[0] == 255).any(1).sum(), (picture[0] == 255).any(0).sum()
            assert (white[0] == 32) == (left != MARGIN)
            assert (white[1] == 32) == (top != MARGIN)
    assert {tuple(corner) for corner in corners.tolist()} == {(y, x) for y in range(5) for x in range(5)}
    assert 0.35 < np.mean(mirrored) < 0.65
    assert pictures.words == ["cat", "face", "taxi"]
    with pytest.raises(ValueError, match="no picture called 'dog'"):
        Pictures([], ["dog"])


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_guidance_in_one_batch_and_eulers_steps(pipe: UNetPipeline) -> None:
    """x₀ = √ᾱ x − √(1 − ᾱ) v of the scaled input, and from x straight on to the next σ."""
    calls: list[tuple[Tensor, int, dict[str, object], Tensor]] = []
    hook = pipe.unet.register_forward_hook(
        lambda _, args, given, output: calls.append((args[0], int(args[1]), given, output[0])), with_kwargs=True
    )
    noise = torch.randn(2, 3, 32, 32)
    made = pipe(WORDS, num_inference_steps=4, guidance_scale=2.5, latents=noise, output_type="latent").images
    hook.remove()
    assert [timestep for _, timestep, _, _ in calls] == [999, 749, 499, 249]
    tokens, pooled = pipe.text_encoder(pipe.text_encoder.tokenize(["", "", *WORDS]))
    left = build_scheduler().alphas_cumprod.double()
    sigmas = [*[float(((1 - left[t]) / left[t]) ** 0.5) for t in (999, 749, 499, 249)], 0.0]
    latents = noise.double() * (sigmas[0] ** 2 + 1) ** 0.5
    for number, (entered, timestep, given, predicted) in enumerate(calls):
        assert torch.equal(given["encoder_hidden_states"], tokens)
        assert torch.equal(given["added_cond_kwargs"]["text_embeds"], pooled)
        assert given["added_cond_kwargs"]["time_ids"].tolist() == [[36, 36, 2, 2, 32, 32]] * 4
        scaled = latents / (sigmas[number] ** 2 + 1) ** 0.5
        torch.testing.assert_close(entered.double(), torch.cat([scaled, scaled]), rtol=1e-3, atol=2e-3)
        away, towards = predicted.double().chunk(2)
        assert (away - towards).abs().max() > 1e-4
        v = away + 2.5 * (towards - away)
        clean = left[timestep] ** 0.5 * scaled - (1 - left[timestep]) ** 0.5 * v
        latents = latents + (latents - clean) / sigmas[number] * (sigmas[number + 1] - sigmas[number])
    torch.testing.assert_close(made.double(), latents, rtol=1e-3, atol=5e-3)


def test_it_starts_from_pure_noise() -> None:
    scheduler = build_scheduler()
    scheduler.set_timesteps(28)
    assert scheduler.timesteps[0] == 999
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert scheduler.alphas_cumprod[0] > 0.99


def test_each_generator_makes_its_picture_whatever_is_beside_it(pipe: UNetPipeline) -> None:
    def drawn(words: list[str], *numbers: int, **given: object) -> Tensor:
        seeds = [torch.Generator().manual_seed(number) for number in numbers]
        return pipe(words, num_inference_steps=3, generator=seeds, output_type="pt", **given).images

    both = drawn(WORDS, 3, 4)
    assert both.shape == (2, 3, 32, 32)
    assert both.min() >= 0
    assert both.max() <= 1
    assert torch.equal(drawn(WORDS, 3, 4), both)
    torch.testing.assert_close(drawn(WORDS[1:], 4), both[1:], rtol=0, atol=1e-3)
    assert (drawn(WORDS[:1], 4) - both[1:]).abs().max() > 1e-3  # the words count
    assert (drawn(WORDS[1:], 4, crops_coords_top_left=(0, 4)) - both[1:]).abs().max() > 1e-3  # and the corner


def test_without_guidance_only_the_caption_is_asked_for(pipe: UNetPipeline) -> None:
    batches = []
    hook = pipe.unet.register_forward_hook(lambda _, args, output: batches.append(len(output[0])))
    pipe(WORDS, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    hook.remove()
    assert batches == [2] * 3


def test_what_makes_no_sense_is_refused(pipe: UNetPipeline) -> None:
    with pytest.raises(ValueError, match="empty list"):
        pipe([])
    with pytest.raises(ValueError, match=r"never seen 'cats'"):
        pipe("cats face")
    with pytest.raises(ValueError, match=r"2 pictures need \(2, 3, 32, 32\)"):
        pipe(WORDS, latents=torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match=r"\['prompts'\] are not on offer"):
        pipe(WORDS, callback_on_step_end_tensor_inputs=["prompts"])


def test_a_callback_sees_and_replaces_latents(pipe: UNetPipeline) -> None:
    seen = []

    def black(_: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(timestep)))
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 1 else {}

    made = pipe("taxi", num_inference_steps=2, output_type="pt", callback_on_step_end=black).images
    assert seen == [(0, 999), (1, 499)]
    assert not made.any()


# --- training --------------------------------------------------------------------------------------------------------


def trainer(pictures: Pictures, **changes: object) -> train.Trainer:
    config = train.TrainConfig(**{"steps": 4, "batch": 4, "warmup": 2, "drop_caption": 0.5} | changes)
    torch.manual_seed(0)
    return train.Trainer(config, pictures, tiny())


@torch.enable_grad()
def test_the_loss_is_of_v(pictures: Pictures) -> None:
    """At the start nothing is predicted, so it is the mean square of √ᾱ ε − √(1 − ᾱ) x, drawn in the same order."""
    made, seed = trainer(pictures, batch=8), torch.Generator().manual_seed(0)
    clean, _, _ = pictures.sample(8, seed)
    torch.rand(8, generator=seed)
    timestep = torch.randint(1000, (8,), generator=seed)
    noise = torch.randn(8, 3, 32, 32, generator=seed)
    left = build_scheduler().alphas_cumprod.double()
    wanted = torch.stack(
        [left[t] ** 0.5 * noise[n] - (1 - left[t]) ** 0.5 * clean[n] for n, t in enumerate(timestep.tolist())]
    )
    assert made.train_step() == pytest.approx(float(wanted.square().mean()), rel=1e-4)


@torch.enable_grad()
def test_a_stopped_training_goes_on_bit_for_bit(pictures: Pictures, tmp_path: Path) -> None:
    whole = trainer(pictures)
    losses = [whole.train_step() for _ in range(4)]
    assert len(set(losses)) == 4
    first = trainer(pictures)
    assert [first.train_step() for _ in range(2)] == losses[:2]
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = trainer(pictures, seed=7)
    random(second.unet, second.text)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert [second.train_step() for _ in range(2)] == losses[2:]
    for ours, theirs in zip(second.parameters + second.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(ours, theirs)


@torch.enable_grad()
def test_the_command_resumes_and_exports(pictures: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_emoji", lambda path: [])
    monkeypatch.setattr(train, "Pictures", lambda data: pictures)
    monkeypatch.setattr(train, "build_unet", lambda: tiny()[0])
    monkeypatch.setattr(train, "build_text", lambda words: tiny()[1])
    where = ["--out", str(tmp_path), "--batch", "2"]
    train.main([*where, "--steps", "2"])
    train.main([*where, "--steps", "3"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    averaged = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["average"]
    exported = load(tmp_path / "pipeline")
    assert not exported.unet.training
    parameters = [*exported.unet.parameters(), *exported.text_encoder.parameters()]
    for ours, theirs in zip(parameters, averaged, strict=True):
        assert torch.equal(ours, theirs.half().float())
    assert exported.scheduler.config.rescale_betas_zero_snr
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline.*bench\.unet\.train"):
        load(tmp_path / "nothing")


def test_sizes_and_corners_in_sdxls_order() -> None:
    assert places(torch.tensor([[1.0, 3.0]])).tolist() == [[36, 36, 1, 3, 32, 32]]


# --- what was trained ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs weights: python -m bench.unet.train")
def test_it_draws_by_the_caption() -> None:
    """In a few steps, and roughly: a banana is yellow, a frog green, an apple red, and all on white."""
    subject = UNet()
    cases = [subject.test[NAMES.index(name)] for name in ("banana", "frog face", "red apple")]
    made = subject.pictures(subject.draw(cases, 8))
    assert made.shape == (3, 3, 32, 32)
    corners = made[:, :, [1, 1, 30, 30], [1, 30, 1, 30]].mean((1, 2))
    assert (corners > 0.8).all()
    red, green, blue = (made[:, channel, 8:24, 8:24].mean((1, 2)) for channel in range(3))
    assert min(red[0], green[0]) > blue[0] + 0.1
    assert green[1] > max(red[1], blue[1]) + 0.1
    assert red[2] > max(green[2], blue[2]) + 0.1


def test_what_is_tested_is_apart_from_what_is_searched_with(
    pipe: UNetPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.compare.unet.load", lambda: pipe)
    subject = UNet()
    assert (len(subject.test), len(subject.calibration)) == (72, 18)
    assert not {case.seed for case in subject.test} & {case.seed for case in subject.calibration}
    assert len({case.seed for case in subject.test}) == 72
    assert subject.test[0].seed == SEED
    assert {case.prompt for case in subject.test} == set(NAMES)
