"""Models that keep their blocks in the host's memory: on reused steps no block is fetched that does not run."""

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.engine.stand_in import disengage, engage, stand_in

STEPS = 6
CONFIG = DitCacheConfig(0, 2, 1, 3)  # the middle three of five blocks, at every second step


class Swapped(nn.Module):
    """A block that knows where it was moved to, and runs there only."""

    def __init__(self, rate=1.0):
        super().__init__()
        self.rate, self.where, self.moves = nn.Parameter(torch.tensor(rate)), "cpu", []

    def to(self, device=None, dtype=None, non_blocking=False):
        self.where = str(torch.device(device))
        self.moves.append(self.where)
        return self

    def forward(self, x, t):
        assert self.where == "cuda", "run where its weights are not"
        return x + self.rate * t


class Model(nn.Module):
    """Fetches each block before its turn and puts it back after it, as wrappers with block swap do."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Swapped(float(1 + k)) for k in range(5))

    def forward(self, x, timestep):
        for block in self.blocks:
            block.to("cuda", non_blocking=True)
            x = block(x, timestep)
            block.to(device="cpu")
        return x


def moves(model):
    return [len(block.moves) for block in model.blocks]


@torch.no_grad()
def test_what_is_passed_over_is_not_fetched():
    model, fetched = Model(), []
    with dit_cache(model, CONFIG) as cache:
        for step in range(STEPS):
            before = [block.moves.count("cuda") for block in model.blocks]
            t, anchor = 1 - step / STEPS, 1 - (step - step % 2) / STEPS
            with timestep_scope(step, steps=STEPS):
                expected = (1 + 5) * t + (2 + 3 + 4) * anchor  # rates of what runs, and of what is reused
                assert model(torch.zeros(1), torch.tensor(t)).item() == pytest.approx(expected)
            fetched.append([b.moves.count("cuda") - n for b, n in zip(model.blocks, before, strict=True)])
        assert cache.stats.reused_calls == 3
    assert fetched[1::2] == [[1, 0, 0, 0, 1]] * 3
    assert fetched[2::2] == [[1, 1, 1, 1, 1]] * 2
    assert {block.where for block in model.blocks} == {"cpu"}


class PassesOver:
    """A cache that means to pass over its range, and then finds that the residual does not fit."""

    state = None

    def passes_over(self):
        return True

    def pass_over(self, offset, args, kwargs):
        return NotImplemented


@pytest.fixture
def block():
    swapped = stand_in(Swapped(), 1)
    engage(swapped, PassesOver())
    return swapped


def test_a_block_that_runs_after_all_is_moved_first(block):
    assert block.to("cuda") is block
    assert block.moves == []
    assert block(torch.zeros(1), torch.ones(1)) == 1
    assert block.moves == ["cuda"]


def test_the_last_of_several_moves_counts(block):
    block.to("cuda")
    block.to("cpu")  # where its weights are
    disengage(block)
    assert block.moves == []


def test_a_move_that_waits_is_made_when_the_cache_goes(block):
    block.to(torch.device("cuda"))
    disengage(block)
    assert block.moves == ["cuda"]


@pytest.mark.parametrize("given", [("cuda", torch.float16), (torch.device("cuda"), None, False)])
def test_a_cast_is_made_at_once(block, given):
    block.to("cuda")
    block.to(*given)
    assert block.moves == ["cuda", "cuda"]


def test_a_move_of_the_whole_model_counts(block):
    block.to("cuda")
    nn.ModuleList([block]).double()
    assert block.rate.dtype is torch.float64
    disengage(block)
    assert block.moves == []
