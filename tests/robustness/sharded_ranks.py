"""Two processes with a gloo group, each of which makes the same checks and writes down what it has seen."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

HERE = Path(__file__).parent
WAIT = 60  # seconds that the default group waits


def start(script: str, folder: Path, timeout: float = 240) -> list[dict]:
    """Run a script of this folder in two processes; what each has written. None of them outlives the timeout."""
    command = [sys.executable, str(HERE / script), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    started = [subprocess.Popen([*command, str(rank)], env=env, **pipes) for rank in (0, 1)]
    said = ["", ""]
    try:
        end = time.monotonic() + timeout
        for rank, process in enumerate(started):
            said[rank], _ = process.communicate(timeout=max(end - time.monotonic(), 1))
    finally:
        for process in started:
            process.kill()
            process.wait()
    for rank, process in enumerate(started):
        assert process.returncode == 0, f"rank {rank}:\n{said[rank][-4000:]}"
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def main(*checks) -> None:
    """What the script does: every check by its name, given the rank; one that raises is told with its traceback."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    store, patience = f"file://{folder}/store", datetime.timedelta(seconds=WAIT)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
    told = {}
    for check in checks:
        torch.manual_seed(0)
        began = time.monotonic()
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                told[check.__name__] = check(rank) or {}
            told[check.__name__]["said"] = [
                str(each.message) for each in caught if issubclass(each.category, UserWarning)
            ]
        except Exception:
            told[check.__name__] = {"traceback": traceback.format_exc()}
        told[check.__name__]["seconds"] = round(time.monotonic() - began, 2)
    (folder / f"{rank}.json").write_text(json.dumps(told))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo now and then aborts while it is taken down


class Collectives(TorchDispatchMode):
    """Counts the collectives that are issued inside, whoever issues them."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and "wait" not in func.__name__:
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return self.counts.total()


def settled(cache) -> list:
    """Every decision of a cache, as it can be written down."""
    return [[each.step, each.branch, each.reason, each.value] for each in cache.decisions]
