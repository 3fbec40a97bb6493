"""The page for users of two other libraries: what stands on the right runs, and differs from the left by its import."""

import re
from pathlib import Path

import pytest
import torch
from opensora import OpenSoraPipeline
from torch import nn
from toys import Double, Pipe, latents, prompt

import dithooks
import dithooks.compat.cache_dit
from dithooks.handle import handles_of

PAGE = (Path(__file__).parents[2] / "docs" / "migration.md").read_text(encoding="utf-8")
CODE = r"```python\n(.*?)```"
PAIRS = [
    tuple(map(str, pair)) for pair in re.findall(rf"<tr><td>\s+{CODE}\s+</td><td>\s+{CODE}\s+</td></tr>", PAGE, re.S)
]
IMPORTS = {
    "msmodelslim.pytorch.multi_modal.dit_cache": "dithooks.compat.msmodelslim",
    "import cache_dit": "import dithooks.compat.cache_dit as cache_dit",
    "from cache_dit": "from dithooks.compat.cache_dit",
}
YAML = """
cache_config:
  max_warmup_steps: 4
  warmup_interval: 2
  max_cached_steps: -1
  max_continuous_cached_steps: 2
  Fn_compute_blocks: 1
  Bn_compute_blocks: 0
  residual_diff_threshold: 0.12
  enable_taylorseer: true
  taylorseer_order: 1
"""


class Flux(nn.Module):
    """Two lists under FLUX's names, ten blocks each."""

    def __init__(self):
        super().__init__()
        self.embed, self.proj, self.time = nn.Linear(4, 8), nn.Linear(8, 4), nn.Linear(1, 8)
        self.transformer_blocks = nn.ModuleList(Double(8) for _ in range(10))
        self.single_transformer_blocks = nn.ModuleList(Double(8) for _ in range(10))

    def forward(self, hidden_states, timestep, encoder_hidden_states):
        h, e = self.embed(hidden_states), encoder_hidden_states
        temb = self.time(timestep.reshape(-1, 1)).expand(h.shape[0], -1)
        for block in [*self.transformer_blocks, *self.single_transformer_blocks]:
            e, h = block(h, e, temb)
        return self.proj(h)


class FluxPipeline(Pipe):
    """Called as the page does: ``pipe(...)``."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(Flux())
        self.given = latents(), [prompt(), prompt()]

    def __call__(self, *_):
        x, prompts = self.given
        return super().__call__(x, steps=12, prompts=prompts)


class Videos(OpenSoraPipeline):
    def __call__(self, prompt, num_inference_steps=20):
        return super().__call__(prompt, num_inference_steps)


def standing_alone(after, before):
    """The code between two places of the page that is in no table."""
    part = PAGE[PAGE.index(after) : PAGE.index(before)]
    return re.findall(CODE, re.sub(r"<table>.*?</table>", "", part, flags=re.S), re.S)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache.yaml").write_text(YAML)


def test_there_is_something_to_run():
    assert len(PAIRS) == 5
    assert len(standing_alone("## msmodelslim", "## cache-dit")) == len(standing_alone("## cache-dit", "### What")) == 1


@pytest.mark.parametrize("number", [0, 2, 3, 4])
def test_only_the_import_changes(number):
    left, right = PAIRS[number]
    for theirs, ours in IMPORTS.items():
        left = left.replace(theirs, ours)
    assert left == right


def test_msmodelslim():
    import json

    pipeline = Videos()
    given = {
        "pipeline": pipeline,
        "run_pipeline_and_save_videos": lambda pipe: pipe("a dog").images,
        "json": json,
        "dithooks": dithooks,
    }
    exec(PAIRS[0][1].replace("num_sampling_steps=100", "num_sampling_steps=20"), given)  # for speed
    found, handle = given["found"], given["adaptor"].handle
    pipeline("a cat")
    assert handle.stats.blocks_total / handle.stats.blocks_run >= 1.3
    given["adaptor"].remove()
    code = PAIRS[1][1].replace(
        "adaptor.remove()", "used = adaptor.handle.config, adaptor.handle.stats\nadaptor.remove()"
    )
    exec(code, given)
    assert given["used"][0].cache_num_blocks == found.cache_num_blocks
    assert given["used"][1].reused_calls > 0
    (alone,) = standing_alone("## msmodelslim", "## cache-dit")
    exec(alone, given)
    assert isinstance(given["found"], dithooks.SearchResult)
    assert not any(block._forward_hooks for block in pipeline.transformer.transformer_blocks)


def test_cache_dit(capsys):
    pipe, given = FluxPipeline(), {}
    plain = pipe()
    given["pipe"] = pipe
    exec(PAIRS[2][1], given)
    assert (
        "| Cache Steps | Diffs Min | Diffs P25 | Diffs P50 | Diffs P75 | Diffs P95 | Diffs Max |"
        in capsys.readouterr().out
    )
    assert handles_of(pipe) == []
    exec(PAIRS[3][1], given)
    (handle,) = handles_of(pipe)
    pipe()
    assert {each.range for each in handle.decisions} == {
        "transformer.transformer_blocks",
        "transformer.single_transformer_blocks",
    }
    assert handle.stats.reused_calls > 0
    theirs = pipe()
    given["cache_dit"].disable_cache(pipe)
    (alone,) = standing_alone("## cache-dit", "### What")
    exec(alone, given)
    assert given["cache"].stats.blocks_total > given["cache"].stats.blocks_run
    exec(PAIRS[4][1], given)
    pipe()
    assert handles_of(pipe)[0].stats.reused_calls > 0
    given["cache_dit"].disable_cache(pipe)
    assert not torch.equal(theirs, plain)
    torch.testing.assert_close(pipe(), plain, rtol=0, atol=0)
