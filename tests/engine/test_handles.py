"""What is attached is found in the model, and nowhere else."""

import copy
import gc
import weakref

import pytest
from toys import Net, Pipe, latents

from dithooks import BlockAdapter, DitCacheConfig, dit_cache
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
