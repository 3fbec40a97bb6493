"""Searches under torchrun whose plans are spread over the ranks: as one after another, and what stops one stops all."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import json, os, sys
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from toys import Net, Pipe, latents
from tuning.test_executors import told
from dithooks import search
torch.set_num_threads(1)
torch.set_grad_enabled(False)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
pipe, x = Pipe(Net("single", 4)), latents()

def searched(stop=None, error=None, seed=0, **given):
    calls = []
    def run(pipe):
        calls.append(0)
        def at(step):
            if (rank, len(calls), step) == (1, stop, 4):
                raise error
        return pipe(x + 0.1 * seed * rank, 12, at=at)
    try:
        limits = {"max_evals": 6, "local_moves": 3, "max_runs": 6.0}
        found = search(pipe, run, 1.6, **{"cost": "blocks", "verbose": False, **limits, **given})
    except Exception as raised:
        return {"raised": f"{type(raised).__name__}: {raised}", "calls": len(calls)}
    said = repr(told(found))
    return {"told": said, "calls": len(calls), "interrupted": found.interrupted, "plan": found.plan.to_json(),
            "run_equivalents": found.run_equivalents, "evaluations": len(found.evaluations)}

kept = {"executor": "torchrun", "journal": sys.argv[2] + "/journal", "max_runs": None}
both = {
    "here": searched(),
    "spread": searched(executor="torchrun"),
    "time": searched(executor="torchrun", cost="time", max_evals=3, local_moves=0),
    "journal": searched(**kept),
    "again": searched(**kept),
    "others": searched(executor="torchrun", seed=1),
    "failed": searched(executor="torchrun", stop=2, error=ArithmeticError("no such number")),
    "stopped": searched(executor="torchrun", stop=3, error=KeyboardInterrupt),
    "ray": searched(executor="ray"),
}
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
fully_shard(pipe.transformer, mesh=init_device_mesh("cpu", (2,)))
both["sharded"] = searched(executor="torchrun")
with open(f"{sys.argv[2]}/{rank}.json", "w") as file:
    json.dump(both, file)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo now and then aborts while it is taken down
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of two ranks found."""
    folder = tmp_path_factory.mktemp("torchrun")
    (folder / "program.py").write_text(PROGRAM)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(folder / "program.py"), str(Path(__file__).parents[1]), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("name", ["here", "spread", "time", "journal", "again", "stopped"])
def test_one_plan_for_both(ranks, name):
    first, second = (told[name] for told in ranks)
    assert first["plan"] == second["plan"]
    assert first["told"] == second["told"]
    assert first["run_equivalents"] == second["run_equivalents"]


def test_the_same_plan_as_one_after_another(ranks):
    """Bit by bit, with fewer runs on each: one is recorded, the plans are shared out."""
    here, spread = ranks[0]["here"], ranks[0]["spread"]
    assert spread["told"] == here["told"]
    plans = here["calls"] - 1
    assert plans == here["evaluations"] > 5
    calls = [told["spread"]["calls"] - 1 for told in ranks]
    assert sum(calls) >= plans
    assert max(calls) <= 0.75 * plans


def test_a_journal_goes_on(ranks):
    assert ranks[0]["journal"]["plan"] == ranks[0]["again"]["plan"]
    assert [told["again"]["calls"] for told in ranks] == [1, 1]


def test_ranks_that_draw_something_else(ranks):
    """Both hear of it, before a plan is run."""
    for told in ranks:
        assert "InvalidSetting: run does not draw the same on all ranks: rank 1: " in told["others"]["raised"]
        assert told["others"]["calls"] == 1


def test_an_error_of_one_is_all_ranks_error(ranks):
    for told in ranks:
        assert told["failed"]["raised"].startswith("RuntimeError: rank 1: ArithmeticError: no such number")


def test_ctrl_c_on_one_ends_all(ranks):
    first, second = (told["stopped"] for told in ranks)
    assert first["interrupted"]
    assert second["interrupted"]
    assert first["evaluations"] >= 1


def test_what_cannot_be_spread(ranks):
    for told in ranks:
        assert "is one model of all ranks: its weights are sharded over ranks (FSDP)" in told["sharded"]["raised"]
        assert "torch.distributed has several ranks: give executor='torchrun'" in told["ray"]["raised"]
        assert (told["sharded"]["calls"], told["ray"]["calls"]) == (0, 0)


MINE = """
import torch
from toys import Net, Pipe

def make():
    torch.manual_seed(7)
    pipe, x = Pipe(Net("single", 4)), torch.randn(2, 6, 4)
    return pipe, lambda: pipe(x, 8)
"""


def test_the_command(tmp_path):
    """The first rank writes, and what it writes is what one process would."""
    (tmp_path / "mine.py").write_text(MINE)
    search = ["search", "mine.py:make", "--cost", "blocks", "--target", "1.6", "--quiet", "--executor", "torchrun"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "dithooks.cli"]
    paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(__file__).parents[2])])
    given = {"cwd": tmp_path, "env": {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}}
    done = subprocess.run(
        [sys.executable, *launch, *search, "--out", "spread.json"],
        **given,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("written to spread.json") == 1
    alone = subprocess.run(
        [sys.executable, "-m", "dithooks.cli", *search[:-2], "--out", "here.json"], **given, check=False
    )
    assert alone.returncode == 0
    assert (tmp_path / "spread.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    refused = subprocess.run(
        [sys.executable, "-m", "dithooks.cli", *search], **given, capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "--executor torchrun is for a search on several ranks: start it as torchrun" in refused.stderr
