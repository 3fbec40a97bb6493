"""What diffusers asks of its own models when they are compiled, asked of five of them with a cache attached, one that
never reuses and one that does: nothing is compiled a second time, whatever the shape, the adapter or the offloading.
"""

import pytest
import torch
from compilers import Counted, breaks, fresh
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from dithooks import DitCacheConfig, dit_cache, timestep_scope
from dithooks.tiny import build

pytestmark = [pytest.mark.line("torch.compile"), pytest.mark.slow]

FLUX, WAN, SD3 = "FluxTransformer2DModel", "WanTransformer3DModel", "SD3Transformer2DModel"
QWEN, LTX = "QwenImageTransformer2DModel", "LTXVideoTransformer3DModel"
FIVE = pytest.mark.parametrize("name", [FLUX, WAN, SD3, QWEN, LTX])
NEVER, REUSES = DitCacheConfig(10**6, 2), DitCacheConfig(0, 2)
ON_FIVE = pytest.mark.on("tiny FLUX, Wan, SD3, Qwen-Image and LTX")


@pytest.fixture(autouse=True)
def _fresh_compiler():
    with fresh():
        yield


def made(name):
    model, make = build(name)
    return model.eval(), make()


def called(model, given, number=0):
    with timestep_scope(number, steps=4):
        return model(**given, return_dict=False)[0].clone()


def no_recompile():
    return torch._dynamo.config.patch(error_on_recompile=True)


def changed(given, number):
    """At another step: latents that differ, as in a loop."""
    return {**given, "hidden_states": given["hidden_states"] * (1 + number / 4)}


@FIVE
@ON_FIVE
def test_runs_are_as_in_eager_code(name):
    """Attached, then compiled whole: every other step is reused, by two graphs, and none more in another run."""
    (model, given), backend = made(name), Counted()
    with dit_cache(model, REUSES):
        expected = [called(model, changed(given, number), number) for number in range(4)]
    plain = called(model, changed(given, 1))
    assert (plain - expected[1]).abs().max() > 1e-6
    cache = dit_cache(model, REUSES)
    compiled, graphs = torch.compile(model, fullgraph=True, backend=backend), []
    for run in range(2):
        with torch.compiler.set_stance("fail_on_recompile" if run else "default"):
            for number, wanted in enumerate(expected):
                assert torch.equal(called(compiled, changed(given, number), number), wanted)
                graphs.append(backend.graphs)
    assert "".join("CR"[each.reuse] for each in cache.decisions) == "CRCR" * 2
    assert graphs == [1] + [2] * 7
    cache.remove()
    assert torch.equal(called(model, changed(given, 1)), plain)
    assert not breaks()


@pytest.mark.parametrize(("name", "config"), [*((name, NEVER) for name in (FLUX, WAN, SD3, QWEN, LTX)), (WAN, REUSES)])
@pytest.mark.filterwarnings("ignore:.*reused nothing")
@ON_FIVE
def test_called_twice_alike(name, config):
    """The same call twice, compiled whole, with an error for any graph after the first."""
    (model, given), backend = made(name), Counted()
    plain = model(**given, return_dict=False)[0]
    with dit_cache(model, config):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        with no_recompile():
            for _ in range(2):
                assert torch.equal(compiled(**given, return_dict=False)[0], plain)
    assert backend.graphs == 1


@pytest.mark.parametrize(
    ("name", "first"), [(WAN, "attached"), (QWEN, "attached"), (LTX, "attached"), (WAN, "compiled")]
)
@pytest.mark.on("tiny Wan, Qwen-Image and LTX")
def test_one_graph_for_all_blocks(name, first):
    """compile_repeated_blocks with a limit of one graph for each function: it holds with a cache that reuses."""
    (model, given), backend = made(name), Counted()
    with dit_cache(model, REUSES):
        expected = [called(model, changed(given, number), number) for number in range(2)]
    cache = dit_cache(model, REUSES) if first == "attached" else None
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    cache = cache or dit_cache(model, REUSES)
    with torch._dynamo.config.patch(recompile_limit=1):
        for number, wanted in enumerate(expected):
            assert torch.equal(called(model, changed(given, number), number), wanted)
    assert [each.reuse for each in cache.decisions] == [False, True]
    assert backend.graphs <= 3  # of the block, and of the hooks at both ends of the range
    cache.remove()


def larger(given, number):
    """Of a higher picture."""
    latents, generator = given["hidden_states"], torch.Generator().manual_seed(number)
    shape = (*latents.shape[:-2], latents.shape[-2] + 2 * number, latents.shape[-1])
    return {**given, "hidden_states": torch.randn(shape, generator=generator)}


@pytest.mark.parametrize("name", [WAN, SD3])
@pytest.mark.on("tiny Wan and SD3")
def test_three_resolutions(name):
    """dynamic=True, and an error for any graph after the first of a kind: one that computes, one that reuses."""
    (model, given), backend = made(name), Counted()
    sizes = [larger(given, number) for number in (1, 2, 3)]
    with dit_cache(model, REUSES):
        expected = [[called(model, each, number) for number in range(2)] for each in sizes]
    # Sizes that are alike by chance are no sizes that have to be alike: so diffusers asks for its own shapes, too.
    apart = torch.fx.experimental._config.patch(use_duck_shape=False)
    with apart, dit_cache(model, REUSES) as cache:
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
        for place, each in enumerate(sizes):
            with no_recompile() if place else torch._dynamo.config.patch():
                for number in range(2):
                    assert torch.equal(called(compiled, each, number), expected[place][number])
        assert [each.reuse for each in cache.decisions] == [False, True] * 3
    assert backend.graphs == 2


def adapters(name, ranks):
    """The weights of an adapter of each rank, and what the model gives with it."""
    model, given = made(name)
    weights, outputs = [], []
    torch.manual_seed(0)
    for number, rank in enumerate(ranks):
        layers = ["to_q", "to_k", "to_v", "to_out.0"]
        model.add_adapter(
            LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, init_lora_weights=False), f"adapter{number}"
        )
        model.set_adapter(f"adapter{number}")
        outputs.append(model(**given, return_dict=False)[0])
        state = get_peft_model_state_dict(model, adapter_name=f"adapter{number}")
        weights.append({key: value.clone() for key, value in state.items()})
    assert (outputs[0] - outputs[1]).abs().max() > 1e-4
    return weights, outputs


@pytest.mark.parametrize(
    ("name", "ranks", "config"),
    [
        (FLUX, (7, 13), REUSES),
        (WAN, (13, 7), REUSES),
        (SD3, (11, 11), NEVER),
    ],
)
@pytest.mark.filterwarnings("ignore:.*reused nothing")
@pytest.mark.on("tiny FLUX, Wan and SD3")
def test_an_adapter_swapped_in_place(name, ranks, config):
    """enable_lora_hotswap, one adapter, another in its place, of another rank: no graph more, and its own output."""
    weights, outputs = adapters(name, ranks)
    (model, given), backend = made(name), Counted()
    model.enable_lora_hotswap(target_rank=max(ranks))
    model.load_lora_adapter(dict(weights[0]), adapter_name="one", prefix=None)
    with dit_cache(model, config) as cache:
        compiled = torch.compile(model, backend=backend)
        with no_recompile():
            torch.testing.assert_close(called(compiled, given), outputs[0], rtol=1e-3, atol=1e-4)
            compiled.load_lora_adapter(dict(weights[1]), adapter_name="one", hotswap=True, prefix=None)
            torch.testing.assert_close(called(compiled, given), outputs[1], rtol=1e-3, atol=1e-4)
        assert [each.reuse for each in cache.decisions] == [False, False]
    assert backend.graphs == 1


@pytest.mark.on("tiny Wan")
def test_offloaded_in_groups():
    """Groups of one block each, then attached and compiled: outputs and steps as in eager code."""
    (model, given), (twin, _), backend = made(WAN), made(WAN), Counted()
    with dit_cache(twin, REUSES):
        expected = [called(twin, changed(given, number), number) for number in range(4)]
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    )
    with dit_cache(model, REUSES) as cache:
        model.compile(backend=backend)
        for run in range(2):
            with torch.compiler.set_stance("fail_on_recompile" if run else "default"):
                for number, wanted in enumerate(expected):
                    assert torch.equal(called(model, changed(given, number), number), wanted)
        assert "".join("CR"[each.reuse] for each in cache.decisions) == "CRCR" * 2
