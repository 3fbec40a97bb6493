"""Changes of weights are counted; weights that are moved, cast or taken away for a while have not changed."""

import copy
import gc
import threading
import weakref

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading, apply_layerwise_casting
from peft import LoraConfig, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations
from toys import Ladder, Net, latents, loop

from dithooks import DitCacheConfig, dit_cache
from dithooks.engine.arguments import CallArguments
from dithooks.engine.weights_version import WATCHED, WeightsVersion
from dithooks.integrations.peft_adapters import PeftAdapters

CONFIG = DitCacheConfig(1, 4, 0, 5)  # of six steps, the second to the fourth after the first anchor are reused
PLAIN = {"warm-up": 1, "refresh": 2, "reuse": 3}
LORA = LoraConfig(r=2, target_modules=["proj"], init_lora_weights=False)


@pytest.fixture
def net():
    return Net().eval()


def watch(net):
    return WeightsVersion(net, PeftAdapters())


def counted(weights, change):
    """By how much a change counts, and what comes after it."""
    before = weights.version(walk=False)
    change()
    after = weights.version(walk=False)
    assert weights.version(walk=False) == after
    assert weights.version(walk=True) == after
    return after - before


class Negative(nn.Module):
    def forward(self, weight):
        return -weight


class TestWhatIsNoticed:
    def other(self):
        return {name: value + 1 for name, value in Net().state_dict().items()}

    @pytest.mark.parametrize(
        "change",
        [
            lambda net, other: net.load_state_dict(other),
            lambda net, other: net.load_state_dict(other, assign=True),
            lambda net, other: net.blocks[1].load_state_dict(Net().blocks[1].state_dict()),
            lambda net, other: net.blocks[1].proj.weight.mul_(2),
            lambda net, other: net.blocks[1].register_module("proj", nn.Linear(16, 8)),
            lambda net, other: net.blocks[1].proj.register_parameter("weight", nn.Parameter(torch.ones(8, 16))),
            lambda net, other: parametrizations.weight_norm(net.blocks[1].proj),
            lambda net, other: nn.utils.parametrize.register_parametrization(net.embed, "weight", Negative()),
            lambda net, other: inject_adapter_in_model(LORA, net),
            lambda net, other: inject_adapter_in_model(LORA, net.blocks[3]),
        ],
        ids=[
            "load",
            "assign",
            "load a part",
            "write",
            "layer",
            "parameter",
            "norm",
            "parametrize",
            "lora",
            "lora, part",
        ],
    )
    def test_each_counts_once(self, net, change):
        weights = watch(net)
        assert counted(weights, lambda: change(net, self.other())) == 1

    def test_replaced_after_they_were_moved(self, net):
        weights = watch(net)
        assert weights.version(walk=False) == 0
        net.double()
        assert weights.version(walk=False) == 0
        assert counted(weights, lambda: net.load_state_dict(Net().double().state_dict(), assign=True)) == 1

    def test_an_adapter_on_a_layer_that_is_not_looked_at(self):
        net = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4 * WATCHED)))
        weights = watch(net)
        weights.version(walk=False)
        other = next(str(k) for k in range(len(net)) if str(k) not in set(weights._state[0].names))
        config = LoraConfig(r=2, target_modules=[other], init_lora_weights=False)
        assert counted(weights, lambda: inject_adapter_in_model(config, net)) == 1
        assert counted(weights, lambda: net[int(other)].set_scale("default", 0.1)) == 1

    def test_an_optimizer(self, net):
        weights, optimizer = watch(net), torch.optim.SGD(net.parameters(), lr=0.1)
        with torch.enable_grad():
            net(latents(), torch.tensor(0.5)).sum().backward()
        assert counted(weights, optimizer.step) == 1

    @pytest.mark.parametrize("name", ["scaling", "merged_adapters", "_disable_adapters", "_active_adapter"])
    def test_adapters(self, net, name):
        inject_adapter_in_model(LORA, net)
        layer, weights = net.blocks[2].proj, watch(net)
        change = {
            "scaling": lambda: layer.set_scale("default", 0.3),
            "merged_adapters": layer.merge,
            "_disable_adapters": lambda: layer.enable_adapters(False),
            "_active_adapter": lambda: layer.set_adapter([]),
        }[name]
        assert counted(weights, change) == 1
        assert counted(weights, lambda: layer.enable_adapters(True)) == (name == "_disable_adapters")

    def test_a_strength_that_is_a_tensor(self, net):
        """As for compiled models whose adapters are to be swapped."""
        inject_adapter_in_model(LORA, net)
        layer = net.blocks[2].proj
        layer.scaling["default"] = torch.tensor(0.5)
        weights = watch(net)
        assert counted(weights, lambda: None) == 0
        assert counted(weights, lambda: layer.scaling["default"].fill_(0.7)) == 1
        assert counted(weights, lambda: layer.scaling.update(default=torch.tensor(0.7))) == 1

    def test_the_strength_that_a_call_is_told(self):
        assert CallArguments(
            {"x": latents(), "joint_attention_kwargs": {"scale": 0.5, "mask": 1}}, frozenset()
        ).scales == (0.5,)
        assert (
            CallArguments({"joint_attention_kwargs": None, "attention_kwargs": {}, "scale": 0.7}, frozenset()).scales
            == ()
        )
        assert CallArguments({"attention_kwargs": {"scale": torch.tensor(1.0)}}, frozenset()).scales == ()


class DTensor(nn.Parameter):
    """By its name, what a sharded parameter is."""


def sharded(net, kind):
    """Simulated: every parameter gives way to one of another class, as those of a sharded model do around a call."""
    for module in net.modules():
        for name, parameter in list(module._parameters.items()):
            module._parameters[name] = kind(parameter.data.clone())


class TestWhatIsNoChange:
    def test_sharded_parameters_that_are_gathered(self, net):
        weights = watch(net)
        assert counted(weights, lambda: sharded(net, DTensor)) == 0
        assert counted(weights, lambda: sharded(net, nn.Parameter)) == 0
        assert counted(weights, lambda: sharded(net, nn.Parameter)) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: net.half().float(),
            lambda net: net.double(),
            lambda net: net.to("meta"),
            lambda net: [net.train(), net.eval(), net.requires_grad_(False), net.share_memory()],
            lambda net: [setattr(each, "data", each.data.clone()) for each in net.parameters()],  # as offloading does
            lambda net: [copy.deepcopy(net), net.state_dict()],
            lambda net: [torch.utils.swap_tensors(each, nn.Parameter(each.clone())) for each in net.embed.parameters()],
        ],
        ids=["half and back", "double", "meta", "modes", "moved", "copied", "swapped"],
    )
    def test_moving_and_casting(self, net, change):
        net.load_state_dict(Net().state_dict())  # weights that have been written once more than new ones
        weights = watch(net)
        assert counted(weights, lambda: change(net)) == 0

    @pytest.mark.parametrize("attach", [True, False])
    @pytest.mark.parametrize("kind", [Net, Ladder])  # the latter's blocks have parameters of their own
    def test_blocks_given_a_stand_in_are_the_same_blocks(self, kind, attach):
        net = kind()
        handle = None if attach else dit_cache(net, CONFIG)
        weights = watch(net)
        assert counted(weights, (lambda: dit_cache(net, CONFIG)) if attach else handle.remove) == 0

    def test_an_adapter_that_does_nothing_may_be_scaled(self, net):
        inject_adapter_in_model(LORA, net)
        layers = [block.proj for block in net.blocks]
        for layer in layers:
            layer.enable_adapters(False)
        weights = watch(net)
        assert counted(weights, lambda: [layer.set_scale("default", 0.1) for layer in layers]) == 0

    def test_made_in_inference_mode(self):
        """Such tensors do not count what is written to them; all else is noticed."""
        with torch.inference_mode():
            net = Net()
        weights = watch(net)
        assert counted(weights, lambda: loop(net, latents())) == 0
        assert counted(weights, lambda: net.load_state_dict(Net().state_dict(), assign=True)) == 1

    @pytest.mark.parametrize("where", ["accelerate", "groups", "leaves", "casting", "swapping"])
    def test_offloaded_models_reuse_as_much(self, where):
        """Weights come and go in every call, as new parameters or new contents of the same ones."""
        torch.manual_seed(0)
        model = tiny_flux()
        model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
        cpu = torch.device("cpu")
        if where == "accelerate":
            cpu_offload(model, cpu)
        elif where == "groups":
            apply_group_offloading(model, cpu, cpu, "block_level", 1)
        elif where == "leaves":
            apply_group_offloading(model, cpu, cpu, "leaf_level")
        elif where == "casting":
            apply_layerwise_casting(model, torch.bfloat16, torch.float32)
        with dit_cache(model, CONFIG) as cache:
            steps(model, 6, (lambda k: swapped(model)) if where == "swapping" else None)
            assert cache.stats.reasons == PLAIN


def tiny_flux():
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()


def steps(model, count, at=None):
    prompt, pooled = torch.randn(1, 5, 32), torch.randn(1, 32)
    for k in range(count):
        if at is not None:
            at(k)
        model(
            hidden_states=torch.randn(1, 16, 4),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(5, 3),
            timestep=torch.tensor([1 - k / count]),
        )


def swapped(model):
    """Moved to another device and back in the way of quantised weights."""
    for parameter in model.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.clone()))


class TestHowItIsToldOfCalls:
    @pytest.mark.parametrize("change", [True, False])
    def test_within_a_run_the_next_call_is_computed_and_the_former_forgotten(self, net, change):
        x, t = latents(), [torch.tensor(1 - k / 6) for k in range(6)]
        with dit_cache(net, CONFIG) as cache:
            for k in range(6):
                if k == 3 and change:
                    net.blocks[2].proj.weight.mul_(3)
                out = net(x, t[k])
                if k == 3 and change:
                    computed = out
            reasons = dict(cache.stats.reasons)
        assert reasons == (dict(PLAIN, reuse=2, weights=1) if change else PLAIN)
        if change:
            assert torch.equal(computed, net(x, t[3]))

    def test_each_branch_by_itself(self, net):
        x = latents()
        with dit_cache(net, CONFIG) as cache:
            for k in range(6):
                if k == 3:
                    net.blocks[2].proj.weight.mul_(3)
                for _ in range(2):
                    net(x, torch.tensor(1 - k / 6))
            assert cache.stats.reasons == {"warm-up": 2, "refresh": 4, "reuse": 4, "weights": 2}

    @pytest.mark.parametrize(
        "change", [lambda net: inject_adapter_in_model(LORA, net), lambda net: net.blocks[2].proj.weight.mul_(3)]
    )
    def test_a_run_begun_in_another_thread_meanwhile_hides_nothing(self, net, change):
        """It looks at the modules anew; what had changed until then counts for all."""
        x = latents()

        def other():
            with torch.no_grad():
                for k in range(3):
                    net(x, torch.tensor(1 - k / 6))

        with dit_cache(net, CONFIG) as cache:
            for k in range(6):
                if k == 3:
                    change(net)
                    thread = threading.Thread(target=other)
                    thread.start()
                    thread.join()
                net(x, torch.tensor(1 - k / 6))
            mine = [each.reason for each in cache.decisions if each.run == cache.decisions[0].run]
        assert mine == ["warm-up", "refresh", "reuse", "weights", "reuse", "refresh"]

    def test_adapters_that_come_and_go_in_another_thread(self, net):
        """Whatever is under way there, a call here is told a number, and what comes after it counts once."""
        weights, over = watch(net), threading.Event()

        def other():
            for k in range(40):
                layer = net.blocks[k % 5]
                inject_adapter_in_model(LORA, layer)
                layer.proj = layer.proj.base_layer
                del layer.peft_config
            over.set()

        thread = threading.Thread(target=other)
        thread.start()
        while not over.is_set():
            weights.version(walk=True)
        thread.join()
        assert counted(weights, lambda: net.blocks[0].proj.weight.mul_(2)) == 1


class TestCost:
    def test_few_layers_are_looked_at_however_many_there_are(self):
        model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(4 * WATCHED)))
        weights = watch(model)
        assert weights.version(walk=False) == 0
        assert len(weights._state[0].names) == WATCHED
        for each in model:
            each.weight.add_(1)
        assert weights.version(walk=False) == 1

    def test_nothing_is_kept_alive(self):
        net = Net()
        weights = watch(net)
        weights.version(walk=False)
        inject_adapter_in_model(LORA, net)
        weights.version(walk=False)
        alive = [weakref.ref(each) for each in net.modules()]
        del net
        gc.collect()
        assert not any(each() for each in alive)
        assert weights.version(walk=False) == -1
