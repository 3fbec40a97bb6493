"""Two processes that search together: the same plan in both, and as many runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TOGETHER = """
import json, os, sys, time
import torch
import torch.distributed as dist
sys.path.insert(0, sys.argv[1])
from toys import Net, Pipe, latents
from dithooks import search
from dithooks.planning.planner import Planner

folder, rank = sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
torch.set_grad_enabled(False)
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
torch.manual_seed(0)
pipe = Pipe(Net("single", 4))
for block in pipe.transformer.blocks:
    block.register_forward_hook(lambda *_: time.sleep(0.001 + 0.002 * rank))  # the second is slower,
torch.manual_seed(100 + rank)
x = latents(1 + rank)  # and each draws other pictures

def searched(cost, stop=None, **given):
    calls = []
    def run(pipe):
        calls.append(0)
        def at(step):
            if (len(calls), step) == (stop, 2):
                raise KeyboardInterrupt
        return pipe(x, 8, at=at)
    found = search(pipe, run, 1.5, cost=cost, **{"max_evals": 3, "local_moves": 2, "max_runs": 6.0, **given})
    return {
        "plan": found.plan.to_json(), "calls": len(calls), "reached": found.reached,
        "run_equivalents": found.run_equivalents,
        "scores": [each.score.psnr for each in found.evaluations], "interrupted": found.interrupted,
        "speedups": [each.speedup for each in found.evaluations],
        "alone": Planner(found.recording, cost).candidate(1.5).error,
    }

told = {
    "blocks": searched("blocks", journal=f"{folder}/journal"),
    "again": searched("blocks", journal=f"{folder}/journal"),
    "more": searched("blocks", journal=f"{folder}/journal", max_evals=6, local_moves=6, max_runs=None),
    "time": searched("time"),
    "broken off": searched("blocks", stop=3),
}
with open(f"{folder}/{rank}.json", "w") as file:
    json.dump(told, file)
dist.barrier()
sys.stdout.flush()
os._exit(0)  # gloo now and then aborts while it is taken down
"""


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """What each process found, and what it wrote."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-c", TOGETHER, str(Path(__file__).parents[1]), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    started = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
    try:
        said = [process.communicate(timeout=120) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, said, strict=True):
        assert process.returncode == 0, err
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)], said


@pytest.mark.parametrize("name", ["blocks", "again", "more", "time", "broken off"])
def test_one_plan_for_both(both, name):
    """What they recorded differs; with a journal, both go on from what the first has recorded."""
    first, second = (dict(told[name]) for told in both[0])
    assert (first.pop("alone") == second.pop("alone")) == (name in ("again", "more"))
    assert first == second


def test_how_often_they_ran(both):
    names = "blocks", "again", "more", "time", "broken off"
    blocks, again, more, by_time, broken = (both[0][1][name] for name in names)
    assert blocks["calls"] == 1 + len(blocks["scores"]) > 2
    assert (again["calls"], again["plan"]) == (1, blocks["plan"])
    assert more["calls"] - 1 == len(more["scores"]) - len(blocks["scores"]) > 0
    assert by_time["calls"] == 2 + len(by_time["scores"]) > 2
    assert (broken["calls"], len(broken["scores"]), broken["interrupted"]) == (3, 1, True)
    plan = json.loads(blocks["plan"])["provenance"]
    assert (plan["psnr"], plan["measured_speedup"] in blocks["speedups"]) == (max(blocks["scores"]), True)


def test_only_the_first_writes(both):
    (out, err), (other_out, other_err) = both[1]
    assert (out, other_out) == ("", "")
    assert "run plans" in err
    assert "run plans" not in other_err
