"""Attaching touches nothing before all is checked; removing leaves no trace."""

import copy
import dataclasses
import gc
import inspect
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn
from toys import Double, Ladder, Net, Pipe, Single, latents, prompt

from dithooks import DitCacheConfig, dit_cache
from dithooks.engine.stand_in import SkipBlock

pytestmark = pytest.mark.core

CONFIG = DitCacheConfig(2, 2, 0, 5)


def snapshot(root: nn.Module) -> dict:
    """Everything an object could keep of ours: identities of modules, instance dictionaries, hook dictionaries."""
    return {
        name: (
            id(module),
            type(module),
            {key: id(value) for key, value in vars(module).items() if key != "executions"},
            {key: list(value) for key, value in vars(module).items() if "hooks" in key and isinstance(value, dict)},
        )
        for name, module in root.named_modules()
    }


def test_removal_restores_identity_dictionaries_hooks_and_order():
    net = Net("two_lists")
    pipe = Pipe(net)
    net.blocks[1].register_forward_hook(lambda *_: None)
    before, keys, blocks = snapshot(net), list(net.state_dict()), list(net.blocks)
    with dit_cache(pipe, DitCacheConfig(2, 2, 1, 6)):
        assert snapshot(net) != before
        assert list(net.state_dict()) == keys
        assert isinstance(net.blocks[1], SkipBlock)
        assert not isinstance(net.blocks[0], SkipBlock)
        pipe(latents(), prompts=[prompt()])
    assert snapshot(net) == before
    assert list(net.state_dict()) == keys
    assert all(a is b for a, b in zip(blocks, net.blocks, strict=True))


def test_remove_twice_and_after_an_error_in_the_body():
    net = Net()
    before = snapshot(net)
    handle = dit_cache(net, CONFIG)
    handle.remove()
    handle.remove()
    assert snapshot(net) == before
    assert not handle.active
    with pytest.raises(KeyError), dit_cache(net, CONFIG):
        raise KeyError
    assert snapshot(net) == before
    with pytest.raises(RuntimeError, match="removed"):
        handle.update(CONFIG)


def test_a_hundred_cycles_leave_nothing():
    net = Net("swapped")
    pipe, x, e = Pipe(net), latents(), prompt()
    before, left = snapshot(net), []
    for cycle in range(100):
        with dit_cache(pipe, CONFIG) as cache:
            if cycle % 25 == 0:
                pipe(x, steps=4, prompts=[e])
            left += [weakref.ref(cache), weakref.ref(net.blocks[0]), weakref.ref(cache._attached[0].cache)]
    del cache
    gc.collect()
    assert snapshot(net) == before
    assert sum(ref() is not None for ref in left) == 0
    assert not [cls for cls in Double.__subclasses__() if issubclass(cls, SkipBlock)]


def test_no_cached_tensor_outlives_the_handle():
    net = Net("swapped")
    pipe = Pipe(net)
    with dit_cache(pipe, dataclasses.replace(CONFIG, free_at_end=False)) as cache:
        pipe(latents(), prompts=[prompt()])
        flow = cache._attached[0].cache
        branches = [branch for run in flow.decider._runs.values() for branch in run.branches.values()]
        deltas = [weakref.ref(delta) for branch in branches for anchor in branch.anchors for delta in anchor.kept]
        assert len(deltas) == 2
        del branches, flow
    assert all(ref() is None for ref in deltas)


def test_reset_frees_and_counts_anew():
    pipe, x = Pipe(Net()), latents()
    with dit_cache(pipe, CONFIG) as cache:
        first = pipe(x)
        cache.reset()
        assert (cache.stats.calls, cache.stats.bytes_held) == (0, 0)
        assert torch.equal(pipe(x), first)


class TestUpdate:
    def test_to_another_range_and_schedule_equals_a_fresh_handle(self):
        pipe, x = Pipe(Net()), latents()
        other = DitCacheConfig(1, 3, 2, 2)
        with dit_cache(pipe, other):
            expected = pipe(x)
        with dit_cache(pipe, CONFIG) as cache:
            pipe(x)
            cache.update(other)
            assert torch.equal(pipe(x), expected)
            assert cache.config.cache_step_interval == 3

    def test_bad_values_leave_the_old_one_in_force(self):
        pipe, x = Pipe(Net()), latents()
        with dit_cache(pipe, CONFIG) as cache:
            expected = pipe(x)
            with pytest.raises(ValueError, match="reach past the end"):
                cache.update(DitCacheConfig(1, 2, 3, 3))
            with pytest.raises(TypeError, match="DitCacheConfig"):
                cache.update((1, 2, 3, 4))
            assert torch.equal(pipe(x), expected)

    def test_an_error_half_way_rolls_back(self, monkeypatch):
        net = Net()
        pipe, x = Pipe(net), latents()
        before = snapshot(net)
        with dit_cache(pipe, CONFIG) as cache:
            expected = pipe(x)
            real, puts = nn.ModuleList.__setitem__, []

            def failing(self, index, module):
                if isinstance(module, SkipBlock) and len(puts) == 1:
                    puts.append(index)
                    raise KeyboardInterrupt
                puts.append(index) if isinstance(module, SkipBlock) else None
                return real(self, index, module)

            with monkeypatch.context() as patch:
                patch.setattr(nn.ModuleList, "__setitem__", failing)
                with pytest.raises(KeyboardInterrupt):
                    cache.update(DitCacheConfig(2, 2, 1, 3))
            assert torch.equal(pipe(x), expected)
        assert snapshot(net) == before


class TestErrors:
    """Each names the path, the value and what is allowed, and leaves the model as it was."""

    @pytest.fixture
    def net(self):
        net = Net("two_lists")
        before = snapshot(net)
        yield net
        assert snapshot(net) == before

    @pytest.mark.parametrize("config", [None, 2.0, (1, 2, 3, 4), DitCacheConfig])
    def test_wrong_type_of_config(self, net, config):
        with pytest.raises(TypeError, match="must be a DitCacheConfig"):
            dit_cache(net, config)

    @pytest.mark.parametrize(
        ("blocks", "error", "match"),
        [
            ("", ValueError, "dotted path"),
            ("blocks..0", ValueError, r"'blocks\.\.0'.*dotted path"),
            ("bloks", ValueError, r"no 'bloks'; it has .*'blocks'"),
            ("embed", ValueError, r"Linear, not to an nn\.ModuleList"),
            ("blocks.7", ValueError, "no '7'"),
            ("blocks.0", ValueError, r"Double, not to an nn\.ModuleList"),
            ([], ValueError, "empty list"),
            (3, TypeError, "dotted path"),
            ([3], TypeError, "neither a dotted path nor"),
            (nn.ModuleList([nn.Linear(1, 1)]), ValueError, "not part of Net"),
        ],
    )
    def test_wrong_path(self, net, blocks, error, match):
        with pytest.raises(error, match=match):
            dit_cache(net, CONFIG, blocks=blocks)

    @pytest.mark.parametrize("target", [None, "pipe", Net, 3, {}])
    def test_wrong_target(self, target):
        with pytest.raises((TypeError, ValueError), match="transformer"):
            dit_cache(target, CONFIG)

    def test_empty_list(self, net):
        holder = nn.Module()
        holder.blocks = nn.ModuleList()
        with pytest.raises(ValueError, match=r"empty nn\.ModuleList"):
            dit_cache(holder, CONFIG, blocks="blocks")
        with pytest.raises(ValueError, match=r"has no nn\.ModuleList"):
            dit_cache(holder, CONFIG)

    def test_range_past_the_end(self, net):
        with pytest.raises(ValueError, match=r"cache_block_start=8 and cache_num_blocks=3 .*Net has 10 blocks"):
            dit_cache(net, DitCacheConfig(1, 2, 8, 3))

    def test_pipeline_without_a_denoiser(self):
        pipe = Pipe(Net())
        pipe.text_encoder, pipe.transformer = pipe.transformer, None
        with pytest.raises(ValueError, match=r"no list of blocks that a transformer would call.*'text_encoder'"):
            dit_cache(pipe, CONFIG)
        with dit_cache(pipe, CONFIG, blocks="text_encoder.blocks") as cache:
            assert "text_encoder.blocks.0" in repr(cache)

    def test_twice_on_the_same_blocks(self):
        net = Net()
        handle = dit_cache(net, DitCacheConfig(2, 2, 1, 2))
        with pytest.raises(ValueError, match=r"blocks\.1 is cached already"):
            dit_cache(net, DitCacheConfig(2, 2, 0, 2))
        handle.remove()
        assert not any(isinstance(block, SkipBlock) for block in net.blocks)

    def test_another_cache_is_on(self, net):
        net.__dict__["is_cache_enabled"] = True
        try:
            with pytest.raises(ValueError, match="another cache"):
                dit_cache(net, CONFIG)
        finally:
            del net.__dict__["is_cache_enabled"]

    def test_config_of_another_model(self, net):
        with dit_cache(Net("single"), CONFIG) as cache:
            foreign = cache.config
        assert foreign.fingerprint
        with pytest.raises(ValueError, match="made for another model"):
            dit_cache(net, foreign)
        with dit_cache(Net("single"), foreign):
            pass

    @pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
    def test_a_block_that_cannot_be_subclassed(self):
        net = Ladder(3)
        net.blocks[1] = torch.jit.script(net.blocks[1])
        before = snapshot(net)
        with pytest.raises(TypeError, match="stand-in"):
            dit_cache(net, DitCacheConfig(1, 2, 0, 3))
        assert snapshot(net) == before


class TestTransparency:
    """While attached, the model looks and behaves as it was in everything but speed."""

    @pytest.fixture
    def net(self):
        net = Net("swapped")
        with dit_cache(net, CONFIG):
            yield net

    def test_type_and_signature(self, net):
        block = net.blocks[0]
        assert isinstance(block, Double)
        assert type(block).__name__ == "Double"
        assert type(block).__module__ == Double.__module__
        assert inspect.signature(type(block).forward) == inspect.signature(Double.forward)
        assert list(inspect.signature(block.forward).parameters) == ["hidden_states", "encoder_hidden_states", "temb"]

    def test_attributes_are_the_blocks_own(self, net):
        original = net.blocks[0]._dithooks.original
        net.blocks[0].swap = "changed"
        net.blocks[0].extra = nn.Linear(2, 2)
        assert original.swap == "changed"
        assert dict(original.named_children())["extra"] is net.blocks[0].extra
        del net.blocks[0].extra
        assert not hasattr(original, "extra")

    def test_names_parameters_and_loading(self, net):
        fresh = Net("swapped")
        assert [n for n, _ in net.named_modules()] == [n for n, _ in fresh.named_modules()]
        assert [n for n, _ in net.named_parameters()] == [n for n, _ in fresh.named_parameters()]
        net.load_state_dict(fresh.state_dict(), strict=True)
        assert all(
            torch.equal(a, b) for a, b in zip(net.state_dict().values(), fresh.state_dict().values(), strict=True)
        )
        assert {p.dtype for p in net.to(torch.float64).parameters()} == {torch.float64}
        assert {p.dtype for p in net.blocks[0]._dithooks.original.parameters()} == {torch.float64}

    def test_hooks_of_others_go_to_the_block_and_stay(self):
        net, seen = Net(), []
        with dit_cache(Pipe(net), CONFIG):
            net.blocks[3].register_forward_hook(lambda *_: seen.append(1))
            Pipe(net)(latents())
        inside = len(seen)
        Pipe(net)(latents())
        assert inside > 0
        assert len(seen) == inside + 8

    @pytest.mark.parametrize("how", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
    def test_copies_are_plain(self, how):
        net = Net("swapped")
        net._forward_hooks.clear()
        for block in net.blocks:
            block._forward_hooks.clear()  # the counter of executions is a bound method of the net
        x, e = latents(), prompt()
        expected = Pipe(net)(x, prompts=[e])
        with dit_cache(net, CONFIG) as cache:
            twin = how(net)
            assert not any(isinstance(block, SkipBlock) for block in twin.blocks)
            assert torch.equal(Pipe(twin)(x, prompts=[e]), expected)
            assert cache.stats.calls == 0

    def test_forward_called_directly(self):
        class Direct(Net):
            def forward(self, hidden_states, timestep):
                h, temb = self.embed(hidden_states), self.time(timestep.reshape(-1, 1)).expand(2, -1)
                for block in self.blocks:
                    h = block.forward(h, temb)
                return self.proj(h)

        net = Direct()
        pipe, x = Pipe(net), latents()
        with dit_cache(pipe, CONFIG) as cache:
            direct = pipe(x)
            assert cache.stats.reused_calls == 3
        net.__class__ = Net
        with dit_cache(pipe, CONFIG):
            assert torch.equal(pipe(x), direct)


class TestOthersWrapping:
    def test_instance_forward_set_before_survives(self):
        net, seen = Net(), []
        plain, block = Pipe(net)(x := latents()), net.blocks[2]
        inner = block.forward

        def wrapped(*args, **kwargs):
            seen.append(1)
            return inner(*args, **kwargs)

        object.__setattr__(block, "forward", wrapped)
        with dit_cache(Pipe(net), CONFIG) as cache:
            Pipe(net)(x)
            assert cache.stats.reused_calls == 3
        assert len(seen) == 5
        assert vars(net.blocks[2])["forward"] is wrapped
        assert torch.equal(Pipe(net)(x), plain)

    def test_instance_forward_set_while_attached_stays_and_is_reported(self):
        net, seen = Net(), []
        x = latents()
        plain = Pipe(net)(x)
        handle = dit_cache(Pipe(net), CONFIG)
        inner = net.blocks[2].forward

        def wrapped(*args, **kwargs):
            seen.append(1)
            return inner(*args, **kwargs)

        net.blocks[2].forward = wrapped
        Pipe(net)(x)
        assert handle.stats.reused_calls == 3
        assert len(seen) == 8 + 1  # also where the block is skipped, as it wraps the stand-in; one call was the test
        with pytest.warns(UserWarning, match=r"blocks\.2: wrapped by something else"):
            handle.remove()
        assert [isinstance(block, SkipBlock) for block in net.blocks] == [False, False, True, False, False]
        assert torch.equal(Pipe(net)(x), plain)
        inert, seen[:] = net.blocks[2], []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with dit_cache(Pipe(net), CONFIG) as cache:  # an inert stand-in is a block like any other
                Pipe(net)(x)
                assert cache.stats.reused_calls == 3
        assert net.blocks[2] is inert
        assert len(seen) == 5  # now it is inside, and skipped with the block
        assert torch.equal(Pipe(net)(x), plain)

    def test_entry_replaced_while_attached(self):
        net = Net()
        handle = dit_cache(net, CONFIG)
        mine = net.blocks[1] = Single()
        with pytest.warns(UserWarning, match=r"blocks\.1"):
            handle.remove()
        assert net.blocks[1] is mine
        assert not any(isinstance(block, SkipBlock) for block in net.blocks)

    def test_a_class_that_registers_its_subclasses_learns_of_none(self):
        registered = []

        class Registering(Single):
            def __init_subclass__(cls, **kwargs):
                registered.append(cls)

        net = Net()
        net.blocks = nn.ModuleList(Registering() for _ in range(5))
        with dit_cache(Pipe(net), CONFIG) as cache:
            Pipe(net)(latents())
            assert cache.stats.reused_calls == 3
        assert registered == []
