"""A recorded run: Gram matrices against the residuals in full, its steps and branches, and what its blocks take."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from recording.test_token_selection import captured
from torch import nn
from toys import Ladder, Net, Pipe, Single, latents, loop, prompt

from dithooks import BlockAdapter, timestep_scope
from dithooks.blocks.registry import chains_of
from dithooks.recording.record import record

STEPS = 5
BOTH = ("hidden_states", "encoder_hidden_states")
KINDS = ["single", "in_place", "swapped", "straight", "positional", "last_drops_text", "two_lists"]


def pipe_of(kind="single", depth=4):
    """A pipeline, and what one call of it is given."""
    given = {} if kind in ("single", "in_place") else {"prompts": [prompt()]}
    return Pipe(Net(kind, depth)), given


def near(got, wanted):
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6 * np.abs(wanted).max())


class Plain(nn.Module):
    """Three blocks of a class, one after another; ``key``: what they return is a dict."""

    def __init__(self, block, key=None):
        super().__init__()
        self.blocks, self.key = nn.ModuleList(block() for _ in range(3)), key

    def forward(self, hidden_states, timestep):
        for block in self.blocks:
            out = block(hidden_states)
            hidden_states = out if self.key is None else out[self.key]
        return hidden_states


def calls_of(target, run):
    (chain,) = [chain for chain, _ in chains_of(target, None)]
    return captured(chain, lambda: run(target))


def grams(calls, names=("hidden_states",), outputs=(0,)):
    """(first, last) → Gram matrix of what a range did to each of its streams, one call a step."""

    def gram(first, last):
        parts = []
        for name, position in zip(names, outputs, strict=True):
            parts.append(torch.stack([call[last][1][position] - call[first][0][name] for call in calls]).flatten(1))
        return sum(part @ part.T for part in parts).numpy()

    return gram


class TestGrams:
    """Against the residuals in full, as plain hooks see them: h_out − h_in, block by block, in double precision."""

    @pytest.mark.parametrize("kind", KINDS[:-1])
    def test_one_list(self, kind):
        pipe, given = pipe_of(kind)
        x = latents()
        run = lambda pipe: pipe(x.clone(), STEPS, **given)  # noqa: E731
        (trace,) = record(pipe, run).traces
        assert trace.ranges.tolist() == [[i, j] for i in range(4) for j in range(i, 4)]
        assert trace.share == 1
        outputs = (0, 1) if kind == "straight" else (1, 0)
        wanted = grams(calls_of(pipe, run), BOTH, outputs) if given else grams(calls_of(pipe, run))
        for first, last in trace.ranges.tolist():
            near(trace.gram(first, last), wanted(first, last))

    @pytest.mark.parametrize("in_place", [False, True])
    @pytest.mark.parametrize("kind", KINDS[:3])
    def test_what_is_added_between_two_blocks_is_of_what_is_across(self, kind, in_place):
        """Not of the block before; of a range that goes on after it, though."""
        pipe, given = pipe_of(kind)
        pipe.transformer.in_place_control = in_place
        x, control = latents(), torch.randn(2, 6, 8)
        run = lambda pipe: pipe(x, STEPS, control=control, **given)  # noqa: E731
        (trace,) = record(pipe, run).traces
        calls = calls_of(pipe, run)
        wanted = grams(calls, BOTH, (1, 0)) if given else grams(calls)
        for first, last in trace.ranges.tolist():
            near(trace.gram(first, last), wanted(first, last))
        norms = [[sum(float(out.square().sum()) for out in call[k][1]) ** 0.5 for call in calls] for k in range(4)]
        near(trace.norms, norms)

    def test_two_lists(self):
        """(e, h) go from one list to the other, and come back from that the other way round."""
        pipe, given = pipe_of("two_lists", 2)
        x = latents()
        run = lambda pipe: pipe(x, STEPS, **given)  # noqa: E731
        (trace,) = record(pipe, run).traces
        assert trace.blocks == tuple(f"transformer.{name}.{k}" for name in ("blocks", "singles") for k in range(2))
        calls = calls_of(pipe, run)
        for first, last in trace.ranges.tolist():
            near(trace.gram(first, last), grams(calls, BOTH, (1, 0) if last < 2 else (0, 1))(first, last))

    def test_text_and_image_joined_between_the_lists(self):
        """A range over both does [text; image] out less [text; image] in."""

        class Joining(nn.Module):
            def __init__(self):
                super().__init__()
                self.doubles, self.singles = Net("swapped", 2).blocks, nn.ModuleList(Single() for _ in range(2))

            def forward(self, hidden_states, timestep, encoder_hidden_states):
                h, e, temb = hidden_states, encoder_hidden_states, timestep.expand(2, 8)
                for block in self.doubles:
                    e, h = block(h, e, temb)
                h = torch.cat([e, h], 1)
                for block in self.singles:
                    h = block(h, temb)
                return h[:, 3:]

        model, x, e = Joining(), torch.randn(2, 6, 8), prompt()
        run = lambda model: [model(x + 0.1 * k, torch.tensor(1 - k / 4), e) for k in range(4)]  # noqa: E731
        (trace,) = record(model, run).traces
        calls = calls_of(model, run)
        for first, last in itertools.product((0, 1), (2, 3)):
            ins = [torch.cat([call[first][0][name] for name in BOTH[::-1]], 1) for call in calls]
            deltas = torch.stack([call[last][1][0] - into for call, into in zip(calls, ins, strict=True)]).flatten(1)
            near(trace.gram(first, last), (deltas @ deltas.T).numpy())

    def test_by_hand(self):
        """h → h + (k + 1)·t·1 in three numbers: of blocks 1 to 3 together 9·t."""
        times = torch.tensor([1.0, 0.75, 0.5, 0.25])
        recording = record(Ladder(4), lambda model: [model(torch.full((1, 3), 2.0), t) for t in times])
        near(recording.traces[0].gram(1, 3), 3 * 81 * np.outer(times, times))
        out_of_2 = (2 + (1 + 2 + 3) * times.numpy()) * 3**0.5
        np.testing.assert_allclose(recording.traces[0].norms[2], out_of_2, rtol=1e-6)
        with pytest.raises(ValueError, match="blocks 0 to 4 are no range"):
            recording.traces[0].gram(0, 4)

    def test_dicts(self):
        class Dicts(Single):
            def forward(self, hidden_states):
                return {"hidden_states": super().forward(hidden_states, hidden_states[:, 0])}

        model, x = Plain(Dicts, "hidden_states"), torch.randn(2, 6, 8)
        run = lambda model: [model(x + t, t) for t in (1.0, 0.5, 0.25)]  # noqa: E731
        (trace,) = record(model, run).traces
        near(trace.gram(0, 2), grams(calls_of(model, run))(0, 2))

    def test_several_runs_add_up(self):
        pipe, given = pipe_of("swapped")
        xs = [latents() for _ in range(3)]
        draw = lambda pipe, x: pipe(x, STEPS, **given)  # noqa: E731
        together = record(pipe, lambda pipe: [draw(pipe, x) for x in xs])
        assert (together.runs, together.samples) == (3, 6)
        alone = [record(pipe, lambda pipe, x=x: draw(pipe, x)).traces[0] for x in xs]
        near(together.traces[0].grams, sum(trace.grams for trace in alone))
        near(np.square(together.traces[0].norms), sum(np.square(trace.norms) for trace in alone))
        assert together.traces[0].branches == 1


class TestRuns:
    """Which step, at which σ, and how many calls of it."""

    def test_one_call_a_step(self):
        pipe, given = pipe_of()
        recording = record(pipe, lambda pipe: pipe(latents(3), STEPS, **given))
        (trace,) = recording.traces
        assert trace.steps.tolist() == list(range(STEPS))
        np.testing.assert_allclose(trace.times, [1, 0.8, 0.6, 0.4, 0.2], rtol=1e-6)
        assert (trace.axis, trace.branches) == ("sigma", 1)
        assert recording.sigmas == tuple(trace.times.tolist())
        assert (recording.steps, recording.samples, recording.runs) == (STEPS, 3, 1)
        assert dataclasses.asdict(recording.made) | {"fingerprint": ""} == {
            "model": "Net", "fingerprint": "", "blocks": 4, "dtype": "float32", "steps": STEPS, "scheduler": "Counter",
            "size": (6, 4),
        }  # fmt: skip

    def test_guidance_in_two_calls(self):
        """Gram matrices of both add up; a step's calls are told apart."""
        pipe, texts, x = Pipe(Net("swapped", 4)), [prompt(), prompt(tokens=4)], latents()
        (trace,) = record(pipe, lambda pipe: pipe(x, STEPS, texts)).traces
        assert trace.branches == 2
        calls = calls_of(pipe, lambda pipe: pipe(x, STEPS, texts))
        each = [grams(calls[k::2], BOTH, (1, 0)) for k in (0, 1)]
        near(trace.gram(1, 3), each[0](1, 3) + each[1](1, 3))

    def test_guidance_on_part_of_the_steps(self):
        model, x, texts = Net("swapped", 4), latents(), [prompt(), prompt()]

        def run(model):
            for step in range(STEPS):
                for number in (0, 1) if step in (1, 2) else (0,):
                    with timestep_scope(step, branch=number, sigma=1 - step / STEPS, steps=STEPS):
                        model(x + 0.1 * step, torch.tensor(1 - step / STEPS), texts[number])

        (trace,) = record(model, run).traces
        assert trace.branches == 7 / 5
        calls = calls_of(model, run)
        first, second = (grams([calls[k] for k in those], BOTH, (1, 0))(0, 3) for those in ((0, 1, 3, 5, 6), (2, 4)))
        nearest = [0, 0, 1, 1, 1]  # where it was not called, it counts as at the nearest step at which it was
        near(trace.gram(0, 3), first + second[np.ix_(nearest, nearest)])

    def test_a_run_that_begins_late(self):
        pipe, x = Pipe(Net()), latents()

        def run(pipe):
            pipe.scheduler.set_timesteps(8)
            pipe.scheduler.begin_index = 3
            for t in pipe.scheduler.timesteps[3:]:
                pipe.transformer(x, timestep=t / 1000)
                pipe.scheduler.step()

        recording = record(pipe, run)
        assert recording.traces[0].steps.tolist() == [3, 4, 5, 6, 7]
        np.testing.assert_allclose(recording.traces[0].times, [0.625, 0.5, 0.375, 0.25, 0.125])
        assert recording.steps == len(recording.sigmas) == 8

    def test_two_transformers_that_take_over_from_each_other(self):
        class Experts(Pipe):
            def __init__(self):
                super().__init__(Net("single", 4))
                self.transformer_2 = Net("in_place", 3)

            def __call__(self, x, steps=6):
                self.scheduler.set_timesteps(steps)
                for step, t in enumerate(self.scheduler.timesteps):
                    x = x - (self.transformer if step < 2 else self.transformer_2)(x, timestep=t / 1000) / steps
                    self.scheduler.step()
                return x

        recording = record(Experts(), lambda pipe: [pipe(latents()) for _ in range(2)])
        first, second = recording.traces
        assert (first.path, second.path) == ("transformer", "transformer_2")
        assert (first.steps.tolist(), second.steps.tolist()) == ([0, 1], [2, 3, 4, 5])
        assert first.grams.shape == (10, 2, 2)
        assert second.grams.shape == (6, 4, 4)
        assert (recording.runs, recording.samples, recording.made.blocks, recording.steps) == (2, 4, 7, 6)
        assert recording.made.model == "Net+Net"

    def test_told_by_timesteps_alone(self):
        recording = record(Net(), lambda model: loop(model, latents(), 4), num_inference_steps=4)
        (trace,) = recording.traces
        assert (trace.axis, trace.times.tolist(), recording.sigmas) == ("timestep", [1, 0.75, 0.5, 0.25], None)
        assert (recording.steps, recording.made.scheduler) == (4, None)

    def test_an_adapter(self):
        pipe, _ = pipe_of()
        given = []
        adapter = BlockAdapter(pipe=pipe, transformer=pipe.transformer, blocks=pipe.transformer.blocks)
        recording = record(adapter, lambda target: given.append(target) or target(latents(), STEPS))
        assert given == [pipe]
        assert recording.traces[0].grams.shape == (10, STEPS, STEPS)

    @pytest.mark.parametrize("whole", [True, False])
    def test_compiled(self, whole):
        model, x = Net("swapped", 3), latents()
        e, eager = prompt(), Net("swapped", 3)
        eager.load_state_dict(model.state_dict())
        if whole:
            model = torch.compile(model, backend="eager")
        else:
            for block in model.blocks:
                block.compile(backend="eager")
        run = lambda model: loop(model, x, STEPS, encoder_hidden_states=e)  # noqa: E731
        for times in range(2):  # before it was compiled, and after
            trace, plain = (record(each, run, num_inference_steps=STEPS).traces[0] for each in (model, eager))
            near(trace.grams, plain.grams)
            assert trace.ranges.tolist() == plain.ranges.tolist()
            if not times:
                run(model)

    def test_what_each_block_takes(self):
        class Slow(Single):
            times = 1

            def forward(self, hidden_states, temb):
                for _ in range(self.times):
                    out = super().forward(hidden_states, temb)
                return out

        model = Net("single", 4, width=64)
        model.blocks = nn.ModuleList(Slow(64) for _ in range(4))
        model.blocks[2].times = 20
        x = latents(2, 400)
        (trace,) = record(model, lambda model: loop(model, x, 8), num_inference_steps=8).traces
        assert (trace.block_ms > 0).all()
        others = np.median(trace.block_ms[[0, 1, 3]])
        assert 7 < trace.block_ms[2] / others < 60
        assert trace.call_ms > trace.block_ms.sum()

    def test_how_long_it_takes(self):
        pipe, _ = pipe_of()
        recording = record(pipe, lambda pipe: pipe(latents(), STEPS))
        assert 0 < recording.run_ms < recording.recorded_ms
        assert recording.run_ms > STEPS * recording.traces[0].call_ms

    def test_it_says_how_far_it_is(self):
        pipe, said = pipe_of()[0], []
        record(pipe, lambda pipe: pipe(latents(), STEPS), report=lambda *told: said.append(told))
        assert [told for told in said if told[0] == "record"] == [("record", k + 1, STEPS) for k in range(STEPS)]
        assert [told for told in said if told[0] != "record"][-1] == ("Gram matrices", 10, 10)
