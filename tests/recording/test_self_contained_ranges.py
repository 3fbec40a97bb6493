"""A recording holds a range only if the model uses nothing of its inside behind it.

The oracle asks each model itself, with plain hooks: inner blocks of a range return noise, its last one what it returned
without that, and the model's output has to be the same. Nor may a product be in the way of a range's stream.
"""

import itertools

import pytest
import torch
from driven_models import Layers
from torch import nn

from dithooks import record, timestep_scope

STEPS, TOKENS, WIDTH = 4, 6, 8


class Block(nn.Module):
    """h → h + tanh(W h + t); what it is given beside its stream, as an earlier block returned it, is added before."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states, timestep, skip=None):
        x = hidden_states if skip is None else torch.sin(hidden_states + skip)
        return x + torch.tanh(self.proj(x) + timestep)


class Joined(nn.Module):
    """Blocks, one after another; ``keep`` and ``join``: what the model does behind some of them and before others.

    Args:
        depth: number of blocks.
        joins: by block, the earlier one whose output joins what it is given; ``depth`` is the model's end.
        keep: makes of an output what is kept of it.
        join: makes the stream of itself and what was kept.
    """

    def __init__(self, depth, joins, keep=lambda x: x, join=None):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.blocks = nn.ModuleList(Block() for _ in range(depth))
            self.linear = nn.Linear(2 * WIDTH, WIDTH)
        self.joins, self.keep, self.calls = joins, keep, 0
        self.mixed = joins if join is None else {}  # blocks before which a product is in the way of the stream
        self.join = join or (lambda x, kept: self.linear(torch.cat([x, kept], -1)))

    def forward(self, hidden_states, timestep):
        self.calls += 1
        x, kept = hidden_states, {}
        for number, block in enumerate(self.blocks):
            x = self.joined(number, x, kept)
            x = block(x, timestep)
            if number in self.joins.values():
                kept[number] = self.keep(x)
        return self.joined(len(self.blocks), x, kept)

    def joined(self, number, x, kept):
        return self.join(x, kept[self.joins[number]]) if number in self.joins else x


class Handed(Joined):
    """The later block itself is handed what the earlier one returned, as in U-ViT and HunyuanDiT."""

    def __init__(self):
        super().__init__(6, {5: 0, 4: 1}, join=torch.add)

    def forward(self, hidden_states, timestep):
        x, kept = hidden_states, {}
        for number, block in enumerate(self.blocks):
            x = block(x, timestep, skip=kept[self.joins[number]] if number in self.joins else None)
            kept[number] = x
        return x


class Collected(Joined):
    """What blocks return is collected on the way: returned beside the sample, as for REPA, or used."""

    def __init__(self, chosen, mean=False):
        super().__init__(5, {})
        self.chosen, self.mean = chosen, mean

    def forward(self, hidden_states, timestep):
        x, found = hidden_states, []
        for number, block in enumerate(self.blocks):
            x = block(x, timestep)
            found += [x] if number in self.chosen else []
        return (
            x + torch.stack(found).mean(0) if self.mean else (x, [self.linear.weight[:, :WIDTH] @ f.mT for f in found])
        )


class Packed(Joined):
    """The stream is written back into a part of one tensor for all."""

    def __init__(self, joins):
        super().__init__(4, joins, join=lambda x, kept: x + 2 * kept)

    def forward(self, hidden_states, timestep):
        states, kept = torch.cat([hidden_states, torch.ones_like(hidden_states[:, :2])], 1), {}
        for number, block in enumerate(self.blocks):
            states[:, :-2] = block(self.joined(number, states[:, :-2], kept), timestep)
            kept[number] = states.clone()[:, :-2]
        return self.joined(4, states, kept)[:, :-2]


class Mixed(Joined):
    """Between two blocks, half of what the former was given goes on past it."""

    def __init__(self, depth, number):
        super().__init__(depth, {})
        self.number = number

    def forward(self, hidden_states, timestep):
        x = hidden_states
        for number, block in enumerate(self.blocks):
            before, x = x, block(x, timestep)
            x = torch.where(torch.arange(WIDTH) < 4, before, x) if number == self.number else x
        return x


def half(x):
    return x[:, :, : WIDTH // 2]


def with_mean(x, kept):
    return x * kept.mean(-1, keepdim=True)


MODELS = {
    "plain": lambda: Joined(4, {}),
    "u_shape": lambda: Joined(9, {7: 1, 5: 2}),
    "to_the_end": lambda: Joined(4, {4: 1}),
    "a_clone": lambda: Joined(5, {4: 1}, torch.clone),
    "a_view": lambda: Joined(5, {4: 1}, half, with_mean),
    "a_detached_view": lambda: Joined(5, {4: 1}, lambda x: half(x).detach(), with_mean),
    "made_early": lambda: Joined(5, {4: 1}, lambda x: torch.cat([torch.tanh(x), x.exp()], -1), with_mean),
    "added_in_place": lambda: Joined(5, {4: 1}, torch.clone, lambda x, kept: x.add_(kept)),
    "the_shape_only": lambda: Joined(5, {4: 1}, join=lambda x, kept: x + torch.ones_like(kept) + kept.new_zeros(())),
    "overwritten": lambda: Joined(5, {4: 1}, torch.clone, lambda x, kept: x + kept.copy_(x)),
    "handed_to_a_block": Handed,
    "collected": lambda: Collected((1, 3)),
    "collected_and_used": lambda: Collected((0, 1, 2), mean=True),
    "packed": lambda: Packed({}),
    "packed_and_joined": lambda: Packed({3: 0}),
    "past_a_block": lambda: Mixed(5, 2),
}


@torch.no_grad()
def run(model, count=STEPS):
    x, found = torch.randn(2, TOKENS, WIDTH, generator=torch.Generator().manual_seed(0)), []
    for step in range(count):
        out = model(x.clone(), torch.tensor(1 - step / count))
        out = out[0] if isinstance(out, tuple) else out
        x = x - out / count
        found.append(out)
    return found


def flat(output):
    return torch.cat([part.flatten() for part in ([output[0], *output[1]] if isinstance(output, tuple) else [output])])


@torch.no_grad()
def self_contained(model, depth):
    """All ranges, first and last block, of whose inside nothing is used behind them."""
    x, t, outputs = torch.randn(2, TOKENS, WIDTH), torch.tensor(0.5), {}
    hooks = [
        block.register_forward_hook(lambda _, args, out, n=n: outputs.update({n: out.clone()}))
        for n, block in enumerate(model.blocks)
    ]
    wanted = flat(model(x.clone(), t))
    for hook in hooks:
        hook.remove()
    found = []
    for first, last in itertools.combinations_with_replacement(range(depth), 2):
        hooks = [
            model.blocks[n].register_forward_hook(lambda _, args, out: torch.randn_like(out))
            for n in range(first, last)
        ]
        hooks.append(model.blocks[last].register_forward_hook(lambda _, args, out, n=last: outputs[n].clone()))
        got = flat(model(x.clone(), t))
        for hook in hooks:
            hook.remove()
        if torch.allclose(got, wanted, atol=1e-5) and not any(first < number <= last for number in model.mixed):
            found.append([first, last])
    return found


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("kind", MODELS)
def test_the_ranges_are_those_that_the_model_uses_no_inside_of(kind, inference):
    model = MODELS[kind]()
    with torch.inference_mode(inference):
        (trace,) = record(model, run).traces
    wanted = self_contained(model, len(model.blocks))
    assert trace.ranges.tolist() == wanted
    assert len(trace.grams) == len(wanted)
    whole = len(model.blocks) * (len(model.blocks) + 1) // 2
    assert (len(wanted) == whole) == (kind in ("plain", "the_shape_only", "overwritten", "packed"))


def test_a_skip_counts_though_its_weights_are_still_zeros():
    model = Joined(4, {3: 0})
    model.linear.weight.data[:, WIDTH:] = 0
    (trace,) = record(model, run).traces
    assert trace.ranges.tolist() == [[0, 0], [1, 1], [1, 2], [2, 2], [3, 3]]


@pytest.mark.parametrize("kind", ["plain", "u_shape", "to_the_end"])
def test_it_takes_no_further_call(kind):
    """One a step, and the one that shows the wiring."""
    model = MODELS[kind]()
    record(model, run)
    assert model.calls == STEPS + 1


def test_a_block_whose_list_is_named_by_itself():
    """Blocks of another list between those that are named are operations like any other."""
    model = Joined(6, {5: 1})
    model.front, model.back = model.blocks[:3], model.blocks[3:]
    (trace,) = record(model, run, blocks="front").traces
    assert trace.ranges.tolist() == [[0, 0], [0, 1], [1, 1], [2, 2]]  # and not past 1, whose output is used behind 2


def test_a_list_that_is_no_part_of_the_trunk_hands_on_what_it_is_given():
    """A light list runs beside the blocks, from what the first one returned, and joins the last one's output."""

    class Beside(Joined):
        def __init__(self):
            super().__init__(4, {})
            self.side = nn.ModuleList([nn.Linear(WIDTH, 2), nn.Linear(2, WIDTH)])

        def forward(self, hidden_states, timestep):
            x = aside = self.blocks[0](hidden_states, timestep)
            for block in self.blocks[1:]:
                x = block(x, timestep)
            for block in self.side:
                aside = block(aside)
            return x + aside

    (trace,) = record(Beside(), run, blocks="blocks").traces
    assert trace.ranges.tolist() == [[0, 0], [1, 1], [1, 2], [1, 3], [2, 2], [2, 3], [3, 3]]


@pytest.mark.parametrize("skip", [None, (0, 2), (1, 3)])
def test_a_loop_that_calls_the_blocks_itself(skip):
    model = Layers(4, skip)

    @torch.no_grad()
    def loop(model):
        x = torch.ones(1, 3, 4)
        for step in range(STEPS):
            with timestep_scope(step, sigma=1 - step / STEPS, steps=STEPS):
                x = x - model.forward(x, torch.tensor(1 - step / STEPS)) / STEPS
        return [x]

    (trace,) = record(model, loop).traces
    every = [[first, last] for first in range(4) for last in range(first, 4)]
    refused = {None: [], (0, 2): [[0, 1]], (1, 3): [[0, 2], [1, 2]]}[skip]
    assert trace.ranges.tolist() == [pair for pair in every if pair not in refused]
