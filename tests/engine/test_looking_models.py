"""Policies that look, on every class of diffusers: what is computed is the model's own, and each run decides alike."""

import warnings

import pytest
import torch

from dithooks import DitCacheConfig, EasyCache, Interval, Linear, Taylor, Threshold, dit_cache, timestep_scope
from dithooks.errors import WiringError
from dithooks.tiny import build, names

STEPS = 5
CONFIGS = [
    DitCacheConfig(cache_block_start=1, policy=Threshold(10.0, 1, max_continuous_cached_steps=2), predictor=Linear()),
    DitCacheConfig(policy=EasyCache(10.0, 2, max_continuous_cached_steps=2), predictor=Taylor(1, axis="step")),
]


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output if isinstance(output, (list, tuple)) else ()
    if hasattr(output, "__dict__"):
        values = vars(output).values()
    return [tensor for value in values for tensor in tensors(value)]


def moved(given, step):
    """The model's first argument a little further on, as far as it is numbers."""
    name = next(iter(given))
    draw = torch.Generator().manual_seed(1)

    def on(value):
        if isinstance(value, (list, tuple)):
            return type(value)(on(item) for item in value)
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            return value + 0.02 * step * torch.randn(value.shape, generator=draw).to(value.dtype)
        return value

    return {**given, name: on(given[name])}


def stands(model):
    """Modules and their hooks; what else is in them, some models change themselves."""
    return {
        name: (
            id(module),
            type(module),
            *(list(module.__dict__[kind]) for kind in ("_forward_hooks", "_forward_pre_hooks")),
        )
        for name, module in model.named_modules()
    }


def sample(model, inputs):
    outs = []
    for step in range(STEPS):
        with timestep_scope(step, sigma=1 - step / STEPS, steps=STEPS):
            outs.append([tensor.clone() for tensor in tensors(model(**moved(inputs(), step)))])
    return outs


def refused(model, inputs, config):
    """Whether a range is refused without any policy that looks."""
    plain = DitCacheConfig(cache_block_start=config.cache_block_start, policy=Interval(0, 2))
    try:
        with dit_cache(model, plain):
            sample(model, inputs)
    except (WiringError, ValueError):
        return True
    return False


@pytest.mark.parametrize("config", CONFIGS, ids=["threshold", "easycache"])
@pytest.mark.parametrize("name", names())
def test_every_class(name, config):
    model, inputs = build(name)
    before, plain = stands(model), sample(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with dit_cache(model, config) as cache:
                first, made = sample(model, inputs), cache.decisions
                again, both = sample(model, inputs), cache.decisions
                held = cache.stats.bytes_held
        except (WiringError, ValueError):
            assert refused(model, inputs, config)
            return
    assert stands(model) == before
    assert held == 0
    assert [each[2:6] for each in both[len(made) :]] == [each[2:6] for each in made]
    reused = {each.step for each in made if each.reuse}
    for step in range(STEPS):
        for a, b, c in zip(plain[step], first[step], again[step], strict=True):
            assert torch.equal(b, c) or (b.isnan() == c.isnan()).all()
            assert step in reused or torch.equal(a, b)
    reasons = {each.reason for each in made}
    assert reused or reasons & {"non-finite", "not reached", "no anchor", "gradients"}, reasons
