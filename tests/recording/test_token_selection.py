"""What a recording keeps, on every class of diffusers: of each range, its residual, whatever becomes of its streams."""

import numpy as np
import pytest
import torch
from engine.test_looking_models import moved
from torch import nn
from toys import Net, Pipe, latents, loop, prompt

from dithooks import timestep_scope
from dithooks.blocks.observation import Observation, observed_blocks
from dithooks.blocks.registry import chains_of
from dithooks.blocks.stream_transforms import build as rebuild
from dithooks.blocks.trunk import find_trunk
from dithooks.blocks.wiring import resolve
from dithooks.errors import WiringError
from dithooks.recording.record import record
from dithooks.recording.recorder import Recorder
from dithooks.recording.token_selection import SamplePoint, points_of
from dithooks.tiny import build, names

STEPS = 3
# Its decoder is given the former hidden_states as encoder_hidden_states, and other ones in their place.
OTHER_STREAM = {"MotifVideoTransformer3DModel#decoder": 6}
NO_RANGE = "RFD4ProteinaTransformer"  # which argument an output carries on is not clear


def sample(model, inputs, steps=STEPS):
    for step in range(steps):
        with timestep_scope(step, branch=0, sigma=1 - step / steps, steps=steps):
            model(**moved(inputs(), step))


def hooked(chain, run, enter, leave, begin=lambda: None):
    """Call ``run`` with hooks on the blocks, told by number."""
    handles = [chain.owner.register_forward_pre_hook(lambda *_: begin())]
    for index, site in enumerate(chain.block_refs):
        handles += [
            site.block.register_forward_pre_hook(lambda _, a, k, i=index: enter(i, a, k), with_kwargs=True),
            site.block.register_forward_hook(lambda _, a, k, out, i=index: leave(i, out), with_kwargs=True),
        ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()


def captured(chain, run):
    """Of each call of the model, what each block was given and returned, in full, in double precision."""
    faces, calls = [spot.reader for spot in observed_blocks(chain)], []

    def copy(value):
        return value.double().clone() if isinstance(value, torch.Tensor) and value.is_floating_point() else None

    def enter(index, args, kwargs):
        calls[-1][index] = [{name: copy(value) for name, value in faces[index].arguments(args, kwargs).items()}]

    def leave(index, output):
        calls[-1][index].append([copy(value) for value in faces[index].take(output)[1]])

    hooked(chain, run, enter, leave, lambda: calls.append({}))
    return calls


def observed(chain, run):
    observation = Observation(observed_blocks(chain))
    hooked(chain, run, observation.enter, observation.leave)
    observation.close()
    return observation


def residual(wiring, before, after):
    """What leaves less what enters; of tokens that come from nowhere, nothing."""
    entering, found = [before[name] for name in wiring.entry], []
    for bridge, out in zip(wiring.leave, after, strict=True):
        if bridge is not None:
            ours = rebuild(bridge, [torch.ones_like(each) for each in entering], out.shape)
            found.append(((out - rebuild(bridge, entering, out.shape)) * ours).flatten())
    return torch.cat(found).numpy()


def grams_of(target, path, run, once):
    """(first, last) → Gram matrix, of one transformer, from full residuals."""
    (chain,) = [chain for chain, _ in chains_of(target, None) if chain.path == path]
    calls, observation = captured(chain, run), observed(chain, once)
    order = find_trunk(observation, chain.weights() if chain.found else None).order

    def gram(first, last):
        wiring = resolve(observation, order, first, last)
        each = [residual(wiring, call[order[first]][0], call[order[last]][1]) for call in calls]
        return np.stack(each) @ np.stack(each).T

    return gram


@pytest.mark.parametrize("name", names())
@pytest.mark.filterwarnings("ignore")
def test_every_range_of_every_class(name):
    model, inputs = build(name)
    if name.endswith("ControlNetModel"):
        with pytest.raises(WiringError, match="is a ControlNet"):
            record(model, lambda model: sample(model, inputs))
        return
    recording = record(model, lambda model: sample(model, inputs))
    assert recording.traces
    for trace in recording.traces:
        assert len(trace.ranges) or name == NO_RANGE
        assert trace.share == 1
        gram = grams_of(model, trace.path, lambda: sample(model, inputs), lambda: model(**moved(inputs(), 0)))
        for (first, last), got in zip(trace.ranges.tolist(), trace.grams, strict=True):
            wanted = gram(first, last)
            np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5 * wanted.max())
            assert not first < OTHER_STREAM.get(name, 0) <= last
    few = record(model, lambda model: sample(model, inputs, 1), share=1e-9)  # one token of each stream
    for trace, whole in zip(few.traces, recording.traces, strict=True):
        assert (trace.ranges == whole.ranges).all()
        assert trace.share < 1
        assert (np.trace(trace.grams, axis1=1, axis2=2) > 0).all()


class TestPoints:
    """Nets of four blocks, or of twice four; what is kept where."""

    @staticmethod
    def seen(kind, **given):
        net = Net(kind, 4)
        text = None if kind in ("single", "in_place") else prompt()
        (chain,) = [chain for chain, _ in chains_of(net, None)]
        x = latents()
        observation = observed(chain, lambda: net(x, torch.tensor(0.5), encoder_hidden_states=text, **given))
        return observation, find_trunk(observation, None).order

    @staticmethod
    def placed(points):
        return [(point.block, point.side) for point in points]

    @pytest.mark.parametrize("kind", ["single", "in_place", "swapped", "straight", "positional", "last_drops_text"])
    def test_where_all_is_handed_on_one_side_will_do(self, kind):
        points = points_of(*self.seen(kind))
        assert self.placed(points) == [(0, "in"), (1, "in"), (2, "in"), (3, "in"), (3, "out")]
        streams = 1 if kind in ("single", "in_place") else 2
        tokens = 2 * 6 + 2 * 3 * (streams - 1)
        for point in points:
            assert (len(point.rows), point.tokens) == (streams, tokens)
            assert sorted(point.ids.tolist()) == list(range(1, tokens + 1))

    def test_where_something_is_added_both_are_looked_at(self):
        points = points_of(*self.seen("single", control=torch.ones(2, 6, 8)))
        sides = [(block, side) for block in range(4) for side in ("in", "out")]
        assert self.placed(points) == sides
        assert all(point.ids.tolist() == points[0].ids.tolist() for point in points)

    def test_where_a_block_is_said_to_be_altered(self):
        seen = self.seen("single")
        assert self.placed(points_of(*seen, altered={1}))[1:4] == [(1, "in"), (1, "out"), (2, "in")]

    def test_across_two_lists(self):
        points = points_of(*self.seen("two_lists"))
        assert [block for block, side in self.placed(points) if side == "in"] == list(range(8))
        assert all(set(point.ids.tolist()) == set(points[0].ids.tolist()) for point in points)

    @pytest.mark.parametrize("share", [0.5, 0.2, 1e-9])
    def test_the_same_share_of_each_stream_and_the_same_tokens_everywhere(self, share):
        points = points_of(*self.seen("swapped"), share=share)
        kept = set(points[0].ids.tolist())
        text = {number for number in kept if number <= 6}
        assert len(text) == max(1, int(6 * share))
        assert len(kept - text) == max(1, int(12 * share))
        assert all(set(point.ids.tolist()) == kept for point in points)

    @pytest.mark.parametrize("memory", [5 * 18 * 32, 3000, 1000, 1])
    def test_memory(self, memory):
        """Five points of 18 tokens of 8 numbers of 4 bytes; a token of each of two streams at the least."""
        points = points_of(*self.seen("swapped"), memory=memory)
        nbytes = 32 * sum(len(point.ids) for point in points)
        assert nbytes <= max(memory, 5 * 2 * 32)
        assert nbytes > min(memory, 5 * 18 * 32) - 2 * 5 * 32

    def test_rows_are_taken_by_value_and_in_place(self):
        """Each number is the same token of the same sample, whatever comes first among the outputs."""
        points = points_of(*self.seen("swapped"), share=0.5)
        text, image = torch.arange(6.0).reshape(2, 3, 1).repeat(1, 1, 8), torch.arange(100.0, 112).reshape(2, 6, 1)
        image = image.repeat(1, 1, 8)
        entering = points[0].take({"hidden_states": image, "encoder_hidden_states": text}.get)
        leaving = points[-1].take({0: text, 1: image}.get)
        for point, taken in ((points[0], entering), (points[-1], leaving)):
            rows = torch.cat(taken)[:, 0].tolist()
            assert all(rows[k] == (n - 1 if n <= 6 else 93 + n) for k, n in enumerate(point.ids.tolist()))
        before = entering[0].clone()
        image += 1
        assert torch.equal(entering[0], before)

    def test_other_shapes_are_not_taken(self):
        point = points_of(*self.seen("single"))[0]
        assert point.take({"hidden_states": torch.zeros(2, 7, 8)}.get) is None
        assert point.take({"hidden_states": None}.get) is None
        assert len(point.take({"hidden_states": torch.zeros(2, 6, 8)}.get)) == 1


class TestSamples:
    @staticmethod
    def wide(**given):
        model = Net("single", 4)
        x = torch.randn(1, 4000, 4)
        return record(model, lambda model: loop(model, x, STEPS), num_inference_steps=STEPS, **given)

    def test_a_share(self):
        whole, some = self.wide().traces[0], self.wide(share=0.05).traces[0]
        assert (whole.share, some.share) == (1, 0.05)

    def test_are_the_same_tokens_at_every_step_and_boundary(self):
        """What each token is given tells which it is; a block adds 1000 to that."""

        class Add(nn.Module):
            def forward(self, hidden_states):
                return hidden_states + 1000

        class Model(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Add() for _ in range(3))

            def forward(self, hidden_states, timestep):
                for block in self.blocks:
                    hidden_states = block(hidden_states)
                return hidden_states

        told = []

        def take(self, read, plain=SamplePoint.take):
            told.append(plain(self, read)[0][:, 0].tolist())
            return [torch.tensor(told[-1])[:, None]]

        x = torch.arange(100.0)[None, :, None].expand(1, 100, 2).contiguous()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SamplePoint, "take", take)
            record(Model(), lambda model: [model(x, t) for t in (1.0, 0.5, 0.25)], share=0.1)
        assert len(told) == 3 * 4
        assert len(set(told[0])) == 10
        assert [[token % 1000 for token in taken] for taken in told] == [told[0]] * 12
        assert [taken[0] // 1000 for taken in told] == [0, 1, 2, 3] * 3

    def test_a_share_tells_the_same(self):
        torch.manual_seed(1)
        model, x = Net("single", 4), torch.randn(1, 4000, 4)
        run = lambda model: loop(model, x, STEPS)  # noqa: E731
        whole, some = record(model, run).traces[0], record(model, run, share=0.05).traces[0]
        for which in ("grams", "norms"):
            ratio = getattr(some, which) / getattr(whole, which)
            wanted = 0.05 if which == "grams" else 0.05**0.5
            np.testing.assert_allclose(ratio, wanted, rtol=0.15)
            assert ratio.std(axis=-1).max() < 0.02 * wanted  # all but the same at every step: the same tokens

    @pytest.mark.parametrize("prompts", [1, 2])
    @pytest.mark.parametrize("memory", [100_000, 20_000])
    def test_fit_into_memory(self, memory, prompts):
        """All that a run keeps, with one call or two a step."""
        pipe, held = Pipe(Net("swapped", 4)), []

        def fold(self, plain=Recorder._fold):
            calls = [call for _, sampled in self._branches.values() for call in sampled.calls]
            held.append(sum(each.nbytes for call in calls for point in call for each in point))
            plain(self)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Recorder, "_fold", fold)
            texts = [prompt(tokens=40) for _ in range(prompts)]
            recording = record(pipe, lambda pipe: pipe(latents(2, 50), STEPS, texts), memory=memory)
        assert 0.8 * memory * prompts / 2 < max(held) <= memory * prompts / 2
        assert recording.traces[0].share < 1
