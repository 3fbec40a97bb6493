"""Streams in containers within containers, as LTX-2's own code has them: followed, and built anew at every step."""

from collections import OrderedDict
from dataclasses import InitVar, dataclass, field, replace
from typing import NamedTuple

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.blocks.block_io import CallReader, take_apart
from dithooks.blocks.containers import Step, leaves_of, replaced

TIMES = (1.0, 0.4, 0.1)


@dataclass(frozen=True)
class Args:
    """The arguments of one modality: one stream, and what the blocks only read."""

    x: torch.Tensor
    t: torch.Tensor
    mask: torch.Tensor  # integers: no residual could be taken of them
    rope: tuple[torch.Tensor, torch.Tensor]
    enabled: bool = True
    cache: object = None


class Pair(NamedTuple):
    video: Args
    audio: Args


def mixed(x, t, mask, rope, other, rate):
    return x + rate * torch.tanh(x + t) * mask + 0.1 * rope[0] * other.mean()


class Block(nn.Module):
    """Changes the streams of two modalities, and leaves all else as it is."""

    def __init__(self, form, rate):
        super().__init__()
        self.form, self.rate, self.runs, self.seen = form, nn.Parameter(torch.tensor(rate)), 0, []

    def changed(self, v, a):
        self.runs += 1
        self.seen.append((float(v.t), float(a.t)))
        x = mixed(v.x, v.t, v.mask, v.rope, a.x, self.rate) if v.enabled else v.x
        y = mixed(a.x, a.t, a.mask, a.rope, v.x, -self.rate) if a.enabled else a.x
        return x, y


class Dataclasses(Block):
    def forward(self, video, audio):
        x, y = self.changed(video, audio)
        return replace(video, x=x), replace(audio, x=y)


class Swapped(Block):
    def forward(self, video, audio):
        x, y = self.changed(video, audio)
        return [replace(audio, x=y), replace(video, x=x)]


class Dicts(Block):
    def forward(self, states):
        x, y = self.changed(Args(**states["video"]), Args(**states["audio"]))
        return {"video": {**states["video"], "x": x}, "audio": {**states["audio"], "x": y}}


class Tuples(Block):
    def forward(self, pair):
        x, y = self.changed(*pair)
        return Pair(replace(pair.video, x=x), replace(pair.audio, x=y))


class Apart(Block):
    """Streams in a tuple, and what is only read in arguments of its own."""

    def forward(self, xs, video=None, audio=None):
        return self.changed(replace(video, x=xs[0]), replace(audio, x=xs[1]))


class Within(Block):
    """A dict by keyword, in a list in a tuple as it comes back."""

    def forward(self, *, state):
        x, y = self.changed(state["pair"][0], state["pair"][1])
        old = state["pair"]
        return ([{**state, "pair": (replace(old[0], x=x), replace(old[1], x=y))}],)


class Written(Block):
    """Writes into the streams that it is given."""

    def forward(self, video, audio):
        x, y = self.changed(video, audio)
        video.x.copy_(x), audio.x.copy_(y)
        return replace(video), replace(audio)


FORMS = {each.__name__: each for each in (Dataclasses, Swapped, Dicts, Tuples, Apart, Within, Written)}


class Model(nn.Module):
    def __init__(self, form, by_name=True):
        super().__init__()
        torch.manual_seed(0)
        self.transformer_blocks = nn.ModuleList(FORMS[form](form, 0.2 * (k + 1)) for k in range(4))
        self.form, self.by_name = form, by_name

    def forward(self, latents, timestep, enabled=True):
        v, a = given(*latents, timestep, enabled)
        for block in self.transformer_blocks:
            v, a = self.called(block, v, a)
        return v.x + v.t, a.x * a.t

    def called(self, block, v, a):
        if self.form == "Dicts":
            out = block({"video": vars(v), "audio": vars(a)})
            return Args(**out["video"]), Args(**out["audio"])
        if self.form == "Tuples":
            return block(Pair(v, a))
        if self.form == "Apart":
            x, y = block((v.x, a.x), audio=a, video=v)
            return replace(v, x=x), replace(a, x=y)
        if self.form == "Within":
            return block(state={"number": 3, "pair": (v, a)})[0][0]["pair"]
        out = block(audio=a, video=v) if self.by_name else block(v, a)
        return out[::-1] if self.form == "Swapped" else out


def given(x, y, timestep, enabled=True):
    mask, rope = torch.tensor([1, 0, 2, 1])[:, None], (torch.full((1,), 0.3), torch.ones(1))
    # In this way both have the very same embedding at the first step, but not at others.
    times = timestep, timestep if float(timestep) == TIMES[0] else timestep * 2
    return Args(x.clone(), times[0], mask, rope), Args(y.clone(), times[1], mask, rope, enabled)


def by_hand(model, latents, time, enabled=True, deltas=None, start=0, count=4):
    """The model's outputs and the residuals of a range of its blocks; with residuals, these instead of the blocks."""
    v, a = given(*latents, time, enabled)
    for number, block in enumerate(model.transformer_blocks):
        if number == start:
            before = v.x, a.x
            if deltas is not None:
                v, a = replace(v, x=v.x + deltas[0]), replace(a, x=a.x + deltas[1])
        if deltas is None or not start <= number < start + count:
            x, y = block.changed(v, a)
            v, a = replace(v, x=x), replace(a, x=y)
        if number == start + count - 1:
            taken = v.x - before[0], a.x - before[1]
    return (v.x + v.t, a.x * a.t), taken


@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("start", "count"), [(0, 4), (1, 2), (0, 1), (2, 2)])
def test_streams_in_containers_are_followed(form, by_name, start, count):
    """Shapes are the same, so that they tell nothing; a reused step has its own embeddings, before and behind."""
    model, latents, deltas = Model(form, by_name), torch.randn(3, 2, 1, 4, 5), None
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 3, start, count)) as cache:
        for step, time in enumerate(TIMES):
            for block in model.transformer_blocks:
                block.runs, block.seen = 0, []
            with timestep_scope(step):
                outputs = model(latents[step], torch.tensor(time))
            ran = [block.runs for block in model.transformer_blocks]
            seen = {each for block in model.transformer_blocks for each in block.seen}
            wanted, taken = by_hand(model, latents[step], torch.tensor(time), True, deltas, start, count)
            deltas = deltas or taken
            torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-5)
            if step:
                assert ran == [int(not start <= number < start + count) for number in range(4)]
                assert seen <= {(float(torch.tensor(time)), float(torch.tensor(time) * 2))}
        assert cache.stats.reused_calls == 2


def test_one_modality_that_is_switched_off_stays_as_it_is():
    """All of it is handed on by the blocks; the other one is cached."""
    model, latents, deltas = Model("Dataclasses"), torch.randn(2, 2, 1, 4, 5), None
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 2, 0, 4)) as cache:
        for step, time in enumerate(TIMES[:2]):
            with timestep_scope(step):
                outputs = model(latents[step], torch.tensor(time), False)
            wanted, deltas = by_hand(model, latents[step], torch.tensor(time), False, deltas)
            torch.testing.assert_close(outputs, wanted, rtol=1e-5, atol=1e-5)
        assert cache.stats.reused_calls == 1
        assert cache.stats.bytes_held == latents[0, 0].numel() * 4  # of the video alone, and not of embeddings


def test_an_embedding_that_one_block_changes_is_a_stream_after_all():
    """The last block leaves it as it is, but on a reused step it has to come out changed."""

    class Changing(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, args):
            t = args.t * self.factor if self.factor != 1 else args.t
            return replace(args, x=args.x + torch.tanh(args.x * t), t=t)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Changing(factor) for factor in (1, 3, 1))

        def forward(self, x, timestep):
            args = given(x, x, timestep)[0]
            for block in self.blocks:
                args = block(args)
            return args.x, args.t

    net, x = Net(), torch.randn(2, 1, 4, 5)
    with torch.no_grad():
        (before, _), (after, t) = (x[0], 0.5), net(x[0], torch.tensor(0.5))
        with dit_cache(net, DitCacheConfig(0, 2, 0, 3)) as cache:
            for step, time in enumerate((0.5, 0.2)):
                with timestep_scope(step):
                    outputs = net(x[step], torch.tensor(time))
            assert cache.stats.reused_calls == 1
    torch.testing.assert_close(outputs[0], x[1] + after - before)
    torch.testing.assert_close(outputs[1], torch.tensor(0.2) + t - 0.5)  # 1.2, as every stream


def test_another_class_with_the_same_fields_is_built_of_those_that_were_given():
    """What the block leaves as it is, is this step's own, whatever it is put into."""

    @dataclass
    class State:
        x: torch.Tensor
        t: torch.Tensor

    class Converting(nn.Module):
        def forward(self, args):
            return State(args.x + torch.tanh(args.x), args.t)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Converting() for _ in range(3))

        def forward(self, x, timestep):
            args = given(x, x, timestep)[0]
            for block in self.blocks:
                args = block(args)
            return args.x, args.t

    net, x = Net(), torch.randn(2, 1, 4, 5)
    with torch.no_grad():
        after, _ = net(x[0], torch.tensor(0.5))
        with dit_cache(net, DitCacheConfig(0, 2, 0, 1)) as cache:
            for step, time in enumerate((0.5, 0.2)):
                with timestep_scope(step):
                    outputs = net(x[step], torch.tensor(time))
            assert cache.stats.reused_calls == 1
        h = x[1] + torch.tanh(x[0])
        for _ in range(2):
            h = h + torch.tanh(h)
    torch.testing.assert_close(outputs, (h, torch.tensor(0.2)))
    assert not torch.allclose(outputs[0], after)


class TestContainers:
    def test_ways_into_them(self):
        nested = {"a": [1, (2,)], "b": Pair(3, OrderedDict(c=4)), 5: None}
        assert [("".join(step.text for step in way), leaf) for way, leaf in leaves_of(nested)] == [
            ("['a'][0]", 1),
            ("['a'][1][0]", 2),
            ("['b'].video", 3),
            ("['b'].audio['c']", 4),
            ("[5]", None),
        ]

    def test_one_that_holds_itself_ends_there(self):
        knot = [1]
        knot.append(knot)
        assert leaves_of(knot) == [((Step(0),), 1), ((Step(1),), knot)]

    def test_modules_and_classes_are_none(self):
        module = nn.Linear(2, 2)
        assert leaves_of(module) == [((), module)]
        assert leaves_of(Args) == [((), Args)]

    def test_a_copy_with_other_parts_keeps_what_its_class_makes(self):
        @dataclass
        class Counted:
            x: int
            y: int = 2
            seed: InitVar[int] = 7
            total: int = field(init=False)

            def __post_init__(self, seed):
                self.total = self.x + self.y + (seed or 0)

        made = replaced(Counted(1, 5), {Step("x", True): 10})
        assert (made.x, made.y, made.total) == (10, 5, 22)
        assert replaced(OrderedDict(a=1, b=2), {Step("a"): 3}) == OrderedDict(a=3, b=2)
        assert replaced([1, 2], {Step(1): 3}) == [1, 3]
        assert replaced(Pair(1, 2), {Step("audio", True): 3}) == Pair(1, 3)

    def test_an_output_is_taken_apart_and_built_again(self):
        output = ({"a": 1, "b": [2, None]}, Pair(3, (4, {})), 5)
        builder, values = take_apart(output)
        assert values == (1, 2, None, 3, 4, 5)
        assert builder(values, (), {}) == output
        assert type(builder(values, (), {})[1]) is Pair
        assert builder.take(({"b": [2, None], "a": 1}, Pair(3, (4, {})), 5)) == ()  # other keys, or in another order

    def test_names_of_what_arguments_hold(self):
        class Takes(nn.Module):
            def forward(self, state, other=None): ...

        reader, x = CallReader(Takes()), torch.zeros(1)
        args, kwargs = ({"image": x, "size": (1, 2)},), {"other": [x, Pair(x, 3)]}
        assert list(reader.arguments(args, kwargs)) == [
            "state['image']",
            "state['size'][0]",
            "state['size'][1]",
            "other",
            "other[0]",
            "other[1].video",
            "other[1].audio",
        ]
        assert reader.read("state['size'][1]", args, kwargs) == 2
        assert reader.read("other[1].video", args, kwargs) is x
        assert reader.read("other[1].video", args, {}) is None
