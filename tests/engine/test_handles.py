"""What is attached is found in the model, and nowhere else."""

import copy
import gc
import weakref

import pytest
import torch
from toys import Net, Pipe, latents

from dithooks import BlockAdapter, DitCacheConfig, detach, dit_cache, handle_of
from dithooks.compat import cache_dit
from dithooks.engine.stand_in import SkipBlock
from dithooks.handle import handles_of

CONFIG = DitCacheConfig(2, 2, 1, 3)


def test_by_pipeline_by_transformer_and_by_adapter():
    pipe, other = Pipe(Net()), Pipe(Net())
    cache = dit_cache(pipe, CONFIG)
    for target in (pipe, pipe.transformer, BlockAdapter(pipe), BlockAdapter(transformer=pipe.transformer)):
        assert handles_of(target) == [cache]
    assert handles_of(other) == []
    cache.remove()
    assert handles_of(pipe) == []


def test_several_on_one_pipeline_each_once():
    pipe = Pipe(Net("two_lists"))
    pipe.transformer_2 = Net("two_lists")
    both = dit_cache(pipe, CONFIG, blocks=["transformer.blocks", "transformer_2.blocks"])
    one = dit_cache(pipe, CONFIG, blocks="transformer.singles")
    assert handles_of(pipe) == [both, one]
    assert handles_of(pipe.transformer_2) == [both]
    both.remove()
    assert handles_of(pipe) == [one]


def test_a_copy_has_none_and_an_update_keeps_its_own():
    pipe = Pipe(Net())
    with dit_cache(pipe, CONFIG) as cache:
        assert handles_of(copy.deepcopy(pipe)) == []
        cache.update(DitCacheConfig(1, 3, 0, 2))
        pipe(latents())
        assert handles_of(pipe) == [cache]


def test_it_is_kept_alive_by_the_model_alone():
    pipe = Pipe(Net())
    handle = weakref.ref(dit_cache(pipe, CONFIG))
    gc.collect()
    assert handle() is not None
    pipe(latents())
    assert handles_of(pipe)[0].stats.reused_calls == 3
    gone = weakref.ref(pipe.transformer)
    del pipe
    gc.collect()
    assert handle() is None
    assert gone() is None


def test_what_reuses_nothing_is_not_attached():
    net = Net()
    with pytest.warns(UserWarning, match="nothing is attached"):
        dit_cache(net, DitCacheConfig(0, 1, 0, 2))
    assert handles_of(net) == []


def test_a_model_that_is_sharded_is_the_same_model():
    """FSDP puts a class of its own over a model's and its blocks': a plan or configuration is still theirs."""
    from torch.distributed.fsdp import FSDPModule

    net = Net("two_lists", 2)
    with dit_cache(net, CONFIG) as cache:
        config = cache.config
    for module in (net, *net.blocks, *net.singles):
        cls = type(module)
        module.__class__ = type(f"FSDP{cls.__name__}", (FSDPModule, cls), {})
    assert type(net).__name__ == "FSDPNet"
    with dit_cache(net, config, verify=False) as cache:
        assert cache.config == config
    with pytest.raises(ValueError, match="another model"):
        dit_cache(Net("two_lists", 3), config)


def is_bare(net):
    """Whether nothing of a cache is on a model: no hook on it, no stand-in in its lists."""
    return not net._forward_pre_hooks and not any(isinstance(block, SkipBlock) for block in net.blocks)


class TestLost:
    """A handle that nobody has kept is found, and what it has attached is taken off."""

    def test_out_of_scope(self):
        pipe = Pipe(Net())

        def attach():
            dit_cache(pipe, CONFIG)

        attach()
        gc.collect()
        pipe(latents())
        with pytest.raises(
            ValueError, match=r"cached already.*dithooks\.handle_of\(model\).*dithooks\.detach\(model\)"
        ):
            dit_cache(pipe, CONFIG)
        assert handle_of(pipe).stats.reused_calls == 3
        assert handle_of(pipe) is handle_of(pipe.transformer)
        detach(pipe)
        assert is_bare(pipe.transformer)
        assert handle_of(pipe) is None
        dit_cache(pipe, CONFIG).remove()

    @pytest.mark.parametrize("attached_to", ["inner", "outer"])
    @pytest.mark.parametrize("asked_of", ["inner", "outer"])
    def test_in_nested_modules(self, attached_to, asked_of):
        """Whichever of a model and a module around it was attached to, either leads to the handle."""

        class Around(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.dit = Net()

        outer = Around()
        parts = {"inner": outer.dit, "outer": outer}
        cache = dit_cache(parts[attached_to], CONFIG)
        assert handle_of(parts[asked_of]) is cache
        detach(parts[asked_of])
        assert is_bare(outer.dit)
        assert not cache.active

    def test_of_cache_dit(self):
        pipe = Pipe(Net())
        cache_dit.enable_cache(pipe, cache_dit.DBCacheConfig(Fn_compute_blocks=1, max_warmup_steps=2))
        assert handle_of(pipe.transformer) is cache_dit.enable.enabled(pipe)[0]
        detach(pipe)
        assert is_bare(pipe.transformer)
        assert cache_dit.enable.enabled(pipe) == []

    def test_several(self):
        """Which one is meant has to be said; all of them can be taken off at once."""
        pipe = Pipe(Net("two_lists"))
        one = dit_cache(pipe, CONFIG, blocks="transformer.blocks")
        two = dit_cache(pipe, CONFIG, blocks="transformer.singles")
        with pytest.raises(
            ValueError, match=r"Pipe has 2 caches attached \(transformer\.blocks, transformer\.singles\)"
        ):
            handle_of(pipe)
        detach(pipe)
        assert (one.active, two.active, is_bare(pipe.transformer)) == (False, False, True)

    def test_nothing_there(self):
        """Which is said, and is no error; what can hold no cache at all is one."""
        pipe = Pipe(Net())
        assert handle_of(pipe) is None
        with pytest.warns(UserWarning, match="nothing is cached in this Pipe"):
            detach(pipe)
        for target in (None, "flux", 3):
            for find in (handle_of, detach):
                with pytest.raises(TypeError, match="neither a model nor holds one"):
                    find(target)


def test_a_handle_that_was_removed_is_not_entered():
    """A ``with`` on it would run without a cache, and say nothing."""
    cache = dit_cache(Net(), CONFIG)
    cache.remove()
    with pytest.raises(RuntimeError, match="was removed: attach a new one"), cache:
        raise AssertionError
