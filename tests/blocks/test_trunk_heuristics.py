"""Which lists of a model are its trunk, and in which order they count."""

import pytest
import torch
from torch import nn
from toys import Net, Pipe, Single, latents

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.blocks.discovery import owners_of
from dithooks.blocks.trunk_heuristics import find_owners
from dithooks.engine.attachment import Attachment


def blocks(number, width=8):
    return nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Linear(width, width)) for _ in range(number))


def model(**lists):
    made = nn.Module()
    for name, each in lists.items():
        made.add_module(name, each)
    return made


def told(owner):
    return {listed.path: listed.apart for listed in owner.lists}


class TestTrunk:
    def test_long_lists_are_trunk(self):
        (owner,) = find_owners(model(doubles=blocks(4), singles=blocks(8)))
        assert told(owner) == {"doubles": "", "singles": ""}

    def test_light_ones_are_not(self):
        (owner,) = find_owners(model(embed=blocks(2), layers=blocks(30)))
        assert told(owner) == {"embed": "6.7% of the parameters of the heaviest list", "layers": ""}

    @pytest.mark.parametrize(
        ("name", "reason"),
        [
            ("noise_refiner", "named as a refiner"),
            ("text_blocks", "named as for the text"),
            ("vace_blocks", "named as a ControlNet"),
            ("face_adapter", "named as an adapter"),
        ],
    )
    def test_names_of_side_lists(self, name, reason):
        (owner,) = find_owners(model(**{name: blocks(4), "layers": blocks(4)}))
        assert told(owner) == {name: reason, "layers": ""}

    def test_a_name_does_not_outweigh_what_there_is(self):
        """A model of text blocks only is one of text blocks."""
        (owner,) = find_owners(model(text_blocks=blocks(40), heads=blocks(1)))
        assert told(owner)["text_blocks"] == ""

    def test_single_layers_are_no_blocks_unless_there_is_nothing_else(self):
        layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        (owner,) = find_owners(model(projections=layers, layers=blocks(4, 16)))
        assert told(owner) == {"projections": "single layers (Linear), no blocks", "layers": ""}
        (owner,) = find_owners(model(projections=layers))
        assert told(owner) == {"projections": ""}

    def test_lists_inside_blocks_are_not_looked_at(self):
        class Mixture(nn.Module):
            def __init__(self):
                super().__init__()
                self.experts = blocks(8, 16)
                self.gate = nn.Linear(4, 8)

        (owner,) = find_owners(model(layers=nn.ModuleList(Mixture() for _ in range(4))))
        assert told(owner) == {"layers": ""}

    def test_a_part_that_is_called_by_itself(self):
        (owner,) = find_owners(model(text=model(layers=blocks(2)), layers=blocks(8)))
        assert told(owner) == {"layers": "", "text.layers": "in a part of the model that is called by itself"}

    def test_the_trunk_may_be_in_a_part(self):
        (owner,) = find_owners(model(heads=blocks(1), backbone=model(layers=blocks(16))))
        assert (owner.path, [listed.path for listed in owner.trunk]) == ("backbone", ["backbone.layers"])

    def test_the_heavier_one_of_two_parts(self):
        """Whichever is declared first, and however deep it is."""
        light, heavy = model(layers=blocks(2)), model(layers=blocks(5))
        (owner,) = find_owners(model(encoder=light, decoder=heavy))
        assert told(owner) == {
            "decoder.layers": "",
            "encoder.layers": "in a part of the model that is called by itself",
        }
        assert [each.path for each in find_owners(model(one=heavy, two=light))] == ["one"]
        assert [each.path for each in find_owners(model(one=light, net=model(inner=heavy)))] == ["net.inner"]

    def test_all_lists_of_a_part_weigh(self):
        parts = {"one": model(layers=blocks(5)), "two": model(doubles=blocks(4), singles=blocks(4))}
        assert [each.path for each in find_owners(model(**parts))] == ["two"]

    @pytest.mark.parametrize("name", ["cond_encoder", "text", "context_net", "encoder", "prompt"])
    def test_the_name_decides_between_parts_of_about_one_weight(self, name):
        parts = {name: model(layers=blocks(5)), "decoder": model(layers=blocks(4))}
        assert [each.path for each in find_owners(model(**parts))] == ["decoder"]
        parts[name] = model(layers=blocks(9))  # more than twice as heavy: no name outweighs that
        assert [each.path for each in find_owners(model(**parts))] == [name]

    def test_lists_in_a_dict_of_lists_belong_to_the_model(self):
        (owner,) = find_owners(model(modes=nn.ModuleDict({"image": blocks(4), "video": blocks(4)})))
        assert (owner.path, list(told(owner))) == ("", ["modes.image", "modes.video"])

    def test_models_in_a_list(self):
        pair = model(models=nn.ModuleList([model(layers=blocks(4)), model(layers=blocks(4))]))
        assert [owner.path for owner in find_owners(pair)] == ["models.0", "models.1"]

    def test_a_list_of_lists_is_no_list_of_blocks(self):
        stages = model(stages=nn.ModuleList([blocks(4), blocks(4)]))
        (owner,) = find_owners(stages)
        assert list(told(owner)) == ["stages.0", "stages.1"]
        with pytest.raises(
            ValueError, match=r"leads to a list of lists: name these, blocks=\['stages.0', 'stages.1'\]"
        ):
            dit_cache(stages, DitCacheConfig(0, 2, 0, 2), blocks="stages")

    def test_a_sequential_calls_its_blocks_itself(self):
        one = nn.Module()
        one.body = nn.Sequential(nn.Linear(2, 2))
        with pytest.raises(ValueError, match=r"leads to an nn.Sequential.*make it an nn.ModuleList of these"):
            dit_cache(one, DitCacheConfig(0, 2, 0, 1), blocks="body")

    def test_none(self):
        assert find_owners(nn.Linear(2, 2)) == []


class TestPipelines:
    def test_components_that_are_not_called_transformer(self):
        pipe = Pipe(None)
        pipe.prior, pipe.text_encoder, pipe.image_encoder = Net(), model(layers=blocks(50)), None
        assert [owner.path for owner in owners_of(pipe)] == ["prior"]

    def test_the_heavy_one_of_several(self):
        pipe = Pipe(None)
        pipe.decoder, pipe.connectors = model(layers=blocks(30)), model(layers=blocks(2))
        assert [owner.path for owner in owners_of(pipe)] == ["decoder"]

    @pytest.mark.parametrize(
        "others",
        [
            ["text_encoder", "dit"],
            ["dit", "image_encoder"],
            ["text_encoder_2", "audio_encoder", "dit"],
            ["ipadapter_image_encoder", "dit", "vae_decoder", "blockwise_controlnet"],
            ["text_encoder", "dit", "transformer"],
        ],
    )
    @pytest.mark.parametrize("weight", [2, 20, 200])
    def test_components_are_told_apart_whether_the_pipeline_is_a_module_or_not(self, others, weight):
        """What encodes is no transformer, however heavy it is, and one called so is the transformer."""
        parts = {name: model(layers=blocks(weight)) for name in others}
        denoiser = others[-1] if others[-1] == "transformer" else "dit"
        parts[denoiser] = model(layers=blocks(10))
        pipe = Pipe(None)
        vars(pipe).update(parts)
        for pipeline in (pipe, model(**parts), model(pipe=model(**parts))):
            (owner,) = owners_of(pipeline)
            assert (owner.path.removeprefix("pipe."), owner.module) == (denoiser, parts[denoiser])

    def test_a_text_encoder_within_a_transformer_is_none(self):
        """Its own list is light against it."""
        (owner,) = find_owners(model(text_encoder=model(layers=blocks(90)), blocks=blocks(10)))
        assert owner.path == ""
        assert [each.path for each in owner.trunk] == ["blocks"]

    def test_an_encoder_by_itself_may_be_given(self):
        assert [each.path for each in find_owners(model(text_encoder=model(layers=blocks(4))))] == ["text_encoder"]

    def test_components_that_cannot_be_told(self):
        """diffusers raises where an expected one is missing; its attributes are there all the same."""

        class Partial(Pipe):
            @property
            def components(self):
                raise ValueError("expected another")

        assert [owner.path for owner in owners_of(Partial(Net()))] == ["transformer"]

    def test_two_experts_one_of_them_missing(self):
        pipe = Pipe(Net())
        pipe.transformer_2 = None
        assert [owner.path for owner in owners_of(pipe)] == ["transformer"]
        pipe.transformer_2 = Net()
        assert [owner.path for owner in owners_of(pipe)] == ["transformer", "transformer_2"]


class Order(nn.Module):
    """Calls its lists in another order than it has them."""

    def __init__(self, calls):
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.ModuleList(Single() for _ in range(3))
        self.second = nn.ModuleList(Single() for _ in range(3))
        self.embed, self.calls, self.ran = nn.Linear(4, 8), calls, []
        for name, block in self.named_modules():
            if isinstance(block, Single):
                block.register_forward_hook(lambda *_, name=name: self.ran.append(name))

    def forward(self, hidden_states, timestep):
        h, temb = self.embed(hidden_states), timestep.reshape(1, 1, 1).expand(2, 1, 8)[:, 0]
        for name in self.calls:
            h = self.get_submodule(name)(h, temb)
        return h


ORDERS = {
    "reversed": [f"second.{i}" for i in range(3)] + [f"first.{i}" for i in range(3)],
    "in turn": [f"{name}.{i}" for i in range(3) for name in ("first", "second")],
    "as they are": [f"{name}.{i}" for name in ("first", "second") for i in range(3)],
}


@pytest.mark.parametrize("blocks", [None, ["first", "second"]])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("start", "count"), [(0, 6), (0, 2), (1, 4), (5, 1)])
def test_blocks_count_in_the_order_of_their_calls(order, blocks, start, count):
    net, x, t = Order(ORDERS[order]), latents(), torch.tensor(0.5)
    before = [*net.first, *net.second]
    with torch.no_grad():
        plain = net(x, t)
        with dit_cache(net, DitCacheConfig(0, 2, start, count), blocks=blocks) as cache:
            for step in (0, 1):
                net.ran.clear()
                with timestep_scope(step):
                    assert torch.allclose(net(x, t), plain, atol=1e-6)
            assert net.ran == [name for i, name in enumerate(ORDERS[order]) if not start <= i < start + count]
            assert (cache.stats.reused_calls, cache.stats.blocks_total) == (1, 12)
            names = ORDERS[order]
            assert f"{names[start]} … {names[start + count - 1]} of 6" in repr(cache)
        assert all(a is b for a, b in zip(before, [*net.first, *net.second], strict=True))
        assert torch.equal(net(x, t), plain)
    assert not any(module._forward_pre_hooks for module in net.modules())


@pytest.mark.parametrize("place", ["_put_blocks_back", "_make_stand_ins", "_put_stand_ins"])
def test_a_move_that_is_interrupted_is_finished_by_the_next_call(place, monkeypatch):
    """The first call shows that the range is other blocks; Ctrl-C while the stand-ins are put there."""
    net, x, t = Order(ORDERS["reversed"]), latents(), torch.tensor(0.5)
    before, original = [*net.first, *net.second], getattr(Attachment, place)
    with torch.no_grad():
        plain = net(x, t)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 3)) as cache:

            def interrupted(self):
                raise KeyboardInterrupt

            monkeypatch.setattr(Attachment, place, interrupted)
            with timestep_scope(0), pytest.raises(KeyboardInterrupt):
                net(x, t)
            monkeypatch.setattr(Attachment, place, original)
            for step in (1, 2, 3):
                net.ran.clear()
                with timestep_scope(step):
                    assert torch.allclose(net(x, t), plain, atol=1e-6)
            assert net.ran == [f"first.{i}" for i in range(3)]
            assert cache.stats.reused_calls > 0
        assert all(a is b for a, b in zip(before, [*net.first, *net.second], strict=True))
        assert torch.equal(net(x, t), plain)
    assert not any(module._forward_pre_hooks for module in net.modules())


def test_a_list_that_is_not_run_does_not_count():
    net, x, t = Order([f"second.{i}" for i in range(3)]), latents(), torch.tensor(0.5)
    with torch.no_grad():
        with dit_cache(net, DitCacheConfig(0, 2, 0, 3)) as cache:
            for step in (0, 1):
                net.ran.clear()
                with timestep_scope(step):
                    net(x, t)
            assert net.ran == []
            assert cache.stats.blocks_total == 6
        with (
            dit_cache(net, DitCacheConfig(0, 2, 0, 4)),
            pytest.raises(
                ValueError, match=r"blocks 0 to 3 reach past the end: Order calls 3 blocks.*first: not run in this call"
            ),
        ):
            net(x, t)
    net(x, t)


def test_a_light_list_whose_streams_do_not_go_on_is_left_out():
    """It counts at first, by its weight; seen at work, it turns out to have other streams."""

    class Aside(Net):
        def forward(self, hidden_states, timestep):
            steering = torch.ones(2, 3, 8)
            for block in self.steer:
                steering = block(steering, torch.ones(2, 8))
            return super().forward(hidden_states, timestep) * steering.mean()

    net, x, t = Aside("single"), latents(), torch.tensor(0.5)
    trunk = net.blocks
    del net.blocks  # so that the list that runs first comes first
    net.steer, net.blocks = nn.ModuleList(Single() for _ in range(2)), trunk
    assert [listed.path for listed in owners_of(net)[0].trunk] == ["steer", "blocks"]
    with torch.no_grad():
        plain = net(x, t)
        with dit_cache(net, DitCacheConfig(0, 2, 0, 5)) as cache:
            for step in (0, 1):
                with timestep_scope(step):
                    assert torch.allclose(net(x, t), plain, atol=1e-6)
            assert cache.stats.reused_calls == 1
            assert "blocks.0 … blocks.4 of 5" in repr(cache)
