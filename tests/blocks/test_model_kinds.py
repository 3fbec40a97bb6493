"""U-Nets and ControlNets are named as such when a cache is attached to them; no other transformer is taken for one."""

from types import SimpleNamespace

import diffusers
import pytest
import torch
from torch import nn

from dithooks import DitCacheConfig, dit_cache
from dithooks.blocks.model_kinds import is_controlnet, is_unet
from dithooks.tiny import build, names

CONFIG = DitCacheConfig(0, 2, 0, 1)
UNETS = {
    "UNet2DConditionModel": {},
    "UNet2DModel": {},
    "UNet1DModel": {},
    "UNet3DConditionModel": {},
    "UNetMotionModel": {},
    "UNetSpatioTemporalConditionModel": {},
    "I2VGenXLUNet": {},
    "Kandinsky3UNet": {},
    "StableCascadeUNet": {},
}
CONTROLNETS = {
    "ControlNetModel": {},
    "SparseControlNetModel": {},
    "FluxControlNetModel": {"num_layers": 2, "num_single_layers": 2},
    "SD3ControlNetModel": {"num_layers": 2},
    "QwenImageControlNetModel": {"num_layers": 2},
    "HunyuanDiT2DControlNetModel": None,  # has no usable defaults
    "SanaControlNetModel": {"num_layers": 2},
    "CosmosControlNetModel": {},
}


def empty(name, config):
    with torch.device("meta"):
        return getattr(diffusers, name)(**config)


@pytest.mark.parametrize("name", UNETS)
def test_unets(name):
    model = empty(name, UNETS[name])
    for target in (model, SimpleNamespace(unet=model, scheduler=None)):
        with pytest.raises(ValueError, match=f"{name} is a U-Net: .*Name the blocks of one stage") as error:
            dit_cache(target, CONFIG)
        assert len(str(error.value)) <= 300
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


@pytest.mark.parametrize("name", CONTROLNETS)
def test_controlnets_as_they_are_before_training(name):
    config = CONTROLNETS[name]
    model = build(name).model if config is None else empty(name, config)
    assert is_controlnet(model)
    lists = [path for path, each in model.named_children() if isinstance(each, nn.ModuleList) and len(each)]
    for path in lists:  # also where the user names the blocks
        with pytest.raises(ValueError, match=f"{name} is a ControlNet: .*Cache the model that it steers") as error:
            dit_cache(model, CONFIG, blocks=path)
        assert len(str(error.value)) <= 300
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in model.modules())


def test_one_list_within_a_unet_may_be_named():
    """Blocks in a row, that the model does nothing else with: they are cached as any others."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=2,
    ).eval()
    given = [torch.randn(1, 4, 8, 8), torch.tensor(10), torch.randn(1, 3, 8)]
    with torch.no_grad():
        plain = unet(*given).sample
        with dit_cache(unet, DitCacheConfig(0, 2, 0, 2), blocks="mid_block.attentions.0.transformer_blocks") as cache:
            found = [unet(given[0], torch.tensor(t), given[2]).sample for t in (10, 9)]
            assert cache.stats.reused_calls == 1
    torch.testing.assert_close(found[0], plain)
    assert (found[1] - plain).abs().max() < 0.1


@pytest.mark.parametrize("name", names())
def test_no_transformer_is_taken_for_one(name):
    model = build(name).model
    assert not is_unet(model)
    assert is_controlnet(model) is ("ControlNet" in name)


class Modulated(nn.Module):
    """A transformer of somebody's own, with a layer for each block that is no output."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.modulations = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x, timestep):
        for block, modulation in zip(self.blocks, self.modulations, strict=True):
            x = block(x) + modulation(timestep.expand(4))
        return x


def test_a_layer_for_each_block_is_no_controlnet():
    assert not is_controlnet(Modulated())
    renamed = Modulated()
    renamed.zero_convs = renamed.modulations
    del renamed.modulations
    assert is_controlnet(renamed)


class Steered(nn.Module):
    """A transformer that a control is put into, through a layer for each block, with an adapter around all of them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        self.control_projs = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.adaln_zeros = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.down_projs, self.up_projs = (nn.ModuleList([nn.Linear(4, 4)]) for _ in range(2))

    def forward(self, x, timestep, control):
        x = self.down_projs[0](x)
        for block, proj, zero in zip(self.blocks, self.control_projs, self.adaln_zeros, strict=True):
            x = block(x + proj(control)) + zero(timestep.expand(4))
        return self.up_projs[0](x)


class Hourglass(nn.Module):
    """A transformer whose blocks on the way down hand nothing past those that follow."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.down_blocks, self.mid_blocks, self.up_blocks = (
            nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(number)) for number in (2, 4, 2)
        )

    def forward(self, x, timestep):
        for block in (*self.down_blocks, *self.mid_blocks, *self.up_blocks):
            x = block(x)
        return x


def test_down_and_up_without_skips():
    model, x = Hourglass(), torch.randn(1, 5, 4)
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 2, 0, 2)) as cache:
        found = [model(x + step, torch.tensor(1.0 - step / 2)) for step in range(2)]
        assert cache.stats.reused_calls == 1
        assert str(cache).startswith("down_blocks.0 … down_blocks.1 of 8 blocks")
        h = x
        for block in model.down_blocks:
            h = block(h)
        h = x + 1 + (h - x)
        for block in (*model.mid_blocks, *model.up_blocks):
            h = block(h)
    torch.testing.assert_close(found[1], h)


def test_a_model_that_is_steered_is_neither():
    """By hand: the second step has the residual of the first between the same two layers."""
    model, x, control = Steered(), torch.randn(2, 5, 4), torch.randn(2, 5, 4)
    with torch.no_grad(), dit_cache(model, DitCacheConfig(0, 2, 1, 1)) as cache:
        found = [model(x + step, torch.tensor(1.0 - step / 2), control) for step in range(2)]
        assert cache.stats.reused_calls == 1
        for step, own in enumerate((torch.tensor(1.0), torch.tensor(0.5))):
            h = model.down_projs[0](x + step)
            h = model.blocks[0](h + model.control_projs[0](control)) + model.adaln_zeros[0](own.expand(4))
            h = entered = h + model.control_projs[1](control)
            if step == 0:
                h = model.blocks[1](h)
                delta = h - entered
            else:
                h = h + delta
            h = h + model.adaln_zeros[1](own.expand(4))
            h = model.blocks[2](h + model.control_projs[2](control)) + model.adaln_zeros[2](own.expand(4))
            torch.testing.assert_close(found[step], model.up_projs[0](h))
