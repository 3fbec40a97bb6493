"""A model whose number of tokens depends on something that is no tensor: residuals of two lengths are never summed."""

import torch
from torch import nn

from dithooks import DitCacheConfig, Linear, Mask, dit_cache


class Cut(nn.Module):
    """Takes the first tokens of what it is given, as many as it is told."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.length = 6

    def forward(self, hidden_states, timestep):
        hidden_states = hidden_states[:, : self.length] * timestep
        for block in self.blocks:
            hidden_states = block(hidden_states)
        return hidden_states


@torch.no_grad()
def test_a_line_through_two_residuals_of_one_length():
    model, x = Cut(), torch.ones(1, 8, 4)
    times, lengths = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5), (6, 6, 8, 6, 6, 6)
    config = DitCacheConfig(policy=Mask((1, 1, 0, 1, 0, 0)), predictor=Linear())
    found, plain = [], []
    with dit_cache(model, config, verify=False) as cache:
        for time, model.length in zip(times, lengths, strict=True):
            found.append(model(x, time))
    for time, model.length in zip(times, lengths, strict=True):
        plain.append(model(x, time))
    assert [record.reason for record in cache.decisions] == ["mask", "mask", "shape", "mask", "reuse", "reuse"]
    for computed in (0, 1, 2, 3):
        torch.testing.assert_close(found[computed], plain[computed], rtol=0, atol=0)
    residual = plain[3] - x[:, :6] * times[3]  # of step 3 alone: the one before it was of another length
    for reused in (4, 5):
        torch.testing.assert_close(found[reused], x[:, :6] * times[reused] + residual)
