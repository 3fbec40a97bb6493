"""The page "using.md": every block of Python runs, in order, and every call of ``dithooks`` is understood."""

import warnings

import pytest
import torch
from docs_pages import INERT, ROOT, blocks, check_command, commands, run_page, stand_ins, tiny
from torch import nn
from toys import Single

import dithooks
from dithooks import BlockAdapterRegistry, DitCacheConfig

PAGE = (ROOT / "docs/using.md").read_text(encoding="utf-8")
PARTS = {name: getattr(dithooks, name) for name in dithooks.__all__}


def three():
    return nn.ModuleList(Single() for _ in range(3))


class Backbone(nn.Module):
    """Two lists."""

    def __init__(self):
        super().__init__()
        self.double_blocks, self.single_blocks = three(), three()


class Model(nn.Module):
    """Has the lists that the text names, and calls them one after the other."""

    def __init__(self):
        super().__init__()
        self.body, self.backbone, self.time = nn.Module(), Backbone(), nn.Linear(1, 8)
        self.body.blocks = three()

    @torch.no_grad()
    def forward(self, hidden_states, sigma):
        temb = self.time(torch.full((hidden_states.shape[0], 1), float(sigma)))
        for block in [*self.body.blocks, *self.backbone.double_blocks, *self.backbone.single_blocks]:
            hidden_states = block(hidden_states, temb)
        return hidden_states


class Job:
    """A sampling run of a server, six steps long, which makes one when it is told to."""

    def __init__(self, call):
        self.call, self.left = call, [1.0, 0.9, 0.7, 0.5, 0.3, 0.1]

    @torch.no_grad()
    def step(self, transformer):
        timestep = torch.full_like(self.call["timestep"], self.left.pop(0))
        transformer(**{**self.call, "timestep": timestep})


def call_of(pipe):
    """What its pipeline gives a transformer."""
    seen = []
    hook = pipe.transformer.register_forward_pre_hook(lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True)
    pipe("any", num_inference_steps=1)
    hook.remove()
    return seen[0]


@pytest.fixture
def given():
    """What the text leaves open."""
    pipe, other = tiny("FluxPipeline"), tiny("FluxPipeline")
    other.register_modules(transformer=pipe.transformer)
    call = call_of(pipe)
    jobs = [Job(call), Job({**call, "hidden_states": call["hidden_states"] + 1})]
    waiting = [job for _ in range(6) for job in jobs]
    return {
        **PARTS,
        "dithooks": dithooks,
        "pipe": pipe,
        "other_pipe": other,
        "transformer": pipe.transformer,
        "model": Model().eval(),
        "config": DitCacheConfig(2, 2),
        "config_high": DitCacheConfig(2, 2),
        "config_low": DitCacheConfig(2, 3),
        "latents": torch.randn(1, 6, 8),
        "sigmas": [1.0, 0.8, 0.6, 0.4, 0.2],
        "jobs": jobs,
        "run": lambda pipe: pipe("any", num_inference_steps=6, generator=torch.manual_seed(0)).images,
        "waiting": waiting,
        "next_job": lambda: waiting.pop(0),
    }


@pytest.mark.slow
def test_the_code_runs(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ran, flux, experts = [], given["pipe"], tiny("WanPipeline")

    def before(block, names):
        ran.append(block.line)
        names["pipe"] = experts if "pipe.transformer_2" in block.body else flux

    try:
        with stand_ins([]), torch.enable_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # toys reuse little, which is said
            names = run_page(PAGE, given, before, outputs=False)  # these are of the pipeline that ships
    finally:
        if "MyTransformer" in BlockAdapterRegistry.names():
            BlockAdapterRegistry.unregister("MyTransformer")
    assert ran == [block.line for block in blocks(PAGE) if block.kind == "python"]
    assert len(ran) >= 9
    assert isinstance(names["found"], dithooks.Profile)  # by the last of the blocks that find something
    assert not given["waiting"]
    assert not any(block._forward_hooks for block in flux.transformer.modules())


def test_every_block_says_what_it_is():
    assert {block.kind for block in blocks(PAGE)} <= INERT | {"python"}


CALLS = commands(PAGE)


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_commands_are_understood(words):
    check_command(words)


def test_there_are_commands():
    assert len(CALLS) >= 5
