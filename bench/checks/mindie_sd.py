"""Compare MindIE-SD's block cache with this library's of the same names: ``python -m bench.checks.mindie_sd``.

Makes an environment with the real package, in ``--environment`` or a temporary folder. Its ``cache_agent`` is imported
as it is, without what the package imports beside it, which needs an Ascend NPU. Toy models of one and of two streams
are run by both, through all settings of a grid, twice each. Writes ``engines_mindie_sd.json`` and ``.md``.

Exit codes: 0 all hold, or the package cannot be had, which is said; 1 one does not hold, or an import breaks.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.checks.engine_report import report
from bench.checks.peer_environment import main_of
from bench.checks.stand_ins import bare_package
from dithooks.compat.mindie_sd import CacheAgent, CacheConfig

REQUIREMENTS = ["mindiesd==3.1.0"]
BLOCKS, STEPS = 6, 8
COLUMNS = {
    "settings": "settings",
    "runs": "runs",
    "reused": "of them with reused steps",
    "ok": "the same to the last bit",
}
REMARKS = (
    f"{BLOCKS} blocks, {STEPS} steps, two runs with each setting. The package's `cache_agent` is the real one; what "
    "its `__init__` imports beside it, operators of an Ascend NPU, is left out.",
)


class OneStream(nn.Module):
    """A block that takes and returns hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, temb: Tensor) -> Tensor:
        """Return the hidden states, changed."""
        return hidden_states + 0.3 * torch.tanh(self.mix(hidden_states) + temb)


class TwoStreams(nn.Module):
    """A block that takes and returns hidden states, and those of the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, Tensor]:
        """Return both, changed."""
        image = hidden_states + 0.3 * torch.tanh(self.image(hidden_states) + encoder_hidden_states.mean() + temb)
        return image, encoder_hidden_states + 0.2 * torch.tanh(self.text(encoder_hidden_states) * temb)


@torch.no_grad()
def draw(apply: Callable[..., Any], blocks: list[nn.Module], seed: int) -> Tensor:
    """Return the latents after each step of a run whose blocks are applied one by one."""
    latents, drawn = torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(seed)), []
    for step in range(STEPS):
        time = torch.tensor(step / STEPS)
        image, text = latents.clone(), latents[:, :2] * 0.5
        for block in blocks:
            if isinstance(block, TwoStreams):
                image, text = apply(block, hidden_states=image, encoder_hidden_states=text, temb=time)
            else:
                image = apply(block, hidden_states=image, temb=time)
        latents = latents - 0.1 * image + 0.01 * text.mean()
        drawn.append(latents)
    return torch.stack(drawn)


def settings() -> Iterator[dict[str, Any]]:
    """Iterate over settings: ranges of two blocks and more, and those that leave out none."""
    for start, interval, first, last in product((0, 2, 5, STEPS), (1, 2, 3), (0, 1, 3), (3, 5, BLOCKS)):
        if last - first != 1:
            yield {
                "method": "dit_block_cache",
                "blocks_count": BLOCKS,
                "steps_count": STEPS,
                "step_start": start,
                "step_interval": interval,
                "step_end": max(STEPS - 1, start),
                "block_start": first,
                "block_end": last,
            }


def compared(kind: type[nn.Module], config: type, agent: type) -> dict[str, Any]:
    """Run a toy model of one kind of blocks by both."""
    torch.manual_seed(0)
    blocks, count, reused, ok = [kind() for _ in range(BLOCKS)], 0, 0, True
    for given in settings():
        theirs, ours = agent(config(**given)), CacheAgent(CacheConfig(**given))
        for seed in range(2):
            ok = ok and torch.equal(draw(theirs.apply, blocks, seed), draw(ours.apply, blocks, seed))
        count += 1
        reused += ours.handle is not None and ours.handle.stats.reused_calls > 0
    return {"settings": count, "runs": 2 * count, "reused": 2 * reused, "ok": ok and reused > 0}


def same_names(config: type, agent: type) -> dict[str, Any]:
    """Compare the fields of the configurations with their defaults, and the signatures of ``apply``."""
    own, other = ([(each.name, each.default) for each in fields(kind)] for kind in (CacheConfig, config))
    parameters = [
        [(each.name, each.kind) for each in inspect.signature(kind.apply).parameters.values()]
        for kind in (CacheAgent, agent)
    ]
    ok = own == other and parameters[0] == parameters[1]
    return {"settings": len(other), "runs": "–", "reused": "–", "ok": ok}


def check(out: Path | None) -> int:
    """Run all cases, and report them."""
    bare_package("mindiesd")
    from mindiesd import cache_agent

    config, agent = cache_agent.CacheConfig, cache_agent.CacheAgent
    cases = {
        "names, defaults and parameters": lambda: same_names(config, agent),
        "one stream": lambda: compared(OneStream, config, agent),
        "two streams": lambda: compared(TwoStreams, config, agent),
    }
    title = "MindIE-SD's block cache, and the same settings here"
    return report("mindie_sd", title, ("mindiesd", "torch"), COLUMNS, cases, REMARKS, out)


if __name__ == "__main__":
    sys.exit(main_of("bench.checks.mindie_sd", __doc__, "MindIE-SD", REQUIREMENTS, check))
