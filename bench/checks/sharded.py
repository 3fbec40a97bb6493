"""Two ranks on two devices that share a model: its weights sharded by FSDP2, decisions made as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dithooks import DitCacheConfig, Threshold, dit_cache

STEPS, RANKS = 12, 2
ROOT = Path(__file__).resolve().parents[2]  # of the checkout
MARK = "ranks told: "


def sharded(device: torch.device) -> dict[str, Any]:
    """Two ranks that share a model decide as one, where each by itself would not, and draw what one model draws."""
    if device.type != "cpu" and torch.accelerator.device_count() < RANKS:
        return {"ok": None, "devices": torch.accelerator.device_count(), "needed": RANKS}
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={RANKS}", "-m", "bench.checks.sharded"]
    command = [sys.executable, *launch, device.type]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    told = [line.removeprefix(MARK) for line in done.stdout.splitlines() if line.startswith(MARK)]
    if not told:
        raise RuntimeError(f"the ranks ended with exit code {done.returncode}: {done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(told[0])
    return figures


class Net(nn.Module):
    """A plain transformer."""

    def __init__(self, depth: int = 8, width: int = 64) -> None:
        super().__init__()
        self.embed, self.proj = nn.Linear(4, width), nn.Linear(width, 4)
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, batch_first=True) for _ in range(depth))

    def forward(self, hidden_states: Tensor, timestep: Tensor) -> Tensor:
        h = self.embed(hidden_states) * (1 + timestep)
        for block in self.blocks:
            h = block(h)
        output: Tensor = self.proj(h)
        return output


def rank(kind: str) -> dict[str, Any]:
    """What this rank makes of it: each rank has a picture of its own, of another size."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    number, device = dist.get_rank(), torch.device(kind)
    drawn = torch.randn(1, 16 - 5 * number, 4, generator=torch.Generator().manual_seed(number))
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.2, max_warmup_steps=2))
    told: dict[str, tuple[Tensor, Any, int]] = {}
    for name, group in {"apart": None, "whole": dist.group.WORLD, "sharded": dist.group.WORLD}.items():
        torch.manual_seed(0)
        model, x = Net().to(device).eval(), ((1 + number) * drawn).to(device)
        if name == "sharded":
            for part in (*model.blocks, model):
                fully_shard(part, mesh=init_device_mesh(kind, (RANKS,)))
        with torch.no_grad(), dit_cache(model, config, process_group=group) as cache:
            for step in range(STEPS):
                x = x - model(x, torch.full((), 1 - step / STEPS, device=device)) / STEPS
            told[name] = x.cpu(), [(each.reason, each.value) for each in cache.decisions], cache.stats.reused_calls
    everyone: list[Any] = [None] * RANKS
    dist.all_gather_object(everyone, [told[name][1] for name in ("apart", "sharded")])
    one = all(each[1] == everyone[0][1] for each in everyone) and told["whole"][1] == told["sharded"][1]
    differ = any(each[0] != everyone[0][0] for each in everyone)
    error = float((told["sharded"][0] - told["whole"][0]).norm() / told["whole"][0].norm())
    return {
        "ok": one and differ and error < 1e-4 and told["sharded"][2] > 0,
        "backend": str(dist.get_backend_config()),
        "calls reused": told["sharded"][2],
        "one decision": one,
        "apart they would differ": differ,
        "sharded against whole, relative L2": error,
    }


if __name__ == "__main__":
    kind = sys.argv[1]
    if kind != "cpu":
        torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(dist.get_default_backend_for_device(kind))
    figures = rank(kind)
    if dist.get_rank() == 0:
        print(MARK + json.dumps(figures), flush=True)
    dist.destroy_process_group()
