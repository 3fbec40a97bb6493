"""The distilled pipeline: what the teacher's way is, what is learned from it, and what is drawn; on tiny models."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from bench.compare.few import FewSteps
from bench.compare.quality import psnr
from bench.few_steps import STEPS, WEIGHTS, load, train
from bench.few_steps.measure import EqualSteps
from bench.few_steps.model import build_student
from bench.few_steps.pipeline import FewStepPipeline
from bench.few_steps.trajectories import SEED, TICKS, Trajectories, at_ticks, cached, draw
from bench.sheets import GAP, LABEL, SCALE, sheet, wrapped
from dithooks.demo import load_pipeline
from dithooks.demo.emoji import Emoji
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.demo.text import CaptionEncoder

WORDS = ["cat face", "taxi"]


def random(module: torch.nn.Module) -> None:
    """Every layer re-drawn: at zero, gates would hide what blocks do."""
    seed = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=seed) * 0.1


def tiny() -> FluxTransformer2DModel:
    made = FluxTransformer2DModel(
        patch_size=1,
        in_channels=48,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=1,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    random(made)
    return made


def text() -> CaptionEncoder:
    made: CaptionEncoder = CaptionEncoder(vocabulary=["cat", "face", "taxi"], dim=16, max_length=3).eval()
    return made


@pytest.fixture
def teacher() -> EmojiPipeline:
    torch.manual_seed(0)
    made = EmojiPipeline(transformer=tiny(), text_encoder=text(), scheduler=FlowMatchEulerDiscreteScheduler())
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture
def student(teacher: EmojiPipeline) -> FewStepPipeline:
    transformer = build_student(teacher.transformer).eval()
    random(transformer)
    made = FewStepPipeline(transformer=transformer, text_encoder=teacher.text_encoder, scheduler=teacher.scheduler)
    made.set_progress_bar_config(disable=True)
    return made


# --- the teacher's way -----------------------------------------------------------------------------------------------


def test_between_its_own_times_an_euler_sampler_goes_straight() -> None:
    sigmas = torch.tensor([1.0, 0.6, 0.001, 0.0])
    states = torch.randn(3, 4, 5)
    wanted = np.empty((3, 9, 5))
    for row in range(3):
        for column in range(5):
            known = states[row, :, column].numpy()[::-1]
            wanted[row, :, column] = np.interp(np.linspace(1, 0, 9), sigmas.numpy()[::-1], known)
    np.testing.assert_allclose(at_ticks(states, sigmas, 8), wanted, atol=1e-5)


def test_a_trajectory_leads_from_its_own_noise_to_the_teachers_picture(teacher: EmojiPipeline) -> None:
    made = draw(teacher, WORDS, first=7, steps=6).float()
    assert made.shape == (2, TICKS + 1, 64, 48)
    noise = torch.stack([torch.randn(64, 48, generator=torch.Generator().manual_seed(SEED + n)) for n in (7, 8)])
    picture = teacher(WORDS, num_inference_steps=6, guidance_scale=3.0, latents=noise, output_type="latent").images
    torch.testing.assert_close(made[:, 0], noise, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(made[:, -1], picture, rtol=1e-3, atol=1e-3)
    assert (noise - picture).abs().mean() > 0.1
    assert all(TICKS % steps == 0 for steps in STEPS)


def test_what_is_cached_is_not_drawn_again(
    teacher: EmojiPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bench.few_steps.trajectories.STEPS", 2)
    monkeypatch.setattr("bench.few_steps.trajectories.BATCH", 2)
    asked = []

    def load_teacher() -> EmojiPipeline:
        asked.append(1)
        return teacher

    said: list[str] = []
    captions = [*WORDS, "face"]
    first = cached(tmp_path, load_teacher, captions, said.append)
    assert said == ["2 of 3 trajectories", "3 of 3 trajectories"]
    (tmp_path / "000002.pt").unlink()
    again = cached(tmp_path, load_teacher, captions, said.append)
    assert len(said) == 3
    assert len(asked) == 2
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.tokens, torch.tensor([[1, 2, 0], [3, 0, 0], [2, 0, 0]]))
    with pytest.raises(ValueError, match="of other captions"):
        cached(tmp_path, load_teacher, ["taxi", *WORDS])


# --- the student -----------------------------------------------------------------------------------------------------


def test_before_training_the_student_is_the_teacher(teacher: EmojiPipeline) -> None:
    made = build_student(teacher.transformer)
    tokens, pooled = teacher.text_encoder(teacher.text_encoder.tokenize(WORDS))
    given = {
        "hidden_states": torch.randn(2, 64, 48),
        "encoder_hidden_states": tokens,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.3, 0.9]),
        "img_ids": torch.randn(64, 3),
        "txt_ids": torch.zeros(3, 3),
        "return_dict": False,
    }
    wanted = teacher.transformer(**given)[0]
    assert torch.equal(made(**given, guidance=torch.tensor([0.25, 0.125]))[0], wanted)
    random(made.time_text_embed.guidance_embedder)
    apart = [made(**given, guidance=torch.full((2,), length))[0] for length in (0.25, 0.125)]
    assert (apart[0] - apart[1]).abs().max() > 1e-3  # and trained, it knows one length from another


def test_another_model_is_no_teacher(teacher: EmojiPipeline) -> None:
    teacher.transformer.extra = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"another model: \['extra\.weight'"):
        build_student(teacher.transformer)


@pytest.mark.parametrize("steps", STEPS)
def test_a_picture_is_made_of_equal_steps_of_one_call_each(student: FewStepPipeline, steps: int) -> None:
    calls: list[tuple[dict[str, Tensor], Tensor]] = []
    hook = student.transformer.register_forward_hook(
        lambda _, args, given, output: calls.append((given, output[0])), with_kwargs=True
    )
    noise = torch.randn(2, 64, 48)
    made = student(WORDS, num_inference_steps=steps, latents=noise, output_type="latent").images
    hook.remove()
    assert len(calls) == steps
    latents = noise
    for number, (given, velocity) in enumerate(calls):
        torch.testing.assert_close(given["timestep"], torch.full((2,), 1 - number / steps))
        torch.testing.assert_close(given["guidance"], torch.full((2,), 1 / steps))
        torch.testing.assert_close(given["hidden_states"], latents)
        latents = latents - velocity / steps
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)


def test_each_generator_makes_its_picture_whatever_is_beside_it(student: FewStepPipeline) -> None:
    def drawn(words: list[str], *numbers: int) -> Tensor:
        seeds = [torch.Generator().manual_seed(number) for number in numbers]
        return student(words, num_inference_steps=4, generator=seeds, output_type="pt").images

    both = drawn(WORDS, 3, 4)
    assert both.shape == (2, 3, 32, 32)
    assert torch.equal(drawn(WORDS, 3, 4), both)
    torch.testing.assert_close(drawn(WORDS[1:], 4), both[1:], rtol=0, atol=1e-4)
    assert (drawn(WORDS[:1], 4) - both[1:]).abs().max() > 1e-3


def test_what_makes_no_sense_is_refused(student: FewStepPipeline) -> None:
    with pytest.raises(ValueError, match="empty list"):
        student([])
    with pytest.raises(ValueError, match=r"2 pictures need \(2, 64, 48\)"):
        student(WORDS, latents=torch.zeros(1, 64, 48))
    with pytest.raises(ValueError, match=r"\['prompts'\] are not on offer"):
        student(WORDS, callback_on_step_end_tensor_inputs=["prompts"])


def test_a_callback_sees_and_replaces_latents(student: FewStepPipeline) -> None:
    seen = []

    def black(_: object, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, float(timestep)))
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 3 else {}

    made = student("taxi", num_inference_steps=4, output_type="pt", callback_on_step_end=black).images
    assert seen == [(0, 1000), (1, 750), (2, 500), (3, 250)]
    assert not made.any()


def test_the_undistilled_model_is_measured_on_the_same_times() -> None:
    scheduler = EqualSteps(shift=1.0)
    scheduler.set_timesteps(4)
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.75, 0.5, 0.25, 0])


# --- training --------------------------------------------------------------------------------------------------------


def ways() -> Trajectories:
    seed = torch.Generator().manual_seed(5)
    return Trajectories(torch.tensor([[1, 2, 0], [3, 0, 0]]), torch.randn(2, TICKS + 1, 64, 48, generator=seed).half())


def trainer(teacher: EmojiPipeline, **changes: object) -> train.Trainer:
    config = train.TrainConfig(**{"steps": 6, "batch": 5, "warmup": 2} | changes)
    return train.Trainer(config, ways(), teacher.transformer, teacher.text_encoder)


@torch.enable_grad()
def test_it_learns_to_come_from_where_it_is_to_where_the_teacher_was(teacher: EmojiPipeline) -> None:
    """The loss, and where every picture is then, by the undistilled model, which it still is at the first step."""
    made = trainer(teacher)
    which, stride, tick, here = (each.clone() for each in (made.which, made.stride, made.tick, made.latents))
    known = ways()
    errors, after = [], []
    with torch.no_grad():
        for place in range(5):
            tokens, pooled = teacher.text_encoder(known.tokens[which[place : place + 1]])
            velocity = teacher.transformer(
                here[place : place + 1],
                tokens,
                pooled,
                1 - tick[place : place + 1] / TICKS,
                made.ids[0],
                made.ids[1],
                return_dict=False,
            )[0][0]
            length = int(stride[place]) / TICKS
            there = known.latents[which[place], tick[place] + stride[place]].float()
            errors.append((velocity - (here[place] - there) / length).square().mean())
            after.append(here[place] - length * velocity)
    assert made.train_step() == pytest.approx(float(torch.stack(errors).mean()), rel=1e-4)
    arrived = tick + stride == TICKS
    for place in range(5):
        if arrived[place]:
            assert made.tick[place] == 0
            assert torch.equal(made.latents[place], known.latents[made.which[place], 0].float())
        else:
            assert made.tick[place] == tick[place] + stride[place]
            torch.testing.assert_close(made.latents[place], after[place], rtol=1e-4, atol=1e-4)


def test_every_picture_goes_by_one_grid_from_noise_to_the_end(teacher: EmojiPipeline) -> None:
    made = trainer(teacher, batch=300)
    assert {TICKS // int(stride) for stride in made.stride} == set(STEPS)
    assert (made.tick % made.stride == 0).all()
    for steps in STEPS:
        assert set((made.tick[made.stride == TICKS // steps] * steps // TICKS).tolist()) == set(range(steps))
    assert torch.equal(made.latents, ways().latents[made.which, made.tick].float())


@torch.enable_grad()
def test_a_stopped_training_goes_on_bit_for_bit(teacher: EmojiPipeline, tmp_path: Path) -> None:
    whole = trainer(teacher)
    losses = [whole.train_step() for _ in range(6)]
    assert len(set(losses)) == 6
    first = trainer(teacher)
    assert [first.train_step() for _ in range(3)] == losses[:3]
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    second = trainer(teacher, seed=7)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for ours, theirs in zip(second.parameters + second.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(ours, theirs)


@torch.enable_grad()
def test_the_command_resumes_and_exports(
    teacher: EmojiPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = [Emoji(captions=("cat face",), category="", pixels=np.zeros((32, 32, 3), np.uint8))]
    monkeypatch.setattr(train, "load_emoji", lambda path: data)
    monkeypatch.setattr(train, "load_pipeline", lambda: teacher)
    monkeypatch.setattr("bench.few_steps.trajectories.STEPS", 2)
    where = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path), "--batch", "2", "--trajectories", "3"]
    train.main([*where, "--steps", "2"])
    train.main([*where, "--steps", "3"])
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == ["000000.pt"]
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    averaged = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["average"]
    exported = load(tmp_path / "run" / "pipeline")
    assert not exported.transformer.training
    for ours, theirs in zip(exported.transformer.parameters(), averaged, strict=True):
        assert torch.equal(ours, theirs.half().float())
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline.*bench\.few_steps\.train"):
        load(tmp_path)


def test_every_name_has_its_turn() -> None:
    data = [Emoji(captions, "", np.zeros(0)) for captions in (("a", "b"), ("c",))]
    assert train.to_draw(data, 5) == ["a", "c", "b", "c", "a"]


# --- what was trained ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WEIGHTS.exists(), reason="needs weights: python -m bench.few_steps.train")
def test_in_four_calls_the_distilled_model_is_nearer_the_teacher_than_the_other() -> None:
    """On noise that it was not distilled with; guidance takes the other two calls a step, so it makes two steps."""
    subject, undistilled = FewSteps(4), load_pipeline()
    undistilled.set_progress_bar_config(disable=True)
    cases = [case for case in subject.test if case.prompt in ("cat", "hot dog", "teapot")]
    noise = torch.cat([torch.randn(1, 64, 48, generator=torch.Generator().manual_seed(case.seed)) for case in cases])

    def teacher(steps: int) -> Tensor:
        captions = [str(case.prompt) for case in cases]
        made = undistilled(captions, num_inference_steps=steps, latents=noise, output_type="latent").images
        return subject.pictures(made)

    wanted = teacher(28)
    undistilled.scheduler = EqualSteps(shift=1.0)
    made, other = subject.pictures(subject.draw(cases)), teacher(2)
    assert made.shape == (3, 3, 32, 32)
    assert np.mean(psnr(made, wanted)) > np.mean(psnr(other, wanted)) + 2


def test_a_subject_is_named_by_its_steps(monkeypatch: pytest.MonkeyPatch, student: FewStepPipeline) -> None:
    monkeypatch.setattr("bench.compare.few.load", lambda: student)
    subject = FewSteps()
    assert (subject.name, subject.steps, subject.calls) == ("few8", 8, 1)
    assert (FewSteps(6).name, FewSteps(6).steps) == ("few6", 6)
    assert not {case.seed for case in subject.test} & {case.seed for case in subject.calibration}
    assert not {case.prompt for case in subject.test} & {case.prompt for case in subject.calibration}


def test_a_sheet_has_a_column_for_every_caption_and_a_row_for_every_way() -> None:
    black, white = torch.zeros(3, 3, 32, 32), torch.ones(3, 3, 32, 32)
    page = sheet([black, white], ["a", "b"], ["one", "two", "three"])
    assert page.width == LABEL + 3 * (32 * SCALE + GAP)
    x = LABEL + 2 * (32 * SCALE + GAP) + 5
    lower = page.height - GAP - 5
    assert page.getpixel((x, lower)) == (255, 255, 255)
    assert page.getpixel((x, lower - 32 * SCALE - GAP)) == (0, 0, 0)
    assert wrapped("smiling face with sunglasses") == "smiling face\nwith\nsunglasses"
    with pytest.raises(ValueError, match="captions"):
        sheet([black], ["a"], ["one"])
