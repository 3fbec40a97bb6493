"""The video benchmark: its clips, pipeline and training, on sizes that take no time."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FirstBlockCacheConfig, UniPCMultistepScheduler
from torch import Tensor

from bench.compare.video import SEED, Video, captions
from bench.video import load, sheet, train
from bench.video.clips import FRAMES, LARGE, MOTIONS, NAMES, OUTSIDE, SIZE, SMALL, TRAVEL, Clips, caption, paths
from bench.video.model import build_scheduler, build_text, build_transformer, to_clips, to_latents
from bench.video.pipeline import ClipPipeline
from dithooks import CachePlan, DitCacheConfig, Interval, dit_cache, search
from dithooks.demo.emoji import Emoji

WORDS = ["cat face moving left", "banana growing", "rocket turning"]


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


def drawn(pixels: np.ndarray, name: str = "cat face") -> Emoji:
    return Emoji(captions=(name,), category="", pixels=pixels)


@pytest.fixture
def disc() -> Clips:
    """A black disc, off the middle of its square by a quarter, so that a turn shows."""
    rows, columns = np.mgrid[:32, :32]
    inside = (rows - 7.5) ** 2 + (columns - 15.5) ** 2 < 36
    return Clips([drawn(np.where(inside, 0, 255).astype(np.uint8)[..., None].repeat(3, 2))], ("cat face",))


@pytest.fixture
def pipe() -> ClipPipeline:
    """Every layer re-drawn: with the gates at zero all blocks would be identities, and words would do nothing."""
    transformer, text = build_transformer(width=16, layers=3, head=8), build_text(16)
    draw = torch.Generator().manual_seed(1)
    for parameter in [*transformer.parameters(), *text.parameters()]:
        parameter.data = torch.randn(parameter.shape, generator=draw) * (0.3 if parameter.dim() > 1 else 0.1)
    made = ClipPipeline(transformer=transformer.eval(), text_encoder=text.eval(), scheduler=build_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


# --- clips -----------------------------------------------------------------------------------------------------------


def centres(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of the dark: from the left, from the top, and how much there is, each (n, frames)."""
    dark = (1 - clips.double()).mean(2)
    places = torch.arange(SIZE) + 0.5
    amount = dark.sum((2, 3))
    return (dark.sum(2) * places).sum(2) / amount, (dark.sum(3) * places).sum(2) / amount, amount


def each_motion(clips: Clips, chance: Tensor | None = None) -> dict[str, Tensor]:
    chance = torch.full((len(MOTIONS), 4), 0.5) if chance is None else chance
    made = clips.draw(torch.zeros(len(MOTIONS), dtype=torch.long), torch.arange(len(MOTIONS)), chance)
    assert made.shape == (len(MOTIONS), FRAMES, 3, SIZE, SIZE)
    assert made.min() >= 0
    assert made.max() <= 1 + 1e-6
    return {motion: clip[None] for motion, clip in zip(MOTIONS, made, strict=True)}


@pytest.mark.parametrize(("motion", "along", "sign"), [("left", 0, -1), ("right", 0, 1), ("up", 1, -1), ("down", 1, 1)])
def test_it_goes_where_the_caption_says(disc: Clips, motion: str, along: int, sign: int) -> None:
    x, y, amount = centres(each_motion(disc)[f"moving {motion}"])
    ahead, aside = (x, y) if along == 0 else (y, x)
    step = sign * sum(TRAVEL) / 2 / (FRAMES - 1)
    torch.testing.assert_close(ahead.diff(), torch.full_like(ahead.diff(), step), rtol=0, atol=0.02)
    torch.testing.assert_close(aside, aside[:, :1].expand_as(aside), rtol=0, atol=0.02)
    torch.testing.assert_close(amount, amount[:, :1].expand_as(amount), rtol=0.02, atol=0)


def test_growing_and_shrinking_are_one_the_other_backwards(disc: Clips) -> None:
    made = each_motion(disc)
    torch.testing.assert_close(made["growing"], made["shrinking"].flip(1))
    _, _, amount = centres(made["growing"])
    assert (amount.diff() > 0).all()
    ratio = (sum(LARGE) / sum(SMALL)) ** 2
    assert (amount[0, -1] / amount[0, 0]).item() == pytest.approx(ratio, rel=0.03)


def test_a_turn_is_clockwise(disc: Clips) -> None:
    """Wherever it is: the disc is above the middle; of a turn by 150° it ends below it, having passed on the right."""
    where = torch.tensor([0.1, 0.8, 0.5, 0.5]).expand(len(MOTIONS), 4)
    middle = [part[0, 0].item() for part in paths(torch.tensor([MOTIONS.index("turning")]), where[:1])]
    assert abs(middle[0] - middle[1]) > 3
    x, y, _ = centres(each_motion(disc, where)["turning"])
    radius = middle[1] - y[0, 0]
    angle = torch.linspace(0, math.radians(150), FRAMES, dtype=torch.float64)
    torch.testing.assert_close(x[0], middle[0] + radius * angle.sin(), rtol=0, atol=0.03)
    torch.testing.assert_close(y[0], middle[1] - radius * angle.cos(), rtol=0, atol=0.03)
    assert radius > 2


def test_the_square_stays_in_view_wherever_chance_puts_it() -> None:
    chance = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 4)
    for motion in range(len(MOTIONS)):
        x, y, side, _ = paths(torch.full((len(chance),), motion), chance)
        for centre in (x, y):
            assert (centre - side / 2).min() >= -OUTSIDE - 1e-4
            assert (centre + side / 2).max() <= SIZE + OUTSIDE + 1e-4
        assert x.amax() - x.amin() > 2  # but not always in the same place


def test_a_still_emoji_is_the_picture_scaled() -> None:
    """Of 16 pixels' side each is the mean of four of the picture's, as far as sampling goes: a ramp is kept exactly."""
    ramp = np.linspace(0, 255, 32).round().astype(np.uint8)[None, :, None].repeat(32, 0).repeat(3, 2)
    clips = Clips([drawn(ramp)], ("cat face",))
    chance = torch.tensor([[0.5, 0.5, 1.0, 0.0]])  # in the middle, 16 pixels large
    frame = clips.draw(torch.tensor([0]), torch.tensor([MOTIONS.index("turning")]), chance)[0, 0, 0]
    wanted = torch.from_numpy(ramp[0, :, 0].astype(np.float32) / 255).view(16, 2).mean(1)
    torch.testing.assert_close(frame[12, 5:19], wanted[1:-1], rtol=0, atol=2e-3)
    assert frame[0].min() == 1  # white around it


def test_clips_come_from_the_generator_alone(disc: Clips) -> None:
    first, captions = disc.sample(5, seeds(3)[0])
    again, same = disc.sample(5, seeds(3)[0])
    other, _ = disc.sample(5, seeds(4)[0])
    assert torch.equal(first, again)
    assert captions == same
    assert not torch.equal(first, other)
    assert all(words.removeprefix("cat face ") in MOTIONS for words in captions)


def test_captions_are_of_what_is_drawn(disc: Clips) -> None:
    made, captions = disc.sample(40, seeds(0)[0])
    x, _, _ = centres(made)
    for went, words in zip((x[:, -1] - x[:, 0]).tolist(), captions, strict=True):
        if "left" in words or "right" in words:
            assert (went < -TRAVEL[0] + 0.1) if "left" in words else (went > TRAVEL[0] - 0.1)


def test_a_picture_that_is_not_there_is_named(disc: Clips) -> None:
    with pytest.raises(ValueError, match="no picture called 'dog'"):
        Clips([drawn(np.zeros((32, 32, 3), np.uint8))], ("cat face", "dog"))
    assert len(set(NAMES)) == 36


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_shapes_of_what_it_gives(pipe: ClipPipeline) -> None:
    def draw(kind: str) -> object:
        return pipe(WORDS[:2], num_inference_steps=2, generator=seeds(0, 1), output_type=kind).frames

    latents, clips, pictures = draw("latent"), draw("pt"), draw("pil")
    assert latents.shape == (2, 3, FRAMES, SIZE, SIZE)
    assert latents.dtype == torch.float32
    assert clips.shape == (2, FRAMES, 3, SIZE, SIZE)
    torch.testing.assert_close(clips, (latents / 2 + 0.5).clamp(0, 1).transpose(1, 2))
    assert [len(clip) for clip in pictures] == [FRAMES, FRAMES]
    assert pictures[1][3].size == (SIZE, SIZE)
    pixel = (clips[1, 3, :, 5, 7] * 255).round().int().tolist()
    assert list(pictures[1][3].getpixel((7, 5))) == pixel
    torch.testing.assert_close(to_clips(to_latents(clips)), clips)
    assert pipe(WORDS[0], num_inference_steps=2, return_dict=False, output_type="latent")[0].shape[0] == 1


def test_two_calls_a_step_each_in_its_context(pipe: ClipPipeline) -> None:
    """As guidance combines them, and diffusers' solver goes on from that."""
    calls: list[tuple[str, int, Tensor, Tensor]] = []

    def seen(module: torch.nn.Module, args: object, given: dict[str, Tensor], output: tuple[Tensor]) -> None:
        calls.append((context[-1], int(given["timestep"][0]), given["hidden_states"].clone(), output[0]))

    context: list[str] = []
    opened = pipe.transformer.cache_context

    def told(name: str, **more: object) -> object:
        assert set(more) == {"step_index", "sigma", "num_inference_steps"}
        context.append(name)
        return opened(name, **more)

    pipe.transformer.cache_context = told
    hook = pipe.transformer.register_forward_hook(seen, with_kwargs=True)
    made = pipe(WORDS, num_inference_steps=4, guidance_scale=2.5, generator=seeds(0, 1, 2), output_type="latent").frames
    hook.remove()
    assert context == ["cond", "uncond"] * 4
    scheduler = build_scheduler()
    scheduler.set_timesteps(4)
    latents = torch.cat([torch.randn(1, 3, FRAMES, SIZE, SIZE, generator=seed) for seed in seeds(0, 1, 2)])
    for step, timestep in enumerate(scheduler.timesteps):
        (name, at, entered, cond), (other, _, also, uncond) = calls[2 * step : 2 * step + 2]
        assert (name, other, at) == ("cond", "uncond", int(timestep))
        torch.testing.assert_close(entered, latents)
        assert torch.equal(entered, also)
        assert (cond - uncond).abs().max() > 0.01
        latents = scheduler.step(uncond + 2.5 * (cond - uncond), timestep, latents).prev_sample
    torch.testing.assert_close(made, latents)


def test_without_guidance_only_the_caption_is_asked_for(pipe: ClipPipeline) -> None:
    batches = []
    hook = pipe.transformer.register_forward_hook(lambda _, args, output: batches.append(len(output[0])))
    pipe(WORDS, num_inference_steps=3, guidance_scale=1.0, output_type="latent")
    hook.remove()
    assert batches == [3] * 3


def test_predicting_x_comes_to_the_same_as_predicting_the_velocity() -> None:
    """Wan's scheduler as it is, given the velocity (noisy - x) / σ, takes the same steps."""
    ours = build_scheduler()
    wans = UniPCMultistepScheduler.from_config(ours.config, prediction_type="flow_prediction")
    draw = torch.Generator().manual_seed(0)
    first = second = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64)
    clip = torch.randn(2, 3, 4, 4, generator=draw, dtype=torch.float64)
    for scheduler in (ours, wans):
        scheduler.set_timesteps(7)
    assert ours.sigmas[0] > 0.99
    for step, timestep in enumerate(ours.timesteps):
        predicted = clip + 0.1 * step
        velocity = (second - predicted) / wans.sigmas[step].double()
        first = ours.step(predicted, timestep, first).prev_sample
        second = wans.step(velocity, timestep, second).prev_sample
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, clip + 0.6, rtol=1e-4, atol=1e-4)


def test_each_generator_makes_its_clip_whatever_is_beside_it(pipe: ClipPipeline) -> None:
    def draw(words: list[str], *numbers: int) -> Tensor:
        return pipe(words, num_inference_steps=3, generator=seeds(*numbers), output_type="latent").frames

    both = draw(WORDS[:2], 3, 4)
    torch.testing.assert_close(draw(WORDS[1:2], 4), both[1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(draw(WORDS[1::-1], 4, 3), both.flip(0), rtol=0, atol=1e-4)
    assert (draw(WORDS[2:], 4) - both[1:]).abs().max() > 0.01  # the words count, too
    noise = torch.randn(1, 3, FRAMES, SIZE, SIZE, generator=seeds(4)[0])
    given = pipe(WORDS[1], num_inference_steps=3, latents=noise, output_type="latent").frames
    assert torch.equal(given, draw(WORDS[1:2], 4))


def test_what_makes_no_sense_is_refused(pipe: ClipPipeline) -> None:
    with pytest.raises(ValueError, match="empty list"):
        pipe([])
    with pytest.raises(ValueError, match=r"never seen 'cats'; close to 'cats': cat"):
        pipe("cats face moving left")
    with pytest.raises(ValueError, match=r"2 clips need \(2, 3, 8, 24, 24\)"):
        pipe(WORDS[:2], latents=torch.zeros(1, 3, FRAMES, SIZE, SIZE))
    with pytest.raises(ValueError, match="output_type 'np' is unknown"):
        pipe(WORDS, output_type="np")
    with pytest.raises(ValueError, match=r"\['prompts'\] are not on offer"):
        pipe(WORDS, callback_on_step_end_tensor_inputs=["prompts"])


def test_a_callback_sees_and_replaces_latents(pipe: ClipPipeline) -> None:
    seen = []

    def black(_: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(timestep), int(pipe.current_timestep)))
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 2 else {}

    made = pipe(WORDS[0], num_inference_steps=3, output_type="pt", callback_on_step_end=black).frames
    assert [step for step, _, _ in seen] == [0, 1, 2]
    assert all(now == then for _, then, now in seen)
    assert seen[0][1] == 999  # from pure noise on
    assert pipe.current_timestep is None
    assert not made.any()


def test_saved_in_half_precision_and_loaded_in_float(pipe: ClipPipeline, tmp_path: Path) -> None:
    exact = {name: value.half().float() for name, value in pipe.transformer.state_dict().items()}
    pipe.to(torch.float16).save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert {value.dtype for value in loaded.transformer.parameters()} == {torch.float32}
    assert {value.dtype for value in loaded.text_encoder.parameters()} == {torch.float32}
    assert all(torch.equal(value, exact[name]) for name, value in loaded.transformer.state_dict().items())
    assert loaded.scheduler.config.prediction_type == "sample"
    assert loaded.scheduler.config.flow_shift == 3.0
    assert not loaded.transformer.training
    loaded_draws = draw(loaded, 2)
    pipe.to(torch.float32)
    torch.testing.assert_close(loaded_draws, draw(pipe, 2), rtol=1e-4, atol=1e-4)
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline.*bench\.video\.train"):
        load(tmp_path)


# --- caching it ------------------------------------------------------------------------------------------------------


def draw(pipe: ClipPipeline, steps: int = 6) -> Tensor:
    made: Tensor = pipe(WORDS[:2], num_inference_steps=steps, generator=seeds(0, 1), output_type="latent").frames
    return made


def test_two_branches_are_seen_and_reused(pipe: ClipPipeline) -> None:
    plain = draw(pipe)
    blocks = list(pipe.transformer.blocks)
    with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 2))) as cache:
        cached = draw(pipe)
        decided = [(each.step, each.branch, each.reuse) for each in cache.decisions]
        assert (cache.stats.blocks_run, cache.stats.blocks_total) == (3 * 2 * 3, 6 * 2 * 3)
    assert decided == [(step, branch, step % 2 == 1) for step in range(6) for branch in (0, 1)]
    assert (cached - plain).abs().max() > 1e-3
    assert all(ours is theirs for ours, theirs in zip(pipe.transformer.blocks, blocks, strict=True))
    assert torch.equal(draw(pipe), plain)  # nothing is left behind


def test_a_plan_is_found_and_used(pipe: ClipPipeline) -> None:
    plan = search(pipe, draw, 2.0, cost="blocks", max_evals=1, verbose=False).plan
    assert isinstance(plan, CachePlan)
    with dit_cache(pipe, plan) as cache:
        draw(pipe)
    assert cache.stats.blocks_total / cache.stats.blocks_run >= 2.0


def test_diffusers_own_cache_finds_its_contexts(pipe: ClipPipeline) -> None:
    """Its hooks refuse to run outside of one."""
    plain = draw(pipe)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = draw(pipe)
    pipe.transformer.disable_cache()
    assert (cached - plain).abs().max() > 1e-3
    assert torch.equal(draw(pipe), plain)


# --- training --------------------------------------------------------------------------------------------------------


def trainer(disc: Clips, **changes: object) -> train.Trainer:
    config = train.TrainConfig(**{"steps": 6, "batch": 2, "warmup": 2, "drop_caption": 0.5} | changes)
    return train.Trainer(config, disc, (build_transformer(width=16, layers=2, head=8), build_text(16)))


@torch.enable_grad()
def test_a_stopped_training_goes_on_bit_for_bit(disc: Clips, tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = trainer(disc)
    begun = [p.detach().clone() for p in whole.parameters]
    losses = [whole.train_step() for _ in range(6)]
    assert len(set(losses)) == 6
    assert sum(not torch.equal(now, then) for now, then in zip(whole.parameters, begun, strict=True)) > 20

    torch.manual_seed(0)
    first = trainer(disc)
    assert [first.train_step() for _ in range(3)] == losses[:3]
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    second = trainer(disc, seed=7)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert second.step == 3
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for ours, theirs in zip(second.parameters + second.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(ours, theirs)


@torch.enable_grad()
def test_the_command_resumes_and_exports(disc: Clips, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_emoji", lambda path: [])
    monkeypatch.setattr(train, "Clips", lambda data: disc)
    monkeypatch.setattr(train, "build_transformer", lambda: build_transformer(width=16, layers=1, head=8))
    monkeypatch.setattr(train, "build_text", lambda: build_text(16))
    where = ["--out", str(tmp_path), "--batch", "2"]
    train.main([*where, "--steps", "2"])
    train.main([*where, "--steps", "3"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    averaged = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["average"]
    exported = load(tmp_path / "pipeline")
    parameters = [*exported.transformer.parameters(), *exported.text_encoder.parameters()]
    for ours, theirs in zip(parameters, averaged, strict=True):
        assert torch.equal(ours, theirs.half().float())


def test_batches_are_what_the_pipeline_will_show(disc: Clips) -> None:
    made = trainer(disc, batch=100)
    clean, tokens, sigma, noise = made.batch()
    assert clean.shape == noise.shape == (100, 3, FRAMES, SIZE, SIZE)
    assert clean.min() < -0.9
    assert clean.max() == 1
    dropped = (tokens == 0).all(1).float().mean().item()
    assert dropped == pytest.approx(0.5, abs=0.16)
    assert sigma.median().item() == pytest.approx(0.75, abs=0.08)  # odds of 3
    assert noise.std().item() == pytest.approx(1, abs=0.01)


@torch.enable_grad()
def test_the_loss_is_of_the_velocity(disc: Clips) -> None:
    """(noisy - x̂) / σ - (ε - x) = (x - x̂) / σ, with σ of a tenth at least; x̂ is zero at the start."""
    made = trainer(disc)
    state = made.generator.get_state()
    clean, _, sigma, noise = made.batch()
    made.generator.set_state(state)
    noisy = (1 - sigma).view(-1, 1, 1, 1, 1) * clean + sigma.view(-1, 1, 1, 1, 1) * noise
    assert sigma.min() > 0.1
    wanted = (noisy / sigma.view(-1, 1, 1, 1, 1) - (noise - clean)).square().mean()
    assert made.train_step() == pytest.approx(wanted.item(), rel=1e-4)


def test_the_learning_rate_warms_up_and_falls_to_zero() -> None:
    config = train.TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.5)
    assert [config.lr_at(step) for step in (0, 4, 9, 49, 75, 100)] == pytest.approx([0.1, 0.5, 1, 1, 0.5, 0])


# --- what the comparison draws ---------------------------------------------------------------------------------------


def test_what_is_tested_is_apart_from_what_is_searched_with(
    pipe: ClipPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.compare.video.load", lambda: pipe)
    subject = Video()
    assert len(subject.test) == 72
    assert len(subject.calibration) == 18
    assert not {case.prompt for case in subject.test} & {case.prompt for case in subject.calibration}
    assert not {case.seed for case in subject.test} & {case.seed for case in subject.calibration}
    assert len({case.seed for case in subject.test}) == 72
    assert subject.test[0].seed == SEED
    every = {caption(name, motion) for name in NAMES for motion in MOTIONS}
    assert {case.prompt for case in (*subject.test, *subject.calibration)} <= every
    counts = [sum(words.endswith(motion) for words in captions()) for motion in MOTIONS]
    assert min(counts) >= 10
    latents = subject.draw(subject.test[:2], 2)
    assert latents.shape == (2, 3, FRAMES, SIZE, SIZE)
    assert subject.pictures(latents).shape == (2, FRAMES, 3, SIZE, SIZE)
    torch.testing.assert_close(subject.draw(subject.test[1:2], 2), latents[1:], rtol=0, atol=1e-4)


def test_the_sheet_has_a_row_for_each_clip() -> None:
    clips = torch.zeros(2, 3, 3, 4, 4)
    clips[1, 2, 0] = 1  # red
    page = sheet.sheet(clips, ["one", "two"])
    side = 4 * sheet.SCALE
    column, row = sheet.LABEL + 2 * (side + sheet.GAP), sheet.GAP + side + sheet.GAP
    assert page.getpixel((column, row)) == (255, 0, 0)
    assert page.getpixel((column + side - 1, row + side - 1)) == (255, 0, 0)
    assert page.getpixel((column, sheet.GAP)) == (0, 0, 0)
    with pytest.raises(ValueError, match="2 clips need as many captions, not 1"):
        sheet.sheet(clips, ["one"])
