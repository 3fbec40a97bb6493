"""Recording leaves a model and what it draws as they were; what it refuses; and its files."""

import dataclasses
import itertools
import warnings

import numpy as np
import pytest
import torch
from recording.test_recording import KINDS, STEPS, pipe_of
from toys import Net, latents, loop, prompt

from dithooks import DitCacheConfig, dit_cache
from dithooks.recording.record import record
from dithooks.recording.recording import Recording
from dithooks.tiny import build


def stands(model):
    """Modules, the entries of their lists, and their hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
    return {n: (id(m), type(m), *(list(m.__dict__[kind]) for kind in kinds)) for n, m in model.named_modules()}


def test_a_model_of_diffusers_draws_the_same():
    model, inputs = build("FluxTransformer2DModel")
    before = stands(model)

    def run(model):
        return [model(**inputs(), return_dict=False)[0] + 0 for _ in range(1)]

    plain = run(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(record(model, run).results[0], plain[0])
    assert stands(model) == before


def same(a, b):
    """Bit for bit, arrays and mappings of arrays, too."""
    if isinstance(b, dict):
        return list(a) == list(b) and all(map(same, a.values(), b.values()))
    if isinstance(b, np.ndarray):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    return a == b


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_what_it_draws_is_what_it_draws_without(kind, mode):
    pipe, given = pipe_of(kind)
    x = latents()
    run = mode()(lambda pipe: pipe(x.clone(), STEPS, **given))
    plain, before = run(pipe), stands(pipe.transformer)
    assert torch.equal(record(pipe, run).results, plain)
    assert stands(pipe.transformer) == before


class TestRefused:
    @pytest.mark.parametrize(
        ("run", "match"),
        [
            (lambda pipe: [pipe(latents(), 4), pipe(latents(), 5)], "runs of different schedules .*4 steps, then 5"),
            (lambda pipe: None, "run made no step of the target"),
            (torch.enable_grad()(lambda pipe: pipe(latents(), 4)), "called with gradients enabled"),
            (lambda pipe: pipe(latents(), 4), "num_inference_steps=6, but run made 4 steps"),
        ],
    )
    def test_runs(self, run, match):
        pipe = pipe_of()[0]
        before = stands(pipe.transformer)
        with pytest.raises(ValueError, match=match):
            record(pipe, run, num_inference_steps=6 if "=6" in match else None)
        assert stands(pipe.transformer) == before

    def test_other_noise_levels(self):
        pipe = pipe_of()[0]

        def run(pipe):
            pipe(latents(), 4)
            pipe.scheduler.set_timesteps = lambda steps, plain=pipe.scheduler.set_timesteps: (
                plain(steps), setattr(pipe.scheduler, "sigmas", pipe.scheduler.sigmas**2))  # fmt: skip
            pipe(latents(), 4)

        with pytest.raises(ValueError, match=r"different schedules .*or other noise levels"):
            record(pipe, run)

    def test_other_shapes(self):
        def run(pipe):
            pipe(latents(), 2, at=None)
            pipe.scheduler.set_timesteps(2)
            for tokens, t in ((6, 1000.0), (7, 500.0)):
                pipe.transformer(latents(1, tokens), timestep=torch.tensor(t / 1000))
                pipe.scheduler.step()

        with pytest.raises(ValueError, match="tensors of other shapes than at the step before"):
            record(pipe_of()[0], run)

    @pytest.mark.parametrize(
        ("given", "error", "match"),
        [
            ({"run": None}, TypeError, "run must be a function"),
            ({"share": 0}, ValueError, "share=0"),
            ({"share": 1.5}, ValueError, "share=1.5"),
            ({"memory": 0}, ValueError, "memory=0"),
            ({"blocks": "transformer.nothing"}, ValueError, "nothing"),
        ],
    )
    def test_arguments(self, given, error, match):
        with pytest.raises(error, match=match):
            record(pipe_of()[0], **{"run": lambda pipe: pipe(latents(), 4), **given})

    def test_a_model_that_is_cached(self):
        pipe = pipe_of()[0]
        with dit_cache(pipe, DitCacheConfig(0, 2)), pytest.raises(ValueError, match="is cached already"):
            record(pipe, lambda pipe: pipe(latents(), 4))
        assert record(pipe, lambda pipe: pipe(latents(), 4)).steps == 4

    @pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
    @pytest.mark.parametrize("where", ["first", "later", "block"])
    def test_nothing_is_left_behind(self, where, error):
        pipe = pipe_of()[0]
        count = itertools.count()

        def fail(*_):
            if next(count) == {"first": 0, "later": 3, "block": 9}[where]:
                raise error("stop")

        failing = (pipe.transformer.blocks[1] if where == "block" else pipe.transformer).register_forward_hook(fail)
        before, blocks = stands(pipe.transformer), list(pipe.transformer.blocks)
        with pytest.raises(error, match="stop"):
            record(pipe, lambda pipe: pipe(latents(), 12))
        assert stands(pipe.transformer) == before
        assert all(a is b for a, b in zip(pipe.transformer.blocks, blocks, strict=True))
        failing.remove()
        assert record(pipe, lambda pipe: pipe(latents(), 4)).steps == 4


class TestFiles:
    @pytest.fixture
    def recording(self):
        pipe = pipe_of("two_lists", 2)[0]
        return record(pipe, lambda pipe: pipe(latents(), STEPS, [prompt(), prompt(tokens=5)]))

    def test_round_trip(self, recording, tmp_path):
        recording.save(tmp_path / "run.calibration")
        read = Recording.load(str(tmp_path / "run.calibration"))
        assert [path.name for path in tmp_path.iterdir()] == ["run.calibration"]
        for each in dataclasses.fields(Recording):
            if each.name not in ("traces", "results"):
                assert getattr(read, each.name) == getattr(recording, each.name)
                assert type(getattr(read, each.name)) is type(getattr(recording, each.name))
        assert read.results is None
        for got, wanted in zip(read.traces, recording.traces, strict=True):
            for each in dataclasses.fields(wanted):
                a, b = getattr(got, each.name), getattr(wanted, each.name)
                assert type(a) is type(b)
                assert same(a, b)

    def test_without_noise_levels(self, tmp_path):
        record(Net(), lambda model: loop(model, latents(), 4)).save(tmp_path / "x.npz")
        assert Recording.load(tmp_path / "x.npz").sigmas is None

    @pytest.mark.parametrize("garbage", [b"", b"garbage", b"PK\x03\x04garbage", b"{}", b"\x93NUMPY\x01\x00v\x00"])
    def test_garbage(self, garbage, tmp_path):
        (tmp_path / "x.npz").write_bytes(garbage)
        with pytest.raises(ValueError, match=r"x\.npz is no "):
            Recording.load(tmp_path / "x.npz")

    @pytest.mark.parametrize(
        "kind", ["array", "other archive", "schema", "kind", "cut", "changed", "lacking", "objects", "traces"]
    )
    def test_other_files(self, kind, recording, tmp_path):
        path = tmp_path / "x.npz"
        recording.save(path)
        if kind == "array":
            np.save(path.open("wb"), np.arange(3))
        elif kind == "cut":
            path.write_bytes(path.read_bytes()[:-300])
        elif kind == "changed":
            written = path.read_bytes()
            path.write_bytes(written[:200] + bytes(50) + written[250:])
        else:
            stored = dict(np.load(path))
            if kind == "other archive":
                stored = {"x": np.arange(3)}
            elif kind == "lacking":
                del stored["0.grams"]
            elif kind == "objects":
                stored["head"] = np.array({"a": 1}, dtype=object)
            else:
                text = str(stored["head"])
                change = {"schema": ('"schema": 1', '"schema": 99'), "kind": ('"Recording"', '"Plan"'),
                          "traces": ('"axis"', '"axes"')}[kind]  # fmt: skip
                stored["head"] = np.array(text.replace(*change))
            np.savez_compressed(path.open("wb"), **stored)
        with pytest.raises(ValueError, match=r"x\.npz is "):
            Recording.load(path)

    def test_a_file_that_is_not_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            Recording.load(tmp_path / "x.npz")
