"""The Fashion-MNIST benchmark: its reader, pipeline, training and scores, on sizes that take no time."""

from __future__ import annotations

import gzip
import json
import math
import struct
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from bench.compare.subject import Case
from bench.fashion import load, sheet, train
from bench.fashion.classifier import SEEN, Classifier, load_classifier, look
from bench.fashion.data import NAMES, PARTS, SIZE, VARIABLE, Split, load_fashion, read_idx, to_unit
from bench.fashion.metrics import Moments, frechet_distance, inception_score, scores_of, to_bytes
from bench.fashion.model import NO_CLASS, build_scheduler, build_transformer
from bench.fashion.pipeline import FashionPipeline
from bench.fashion.scores import SEED, Judge, Table, cases, knob
from bench.peers.peer import Attached, Method
from dithooks import CachePlan, DitCacheConfig, Interval, dit_cache, search


def random_transformer(layers: int = 3) -> DiTTransformer2DModel:
    """Every layer re-drawn: with the gates at zero all blocks would be identities, and guidance would do nothing."""
    model = build_transformer(layers=layers, heads=2, head_dim=8)
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * (0.3 if parameter.dim() > 1 else 0.1)
    return model


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture
def pipe() -> FashionPipeline:
    made = FashionPipeline(transformer=random_transformer(), scheduler=build_scheduler())
    made.set_progress_bar_config(disable=True)
    return made


def some(count: int = 40) -> Split:
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (count, 1, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    return Split(pictures, torch.arange(count).remainder(10).byte())


# --- the files -------------------------------------------------------------------------------------------------------


def idx(numbers: Tensor, *, magic: bytes | None = None, sizes: tuple[int, ...] | None = None) -> bytes:
    sizes = tuple(numbers.shape) if sizes is None else sizes
    head = bytes((0, 0, 8, numbers.dim())) if magic is None else magic
    return head + struct.pack(f">{len(sizes)}I", *sizes) + bytes(numbers.byte().flatten().tolist())


def test_an_idx_file_is_read_as_written(tmp_path: Path) -> None:
    numbers = torch.arange(2 * 3 * 4, dtype=torch.uint8).reshape(2, 3, 4)
    (path := tmp_path / "x.gz").write_bytes(gzip.compress(idx(numbers)))
    assert torch.equal(read_idx(path, (2, 3, 4)), numbers)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (
            gzip.compress(idx(torch.zeros(3), magic=bytes((0, 0, 0x0D, 1)))),
            "begins with 00000d01.*begins with 00000801",
        ),
        (gzip.compress(idx(torch.zeros(3), magic=bytes((1, 0, 8, 1)))), "begins with 01000801"),
        (gzip.compress(idx(torch.zeros(3, 1))), "begins with 00000802"),
        (gzip.compress(idx(torch.zeros(4))), r"says that it holds \(4,\); Fashion-MNIST has \(3,\)"),
        (gzip.compress(idx(torch.zeros(2), sizes=(3,))), r"holds 2 bytes of \(3,\)"),
        (gzip.compress(idx(torch.zeros(4), sizes=(3,))), r"holds 4 bytes of \(3,\)"),
        (gzip.compress(bytes((0, 0, 8, 1, 0, 0))), "ends within its header"),
        (gzip.compress(b""), "begins with :"),
        (idx(torch.zeros(3)), "not a whole gzip file"),
        (gzip.compress(idx(torch.zeros(3)))[:-5], "not a whole gzip file"),
    ],
    ids=[
        "floats",
        "no idx",
        "another dimension",
        "another size",
        "too short",
        "too long",
        "header cut",
        "empty",
        "not gzipped",
        "gzip cut",
    ],
)
def test_a_file_that_is_not_what_it_should_be_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    (path := tmp_path / "x.gz").write_bytes(content)
    with pytest.raises(ValueError, match=complaint):
        read_idx(path, (3,))


def test_a_missing_folder_names_the_package_and_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        FileNotFoundError, match=rf"t10k-images.* is not in {tmp_path}.*apt install dataset-fashion-mnist"
    ):
        load_fashion("test", tmp_path)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "elsewhere"))
    with pytest.raises(FileNotFoundError, match=rf"train-images.* is not in {tmp_path}/elsewhere"):
        load_fashion("train")
    with pytest.raises(ValueError, match="no part 'dev': train or test"):
        load_fashion("dev", tmp_path)


def test_a_folder_is_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS, "test", ("t10k", 20))
    data = some(20)
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(data.pictures.squeeze(1))))
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(data.labels)))
    read = load_fashion("test", tmp_path)
    assert len(read) == 20
    assert torch.equal(read.pictures, data.pictures)
    assert torch.equal(read.labels, data.labels)
    assert to_unit(torch.tensor([0, 51, 255], dtype=torch.uint8)).tolist() == pytest.approx([0, 0.2, 1])
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(data.labels + 1)))
    with pytest.raises(ValueError, match="label 10 in test; there are 10 classes"):
        load_fashion("test", tmp_path)


# --- the pipeline ----------------------------------------------------------------------------------------------------


def test_kinds_of_output(pipe: FashionPipeline) -> None:
    def draw(kind: str):
        return pipe([3, 9], num_inference_steps=2, generator=seeds(0, 1), output_type=kind).images

    latents, unit, pictures = draw("latent"), draw("pt"), draw("pil")
    assert latents.shape == unit.shape == (2, 1, SIZE, SIZE)
    assert torch.equal(unit, (latents / 2 + 0.5).clamp(0, 1))
    assert [(each.size, each.mode) for each in pictures] == [((SIZE, SIZE), "L")] * 2
    assert list(pictures[1].tobytes()) == to_bytes(unit[1]).flatten().tolist()
    (alone,) = pipe(3, num_inference_steps=2, generator=seeds(0), output_type="latent", return_dict=False)
    assert alone.shape == (1, 1, SIZE, SIZE)


def test_guidance_in_one_batch_is_that_of_two_calls(pipe: FashionPipeline) -> None:
    labels, steps, scale = [1, 8], 3, 2.5
    calls = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, given: calls.append((len(args[0]), given["class_labels"].tolist())), with_kwargs=True
    )
    made = pipe(
        labels, num_inference_steps=steps, guidance_scale=scale, generator=seeds(5, 6), output_type="latent"
    ).images
    hook.remove()
    assert calls == [(4, [1, 8, NO_CLASS, NO_CLASS])] * steps

    latents = torch.cat([torch.randn(1, 1, SIZE, SIZE, generator=each) for each in seeds(5, 6)])
    scheduler = build_scheduler()
    scheduler.set_timesteps(steps)
    for timestep in scheduler.timesteps:

        def ask(classes: list[int], latents: Tensor = latents, timestep: Tensor = timestep) -> Tensor:
            return pipe.transformer(latents, timestep=timestep.expand(2), class_labels=torch.tensor(classes)).sample

        towards, away = ask(labels), ask([NO_CLASS] * 2)
        assert not torch.allclose(towards, away, rtol=0, atol=1e-2)
        latents = scheduler.step(away + scale * (towards - away), timestep, latents).prev_sample
    torch.testing.assert_close(made, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1.0, 0.0])
def test_without_guidance_only_the_class_is_asked_for(pipe: FashionPipeline, scale: float) -> None:
    shapes = []
    hook = pipe.transformer.register_forward_hook(lambda _, args, output: shapes.append(output[0].shape))
    pipe([4, 5, 6], num_inference_steps=2, guidance_scale=scale, output_type="latent")
    hook.remove()
    assert shapes == [(3, 1, SIZE, SIZE)] * 2


def test_each_generator_makes_its_picture_whatever_is_beside_it(pipe: FashionPipeline) -> None:
    def draw(labels: list[int], *numbers: int) -> Tensor:
        return pipe(labels, num_inference_steps=3, generator=seeds(*numbers), output_type="latent").images

    both = draw([2, 7], 3, 4)
    torch.testing.assert_close(draw([7], 4), both[1:], rtol=0, atol=1e-4)
    torch.testing.assert_close(draw([7, 2], 4, 3), both.flip(0), rtol=0, atol=1e-4)
    assert (draw([6], 4) - both[1:]).abs().max() > 0.01  # the label counts, too
    noise = torch.randn(1, 1, SIZE, SIZE, generator=seeds(4)[0])
    given = pipe(7, num_inference_steps=3, latents=noise, output_type="latent").images
    assert torch.equal(given, draw([7], 4))


def test_what_makes_no_sense_is_refused(pipe: FashionPipeline) -> None:
    with pytest.raises(ValueError, match="empty list"):
        pipe([])
    with pytest.raises(ValueError, match=r"no classes \[-1, 10\]: labels go from 0 to 9"):
        pipe([3, 10, -1])
    with pytest.raises(ValueError, match=r"2 pictures need \(2, 1, 28, 28\)"):
        pipe([1, 2], latents=torch.zeros(1, 1, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"\['labels'\] are not on offer"):
        pipe(1, callback_on_step_end_tensor_inputs=["labels"])


def test_a_callback_sees_and_replaces_latents(pipe: FashionPipeline) -> None:
    seen = []

    def black(_, step: int, timestep: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append((step, int(timestep)))
        return {"latents": torch.full_like(tensors["latents"], -1.0)} if step == 3 else {}

    made = pipe(1, num_inference_steps=4, output_type="pt", callback_on_step_end=black).images
    assert seen == [(0, 999), (1, 749), (2, 499), (3, 249)]  # from pure noise on
    assert not made.any()


def test_saved_in_half_precision_and_loaded_in_float(pipe: FashionPipeline, tmp_path: Path) -> None:
    exact = {name: value.half().float() for name, value in pipe.transformer.state_dict().items()}
    pipe.transformer.half()
    pipe.save_pretrained(tmp_path / "saved")
    loaded = load(tmp_path / "saved")
    assert {value.dtype for value in loaded.transformer.parameters()} == {torch.float32}
    assert all(torch.equal(value, exact[name]) for name, value in loaded.transformer.state_dict().items())
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    assert not loaded.transformer.training
    with pytest.raises(FileNotFoundError, match=r"holds no pipeline.*bench\.fashion\.train"):
        load(tmp_path)


# --- caching it ------------------------------------------------------------------------------------------------------


def test_the_timestep_alone_tells_the_step(pipe: FashionPipeline) -> None:
    assert not hasattr(pipe.scheduler, "step_index")

    def draw(number: int = 0) -> Tensor:
        return pipe([1, 2], num_inference_steps=6, generator=seeds(number, 9), output_type="latent").images

    plain = [draw(0), draw(1)]
    with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 2))) as cache:
        cached = [draw(0), draw(1)]
        decided = [(each.step, each.reuse) for each in cache.decisions]
        assert (cache.stats.blocks_run, cache.stats.blocks_total) == (2 * 3 * 3, 2 * 6 * 3)
    assert decided == [(step, step % 2 == 1) for _ in range(2) for step in range(6)]
    for ours, theirs in zip(cached, plain, strict=True):
        assert (ours - theirs).abs().max() > 1e-3
    assert torch.equal(draw(1), plain[1])  # nothing is left behind


def test_a_reused_step_adds_the_residual_of_the_last_one(pipe: FashionPipeline) -> None:
    """By hand: at the odd steps the blocks add to the embedded picture what they added at the even ones."""
    made = {}
    with dit_cache(pipe, DitCacheConfig(policy=Interval(0, 2))):
        made["cached"] = pipe(4, num_inference_steps=4, generator=seeds(0), output_type="latent").images
    kept: list[Tensor] = []
    step = 0

    class ByHand(nn.Module):
        def __init__(self, inner: nn.ModuleList) -> None:
            super().__init__()
            self.inner = inner
            self.norm1 = inner[0].norm1  # the model's last layer asks the first block for its embedding

        def forward(self, hidden_states: Tensor, **given: object) -> Tensor:
            nonlocal step
            if step % 2 == 0:
                after = hidden_states
                for block in self.inner:
                    after = block(after, **given)
                kept[:] = [after - hidden_states]
            step += 1
            return hidden_states + kept[0]

    pipe.transformer.transformer_blocks = nn.ModuleList([ByHand(pipe.transformer.transformer_blocks)])
    made["by hand"] = pipe(4, num_inference_steps=4, generator=seeds(0), output_type="latent").images
    torch.testing.assert_close(made["cached"], made["by hand"], rtol=1e-4, atol=1e-4)


def test_a_plan_is_found_and_used(pipe: FashionPipeline) -> None:
    def run(pipe: FashionPipeline) -> Tensor:
        return pipe([0, 5], num_inference_steps=8, generator=seeds(0, 1), output_type="latent").images

    plan = search(pipe, run, 2.0, cost="blocks", max_evals=1, verbose=False).plan
    assert isinstance(plan, CachePlan)
    with dit_cache(pipe, plan) as cache:
        run(pipe)
    assert cache.stats.blocks_total / cache.stats.blocks_run >= 2.0


# --- training --------------------------------------------------------------------------------------------------------


def trainer(**changes: object) -> train.Trainer:
    config = train.TrainConfig(**{"steps": 6, "batch": 4, "warmup": 2, "drop_label": 0.5} | changes)
    return train.Trainer(config, some(), build_transformer(layers=2, heads=2, head_dim=8))


@torch.enable_grad()
def test_a_stopped_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    torch.manual_seed(0)
    whole = trainer()
    begun = {name: value.clone() for name, value in whole.transformer.state_dict().items()}
    losses = [whole.train_step() for _ in range(6)]
    assert len(set(losses)) == 6
    assert any(not torch.equal(value, begun[name]) for name, value in whole.transformer.state_dict().items())

    torch.manual_seed(0)
    first = trainer()
    assert [first.train_step() for _ in range(3)] == losses[:3]
    torch.save(first.state_dict(), tmp_path / "checkpoint.pt")
    torch.manual_seed(99)
    second = trainer(seed=7)
    second.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert second.step == 3
    assert [second.train_step() for _ in range(3)] == losses[3:]
    for ours, theirs in zip(second.parameters + second.average, whole.parameters + whole.average, strict=True):
        assert torch.equal(ours, theirs)


@torch.enable_grad()
def test_the_command_resumes_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "load_fashion", lambda part, folder: some())
    monkeypatch.setattr(train, "build_transformer", lambda: build_transformer(layers=1, heads=1, head_dim=8))
    where = ["--out", str(tmp_path), "--batch", "4"]
    train.main([*where, "--steps", "2"])
    train.main([*where, "--steps", "3"])
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 3]
    averaged = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["average"]
    exported = load(tmp_path / "pipeline").transformer
    for ours, theirs in zip(exported.parameters(), averaged, strict=True):
        assert torch.equal(ours, theirs.half().float())


def test_batches_are_what_the_pipeline_will_show() -> None:
    made = trainer(batch=2000)
    clean, labels, timestep, noise = made.batch()
    assert clean.shape == noise.shape == (2000, 1, SIZE, SIZE)
    assert clean.min() == -1
    assert clean.max() == 1
    assert 0.45 < (labels == NO_CLASS).double().mean() < 0.55
    assert set(labels.tolist()) == set(range(11))
    assert (int(timestep.min()), int(timestep.max())) == pytest.approx((0, 999), abs=5)
    pictures = some().pictures.flatten(1)
    for picture, label in zip(clean[:20], labels[:20], strict=True):  # pictures keep their labels
        found = (pictures == to_bytes(picture / 2 + 0.5).flatten()).all(1).nonzero().item()
        assert label in (found % 10, NO_CLASS)


def test_the_rate_rises_stays_and_falls() -> None:
    config = train.TrainConfig(steps=100, lr=1.0, warmup=10, decay=0.25)
    assert [config.lr_at(step) for step in (0, 9, 50, 75, 90, 99)] == pytest.approx([0.1, 1, 1, 1, 0.4, 0.04])


def test_labels_are_dropped_by_the_training_alone() -> None:
    """In train mode each block of diffusers' DiT would drop labels by itself."""
    model = build_transformer(layers=1, heads=1, head_dim=8)
    assert not any(module.training for module in model.modules())
    shown = torch.randn(1, 1, SIZE, SIZE)
    assert not model(shown, timestep=torch.tensor([5]), class_labels=torch.tensor([0])).sample.any()  # zero at first


# --- scores ----------------------------------------------------------------------------------------------------------


def diagonal(mean: list[float], variance: list[float]) -> Moments:
    return Moments(torch.tensor(mean).double(), torch.tensor(variance).double().diag())


def test_frechet_distance_by_hand() -> None:
    # |(1, 2) - (0, 0)|² + (2 - 1)² + (3 - 1)² for standard deviations (2, 3) and (1, 1)
    assert frechet_distance(diagonal([1, 2], [4, 9]), diagonal([0, 0], [1, 1])) == pytest.approx(5 + 1 + 4, abs=1e-12)
    # Variances of which one is nothing: (0 - 3)² + (5 - 4)²
    assert frechet_distance(diagonal([0, 0], [0, 25]), diagonal([0, 0], [9, 16])) == pytest.approx(10, abs=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    # (A B)^½ of a 2×2 matrix has the trace √(tr AB + 2 √det AB), which is told without eigenvectors
    one, other = torch.tensor([[2.0, 0.5], [0.5, 1.0]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    product = one @ other
    trace = math.sqrt(product.trace() + 2 * math.sqrt(product.det()))
    wanted = 3 + 4 - 2 * trace
    zero = torch.zeros(2).double()
    assert frechet_distance(Moments(zero, one), Moments(zero, other)) == pytest.approx(wanted, abs=1e-12)
    assert frechet_distance(Moments(zero, other), Moments(zero, one)) == pytest.approx(wanted, abs=1e-12)


def test_frechet_distance_of_features_that_depend_on_each_other() -> None:
    features = torch.randn(50, 3, dtype=torch.float64)
    features = torch.cat([features, features @ torch.randn(3, 5, dtype=torch.float64)], 1)  # rank 3 of 8
    moments = Moments.of(features)
    assert torch.allclose(moments.covariance, torch.cov(features.T))
    assert frechet_distance(moments, moments) == pytest.approx(0, abs=1e-6)
    apart = Moments(moments.mean + 2, moments.covariance)
    assert frechet_distance(moments, apart) == pytest.approx(8 * 4, abs=1e-6)


def test_inception_score_by_hand() -> None:
    assert inception_score(torch.eye(10).double()) == pytest.approx(10)
    assert inception_score(torch.full((7, 10), 0.1).double()) == pytest.approx(1)
    assert inception_score(torch.eye(10)[[3] * 5].double()) == pytest.approx(1)
    # Half (¾, ¼), half (¼, ¾): ln 2 less the entropy of (¾, ¼)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    told = inception_score(torch.tensor([[0.75, 0.25], [0.25, 0.75]]).double())
    assert told == pytest.approx(2 * math.exp(-entropy))


class ByBrightness(Classifier):
    """Takes a picture for the class that its first pixel says, a tenth for each; features are two pixels."""

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        told = (pictures[:, 0, 0, 0] * 10).round().long().clamp(max=9)
        return pictures[:, 0, 0, :2], nn.functional.one_hot(told, 10) * 50.0


def test_scores_of_pictures() -> None:
    pictures = torch.zeros(100, 1, SIZE, SIZE)
    pictures[:, 0, 0, 0] = torch.arange(100).remainder(10) / 10
    labels = torch.arange(100).remainder(10)
    labels[:25] = 11  # never right
    model = ByBrightness().eval()
    features, probabilities = look(model, to_bytes(pictures), batch=7)
    assert features.dtype == probabilities.dtype == torch.float64
    same = scores_of(to_bytes(pictures), labels, model, Moments.of(features))
    assert (same.asked, same.samples) == (0.75, 100)
    assert same.inception == pytest.approx(10)
    assert same.frechet == pytest.approx(0, abs=1e-9)
    off = scores_of(to_bytes(pictures), labels, model, Moments.of(features + torch.tensor([0.0, 3.0])))
    assert off.frechet == pytest.approx(9, abs=1e-9)


class Told:
    """A subject that draws what its label says, and twice as dark where it takes half the steps."""

    name, steps, calls = "told", 4, 1
    calibration = test = (Case(0, 0),)

    def __init__(self) -> None:
        self.pipe = nn.Module()
        self.pipe.transformer = nn.Module()
        self.pipe.transformer.blocks = nn.ModuleList([nn.Linear(2, 2)])
        self.drawn: list[tuple[int, int, int]] = []

    def draw(self, given: list[Case], steps: int | None = None) -> Tensor:
        steps = steps or self.steps
        for _ in range(steps):
            self.pipe.transformer.blocks[0](torch.zeros(len(given), 2))
        self.drawn += [(int(each.prompt), each.seed, steps) for each in given]
        latents = torch.zeros(len(given), 1, SIZE, SIZE)
        latents[:, 0, 0, 0] = torch.tensor([int(each.prompt) for each in given]) / 10 * steps / self.steps
        return latents

    def pictures(self, latents: Tensor) -> Tensor:
        return latents


@contextmanager
def halved(subject: Told, times: float):
    yield Attached(steps=int(subject.steps / times), shown="half")


def test_a_table_is_drawn_row_by_row_and_goes_on(tmp_path: Path) -> None:
    real = torch.zeros(20, 1, SIZE, SIZE)
    real[:, 0, 0, 0] = torch.arange(20).remainder(10) / 10
    split = Split(to_bytes(real), torch.arange(20).remainder(10).byte())
    judge = Judge.of(ByBrightness().eval(), split, samples=20, batch=8)
    subject, path = Told(), tmp_path / "scores.json"
    table = Table(subject, judge, path)
    table.real(split)
    table.plain()
    assert subject.drawn == [(n % 10, SEED + n, 4) for n in range(20)]
    assert table.rows[0].scores.asked == table.rows[1].scores.asked == 1
    assert table.rows[1].scores.frechet == pytest.approx(0, abs=1e-9)

    method = Method("none", "half the steps", "times", (2.0,), halved)
    again = Table(later := Told(), judge, path)
    again.real(split)
    again.plain()
    assert not later.drawn
    again.method(method, 2.0)
    (row,) = again.rows[2:]
    assert row.fraction == 0.5
    assert row.scores.asked == 0.2  # of 0 and of 1, whose half is nearer to 1 than to 0
    spread = math.sqrt(0.0825 * 20 / 19)  # of 0, 0.1, … 0.9, each twice
    assert row.scores.frechet == pytest.approx(0.225**2 + (spread / 2) ** 2, abs=5e-4)  # but for rounding to bytes
    assert [json.loads(path.read_text())["rows"][n]["title"] for n in range(3)] == [
        "real pictures",
        "uncached",
        "none: half the steps",
    ]
    assert "| none: half the steps | half | 2.00x |" in path.with_suffix(".md").read_text()
    count = len(later.drawn)
    Table(later, judge, path).method(method, 2.0)
    assert len(later.drawn) == count
    with pytest.raises(SystemExit, match="other samples"):
        Table(later, Judge(judge.classifier, judge.real, 10, 8), path)


def test_cases_are_balanced_and_their_seeds_differ() -> None:
    labels, numbers = cases(5000)
    assert torch.tensor(labels).bincount().tolist() == [500] * 10
    assert len(set(numbers)) == 5000
    assert [knob(text) for text in ("2", "0.1", "fast")] == [2, 0.1, "fast"]


def test_the_sheet_has_a_column_for_each_class() -> None:
    pictures = torch.zeros(20, 1, SIZE, SIZE)
    pictures[5] = 1  # the second picture of the third class
    page = sheet.sheet(pictures)
    cell = SIZE * sheet.SCALE + sheet.GAP
    left, top = sheet.GAP + 2 * cell, sheet.TEXT + 2 * sheet.GAP + cell
    assert page.getpixel((left, top)) == page.getpixel((left + SIZE * sheet.SCALE - 1, top + 5)) == 255
    assert page.getpixel((left + cell, top)) == page.getpixel((left, top - cell)) == 0


# --- what ships ------------------------------------------------------------------------------------------------------


def test_the_shipped_weights_draw_what_is_asked_for() -> None:
    labels = list(range(len(NAMES))) * 2
    pictures = load()(labels, num_inference_steps=8, generator=seeds(*range(20)), output_type="pt").images
    told = look(load_classifier(), to_bytes(pictures))[1].argmax(-1)
    assert (told == torch.tensor(labels)).double().mean() >= 0.7
    assert SEEN == 50_000
