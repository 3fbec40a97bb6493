"""A tiny transformer, plans for it, and what a plan comes to when it is followed by hand."""

import torch
from torch import nn

from dithooks import CachePlan, PlanTiers
from dithooks.config.provenance import PlanTarget, Provenance
from dithooks.config.transformer_plan import TransformerPlan

STEPS, BLOCKS, FIRST, CACHED = 6, 5, 1, 3
FAST = ((1, 1, 0, 0, 1, 0), (None, None, (1.0,), (1.5, -0.5), None, (0.75, 0.25)))
HIGH = ((1, 1, 1, 0, 1, 1), (None, None, None, (1.25, -0.25), None, None))
OFF = ((1,) * STEPS, (None,) * STEPS)
TIMES = torch.linspace(1, 0, STEPS + 1)[:-1]


class Block(nn.Linear):
    calls = 0

    def forward(self, x, condition):
        self.calls += 1
        return x + super().forward(x + condition).tanh()


class Transformer(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block(4, 4) for _ in range(BLOCKS))

    def forward(self, hidden_states, timestep, prompt):
        condition = (prompt + timestep.reshape(-1, 1))[:, None]
        for block in self.blocks:
            hidden_states = block(hidden_states, condition)
        return hidden_states


def tiers(names=("transformer",), fast=FAST):
    """As a search in diffusers leaves them: for a class of the same name, with another fingerprint."""
    made = PlanTarget(
        "+".join(["Transformer"] * len(names)), "0" * 16, BLOCKS * len(names), "float32", STEPS, None, (4,)
    )
    plans = {}
    for tier, speed, (steps, weights) in (("high", 1.2, HIGH), ("fast", 1.8, fast)):
        found = Provenance("2026-11-30", {"torch": "2"}, "CPU", 1, speed, "by hand", speed, 0.0)
        pieces = tuple(TransformerPlan(name, FIRST, CACHED, BLOCKS, steps, weights, None) for name in names)
        plans[tier] = CachePlan(pieces, made, found)
    return PlanTiers(plans)


class ByHand:
    """A model without a cache, whose blocks are run one by one, as the plan says at each step."""

    def __init__(self, model, plan):
        self.model, (self.steps, self.weights), self.kept = model, plan, {}

    def __call__(self, step, branch, x, timestep, prompt):
        condition, blocks = (prompt + timestep.reshape(-1, 1))[:, None], list(self.model.blocks)
        x = blocks[0](x, condition)
        kept = self.kept.setdefault(branch, [])
        if self.steps[step]:
            before = x
            for block in blocks[FIRST : FIRST + CACHED]:
                x = block(x, condition)
            kept.insert(0, x - before)
        else:
            x = x + sum(weight * old for weight, old in zip(self.weights[step], kept, strict=False))
        return blocks[-1](x, condition)
