"""The user's function that makes a run: with the target or without, and never something else."""

import pickle

import pytest
import torch
from toys import Net

from dithooks import profile, record, search
from dithooks.user_run import WithoutTarget, check_run

GIVEN = torch.linspace(-1, 1, 24).reshape(1, 6, 4)


@torch.no_grad()
def drawn(net):
    return [net(GIVEN * (1 + t), timestep=torch.tensor([t])) for t in (1.0, 0.8, 0.6, 0.4)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def test_either_way_is_the_same_run(net):
    """For what records, measures and searches."""
    for given in (drawn, lambda: drawn(net), lambda *_: drawn(net), lambda pipe=None: drawn(net)):
        assert [branch.changes.tolist() for branch in profile(net, given).branches] == [
            branch.changes.tolist() for branch in profile(net, drawn).branches
        ]
        assert record(net, given).steps == 4
        assert search(net, given, 1.5, cost="blocks", max_evals=1, local_moves=0, verbose=False).plan.made.steps == 4


def alone():
    return 3


def test_what_is_sent_to_another_process():
    assert pickle.loads(pickle.dumps(check_run(alone)))(None) == 3
    assert check_run(alone) == WithoutTarget(alone)
    assert check_run(max) is max  # without a signature


@pytest.mark.parametrize("wrong", [None, "pipe", 3])
def test_no_function(net, wrong):
    with pytest.raises(TypeError, match="run must be a function that makes the run, such as lambda pipe: pipe"):
        record(net, wrong)


def test_a_function_of_more(net):
    with pytest.raises(
        TypeError, match=r"run takes \(pipe, prompt\): it is called as run\(pipe\), so give the rest before"
    ):
        profile(net, lambda pipe, prompt: None)
