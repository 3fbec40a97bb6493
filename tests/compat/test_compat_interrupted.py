"""Ctrl-C at any line of enabling, refreshing and disabling: to disable once more leaves nothing."""

import contextlib

import pytest
import torch
from toys import Net
from traces import attributes, interrupted

import dithooks
from dithooks import BlockAdapterRegistry as Registry
from dithooks import DitCacheConfig, dit_cache, handle
from dithooks.compat import cache_dit
from dithooks.compat.cache_dit import enable, functors
from dithooks.engine import attachment, hooks, stand_in

OURS = (attachment, handle, stand_in, hooks, enable, functors)
SETTINGS = {"Fn_compute_blocks": 1, "max_warmup_steps": 2}


class Rewrites(cache_dit.PatchFunctor):
    """Other forwards, a mark, and a part put at the end of its parts."""

    def _apply(self, transformer):
        for block in transformer.blocks:
            block.forward = type(block).forward.__get__(block)
        embed, transformer.mark = transformer.embed, self
        del transformer.embed
        transformer.embed = embed
        return transformer


@pytest.mark.parametrize("functor", [None, Rewrites()], ids=["plain", "functor"])
@pytest.mark.parametrize("action", ["enable", "refresh", "disable"])
def test_interrupted_at_any_line(action, functor):
    net = Net()
    before, adapter = attributes(net), cache_dit.BlockAdapter(transformer=net, auto=True, patch_functor=functor)
    actions = {
        "enable": lambda: cache_dit.enable_cache(adapter, **SETTINGS),
        "refresh": lambda: cache_dit.refresh_context(net, max_warmup_steps=3),
        "disable": lambda: cache_dit.disable_cache(net),
    }
    for line in range(1, 6000, 19):
        if action != "enable":
            cache_dit.enable_cache(adapter, **SETTINGS)
        done = interrupted(actions[action], line, OURS)
        cache_dit.disable_cache(net)
        assert attributes(net) == before, f"line {line}"
        if done:
            break
    assert done
    assert line > 50


def test_a_beginning_of_a_name_is_not_for_what_derives_from_it():
    class FluxMixin:
        pass

    class ChromaNet(FluxMixin, Net):
        pass

    class FluxNet(Net):
        pass

    Registry.register("Flux*")(lambda model: dithooks.BlockAdapter(transformer=model, blocks="singles"))
    try:
        for cls, blocks in ((ChromaNet, 10), (FluxNet, 5)):
            with dit_cache(cls("two_lists"), DitCacheConfig(0, 2, 1, 3)) as cache:
                assert f"of {blocks} blocks" in repr(cache)
    finally:
        Registry.unregister("Flux*")


def test_a_registered_adapter_is_left_as_it_is():
    made = []

    class Registered(Net):
        pass

    @cache_dit.BlockAdapterRegistry.register("Registered")
    def registered(pipe):
        made.append(cache_dit.BlockAdapter(pipe=pipe, transformer=pipe.transformer, auto=True))
        return made[-1]

    net = Registered()
    with contextlib.ExitStack() as stack:
        stack.callback(cache_dit.BlockAdapterRegistry.unregister, "Registered")
        cache_dit.enable_cache(net, **SETTINGS)
        assert made[0].pipe.transformer is net
        with torch.no_grad():
            for t in torch.linspace(1, 0.1, 8):
                net(torch.randn(2, 6, 4), t)
        cache_dit.disable_cache(net)
