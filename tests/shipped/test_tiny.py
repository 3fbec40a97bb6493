"""The tiny models stand for every transformer of diffusers: they build, they run, and every block of theirs matters."""

import re
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conformance import tensors
from torch import nn

from dithooks.tiny import build, names, of_class, pipeline, pipeline_names
from dithooks.tiny.tokenizers import tokenizer

diffusers = pytest.importorskip("diffusers")

CONSTRAINTS = (Path(__file__).parents[2] / "constraints.txt").read_text(encoding="utf-8")
PINNED = f"diffusers=={version('diffusers')}" in CONSTRAINTS.split()
# not: wrappers of several ControlNets, which have no blocks, nor an autoencoder that is named after its transformer
LIKE_A_TRANSFORMER = re.compile(r"(?!.*(MultiControlNet|Vae)).*(Transformer|DiT|UVit|FilmDecoder)")
NOT_RUN = {"SD3Transformer2DModel#skip_layers": {"transformer_blocks.1"}}


@pytest.fixture(params=names())
def tiny(request):
    """Name, model and inputs; with another version of diffusers, only of the classes it has."""
    try:
        return request.param, *build(request.param)
    except (AttributeError, ModuleNotFoundError):
        if PINNED:
            raise
        pytest.skip(f"diffusers {diffusers.__version__} has no such class")


def change(one, other):
    """The largest change of any tensor of an output, relative to its own size."""
    pairs = list(zip(tensors(one), tensors(other), strict=True))
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def test_every_transformer_class_of_diffusers_is_there():
    classes = {
        name for name in dir(diffusers) if LIKE_A_TRANSFORMER.match(name) and isinstance(getattr(diffusers, name), type)
    }
    classes = {name for name in classes if issubclass(getattr(diffusers, name), nn.Module)}
    assert len(classes) > 40
    missing = {name for name in classes if not of_class(name)}
    if missing and not PINNED:
        pytest.skip(f"diffusers {diffusers.__version__} has classes without a tiny model: {sorted(missing)}")
    assert not missing


def test_the_plain_variant_comes_first():
    for name in names():
        assert of_class(name.partition("#")[0])[0] == name.partition("#")[0]


def test_an_unknown_name_is_refused_with_those_there_are():
    with pytest.raises(KeyError, match="SanaTransformer2DModel#controlnet"):
        build("SanaTransformer2DModel#none")


def test_output_is_finite_and_of_ordinary_size(tiny):
    _, model, inputs = tiny
    outputs = tensors(model(**inputs()))
    assert outputs
    for output in outputs:
        assert output.isfinite().all()
        assert 0.1 < output.std() < 10


def test_a_second_model_and_a_second_call_give_the_same_bits(tiny):
    name, model, inputs = tiny
    torch.randn(3)  # whatever the global generator was used for in between
    again, _ = build(name)
    outputs = [tensors(output) for output in (model(**inputs()), model(**inputs()), again(**inputs()))]
    for one, two, three in zip(*outputs, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


def test_building_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    build("FluxTransformer2DModel")[1]()
    assert torch.equal(torch.get_rng_state(), state)


def test_seeds_change_weights_and_inputs():
    model, inputs = build("FluxTransformer2DModel")
    other, _ = build("FluxTransformer2DModel", seed=1)
    assert change(model(**inputs(1)), model(**inputs())) > 0.1
    assert change(other(**inputs()), model(**inputs())) > 0.1


def test_main_input_matters(tiny):
    _, model, inputs = tiny
    main = next(iter(inputs()))
    assert change(model(**{**inputs(), main: inputs(1)[main]}), model(**inputs())) > 0.05


def test_every_block_matters(tiny):
    name, model, inputs = tiny
    plain = model(**inputs())
    lists = {
        path: found for path, found in model.named_modules() if isinstance(found, nn.ModuleList) and len(found) > 3
    }
    lists = {path: found for path, found in lists.items() if len({type(block) for block in found}) == 1}
    assert lists
    idle = set()
    for path, blocks in lists.items():
        for index, block in enumerate(blocks):
            kept = [parameter.clone() for parameter in block.parameters()]
            for parameter in block.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3 * parameter.abs().mean().item())
            if change(model(**inputs()), plain) < 1e-5:
                idle.add(f"{path}.{index}")
            for parameter, value in zip(block.parameters(), kept, strict=True):
                parameter.copy_(value)
    assert idle == NOT_RUN.get(name, set())


# -- whole pipelines --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", pipeline_names())
def test_a_pipeline_draws_what_the_prompt_asks_for(name):
    """Its text encoders and tokenizers matter: other words give other latents, and the same words the same."""
    pytest.importorskip("transformers")
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    if name in ("SkyReelsV2Pipeline", "HeliosPipeline", "WanVACEPipeline"):
        pytest.importorskip("ftfy")
    (pipe, call), (again, _) = pipeline(name), pipeline(name)
    drawn = [latents(each, prompt, call) for each, prompt in ((pipe, "a cat"), (again, "a cat"), (pipe, "a dog"))]
    assert drawn[0].isfinite().all()
    assert 0.1 < drawn[0].std() < 20
    assert torch.equal(drawn[0], drawn[1])
    assert (drawn[0] - drawn[2]).abs().max() > 1e-4


@torch.no_grad()
def latents(pipe, prompt, call):
    pipe.set_progress_bar_config(disable=True)
    noise = torch.Generator().manual_seed(0)
    out = pipe(prompt=prompt, num_inference_steps=2, generator=noise, output_type="latent", **call)
    return torch.as_tensor(next(iter(out.values())))


def test_an_unknown_pipeline_is_refused():
    with pytest.raises(KeyError, match="NonePipeline is none of pipeline_names"):
        pipeline("NonePipeline")


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "gemma", "llama", "bytes", "chat"])
def test_letters_are_told_apart(kind):
    pytest.importorskip("transformers")
    one, other, strange = (tokenizer(kind)(text).input_ids for text in ("a cat", "a car", "\u2603"))
    assert len(one) == len(other)
    assert sum(a != b for a, b in zip(one, other, strict=True)) == 1
    assert strange
