"""Random small models: whatever stands between their blocks, a reused step is right, refused or computed; never wrong.

A model is a list of steps: calls of blocks, and moves, which its parent makes between them. So the reference is made by
hand, with nothing of the library: the steps before the range run on the inputs of now, its moves alone on what comes
out, the residual is added, and the steps after it run on that.
"""

import random
from collections import namedtuple
from dataclasses import dataclass, field, make_dataclass

import torch
from hypothesis import given, settings, strategies
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope

WIDTH = 3
NAMES = ("hidden_states", "encoder_hidden_states", "pose_hidden_states", "temb")
SIMPLE = ("clone", "add", "add in place")
REARRANGING = ("join", "split", "cut", "swap", "turn", "flip", "append")
Named = namedtuple("Named", "a b c", defaults=[None, None])  # of fewer than three streams, the rest is None
Output = make_dataclass("Output", ["a", ("b", object, None), ("c", object, None)])
FORMS = {
    "tuple": tuple,
    "list": list,
    "dict": lambda streams: dict(zip("abc", streams, strict=False)),
    "named tuple": lambda streams: Named(*streams),
    "dataclass": lambda streams: Output(*streams),
    "alone": lambda streams: streams[0],
}


def unpacked(returned):
    """The streams that a block returned, in whatever form."""
    if isinstance(returned, torch.Tensor):
        return [returned]
    fields = vars(returned) if isinstance(returned, Output) else returned
    return [value for value in (fields.values() if isinstance(fields, dict) else fields) if value is not None]


class Block(nn.Module):
    """Adds to each stream what depends on all of them; returns them in an order and a form of its own."""

    def __init__(self, order, form, in_place):
        super().__init__()
        self.order, self.form, self.in_place = order, form, in_place
        self.own, self.mixing = (nn.Parameter(0.4 * torch.randn(len(order), WIDTH, WIDTH)) for _ in range(2))

    def forward(self, hidden_states, encoder_hidden_states=None, pose_hidden_states=None, temb=None):
        streams = [hidden_states, encoder_hidden_states, pose_hidden_states][: len(self.order)]
        mean = sum(stream.mean((0, 1)) for stream in streams)
        shared = 0.0 if temb is None else temb.reshape(-1, WIDTH).mean(0)
        weights = zip(streams, self.own, self.mixing, strict=True)
        deltas = [torch.tanh(stream @ own + mean @ mixing + shared) for stream, own, mixing in weights]
        results = [s.add_(d) if self.in_place else s + d for s, d in zip(streams, deltas, strict=True)]
        return FORMS[self.form]([results[number] for number in self.order])


@dataclass
class Call:
    """One block's turn; the block is looked up in its list each time, as a loop over it does."""

    blocks: nn.ModuleList = field(repr=False)
    place: str
    index: int
    kind: tuple  # what the block was made with
    by_keyword: bool
    takes_temb: bool

    def __call__(self, streams, control, temb):
        block, absent = self.blocks[self.index], [None] * (3 - len(streams))
        given = [*streams, *absent, temb] if self.takes_temb else streams
        returned = unpacked(block(**dict(zip(NAMES, given, strict=False))) if self.by_keyword else block(*given))
        return [returned[self.kind[0].index(number)] for number in range(len(streams))]


@dataclass
class Move:
    """What the parent does to its streams between two blocks."""

    name: str
    number: int  # of the stream
    head: bool  # at which end of it
    videos: int  # in the batch; the rest of it are their frames
    joined: "Move | None" = field(default=None, repr=False)  # what is split again
    tokens: int = field(default=0, repr=False)  # of the part that was joined at the head

    def __call__(self, streams, control, temb):
        streams, at = list(streams), self.number % len(streams)
        stream = streams[at]
        if self.name == "clone":
            streams = [each.clone() for each in streams]
        elif self.name == "add":
            streams[at] = stream + self.added(stream.shape, control)
        elif self.name == "add in place":
            stream += self.added(stream.shape, control)
        elif self.name == "join":
            pair = streams[:2] if self.head else streams[1::-1]
            streams[:2], self.tokens = [torch.cat(pair, 1)], pair[0].shape[1]
        elif self.name == "split":
            pair = streams[0].tensor_split([self.joined.tokens], 1)
            streams[:1] = pair if self.joined.head else pair[::-1]
        elif self.name == "cut" and stream.shape[1] > 1:
            streams[at] = stream[:, :-1] if self.head else stream[:, 1:]
        elif self.name == "swap":
            streams[:2] = streams[1::-1]
        elif self.name == "turn":  # "(b f) n c" to "(b n) f c", and back
            streams = [x.unflatten(0, (self.videos, -1)).transpose(1, 2).flatten(0, 1).contiguous() for x in streams]
        elif self.name == "flip":
            streams[at] = stream.flip(1)
        elif self.name == "append":  # as many as another stream may have
            others = self.added((len(stream), streams[-1].shape[1], WIDTH), control)
            streams[at] = torch.cat([others, stream] if self.head else [stream, others], 1)
        return streams

    def added(self, shape, control):
        return control * torch.sin(torch.ones(shape).cumsum(1) + torch.arange(WIDTH) * 10 + 3.0 * self.number)


class Model(nn.Module):
    """One to three lists of blocks, with moves of the given names between them."""

    def __init__(self, rng, names):
        super().__init__()
        self.streams = count = rng.choice([1, 2, 2, 3])
        self.videos, one_class = rng.choice([1, 1, 2]), rng.random() < 0.3
        self.steps, self.joins, self.lists = [], [], {}
        for number in range(rng.choice([1, 2, 2, 3])):
            for _ in range(rng.choice([0, 1, 1, 2]) if number else 0):
                count += self.move(rng, names, count)
            form = rng.choice([*FORMS] if count == 1 else [*FORMS][:-1])
            made, by_keyword, takes_temb = (rng.random() < share for share in (0.2, 0.5, 0.4))
            made = (rng.sample(range(count), count), form, "in place" if made else "")
            of = Block if one_class else type(f"Block{number}", (Block,), {})
            blocks = self.lists[f"blocks_{number}"] = nn.ModuleList(of(*made) for _ in range(rng.choice([1, 2, 3])))
            for index in range(len(blocks)):
                if index and rng.random() < 0.4:
                    self.move(rng, SIMPLE, count)
                self.steps.append(Call(blocks, f"blocks_{number}", index, made, by_keyword, takes_temb))
        for name in rng.sample(
            [*self.lists], len(self.lists)
        ):  # a model need not declare its lists in the order of calls
            self.add_module(name, self.lists[name])

    def move(self, rng, names, count):
        """Draw a step between two blocks; returns by how many streams there are more after it."""
        turned = any(isinstance(step, Move) and step.name == "turn" for step in self.steps)
        able = {"join": count > 1 and not turned, "swap": count > 1, "split": bool(self.joins)}
        name = rng.choice([name for name in names if able.get(name, True)])
        joined = self.joins.pop() if name == "split" else None
        self.steps.append(Move(name, rng.randrange(100), rng.random() < 0.5, self.videos, joined))
        if name == "join":
            self.joins.append(self.steps[-1])
        return {"join": -1, "split": 1}.get(name, 0)

    def forward(self, streams, control, temb, steps=None):
        streams = [stream.clone() for stream in streams]
        for step in self.steps if steps is None else steps:
            streams = step(streams, control, temb)
        return streams


def reference(model, start, end, then, now):
    """What the model gives now if its calls from ``start`` to ``end`` add to the streams what they added then.

    What the moves between them add is that of now.
    """
    before, within, after = model.steps[:start], model.steps[start : end + 1], model.steps[end + 1 :]
    moves = [step for step in within if isinstance(step, Move)]
    alone_then, alone_now = ({"control": k["control"], "temb": None, "steps": moves} for k in (then, now))
    entry_then, entry_now = model(**then, steps=before), model(**now, steps=before)
    exit_then = model(**{**then, "streams": entry_then}, steps=within)
    parts = zip(model(entry_now, **alone_now), exit_then, model(entry_then, **alone_then), strict=True)
    exit_now = [carried_now + (left - carried_then) for carried_now, left, carried_then in parts]
    return model(**{**now, "streams": exit_now}, steps=after)


def inputs_of_two_steps(rng, model):
    """At the first one two streams may be equal, or one constant: then their values tell less."""
    batch, tokens = model.videos * rng.choice([1, 2, 3]), [rng.choice([2, 3, 3, 4]) for _ in range(model.streams)]
    temb, special = rng.choice([(WIDTH,), (batch, WIDTH), (1, 1, 2, WIDTH)]), rng.random()
    streams = [[torch.randn(batch, length, WIDTH) for length in tokens] for _ in range(2)]
    if special < 0.15 and tokens[0] == tokens[-1]:
        streams[0][-1] = streams[0][0].clone()
    elif special < 0.35:
        streams[0][-1].fill_(special > 0.25)
    return [{"streams": streams[k], "control": (0.3, 0.7)[k], "temb": torch.randn(temb)} for k in range(2)]


def same(ones, others, within=0.0):
    return all(a.shape == b.shape and bool(((a - b).abs() <= within).all()) for a, b in zip(ones, others, strict=True))


def outcome(seed, names):
    """What becomes of a random range of a random model: "right", "refused" or "computed"; it fails if it is wrong."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    model = Model(rng, names)
    then, now = inputs_of_two_steps(rng, model)
    calls = [position for position, step in enumerate(model.steps) if isinstance(step, Call)]
    first, last = sorted(rng.choices(range(len(calls)), k=2))
    parts = [f"seed {seed}, blocks {first} … {last}", *(stream.shape for stream in then["streams"]), *model.steps]
    told = "\n".join(map(str, parts))
    plain_then, plain_now = model(**then), model(**now)
    expected = reference(model, calls[first], calls[last], then, now)
    with dit_cache(model, DitCacheConfig(0, 2, first, last - first + 1), blocks=[*model.lists]) as cache:
        try:
            with timestep_scope(0, branch=0):
                computed = model(**then)
        except ValueError:
            result = "refused"  # at the first call, or not at all
        else:
            assert same(computed, plain_then), f"the first call is not plain: {told}"
            with timestep_scope(1, branch=0):
                output = model(**now)
            result = "right" if cache.stats.reused_calls else "computed"
    if result != "refused":
        wanted, within = (expected, 1e-4) if result == "right" else (plain_now, 0.0)
        assert same(output, wanted, within), f"the second call is neither right nor plain: {told}"
    assert same(model(**now), plain_now), f"afterwards the model is not what it was: {told}"
    return result


@settings(derandomize=True, max_examples=1000, deadline=None)
@given(seed=strategies.integers(0, 10**6))
def test_no_reused_step_is_wrong(seed):
    outcome(seed, [*SIMPLE, *REARRANGING])


def test_most_ranges_without_rearrangements_are_reused():
    """Refusing everything would never be wrong, either."""
    assert sum(outcome(seed, SIMPLE) == "right" for seed in range(200)) >= 140
