"""A tiny FLUX and a tiny Wan to be offloaded, and a simulated device for diffusers' group offloading.

On the simulated device, weights that are not there are on the meta device, so that computing with them raises; and what
a stream is given to copy arrives when somebody waits for the stream, and is NaN until then. Hooks, groups and the order
of things are diffusers' own.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from diffusers import FluxTransformer2DModel, WanTransformer3DModel
from diffusers.hooks import group_offloading
from models import drawn
from traces import attributes

from dithooks import DitCacheConfig, Threshold, dit_cache

STEPS = 8
STATIC = DitCacheConfig(2, 2, 1, 3)
LOOKING = DitCacheConfig(cache_block_start=1, policy=Threshold(0.8, max_warmup_steps=2))
NEVER = DitCacheConfig(STEPS, 2, 1, 3)  # all computed
CONFIGS = {"static": STATIC, "looking": LOOKING}


def wan():
    """Its blocks have a parameter of their own, so that what moves weights is on the blocks, too."""
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=5,
    )
    return drawn(model, 0)


def given(model, dtype=torch.float32):
    """What the model is called with, the timestep left out."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"hidden_states": (1, 4, 2, 4, 4), "encoder_hidden_states": (1, 5, 16)}
    if isinstance(model, FluxTransformer2DModel):
        shapes = {
            "hidden_states": (1, 16, 4),
            "encoder_hidden_states": (1, 5, 32),
            "pooled_projections": (1, 32),
            "img_ids": (16, 3),
            "txt_ids": (5, 3),
        }
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def step(model, k, dtype=torch.float32):
    time = 1000 - 100 * k if isinstance(model, WanTransformer3DModel) else 1 - k / STEPS
    return model(**given(model, dtype), timestep=torch.tensor([time], dtype=dtype), return_dict=False)[0]


def run(model, dtype=torch.float32):
    """The outputs at all steps, each from the same inputs."""
    return torch.stack([step(model, k, dtype) for k in range(STEPS)])


@dataclass(frozen=True)
class Expected:
    """What comes out without offloading: uncached and cached, and how the calls were settled."""

    plain: torch.Tensor
    cached: torch.Tensor
    settled: tuple

    @property
    def reused(self):
        return [step for step, reuse, _ in self.settled if reuse]


def settled(handle):
    """Of each call its step, whether it was reused, and why."""
    return tuple((each.step, each.reuse, each.reason) for each in handle.decisions)


@functools.cache
def expected(make, how):
    with torch.no_grad():
        model = make()
        plain = run(model)
        with dit_cache(model, CONFIGS[how]) as handle:
            found = Expected(plain, run(model), settled(handle))
    assert found.reused  # or nothing would be shown
    assert not any(torch.equal(plain[k], plain[k + 1]) for k in range(STEPS - 1))
    assert all(torch.equal(found.cached[k], plain[k]) == (k not in found.reused) for k in range(STEPS))
    return found


class Way(NamedTuple):
    """A way to offload; ``exact``: not through files; ``around``: it puts hooks on blocks, too."""

    offload: Callable
    exact: bool
    around: bool

    def same(self, outputs, reference):
        # What is read from a file lies elsewhere in memory, and the order of sums goes by that.
        tolerance = {"rtol": 0, "atol": 0} if self.exact else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(outputs, reference, **tolerance)


class Stream:
    """What it is given to do is done when somebody waits for it."""

    def __init__(self):
        self.queue = []

    def synchronize(self):
        queue, self.queue = self.queue, []
        for copy in queue:
            copy()


class Group(group_offloading.ModuleGroup):
    """A group of weights whose device is simulated; ``log`` has what was moved, and in which direction."""

    log: list

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.name = kwargs.get("group_id")
        tensors = [t for module in self.modules for t in (*module.parameters(), *module.buffers())]
        self.home = {tensor: tensor.data.clone() for tensor in [*tensors, *self.parameters, *self.buffers]}

    def _init_cpu_param_dict(self):
        return {}  # pinned memory takes an accelerator

    def _onload_from_memory(self):
        self.log.append(("on", self.name))
        if self.stream is not None:
            self.stream.synchronize()
        for tensor, values in self.home.items():
            there = torch.full_like(values, float("nan"))
            swap(tensor, there)
            if self.stream is not None and self.non_blocking:
                self.stream.queue.append(lambda there=there, values=values: there.copy_(values))
            else:
                there.copy_(values)

    def _offload_to_memory(self):
        self.log.append(("off", self.name))
        for tensor, values in self.home.items():
            swap(tensor, values.to("meta"))


def swap(tensor, values):
    """Give a tensor, which stays the same object, values on another device."""
    parameter = isinstance(tensor, torch.nn.Parameter)
    other = torch.nn.Parameter(values, requires_grad=False) if parameter else values.detach()
    torch.utils.swap_tensors(tensor, other)


class Simulated:
    """Group offloading to a device that is not there."""

    def __init__(self, monkeypatch):
        self.log = []
        monkeypatch.setattr(group_offloading, "ModuleGroup", type("Group", (Group,), {"log": self.log}))
        self.late = []  # modules that were called before their weights were on their way

    def apply(self, model, level, blocks=1, stream=False):
        config = group_offloading.GroupOffloadingConfig(
            onload_device=torch.device("cpu"),
            offload_device=torch.device("meta"),
            offload_type=group_offloading.GroupOffloadingType(level),
            non_blocking=False,
            record_stream=False,
            low_cpu_mem_usage=False,
            num_blocks_per_group=blocks,
            stream=Stream() if stream else None,
        )
        group_offloading._apply_group_offloading(model, config)

    def watch(self, model):
        """Write down which modules are called without their weights; what brings them stands behind these hooks."""
        for name, module in model.named_modules():
            hook = module._diffusers_hook.get_hook("group_offloading") if hasattr(module, "_diffusers_hook") else None
            if name and hook is not None and hook.group.home:
                module.register_forward_pre_hook(self._look(name, next(iter(hook.group.home))))

    def _look(self, name, tensor):
        def look(*_):
            if tensor.is_meta:
                self.late.append(name)

        return look

    def brought(self, work):
        """Do something, and say what was brought to the device for it."""
        self.log.clear()
        work()
        return [name for direction, name in self.log if direction == "on"]


def there(model):
    """The modules of a model whose weights are on the simulated device."""
    return sorted({name.rpartition(".")[0] for name, tensor in model.named_parameters() if not tensor.is_meta})


def kept(model):
    """What the modules keep by identity, less the parameters themselves: offloading makes them anew at every call."""
    return [entry for entry in attributes(model) if entry[1] != "_parameters"]


@contextlib.contextmanager
def offloaded(model, offload, config, early, around=False):
    """Offload a model and attach a cache, the former first if ``early``; ``around``: it puts hooks on blocks.

    Hooks that were put on blocks after the cache are around its stand-ins, which then stay, as is said.
    """
    if early:
        offload(model)
    handle = dit_cache(model, config)
    try:
        if not early:
            offload(model)
        yield handle
    finally:
        stays = around and not early
        with pytest.warns(UserWarning, match="wrapped by something else") if stays else contextlib.nullcontext():
            handle.remove()
