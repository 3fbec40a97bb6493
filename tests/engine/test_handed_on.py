"""What stand-ins hand on between the two ends of a skipped range, and models that write into it."""

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache, timestep_scope

pytestmark = pytest.mark.core


class Writing(nn.Module):
    """Writes into the stream between its blocks, and into what entered them, in one of several ways."""

    def __init__(self, how):
        super().__init__()
        torch.manual_seed(0)
        self.how, self.blocks = how, nn.ModuleList(nn.Linear(4, 4) for _ in range(4))

    def forward(self, x, timestep):
        h = entered = x * timestep
        for block in self.blocks:
            h = block(h)
            if self.how == "in place":
                h.add_(1.0)
            elif self.how == "past the version":
                h.data.add_(1.0)
            elif self.how == "into what entered":
                entered.mul_(0.5)
                h.add_(1.0)
        return h


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("how", ["not", "in place", "past the version", "into what entered"])
@pytest.mark.parametrize(("first", "blocks"), [(0, 4), (1, 2), (1, 3)])
def test_the_effect_of_the_range_is_added_once(how, verify, first, blocks):
    """On the inputs that the residual was taken from, a reused step gives what the model gives."""
    model, x = Writing(how), torch.randn(2, 4)
    full = model(x, 1.0)
    with dit_cache(model, DitCacheConfig(1, 8, first, blocks), verify=verify) as cache:
        for step in range(6):
            with timestep_scope(step):
                torch.testing.assert_close(model(x, 1.0), full)
    assert cache.stats.reused_calls == 4
