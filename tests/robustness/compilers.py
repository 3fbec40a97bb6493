"""Backends of torch.compile that count what they compile and run, one with the memory of CUDA graphs; a FLUX, too."""

from __future__ import annotations

import contextlib

import torch
from diffusers import FluxTransformer2DModel
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.mutation_guard import GenerationTracker
from torch._dynamo.utils import counters

from dithooks import timestep_scope
from dithooks.tiny.build import drawn

STEPS = 8


class Counted:
    """Runs graphs as they are: ``graphs`` were compiled, and compiled code was entered ``runs`` times."""

    def __init__(self):
        self.graphs, self.runs = 0, 0

    def __call__(self, module, example_inputs):
        self.graphs += 1
        return self.counting(module.forward)

    def counting(self, run):
        def compiled(*args):
            self.runs += 1
            return run(*args)

        return compiled


class Overwriting(Counted):
    """CUDA graphs as ``mode="reduce-overhead"`` records them, without a GPU.

    A graph returns its outputs in memory of its own, always the same. The first graph that runs in a later call of
    compiled code may take all that memory: here it is filled with NaN, before the inputs are read. (There, who reads
    such an output meets other numbers, or the error "accessing tensor output of CUDAGraphs that has been overwritten
    by a subsequent run".) Which calls are later ones is told by the very counter that torch's CUDA graphs go by.
    """

    def __init__(self):
        super().__init__()
        self.live, self.generation, self.overwritten = [], None, 0

    def __call__(self, module, example_inputs):
        return aot_autograd(fw_compiler=self.record)(module, example_inputs)

    def record(self, module, example_inputs):
        self.graphs += 1
        places = {}

        def replay(*args):
            if self.generation != GenerationTracker.generation:
                for place in self.live:
                    self.overwritten += 1
                    place.fill_(float("nan") if place.is_floating_point() else 0)
                self.live, self.generation = [], GenerationTracker.generation
            copied = [
                arg.clone() if torch.is_tensor(arg) and not isinstance(arg, torch.nn.Parameter) else arg for arg in args
            ]
            return [self.placed(places, number, output) for number, output in enumerate(module(*copied))]

        return self.counting(replay)

    def placed(self, places, number, output):
        if not torch.is_tensor(output):
            return output
        place = places.setdefault((number, output.shape, output.dtype), torch.empty_like(output))
        self.live.append(place.copy_(output))
        return place


@contextlib.contextmanager
def fresh():
    """A compiler that has seen nothing, and will have seen nothing."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def breaks():
    """How many graph breaks there were."""
    return sum(counters["graph_break"].values())


def flux(seed=0, **more):
    """2 blocks and 3, with every parameter drawn."""
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        **more,
    ).eval()
    drawn(model, seed)
    return model


def inputs(image=16, text=5, batch=1, seed=0, dtype=torch.float32):
    """Of that FLUX, less the timestep."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "hidden_states": (batch, image, 4),
        "encoder_hidden_states": (batch, text, 32),
        "pooled_projections": (batch, 32),
    }
    drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return {**drawn, "img_ids": torch.zeros(image, 3), "txt_ids": torch.zeros(text, 3)}


def sample(model, *given, steps=STEPS):
    """All outputs of a run, with a call a step for each of ``given``."""
    outs = []
    for step in range(steps):
        for each in given:
            batch = len(each["hidden_states"])
            with timestep_scope(step, steps=steps):
                out = model(**each, timestep=torch.full((batch,), 1 - step / steps), return_dict=False)[0]
            outs.append(out.clone())
    return torch.stack(outs)
