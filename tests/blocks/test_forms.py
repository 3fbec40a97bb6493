"""Every form in which blocks take and return their streams: found by observation, or said by pattern or functor."""

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import nn
from toys import latents, prompt

from dithooks import BlockAdapter, DitCacheConfig, ForwardPattern, PatchFunctor, dit_cache, timestep_scope
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
        class State:
            def __init__(self, image, text, steps):
                self.image, self.text, self.steps = image, text, steps

        class Fields(PatchFunctor):
            def read(self, args, kwargs):
                return [args[0].image, args[0].text]

            def take(self, output):
                return [output.image, output.text]

            def build(self, streams, args, kwargs):
                return State(*streams, args[0].steps)

        class Holder(nn.Module):
            def __init__(self, rate):
                super().__init__()
                self.rate = nn.Parameter(torch.tensor(rate))

            def forward(self, state):
                return State(*mixed(state.image, state.text, self.rate), state.steps)

        class Stateful(nn.Module):
            def __init__(self):
                super().__init__()
                self.blocks = nn.ModuleList(Holder(0.1 * (k + 1)) for k in range(4))

            def forward(self, x, timestep):
                state = State(x, x + 1, 3)
                for block in self.blocks:
                    state = block(state)
                return (state.image + 2 * state.text) * state.steps

        model, inputs = Stateful(), {"x": latents(), "timestep": torch.tensor(0.5)}
        model.runs = 0
        with torch.no_grad():
            plain = model(**inputs)
        handle = dit_cache(model, DitCacheConfig(0, 2, 0, 4))
        with torch.no_grad(), pytest.raises(ValueError, match=r"blocks\.0 returns State;.*patch_functor"):
            model(**inputs)
        handle.remove()
        for start, count in [(0, 4), (1, 2)]:
            out = reused(BlockAdapter(transformer=model, patch_functor=Fields()), model, start, count, **inputs)
            torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("together", [True, False])
def test_a_mask_that_is_handed_on_is_no_stream(together):
    class Masked(torch.nn.Module):
        def forward(self, hidden_states, mask=None):
            h, m = hidden_states if together else (hidden_states, mask)
            return h + m.unsqueeze(-1) * 0.5, m

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Masked() for _ in range(3))

        def forward(self, x, timestep):
            states = x, x[..., 0] > 0
            for block in self.blocks:
                states = block(states) if together else block(*states)
            return states[0]

    model = Model()
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 2, 0, 3)), pytest.raises(ValueError, match="no residual"):
        model(torch.randn(1, 4, 6), 1.0)
