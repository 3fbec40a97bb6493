"""Taking caches off again: two on one model, interrupted at any line, after others have been at the blocks."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from toys import Ladder, Net, Pipe, Single, latents, loop, prompt
from traces import interrupted

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks import handle as handle_module
from dithooks.engine import attachment, hooks, stand_in
from dithooks.engine.stand_in import SkipBlock

EVERY_OTHER = DitCacheConfig(0, 2, 0, 5)


class TestTwoHandles:
    CONFIG = DitCacheConfig(0, 2, 0, 3)

    @pytest.mark.parametrize("first_off", [0, 1])
    @pytest.mark.parametrize("compiled", [False, True])
    def test_on_two_lists_of_one_model(self, first_off, compiled):
        net, e, x = Net("two_lists", 3), prompt(), latents()
        for block in [*net.blocks, *net.singles]:
            block._forward_hooks.clear()  # counting would break the graph
        before = [*net.blocks, *net.singles]
        plain = loop(net, x, encoder_hidden_states=e)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 6)):
            together = loop(net, x, encoder_hidden_states=e)
        if compiled:
            torch._dynamo.reset()
            net.compile(backend="eager")
        handles = [dit_cache(net, self.CONFIG, blocks=name) for name in ("blocks", "singles")]
        out = loop(net, x, encoder_hidden_states=e)
        assert [handle.stats.reasons for handle in handles] == [{"refresh": 2, "reuse": 2}] * 2
        torch.testing.assert_close(out, together, rtol=1e-4, atol=1e-5)
        handles.pop(first_off).remove()
        loop(net, x, encoder_hidden_states=e)
        handles.pop().remove()
        assert all(a is b for a, b in zip(before, [*net.blocks, *net.singles], strict=True))
        torch.testing.assert_close(loop(net, x, encoder_hidden_states=e), plain)
        torch._dynamo.reset()


class TestRemoval:
    def test_warnings_as_errors_do_not_leave_it_half_done(self):
        pipe = Pipe(Net())
        pipe.transformer_2 = Net()
        handle = dit_cache(pipe, DitCacheConfig(6, 2, 0, 5))
        for k in range(3):
            with timestep_scope(k):
                pipe.transformer(latents(), torch.tensor(0.5))
                pipe.transformer_2(latents(), torch.tensor(0.5))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="reused nothing"):
                handle.remove()
        assert not handle.active
        for net in (pipe.transformer, pipe.transformer_2):
            assert not any(isinstance(block, SkipBlock) for block in net.blocks)
            assert not net._forward_pre_hooks

    @pytest.mark.parametrize("action", ["attach", "update", "remove"])
    def test_interrupted_at_any_line(self, action):
        """KeyboardInterrupt after every n-th line of ours: what is called again, or removed, leaves nothing."""
        net = Net()
        blocks, done = list(net.blocks), False
        ours = (attachment, handle_module, stand_in, hooks)

        for line in range(1, 3000, 23):
            handle = None if action == "attach" else dit_cache(net, EVERY_OTHER)

            attached = []

            def act(handle=handle, attached=attached):
                if action == "attach":
                    attached.append(dit_cache(net, EVERY_OTHER))
                elif action == "update":
                    handle.update(DitCacheConfig(0, 2, 1, 3))
                else:
                    handle.remove()

            done = interrupted(act, line, ours)
            handle = attached[0] if attached else handle
            if handle is not None:
                handle.remove()
            if handle is not None or done:
                assert all(a is b for a, b in zip(blocks, net.blocks, strict=True)), f"line {line}"
                assert not net._forward_pre_hooks, f"line {line}"
                assert [len(block._forward_hooks) for block in net.blocks] == [1] * 5, f"line {line}"
            if done:
                break
        assert done
        assert line > 50

    def test_lists_cut_and_rebuilt_meanwhile(self):
        net = Net()
        originals = list(net.blocks)
        handle = dit_cache(net, EVERY_OTHER)
        net.blocks = net.blocks[:3]
        handle.remove()
        assert all(a is b for a, b in zip(originals, net.blocks, strict=False))
        net.blocks = nn.ModuleList(originals)
        handle = dit_cache(net, EVERY_OTHER)
        del net.blocks[4]
        with pytest.warns(UserWarning, match=r"blocks\.4"):
            handle.remove()
        assert list(net.blocks) == originals[:4]

    def test_a_monkeypatch_taken_off_again(self):
        net = Net()
        handle = dit_cache(net, EVERY_OTHER)
        old = net.blocks[1].forward
        net.blocks[1].forward = lambda *args, **kwargs: old(*args, **kwargs)
        net.blocks[1].forward = old
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "(?!no call)")
            handle.remove()
        assert not any(isinstance(block, SkipBlock) for block in net.blocks)

    def test_a_class_that_is_changed_while_attached_stays_changed(self):
        """As parametrizations and sharding do."""

        class Negative(nn.Module):
            def forward(self, weight):
                return -weight

        net, zero, one = Ladder(5), torch.zeros(1), torch.ones(1)
        with dit_cache(net, EVERY_OTHER):
            parametrize.register_parametrization(net.blocks[1], "rate", Negative())
            assert type(net.blocks[1]).__name__ == "Adder"
            assert parametrize.is_parametrized(net.blocks[1])
            assert net.blocks[1].rate.item() == -2
            assert net(zero, one).item() == 15 - 4
        assert net(zero, one).item() == 15 - 4
        assert not isinstance(net.blocks[1], SkipBlock)
        with dit_cache(net, EVERY_OTHER):
            parametrize.remove_parametrizations(net.blocks[1], "rate", leave_parametrized=False)
            assert net(zero, one).item() == 15
        assert net(zero, one).item() == 15
        assert type(net.blocks[1]) is type(net.blocks[0])

    def test_forward_wrapped_before_is_wrapped_again_and_unwrapped(self):
        """As accelerate does, which leaves an instance ``forward`` behind where it was removed."""
        net, x = Net("single"), latents()
        plain = loop(net, x)
        for block in net.blocks:
            object.__setattr__(block, "forward", block.forward)
        handle = dit_cache(net, EVERY_OTHER)
        block = net.blocks[1]
        old = block._old_forward = block.forward
        block.forward = lambda *args, **kwargs: old(*args, **kwargs)
        loop(net, x)
        assert handle.stats.reused_calls == 2
        handle.remove()
        assert torch.equal(loop(net, x), plain)


class TestMoreBadInput:
    def test_a_list_named_twice(self):
        with pytest.raises(ValueError, match="twice"):
            dit_cache(Net(), EVERY_OTHER, blocks=("blocks", "blocks"))

    @pytest.mark.parametrize("scheduler", ["euler", object, Single])
    def test_no_scheduler(self, scheduler):
        with pytest.raises(TypeError, match="no timesteps"):
            dit_cache(Net(), EVERY_OTHER, scheduler=scheduler)

    def test_a_bare_list(self):
        with pytest.raises(ValueError, match="block list by itself"):
            dit_cache(nn.ModuleList([Single()]), EVERY_OTHER)

    def test_advice_where_lists_do_not_join(self):
        class Apart(Net):
            def forward(self, hidden_states, timestep, encoder_hidden_states):
                h = super().forward(hidden_states, timestep, encoder_hidden_states)
                return self.other[1](self.other[0](h))[..., :4]

        net = Apart("swapped")
        net.other = nn.ModuleList([nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)) for _ in range(2)])
        handle = dit_cache(net, DitCacheConfig(0, 2, 3, 3))
        with pytest.raises(ValueError, match="Cache one of the lists by itself: blocks='blocks' or 'other'"):
            net(latents(), torch.tensor(0.5), prompt())
        handle.remove()

    def test_copies_of_an_attached_model_do_not_drive_its_cache(self):
        net, x = Net("single"), latents()
        for block in net.blocks:
            block._forward_hooks.clear()
        with dit_cache(net, EVERY_OTHER) as cache:
            loop(copy.deepcopy(net), x)
            assert cache.stats.calls == 0
