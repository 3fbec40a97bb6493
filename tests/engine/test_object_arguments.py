"""Models that are given more than tensors: their first residual is tested, and objects that switch something count."""

import dataclasses
import enum
import types
import uuid
import warnings
from collections import namedtuple

import pytest
import torch
from toys import Net, latents

from dithooks import DitCacheConfig, WiringError, dit_cache, timestep_scope

EVERY_OTHER = DitCacheConfig(0, 2, 1, 3)
HALF, X = torch.tensor(0.5), latents()


class Way(enum.Enum):
    LEFT = "left"
    RIGHT = "right"


@dataclasses.dataclass(frozen=True)
class Given:
    context: torch.Tensor


@dataclasses.dataclass
class Open:
    context: torch.Tensor


Named = namedtuple("Named", "context")


def comfy():
    """What ComfyUI hands to each call, as `transformer_options`."""
    return {
        "sigmas": torch.ones(3),
        "cond_or_uncond": [0, 1],
        "uuids": [uuid.uuid4()],
        "wrappers": {"diffusion_model": {None: [lambda executor, *args: executor(*args)]}},
        "patches_replace": {"dit": {("double_block", 0): len}},
        "callbacks": {},
        "model": torch.nn.Linear(1, 1),
    }


GIVEN = {
    "comfy": comfy,
    "enum": lambda: Way.LEFT,
    "uuid": uuid.uuid4,
    "frozen": lambda: Given(torch.ones(1)),
    "open": lambda: Open(torch.ones(1)),
    "named": lambda: Named(torch.ones(1)),
    "function": lambda: len,
    "object": lambda: types.SimpleNamespace(context=torch.ones(1), more=[torch.ones(1)]),
    "torch generator": lambda: torch.Generator().manual_seed(1),
}


class Plain(Net):
    def forward(self, hidden_states, timestep, options=None):
        return super().forward(hidden_states, timestep)


class Leaking(Net):
    """Uses the output of block 2, which is lost where blocks 1 to 3 are left out."""

    def forward(self, hidden_states, timestep, options=None):
        h = self.embed(hidden_states)
        temb = self.time(timestep.reshape(-1, 1)).expand(len(h), -1)
        inner = None
        for number, block in enumerate(self.blocks):
            h = block(h, temb=temb)
            inner = h if number == 2 else inner
        return self.proj(h + inner)


def step(net, number, *args):
    with torch.no_grad(), timestep_scope(number):
        return net(X, HALF, *args)


@pytest.mark.parametrize("kind", GIVEN)
def test_a_range_that_loses_something_is_refused(kind):
    net = Leaking()
    with dit_cache(net, EVERY_OTHER), pytest.raises(WiringError, match="the call it was taken from comes out"):
        step(net, 0, GIVEN[kind]())


@pytest.mark.parametrize("kind", GIVEN)
def test_a_range_that_loses_nothing_is_tested_once_and_reused(kind):
    net, make = Plain(), GIVEN[kind]
    with warnings.catch_warnings(), dit_cache(net, EVERY_OTHER) as cache:
        warnings.simplefilter("error")
        outs = [step(net, number, make()) for number in range(2)]
        assert net.executions == 5 + 2 + 2  # computed; blocks 0 and 4 in its repeat; and on the reused step
        assert cache.stats.reused_calls == 1
    torch.testing.assert_close(*outs)


def test_what_cannot_be_copied_is_said_and_not_used_up():
    class Counting(Net):
        def forward(self, hidden_states, timestep, numbers):
            return super().forward(hidden_states, timestep) + next(numbers)

    net, numbers = Counting(), iter(range(9))
    with dit_cache(net, EVERY_OTHER), pytest.warns(UserWarning, match=r"is given argument 2 \(range_iterator\)"):
        step(net, 0, numbers)
    assert next(numbers) == 1


def test_another_member_or_kind_of_object_is_another_work():
    """Block 2 is switched by what is given: the residual taken with one is not reused with another."""

    class Switched(Net):
        def forward(self, hidden_states, timestep, options=None):
            self.blocks[2].rate = 3.0 if options in (None, Way.LEFT) else 1.0
            return super().forward(hidden_states, timestep)

    net, given = Switched(), [Way.LEFT, Way.LEFT, Way.RIGHT, Way.RIGHT, Way.RIGHT, object(), object(), None]
    with dit_cache(net, DitCacheConfig(0, 9, 1, 3)) as cache:
        for number, each in enumerate(given):
            step(net, number, each)
        reasons = [each.reason for each in cache.decisions]
    assert reasons == ["refresh", "reuse", "no anchor", "reuse", "reuse", "no anchor", "reuse", "no anchor"]
