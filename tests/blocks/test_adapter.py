"""Where the blocks are, said by the user: adapters with everything per list, and hints by class name."""

import pytest
import torch
from toys import Ladder, Net, Pipe, latents, loop, prompt

from dithooks import BlockAdapter, BlockAdapterRegistry, DitCacheConfig, ForwardPattern, dit_cache, timestep_scope


class TestAdapter:
    def test_everything_is_found(self):
        net = Net("two_lists")
        with dit_cache(BlockAdapter(Pipe(net)), DitCacheConfig(0, 2, 3, 4)) as cache:
            assert "transformer.blocks.3 … transformer.singles.1 of 10" in repr(cache)

    def test_a_pattern_per_list(self):
        net, x, t, e = Net("two_lists"), latents(), torch.tensor(0.5), prompt(tokens=6)
        plain = net(x, t, e)
        for blocks in (None, ["blocks", "singles"], [net.blocks, net.singles]):
            adapter = BlockAdapter(transformer=net, blocks=blocks, forward_pattern=[1, ForwardPattern.Pattern_0])
            with dit_cache(adapter, DitCacheConfig(0, 2, 3, 4)) as cache:
                with timestep_scope(0):
                    net(x, t, e)
                with timestep_scope(1):
                    torch.testing.assert_close(net(x, t, e), plain)
                assert cache.stats.reused_calls == 1

    def test_a_pattern_that_is_not_strict_is_asked_where_nothing_else_tells(self):
        class Swaps(torch.nn.Module):
            def forward(self, image, text):
                return text + 1, image * 1.5

        class Joined(torch.nn.Module):
            """The model makes new tensors between blocks, so that what goes where cannot be seen."""

            def __init__(self):
                super().__init__()
                self.blocks = torch.nn.ModuleList(Swaps() for _ in range(4))

            def forward(self, image, text, timestep):
                for block in self.blocks:
                    text, image = (each + timestep for each in block(image, text))
                return image + text

        net = Joined()
        image, text = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
        plain = net(image, text, torch.tensor(0.0))
        for strict in (True, False):
            adapter = BlockAdapter(transformer=net, blocks="blocks", forward_pattern=1, strict=strict)
            with dit_cache(adapter, DitCacheConfig(0, 2, 1, 2), verify=False) as cache:
                for step in range(2):
                    with timestep_scope(step):
                        out = net(image, text, torch.tensor(0.0))
                assert cache.stats.reused_calls == 1
                torch.testing.assert_close(out, plain)

    def test_a_pattern_that_is_wrong_and_not_strict_is_remarked_upon_once(self):
        net, x, t, e = Net("two_lists"), latents(), torch.tensor(1.0), prompt(tokens=6)
        plain, config = net(x, t, e), DitCacheConfig(0, 2, 1, 3)
        wrong = BlockAdapter(transformer=net, blocks="singles", forward_pattern=3)
        with dit_cache(wrong, config), pytest.raises(ValueError, match="says 1"):
            net(x, t, e)
        adapter = BlockAdapter(transformer=net, blocks="singles", forward_pattern=3, strict=False)
        with dit_cache(adapter, config) as cache:
            with pytest.warns(UserWarning, match="pattern 3, h -> h, was declared for singles, but singles.1 returns"):
                loop(net, x, 1, scoped=True, encoder_hidden_states=e)
            with timestep_scope(1):
                out = net(x, t, e)
            assert cache.stats.reused_calls == 1
            torch.testing.assert_close(out, plain)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize(("kind", "pattern"), [("swapped", 1), ("straight", 0), ("last_drops_text", 1)])
    def test_a_pattern_that_fits_is_not_worth_a_word(self, kind, pattern):
        net = Net(kind)
        adapter = BlockAdapter(transformer=net, forward_pattern=pattern, strict=False)
        with dit_cache(adapter, DitCacheConfig(0, 2, 1, 3)), timestep_scope(0):
            net(latents(), torch.tensor(0.5), prompt(tokens=6))

    def test_two_transformers_with_lists_each(self):
        """As Wan 2.2 has: two experts, the first at high noise, with guidance by two calls."""
        pipe = Pipe(Net("two_lists"))
        pipe.transformer_2 = Net("two_lists")
        both = [pipe.transformer, pipe.transformer_2]
        adapter = BlockAdapter(
            pipe,
            both,
            blocks=[[net.blocks, net.singles] for net in both],
            forward_pattern=[[1, 0], [1, 0]],
            has_separate_cfg=True,
        )
        x, prompts = latents(), [prompt(), prompt()]
        with dit_cache(adapter, DitCacheConfig(2, 2, 1, 8)) as cache:
            for step in range(8):
                net = both[step >= 4]
                for e in prompts:
                    with timestep_scope(step):
                        net(x, torch.tensor(0.5), e)
            # each: steps 2 and 6 are refreshes, 3, 5 and 7 reused where the expert has computed before
            assert (cache.stats.calls, cache.stats.reused_calls) == (16, 2 * (1 + 2))

    def test_one_of_two_transformers(self):
        pipe = Pipe(Net())
        pipe.transformer_2 = Net(depth=3)
        for wanted in (pipe.transformer_2, "transformer_2", ["transformer_2"]):
            with dit_cache(BlockAdapter(pipe, wanted), DitCacheConfig(0, 2, 0, 3)) as cache:
                assert "transformer_2.blocks.0 … transformer_2.blocks.2 of 3 blocks>" in repr(cache)
                assert "transformer.blocks" not in repr(cache)

    def test_transformers_without_a_pipeline(self):
        nets = [Net(), Net(depth=3)]
        with dit_cache(BlockAdapter(transformer=nets), DitCacheConfig(0, 2, 0, 3)) as cache:
            assert "transformer_1.blocks.0 … transformer_1.blocks.2 of 5" in repr(cache)
            assert "transformer_2.blocks.2 of 3" in repr(cache)

    def test_a_config_per_list(self):
        """Every list is a range of its own; counted on executed blocks."""
        net, x, t, e = Net("two_lists"), latents(), torch.tensor(0.5), prompt()
        adapter = BlockAdapter(
            transformer=net,
            blocks=["blocks", "singles"],
            params=[DitCacheConfig(0, 2, 1, 3), DitCacheConfig(1, 3, 0, 2)],
        )
        ran = []
        with dit_cache(adapter, DitCacheConfig(0, 1, 0, 1), verify=False) as cache:
            for step in range(6):
                net.executions = 0
                with timestep_scope(step):
                    net(x, t, e)
                ran.append(net.executions)
            #   blocks: steps 1, 3, 5 without 3; singles: steps 2, 3, 5 without 2
            assert ran == [10, 7, 8, 5, 10, 5]
            assert cache.stats.reused_calls == 6
            assert cache.stats.blocks_run == sum(ran)

    def test_a_config_for_one_of_the_lists(self):
        net = Net("two_lists")
        adapter = BlockAdapter(transformer=net, blocks=["blocks", "singles"], params=[None, DitCacheConfig(0, 2, 4, 1)])
        with dit_cache(adapter, DitCacheConfig(0, 2, 0, 2)) as cache:
            assert "blocks.0 … blocks.1 of 5 blocks, singles.4 … singles.4 of 5 blocks" in repr(cache)

    @pytest.mark.parametrize(("separate", "branches"), [(True, 2), (False, 1)])
    def test_guidance_said(self, separate, branches):
        """Two calls per step: residuals apart, or the later one's for both."""
        net, x, prompts = Ladder(), torch.zeros(1), [torch.tensor(1.0), torch.tensor(5.0)]
        with dit_cache(BlockAdapter(transformer=net, has_separate_cfg=separate), DitCacheConfig(0, 2, 0, 5)) as cache:
            for step in (0, 1):
                outs = []
                for t in prompts:
                    with timestep_scope(step):
                        outs.append(net(x, t))
            assert cache.stats.bytes_held == 4 * branches
        # rates 1 to 5, so the residual is 15 t: that of t = 1 and of t = 5, or of the later call for both
        assert torch.cat(outs).tolist() == ([15.0, 75.0] if separate else [75.0, 75.0])

    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({}, ValueError, "needs a pipe or a transformer"),
            ({"transformer": "transformer"}, ValueError, "no pipe that has it"),
            ({"pipe": Pipe(Net()), "blocks": [[]]}, ValueError, "blocks is an empty list"),
            ({"pipe": Pipe(Net()), "auto": False}, ValueError, "give blocks, or auto=True"),
            ({"pipe": Pipe(Net()), "forward_pattern": 6}, ValueError, "patterns 0 to 5"),
            ({"pipe": Pipe(Net()), "forward_pattern": [0, "1"]}, TypeError, "'1' .str. is neither"),
            ({"pipe": Pipe(Net()), "patch_functor": int}, TypeError, "not a PatchFunctor"),
            ({"pipe": Pipe(Net()), "params": [{"a": 1}]}, TypeError, "not a DitCacheConfig"),
            ({"pipe": Pipe(Net()), "has_separate_cfg": 1}, TypeError, "neither True, False nor None"),
        ],
    )
    def test_errors_at_once(self, fields, error, match):
        with pytest.raises(error, match=match):
            BlockAdapter(**fields)

    @pytest.mark.parametrize(
        ("fields", "error", "match"),
        [
            ({"forward_pattern": [0, 1, 2]}, ValueError, r"forward_pattern has 3 entries, but there are 2: \['blocks'"),
            ({"params": [None]}, ValueError, "params has 1 entries, but there are 2"),
            ({"has_separate_cfg": [True, False]}, ValueError, "has_separate_cfg has 2 entries, but there are 1"),
            ({"blocks": "nothing"}, ValueError, "Net has no 'nothing'"),
            ({"blocks": ["blocks", 7]}, TypeError, "7 .int. is neither a dotted path"),
            ({"blocks": ["blocks", "blocks"]}, ValueError, "names a list twice"),
        ],
    )
    def test_errors_when_attaching(self, fields, error, match):
        net = Net("two_lists")
        before = list(net.blocks)
        with pytest.raises(error, match=match):
            dit_cache(BlockAdapter(transformer=net, **fields), DitCacheConfig(0, 2, 0, 2))
        assert all(a is b for a, b in zip(before, net.blocks, strict=True))

    def test_blocks_said_twice(self):
        net = Net()
        with pytest.raises(ValueError, match="blocks is given twice"):
            dit_cache(BlockAdapter(transformer=net), DitCacheConfig(0, 2, 0, 2), blocks="blocks")

    def test_a_transformer_that_is_not_there(self):
        pipe = Pipe(Net())
        for wanted, name in (
            ("transformer_2", "'transformer_2'"),
            (Net(), "Net"),
            (["transformer", "third"], "'third'"),
        ):
            with pytest.raises(ValueError, match=rf"Pipe has no transformer {name}; it has \['transformer'\]"):
                dit_cache(BlockAdapter(pipe, wanted), DitCacheConfig(0, 2, 0, 2))
        pipe.proj = pipe.transformer.proj
        with pytest.raises(ValueError, match=r"transformer=\['proj'\] is not among those that have lists of blocks"):
            dit_cache(BlockAdapter(pipe, "proj"), DitCacheConfig(0, 2, 0, 2))
        pipe.transformer_2 = Net()
        with pytest.raises(ValueError, match=r"blocks are those of \['transformer \(Net\)'\], not of"):
            dit_cache(BlockAdapter(pipe, "transformer_2", blocks="transformer.blocks"), DitCacheConfig(0, 2, 0, 2))


class TestRegistry:
    @pytest.fixture(autouse=True)
    def clean(self):
        before = BlockAdapterRegistry.names()
        yield
        for name in set(BlockAdapterRegistry.names()) - set(before):
            BlockAdapterRegistry.unregister(name)

    def test_no_model_needs_one(self):
        assert BlockAdapterRegistry.names() == ()

    def test_by_the_class_of_a_model_or_one_that_it_derives_from(self):
        class Special(Net):
            pass

        @BlockAdapterRegistry.register("Special")
        def special(model):
            return BlockAdapter(transformer=model, blocks="singles", forward_pattern=0)

        class Derived(Special):
            pass

        for model in (Special("two_lists"), Derived("two_lists")):
            with dit_cache(model, DitCacheConfig(0, 2, 1, 3)) as cache:
                assert "singles.1 … singles.3 of 5" in repr(cache)
            with dit_cache(model, DitCacheConfig(0, 2, 1, 3), blocks="blocks") as cache:
                assert "<CacheHandle blocks.1 … blocks.3 of 5" in repr(cache)
        with dit_cache(Net("two_lists"), DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "of 10" in repr(cache)

    def test_by_the_beginning_of_a_name_the_longest_first(self):
        class SpecialNetTwo(Net):
            pass

        for beginning, blocks in (("Special*", "blocks"), ("SpecialNet*", "singles"), ("SpecialNetThree*", "none")):
            BlockAdapterRegistry.register(beginning)(
                lambda model, blocks=blocks: BlockAdapter(transformer=model, blocks=blocks)
            )
        with dit_cache(SpecialNetTwo("two_lists"), DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "singles.1 … singles.3 of 5" in repr(cache)
        BlockAdapterRegistry.register("SpecialNetTwo")(lambda model: BlockAdapter(transformer=model, blocks="blocks"))
        with dit_cache(SpecialNetTwo("two_lists"), DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "<CacheHandle blocks.1 … blocks.3 of 5" in repr(cache)
        with dit_cache(Net("two_lists"), DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "of 10" in repr(cache)

    def test_by_the_class_of_a_pipelines_transformer(self):
        class Special(Net):
            pass

        @BlockAdapterRegistry.register("Special")
        def special(model):
            return BlockAdapter(transformer=model, blocks="singles")

        pipe = Pipe(Special("two_lists"))
        pipe.transformer_2 = Net()
        with dit_cache(pipe, DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "transformer.singles.1 … transformer.singles.3 of 5" in repr(cache)
            assert "transformer_2.blocks.1 … transformer_2.blocks.3 of 5" in repr(cache)
            pipe(latents(), prompts=(prompt(),))
            assert cache.stats.reused_calls == 4

    def test_beside_parts_without_a_hint(self):
        class Special(Net):
            pass

        @BlockAdapterRegistry.register("Special")
        def special(model):
            return BlockAdapter(transformer=model, blocks="singles")

        pipe = Pipe(None)
        pipe.decoder, pipe.projection, pipe.connector = Special("two_lists"), torch.nn.Linear(2, 2), Net(depth=1)
        with dit_cache(pipe, DitCacheConfig(0, 2, 1, 3)) as cache:
            assert repr(cache) == "<CacheHandle decoder.singles.1 … decoder.singles.3 of 5 blocks>"

    def test_by_the_class_of_a_pipeline(self):
        class SpecialPipe(Pipe):
            pass

        @BlockAdapterRegistry.register("SpecialPipe")
        def special(pipe):
            return BlockAdapter(pipe, blocks="transformer.singles")

        with dit_cache(SpecialPipe(Net("two_lists")), DitCacheConfig(0, 2, 1, 3)) as cache:
            assert "transformer.singles.1" in repr(cache)

    def test_errors(self):
        BlockAdapterRegistry.register("Twice")(lambda model: BlockAdapter(transformer=model))
        with pytest.raises(ValueError, match="Twice has an adapter already"):
            BlockAdapterRegistry.register("Twice")(lambda model: BlockAdapter(transformer=model))

        class Wrong(Net):
            pass

        BlockAdapterRegistry.register("Other")(lambda model: BlockAdapter(transformer=Net()))
        with pytest.raises(ValueError, match="the hint for Other made an adapter of another object"):
            dit_cache(type("Other", (Net,), {})(), DitCacheConfig(0, 2, 0, 2))
        BlockAdapterRegistry.register("Wrong")(lambda model: None)
        with pytest.raises(TypeError, match="the hint for Wrong made None, not a BlockAdapter"):
            dit_cache(Wrong(), DitCacheConfig(0, 2, 0, 2))
        with pytest.raises(KeyError):
            BlockAdapterRegistry.unregister("Never")
