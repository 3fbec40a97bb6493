"""What users may say about their blocks: patterns, functors, adapters, hints; and every form that is found without."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from toys import Ladder, Net, Pipe, latents, prompt

from dithooks import (
    BlockAdapter,
    BlockAdapterRegistry,
    DitCacheConfig,
    ForwardPattern,
    PatchFunctor,
    dit_cache,
    timestep_scope,
)
from dithooks.blocks.pattern import pattern_of
from dithooks.tiny import build


class Answer(NamedTuple):
    text: torch.Tensor
    image: torch.Tensor


@dataclass
class Output:
    image: torch.Tensor
    text: torch.Tensor


def mixed(h, e, rate):
    return h + rate * e.mean(1, keepdim=True), e - rate * torch.tanh(h).mean(1, keepdim=True)


class Block(nn.Module):
    """Mixes h and e, and returns them in one of many forms."""

    def __init__(self, form, rate):
        super().__init__()
        self.form, self.rate = form, nn.Parameter(torch.tensor(rate))

    def forward(self, hidden_states, encoder_hidden_states=None):
        if self.form in ("h->h", "h->he", "h->eh"):
            h = hidden_states + self.rate * torch.tanh(hidden_states).mean(1, keepdim=True)
            return {"h->h": h, "h->he": (h, h.sum(-1)), "h->eh": (h.sum(-1), h)}[self.form]
        h, e = mixed(hidden_states, encoder_hidden_states, self.rate)
        forms = {
            "he->he": lambda: (h, e),
            "he->eh": lambda: (e, h),
            "he->h": lambda: h,
            "list": lambda: [e, h],
            "dict": lambda: {"text": e, "image": h},
            "named tuple": lambda: Answer(e, h),
            "dataclass": lambda: Output(h, e),
        }
        return forms[self.form]()


PATTERNS = {"he->he": 0, "he->eh": 1, "he->h": 2, "h->h": 3, "h->he": 4, "h->eh": 5}
FORMS = [*PATTERNS, "list", "dict", "named tuple", "dataclass"]


class Model(nn.Module):
    """Runs blocks of one form; text and image have the same number of tokens, so that shapes tell nothing."""

    def __init__(self, form, depth=4):
        super().__init__()
        self.form = form
        self.blocks = nn.ModuleList(Block(form, 0.1 * (k + 1)) for k in range(depth))
        self.runs = 0
        for block in self.blocks:
            block.register_forward_hook(self._count)

    def _count(self, *_):
        self.runs += 1

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        h, e, extra = hidden_states, encoder_hidden_states, torch.zeros(())
        for block in self.blocks:
            out = block(h) if self.form.startswith("h->") else block(h, encoder_hidden_states=e)
            if self.form in ("he->h", "h->h"):
                h = out
            elif self.form in ("he->he",):
                h, e = out
            elif self.form == "h->he":
                h, extra = out
            elif self.form == "h->eh":
                extra, h = out
            elif self.form == "dict":
                h, e = out["image"], out["text"]
            elif self.form in ("named tuple", "dataclass"):
                h, e = out.image, out.text
            else:
                e, h = out
        return h + 0.5 * e.mean(1, keepdim=True) + extra.mean()


def reused(target, model, start, count, times=1, config=None, **inputs):
    """The output of a reused step, on the inputs of the computed one; it ran what it should have."""
    with torch.no_grad(), dit_cache(target, config or DitCacheConfig(0, 2, start, count)) as cache:
        with timestep_scope(0):
            model(**inputs)
        model.runs = 0
        with timestep_scope(1):
            out = model(**inputs)
        assert cache.stats.reused_calls == times
    return out


def given(tokens=6):
    return {
        "hidden_states": torch.randn(2, 6, 8),
        "timestep": torch.tensor(0.5),
        "encoder_hidden_states": prompt(2, tokens),
    }


class TestForms:
    @pytest.mark.parametrize("form", FORMS)
    @pytest.mark.parametrize(("start", "count"), [(0, 4), (1, 2), (3, 1), (0, 1)])
    def test_found_by_observation(self, form, start, count):
        model, inputs = Model(form), given()
        with torch.no_grad():
            plain = model(**inputs)
        out = reused(model, model, start, count, **inputs)
        assert model.runs == 4 - count
        torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("form", PATTERNS)
    @pytest.mark.parametrize(("start", "count"), [(0, 4), (1, 2)])
    def test_declared(self, form, start, count):
        model, inputs = Model(form), given()
        adapter = BlockAdapter(transformer=model, blocks="blocks", forward_pattern=PATTERNS[form])
        with torch.no_grad():
            plain = model(**inputs)
        torch.testing.assert_close(reused(adapter, model, start, count, **inputs), plain, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(("wrong", "output"), [(4, 1), (5, 0)])
    def test_a_stream_declared_as_none(self, wrong, output):
        model = Model("he->he" if wrong == 4 else "he->eh")
        handle = dit_cache(BlockAdapter(transformer=model, forward_pattern=wrong), DitCacheConfig(0, 2, 0, 3))
        with torch.no_grad(), pytest.raises(ValueError, match=rf"output {output} is no stream, but the model hands it"):
            model(**given())
        handle.remove()

    @pytest.mark.parametrize(("form", "wrong"), [("he->he", 2), ("he->h", 0), ("h->h", 4)])
    def test_declared_and_not_so(self, form, wrong):
        model = Model(form)
        handle = dit_cache(BlockAdapter(transformer=model, forward_pattern=wrong), DitCacheConfig(0, 2, 0, 4))
        with torch.no_grad(), pytest.raises(ValueError, match=rf"returns \d value.*forward pattern {wrong}"):
            model(**given())
        handle.remove()

    def test_declared_the_wrong_way_round(self):
        """With as many text as image tokens shapes cannot tell; where the outputs go does."""
        model = Model("he->he")
        handle = dit_cache(BlockAdapter(transformer=model, forward_pattern=1), DitCacheConfig(0, 2, 0, 3))
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"output 0 carries on encoder_hidden_states, but the model hands it"),
        ):
            model(**given())
        handle.remove()
        handle = dit_cache(BlockAdapter(transformer=model, forward_pattern=1), DitCacheConfig(0, 2, 0, 3))
        with (
            torch.no_grad(),
            pytest.raises(ValueError, match=r"by forward pattern 1.*they are \[2, 6, 8\] float32 and \[2, 3, 8\]"),
        ):
            model(**given(tokens=3))
        handle.remove()

    def test_three_streams(self):
        class Three(nn.Module):
            def __init__(self, rate):
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(rate))

            def forward(self, video, audio, text):
                return audio + self.rate * video.mean(), text + self.rate * audio.mean(), video * (1 + self.rate)

        class Media(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Three(0.1 * (k + 1)) for k in range(4))

            def forward(self, video, timestep):
                audio, text = video + 1, video + 2
                for block in self.blocks:
                    audio, text, video = block(video, text=text, audio=audio)
                return video + 2 * audio + 3 * text

        model, inputs = Media(), {"video": torch.randn(2, 3, 4), "timestep": torch.tensor(0.5)}
        model.runs = 0
        with torch.no_grad():
            plain = model(**inputs)
        torch.testing.assert_close(reused(model, model, 0, 4, **inputs), plain, rtol=1e-5, atol=1e-6)

    def test_what_observation_cannot_tell_a_pattern_does(self):
        class Swap(nn.Module):
            def __init__(self):
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(0.5))

            def forward(self, image, text):
                return text + self.rate, image + 2 * self.rate

        class One(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList([Swap()])

            def forward(self, x, timestep):
                text, image = self.blocks[0](x, x * 2)
                return image - 3 * text

        model, inputs = One(), {"x": latents(), "timestep": torch.tensor(0.5)}
        model.runs = 0
        handle = dit_cache(model, DitCacheConfig(0, 2, 0, 1))
        with torch.no_grad(), pytest.raises(ValueError, match=r"alike: image, text: say which with BlockAdapter"):
            model(**inputs)
        handle.remove()
        with torch.no_grad():
            plain = model(**inputs)
        out = reused(BlockAdapter(transformer=model, forward_pattern=1), model, 0, 1, **inputs)
        torch.testing.assert_close(out, plain)


class TestPattern:
    @pytest.mark.parametrize(("number", "returns"), [*enumerate(["he", "eh", "h", "h", "he", "eh"])])
    def test_by_number(self, number, returns):
        pattern = ForwardPattern(number)
        assert (pattern.returns, pattern.takes_text) == (returns, number < 3)

    def test_names_of_streams(self):
        names = ["hidden_states", "encoder_hidden_states", "temb"]
        assert [ForwardPattern(n).carries(names) for n in range(6)] == [
            ("hidden_states", "encoder_hidden_states"),
            ("encoder_hidden_states", "hidden_states"),
            ("hidden_states",),
            ("hidden_states",),
            ("hidden_states", None),
            (None, "hidden_states"),
        ]
        assert ForwardPattern(1).carries(["x", "context", "t"]) == ("context", "x")
        assert ForwardPattern(1).carries(["encoder_hidden_states", "x"]) == ("encoder_hidden_states", "x")
        with pytest.raises(ValueError, match=r"forward pattern 0, \(h, e\) -> \(h, e\), does not fit"):
            ForwardPattern(0).carries(["x"])

    def test_found_again(self):
        names = ["hidden_states", "encoder_hidden_states"]
        for number in range(6):
            takes = names if ForwardPattern(number).takes_text else names[:1]
            assert pattern_of(takes, ForwardPattern(number).carries(takes)) is ForwardPattern(number)
        assert pattern_of(["vis", "aud"], ("vis", "aud")) is None


class HiDreamBlocks(PatchFunctor):
    """Blocks of one class in two lists: with text apart, and with text among the hidden states."""

    def read(self, args, kwargs):
        both = kwargs["hidden_states"], kwargs["encoder_hidden_states"]
        return [stream for stream in both if stream is not None]

    def take(self, output):
        return output if isinstance(output, tuple) else [output]

    def build(self, streams, args, kwargs):
        return streams[0] if kwargs["encoder_hidden_states"] is None else tuple(streams)


class ChromaBlocks(PatchFunctor):
    """Text comes first, here and in what the model joins the two to."""

    def read(self, args, kwargs):
        return [kwargs[name] for name in ("encoder_hidden_states", "hidden_states") if name in kwargs]

    def take(self, output):
        return output if isinstance(output, tuple) else [output]

    def build(self, streams, args, kwargs):
        return tuple(streams) if "encoder_hidden_states" in kwargs else streams[0]


class TestFunctor:
    @pytest.mark.parametrize(
        ("name", "functor"),
        [
            ("HiDreamImageTransformer2DModel", HiDreamBlocks()),
            ("ChromaTransformer2DModel", ChromaBlocks()),
            ("ChromaTransformer2DModel#controlnet", ChromaBlocks()),
        ],
    )
    @pytest.mark.parametrize(("start", "count"), [(0, 8), (1, 5), (0, 4), (5, 2)])
    def test_the_same_as_by_observation(self, name, functor, start, count):
        """These two need none; said by a functor, the very same comes out, on other latents than the computed step."""
        model, inputs = build(name)
        outs = []
        for target in (model, BlockAdapter(transformer=model, patch_functor=functor)):
            with torch.no_grad(), dit_cache(target, DitCacheConfig(0, 2, start, count)) as cache:
                with timestep_scope(0, branch=0):
                    model(**inputs())
                with timestep_scope(1, branch=0):
                    outs.append(model(**inputs(seed=1)).sample)
                assert cache.stats.reused_calls == 1
        assert torch.equal(*outs)

    def test_one_that_returns_no_sequence(self):
        class Bare(ChromaBlocks):
            def take(self, output):
                return output[0]

        model, inputs = build("ChromaTransformer2DModel")
        handle = dit_cache(BlockAdapter(transformer=model, patch_functor=Bare()), DitCacheConfig(0, 2, 0, 8))
        with torch.no_grad(), pytest.raises(TypeError, match=r"Bare.take returned Tensor: give a list or tuple"):
            model(**inputs())
        handle.remove()

    def test_blocks_that_fit_no_pattern(self):
        class State(PatchFunctor):
            def read(self, args, kwargs):
                return [args[0]["image"], args[0]["text"]]

            def take(self, output):
                return [output["image"], output["text"]]

            def build(self, streams, args, kwargs):
                return {**args[0], "image": streams[0], "text": streams[1]}

        class Holder(nn.Module):
            def __init__(self, rate):
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(rate))

            def forward(self, state):
                h, e = mixed(state["image"], state["text"], self.rate)
                return {**state, "image": h, "text": e}

        class Stateful(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Holder(0.1 * (k + 1)) for k in range(4))

            def forward(self, x, timestep):
                state = {"image": x, "text": x + 1, "steps": 3}
                for block in self.blocks:
                    state = block(state)
                return (state["image"] + 2 * state["text"]) * state["steps"]

        model, inputs = Stateful(), {"x": latents(), "timestep": torch.tensor(0.5)}
        model.runs = 0
        with torch.no_grad():
            plain = model(**inputs)
        handle = dit_cache(model, DitCacheConfig(0, 2, 0, 4))
        with torch.no_grad(), pytest.raises(ValueError, match=r"position steps: int.*patch_functor"):
            model(**inputs)
        handle.remove()
        for start, count in [(0, 4), (1, 2)]:
            out = reused(BlockAdapter(transformer=model, patch_functor=State()), model, start, count, **inputs)
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


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
