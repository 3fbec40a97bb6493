"""Steps of one branch alone in compiled transformers: another graph for half the rows, and none compiled again."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from toys import Counter, Single, latents

from dithooks import DitCacheConfig, Fitted, Mask, dit_cache
from dithooks.policies.conditional import Conditional

MASK, ALONE = (1, 1, 1, 1, 1, 0), (0, 0, 1, 0, 1, 0)
STEPS = len(MASK)


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Single(4) for _ in range(3))

    def forward(self, hidden_states, timestep, shift):
        for block in self.blocks:
            hidden_states = block(hidden_states + shift, timestep.expand(hidden_states.shape[0], 4))
        return hidden_states


class Guided:
    def __init__(self, transformer, in_batch):
        self.transformer, self.scheduler, self.in_batch = transformer, Counter(), in_batch

    @torch.no_grad()
    def __call__(self, x, shifts):
        self.scheduler.set_timesteps(STEPS)
        for t in self.scheduler.timesteps:
            if self.in_batch:
                one, two = self.transformer(torch.cat([x, x]), t / 1000, torch.cat(shifts)).chunk(2)
            else:
                one, two = (self.transformer(x, t / 1000, shift) for shift in shifts)
            x = x - (two + 3 * (one - two)) / STEPS
            self.scheduler.step()
        return x


@torch.no_grad()
def by_hand(net, x, shifts):
    kept, apart = [], None
    for step, bit in enumerate(MASK):
        t = torch.tensor(1 - step / STEPS)
        if bit:
            one = net(x, t, shifts[0])
            two = one + apart if ALONE[step] else net(x, t, shifts[1])
            apart = two - one
            kept.insert(0, (one, two))
        else:
            one, two = (1.5 * new - 0.5 * old for new, old in zip(kept[0], kept[1], strict=True))
        x = x - (two + 3 * (one - two)) / STEPS
    return x


@pytest.mark.parametrize("in_batch", [False, True], ids=["two calls", "a batch"])
@pytest.mark.parametrize("way", ["wrapped", "in place"])
def test_graphs(way, in_batch):
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(1)
    net, x, shifts = Plain(), latents(2), [torch.randn(2, 1, 4) for _ in range(2)]
    wanted = by_hand(net, x, shifts)
    pipe = Guided(net, in_batch)
    if way == "wrapped":
        pipe.transformer = torch.compile(net, backend="eager", dynamic=False)
    else:
        net.compile(backend="eager", dynamic=False)
    weights = (*[None] * 5, (1.5, -0.5))
    policy = Mask(MASK, conditional=Conditional(0, ALONE, in_batch))
    with dit_cache(pipe, DitCacheConfig(policy=policy, predictor=Fitted(weights), payload="output")) as cache:
        for _ in range(2):
            torch.testing.assert_close(pipe(x, shifts), wanted, rtol=0, atol=2e-5)
        assert cache.stats.reasons["conditional only"] == 4
    assert counters["stats"]["unique_graphs"] == 1 + in_batch
    assert not counters["graph_break"]
    torch._dynamo.reset()
