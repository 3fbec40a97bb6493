"""Blocks in lists of lists, with skip connections between the stages, as in Open-Sora Plan 1.5."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache

STAGES, STEPS = (2, 4, 8, 4, 2), 10
MIDDLE = "transformer.transformer_blocks.2"


class Block(nn.Module):
    def __init__(self, is_last):
        super().__init__()
        self.image, self.text, self.is_last = nn.Linear(8, 8), nn.Linear(8, 8), is_last

    def forward(self, hidden_states, encoder_hidden_states=None, embedded_timestep=None):
        around = encoder_hidden_states.mean() + embedded_timestep
        image = hidden_states + 0.2 * torch.tanh(self.image(hidden_states) + around)
        if self.is_last:
            return image, encoder_hidden_states
        return image, encoder_hidden_states + 0.2 * torch.tanh(self.text(encoder_hidden_states) + embedded_timestep)


class Transformer(nn.Module):
    """Its blocks, and which of them are left out by hand: the first, the last, and whether they are at this call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        ends = [stage == len(STAGES) - 1 for stage in range(len(STAGES))]
        self.transformer_blocks = nn.ModuleList(
            nn.ModuleList(Block(end and index == count - 1) for index in range(count))
            for end, count in zip(ends, STAGES, strict=True)
        )
        self.mix, self.mix_text = (nn.ModuleList(nn.Linear(16, 8) for _ in range(2)) for _ in range(2))
        self.left_out, self.residual, self.reused = None, None, False

    def stage(self, number, h, e, time):
        for index, block in enumerate(self.transformer_blocks[number]):
            first, last = self.left_out or (None, None)
            if first == (number, index):
                before = h, e
                if self.reused:
                    h, e = h + self.residual[0], e + self.residual[1]
            if not (self.left_out and self.reused and first <= (number, index) <= last):
                h, e = block(h, encoder_hidden_states=e, embedded_timestep=time)
            if last == (number, index) and not self.reused:
                self.residual = h - before[0], e - before[1]
        return h, e

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        h, e, time, skipped = hidden_states, encoder_hidden_states, timestep.reshape(-1, 1, 1) / 1000, []
        for number in (0, 1):
            h, e = self.stage(number, h, e, time)
            skipped.append((h, e))
        h, e = self.stage(2, h, e, time)
        for number in (3, 4):
            image, text = skipped.pop()
            h = self.mix[number - 3](torch.cat([h, image], -1))
            e = self.mix_text[number - 3](torch.cat([e, text], -1))
            h, e = self.stage(number, h, e, time)
        return (h,)


class Scheduler:
    def set_timesteps(self, count):
        self.sigmas, self.step_index = torch.linspace(1, 0, count + 1), None
        self.timesteps = self.sigmas[:-1] * 1000

    def step(self, velocity, x):
        index = self.step_index or 0
        self.step_index = index + 1
        return x + (self.sigmas[index + 1] - self.sigmas[index]) * velocity


@torch.no_grad()
def draw(pipe, by_hand=None):
    """Guidance is one batch of both prompts; blocks are left out at every other step from step 2 on."""
    drawn = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 6, 8, generator=drawn), torch.randn(2, 3, 8, generator=drawn)
    pipe.scheduler.set_timesteps(STEPS)
    pipe.transformer.left_out = by_hand
    for step, t in enumerate(pipe.scheduler.timesteps):
        pipe.transformer.reused = by_hand is not None and step > 2 and step % 2 == 1
        without, given = pipe.transformer(torch.cat([x, x]), t.expand(2), text)[0].chunk(2)
        x = pipe.scheduler.step(without + 3 * (given - without), x)
    pipe.transformer.left_out = None
    return x


@pytest.mark.parametrize(
    ("blocks", "first", "ends"),
    [
        pytest.param(MIDDLE, 1, ((2, 1), (2, 6)), id="a stage by its path"),
        pytest.param(None, 7, ((2, 1), (2, 6)), id="nothing told: blocks are counted through all stages"),
    ],
)
def test_blocks_of_a_stage_are_left_out(blocks, first, ends):
    pipe = SimpleNamespace(transformer=Transformer(), scheduler=Scheduler())
    expected = draw(pipe, by_hand=ends)
    with dit_cache(pipe, DitCacheConfig(2, 2, first, 6), blocks=blocks) as cache:
        assert torch.equal(draw(pipe), expected)
    assert cache.stats.reused_calls == 4
    assert not torch.equal(draw(pipe), expected)
