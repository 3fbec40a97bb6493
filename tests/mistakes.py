"""Mistakes that users make, each with the message it gets: ``PYTHONPATH=tests:. python tests/mistakes.py`` writes the
table in docs/mistakes.md.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from toys import Net

import dithooks
from dithooks import DitCacheConfig, PlanTiers, dit_cache
from dithooks.cli.main import main
from dithooks.demo import load_pipeline, load_plan

PAGE = Path(__file__).parents[1] / "docs" / "mistakes.md"
HEAD = """# Mistakes, and the message each gets

Each line was tried, and the tests write this page (`PYTHONPATH=tests:. python tests/mistakes.py`). `pipe` is the
pipeline that ships, `net` a model of five blocks, `plan` one of the plans that ship, `run` a function that draws. What
[works all the same](using.md) is not here: a policy alone, the path of a plan, what a search returned.

| mistake | message |
|---|---|
"""
MISTAKES = (
    # what is attached to
    "dit_cache('FLUX.1-dev', config)",
    "dit_cache(None, config)",
    "dit_cache(nn.Linear(4, 4), config)",
    "dit_cache(pipe, config, blocks='transformer.blocks')",
    "dit_cache(pipe, config, blocks=7)",
    "dit_cache(cache, config)",
    "[dit_cache(net, config), dit_cache(net, config)]",
    # with what
    "dit_cache(pipe, 'plan.jsn')",
    "dit_cache(pipe, 2.0)",
    "dit_cache(pipe, Threshold)",
    "dit_cache(pipe, {'cache_step_intervall': 2})",
    "dit_cache(pipe, tiers)",
    "dit_cache(pipe, tiers, tier='medium')",
    "dit_cache(pipe, tiers, tier='fastest at ≥ 90 dB')",
    "dit_cache(pipe, plan, tier='high')",
    "dit_cache(net, plan)",
    "CachePlan.load('settings.yaml')",
    "CachePlan.from_json('{}')",
    # a configuration
    "DitCacheConfig()",
    "DitCacheConfig(cache_step_start=2)",
    "DitCacheConfig(0, 0)",
    "DitCacheConfig(0, 2.5)",
    "DitCacheConfig(0, 2, cache_num_blocks=0)",
    "DitCacheConfig(0, 2, policy=Threshold(0.1))",
    "DitCacheConfig(0, 2, cache_dtype=torch.float16)",
    "DitCacheConfig(0, 2, overrides={'transformer_2': {'cache_blok_start': 1}})",
    "DitCacheConfig(policy=0.1)",
    "dit_cache(net, DitCacheConfig(0, 2, cache_block_start=5))",
    "dit_cache(net, DitCacheConfig(0, 2, cache_block_start=2, cache_num_blocks=9))",
    "dit_cache(pipe, DitCacheConfig(0, 2, overrides={'transformer_2': {}}))",
    "Threshold(-0.1)",
    "dithooks.Mask('quick')",
    "dithooks.Budget(0.5)",
    # a search
    "dithooks.search(pipe, pipe('taxi', num_inference_steps=1))",
    "dithooks.search(pipe, lambda pipe, prompt: None)",
    "dithooks.search(pipe, run, target_speedup=1.0)",
    "dithooks.search(net, lambda: [torch.ones(4)])",
    "dithooks.promise(pipe, config, run)",
    # a handle
    "removed.update(config)",
    "cache.request(scheduler='euler')",
    "cache.forecast('nobody')",
    # the command line
    "$ dithooks search demo --target 0.5",
    "$ dithooks search no_file.py:make",
    "$ dithooks compare demo",
    "$ dithooks generate demo --prompt taxi --plan 5x",
)


def tried(mistake: str, names: dict[str, Any]) -> tuple[str, str]:
    """Make a mistake; return the kind of error that it gets, and the message."""
    if mistake.startswith("$ "):
        with contextlib.redirect_stderr(io.StringIO()) as told, contextlib.redirect_stdout(io.StringIO()):
            code = main(mistake.split()[2:])
        return f"exit code {code}", told.getvalue().strip()
    try:
        eval(mistake, names)
    except Exception as error:
        return type(error).__name__, str(error)
    finally:
        for model in (names["pipe"], names["net"]):
            dithooks.detach(model)
    return "nothing", ""


def namespace() -> dict[str, Any]:
    """What the mistakes are made with."""
    pipe, net, other = load_pipeline(), Net(), Net()
    pipe.set_progress_bar_config(disable=True)
    config = DitCacheConfig(0, 2)
    removed = dit_cache(other, config)
    removed.remove()
    return {
        **{name: getattr(dithooks, name) for name in dithooks.__all__},
        **{"dithooks": dithooks, "torch": torch, "nn": nn, "pipe": pipe, "net": net, "config": config},
        **{"plan": load_plan("2x"), "tiers": PlanTiers({"high": load_plan("1.5x"), "fast": load_plan("3x")})},
        **{"removed": removed, "cache": dit_cache(other, config), "run": lambda pipe: pipe("taxi")},
    }


def page() -> str:
    """The table."""
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = namespace()
        for mistake in MISTAKES:
            kind, message = tried(mistake, names)
            cells = [f"`{mistake}`", f"{kind}: {message}"]
            rows.append(f"| {' | '.join(' '.join(cell.split()).replace('|', '&#124;') for cell in cells)} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    os.environ["COLUMNS"] = "100"
    PAGE.write_text(page(), encoding="utf-8")
