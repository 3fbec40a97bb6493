"""Searches whose plans are run by actors of Ray: real ones, in processes of their own."""

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from test_executors import told
from test_search import Toy
from toys import Net, Pipe, latents

from dithooks import record, search
from dithooks.cli.main import main
from dithooks.tuning.executors.ray_actors import Actors

ray = pytest.importorskip("ray")
HERE, MAIN = Path(__file__).parents[1], os.getpid()


@pytest.fixture(scope="module", autouse=True)
def cluster():
    """Four processors, and a GPU as far as Ray is told."""
    paths = os.pathsep.join([str(HERE), str(HERE.parent)])
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=1,
        include_dashboard=False,
        log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": paths}},
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    ray.shutdown()


@pytest.fixture
def everything_is_given_back():
    """No actor is left, whatever happened."""
    yield
    until = time.monotonic() + 30
    while ray.available_resources().get("CPU") != 4 and time.monotonic() < until:
        time.sleep(0.1)
    assert ray.available_resources()["CPU"] == 4


pytestmark = pytest.mark.usefixtures("everything_is_given_back")


def make(depth=4):
    """The toy's pipeline, with the same weights in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Pipe(Net("single", depth))


def draw(pipe, x, at=None):
    return pipe(x, 8, at=at)


def away(then):
    """In an actor, once, in the middle of the run of a plan."""

    def at(folder, step):
        marker = Path(folder) / "done"
        if os.getpid() != MAIN and step == 4 and not marker.exists():
            marker.touch()
            then()

    return at


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise ArithmeticError("no such number")


class Bound:
    """Something that no other process can have, whatever has been taught to pickle."""

    def __reduce_ex__(self, protocol):
        raise TypeError("bound to this process")


class Stuck(Toy):
    """A pipeline that has such a thing."""

    def __init__(self):
        super().__init__()
        self.pipe.socket = Bound()


def test_the_same_plan_as_here():
    toy = Toy(steps=12)
    given = {"max_evals": 6, "climb": 3}
    assert told(toy.search(1.6, executor=Actors(workers=2), **given)) == told(toy.search(1.6, **given))
    assert toy.untouched()


def test_an_actor_that_dies(tmp_path):
    """It is started again, and runs its plan once more."""
    x, pipe = latents(), make()
    run = partial(draw, x=x, at=partial(away(die), str(tmp_path)))
    found = search(pipe, run, 1.6, cost="blocks", verbose=False, executor=Actors(workers=2))
    assert (tmp_path / "done").exists()
    assert told(found) == told(search(pipe, partial(draw, x=x), 1.6, cost="blocks", verbose=False))


def test_of_time_each_has_its_own_uncached_run():
    """As many as there are workers, and counted."""
    toy = Toy(steps=12)
    recording = record(toy.pipe, toy.run)
    before = toy.run.calls
    found = toy.search(1.3, cost="time", recording=recording, max_evals=2, executor=Actors(workers=2, num_gpus=0.5))
    assert toy.run.calls == before + 1  # here, one: what is recorded is slower
    assert len(found.evaluations) == 2
    assert found.generations >= 1 + 2 + sum(each.blocks for each in found.evaluations) - 1e-9
    assert all(each.speedup > 0 for each in found.evaluations)


def test_each_may_load_its_own():
    x, pipe = latents(), make()
    run = partial(draw, x=x)
    found = search(pipe, run, 1.6, cost="blocks", verbose=False, executor=Actors(workers=2, load=make))
    assert told(found) == told(search(pipe, run, 1.6, cost="blocks", verbose=False))


@pytest.mark.parametrize(
    ("executor", "run", "error", "message"),
    [
        (Actors(2, load=partial(make, 5)), None, ValueError, "makes another model than the one that was recorded"),
        (Actors(2, load=make), "other", ValueError, "run made no step of the target: it has to draw with the one"),
        (Actors(2), "failing", RuntimeError, "an actor failed: ArithmeticError: no such number"),
        (Actors(2, load=fail), None, RuntimeError, "no such number"),
        (Actors(64), None, ValueError, "64 actors of 1 CPU each were asked for, and the cluster has room for 4"),
        (Actors(2, num_gpus=1), None, ValueError, "2 actors of 1 CPU, 1 GPU each were asked for, .* room for 1"),
        (Actors(1, resources={"NPU": 1}), None, ValueError, "1 actors of 1 CPU, 1 NPU each .* room for 0"),
    ],
    ids=["another model", "another target", "failing", "cannot load", "too many", "no such GPU", "no such device"],
)
def test_what_goes_wrong(executor, run, error, message, tmp_path):
    x, pipe = latents(), make()
    runs = {
        None: partial(draw, x=x),
        "other": lambda given: draw(pipe, x),
        "failing": partial(draw, x=x, at=partial(away(fail), str(tmp_path))),
    }
    with pytest.raises(error, match=message):
        search(pipe, runs[run], 1.6, cost="blocks", verbose=False, executor=executor)


def test_what_cannot_be_sent():
    toy = Stuck()
    with pytest.raises(ValueError, match=r"other processes \(bound to this process\): give executor=Actors\(load="):
        toy.search(1.6, executor="ray")
    assert toy.untouched()


def test_what_actors_take():
    """A GPU each where the target is on one, unless another device is named."""
    assert Actors().options(True)["num_gpus"] == 1.0
    assert Actors().options(False)["num_gpus"] == 0.0
    assert Actors(resources={"NPU": 1}).options(True)["num_gpus"] == 0.0
    assert Actors(num_gpus=0.25).options(False)["num_gpus"] == 0.25
    for wrong in ({"workers": 0}, {"num_cpus": -1}, {"num_gpus": -0.5}, {"resources": {"NPU": -1}}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Actors(**wrong)
    with pytest.raises(TypeError, match="load must be a function without arguments"):
        Actors(load=3)


MINE = """
import torch
from toys import Net, Pipe

class Own(Pipe):
    "Defined in a file that no other process imports."

def make():
    torch.manual_seed(7)
    pipe, x = Own(Net("single", 4)), torch.randn(2, 6, 4)
    return pipe, lambda: pipe(x, 8)
"""


def test_the_command(tmp_path, monkeypatch, capsys):
    """Of a factory in a file; the same plan as without."""
    (tmp_path / "searched_by_ray.py").write_text(MINE)
    monkeypatch.chdir(tmp_path)
    arguments = ["search", "searched_by_ray.py:make", "--cost", "blocks", "--target", "1.6", "--quiet"]
    assert main([*arguments, "--out", "here.json"]) == 0
    assert main([*arguments, "--out", "ray.json", "--executor", "ray", "--workers", "2"]) == 0
    assert (tmp_path / "ray.json").read_bytes() == (tmp_path / "here.json").read_bytes()
    capsys.readouterr()
    assert main([*arguments, "--workers", "2"]) == 2
    assert "--workers goes with --executor ray" in capsys.readouterr().err
    assert main([*arguments, "--executor", "ray", "--workers", "64"]) == 2
    assert "dithooks: error: 64 actors of 1 CPU each were asked for" in capsys.readouterr().err
