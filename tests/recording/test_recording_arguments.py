"""Recording a model that is given more than tensors: anything that can be copied, and new objects in each call."""

import enum
import uuid

import numpy as np
import pytest
import torch
from toys import Net, latents

from dithooks.recording.record import record
from dithooks.tuning.search import search


class Way(enum.Enum):
    LEFT = "left"


class Given(Net):
    def forward(self, hidden_states, timestep, transformer_options=None):
        transformer_options["calls"].append(float(timestep))
        return super().forward(hidden_states, timestep)


def comfy(calls):
    """What ComfyUI hands to each call; UUIDs are new in each."""
    return {
        "sigmas": torch.ones(3),
        "cond_or_uncond": [0],
        "uuids": [uuid.uuid4()],
        "wrappers": {"diffusion_model": {None: [lambda executor: executor()]}},
        "patches_replace": {"dit": {("double_block", 0): len}},
        "way": Way.LEFT,
        "calls": calls,
    }


def drawing(calls=None):
    @torch.no_grad()
    def run(model):
        torch.manual_seed(0)
        x, outs = latents(), []
        for step in range(6):
            out = model(x, torch.tensor(1 - step / 6), transformer_options=comfy([] if calls is None else calls))
            outs.append(out)
            x = x - out / 6
        return outs

    return run


def test_two_recordings_are_one_whatever_the_uuids():
    torch.manual_seed(0)
    net, calls = Given(), []
    first, second = (record(net, drawing(calls), probe=False) for _ in range(2))
    assert calls == [float(torch.tensor(1 - step / 6)) for step in range(6)] * 2  # none twice, to see the streams
    assert first.made == second.made
    for one, other in zip(first.traces, second.traces, strict=True):
        assert one.blocks == other.blocks == tuple(f"blocks.{number}" for number in range(5))
        assert one.inputs.keys() == other.inputs.keys()
        np.testing.assert_array_equal(one.grams, other.grams)


def test_a_search_finds_a_plan():
    found = search(Given(), drawing(), target_speedup=1.2, cost="blocks", max_evals=1, verbose=False)
    assert found.plan.speedup >= 1.2
    assert found.evaluations[0].failure == ""


def test_what_cannot_be_copied_is_refused():
    @torch.no_grad()
    def run(model):
        return model(latents(), torch.tensor(1.0), transformer_options={"calls": iter([])})

    with pytest.raises(ValueError, match=r"Given is given transformer_options \(dict\), which may remember a call"):
        record(Given(), run)
