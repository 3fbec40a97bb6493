"""Weights sharded over two processes, by FSDP2's `fully_shard` or tensor and sequence parallel, before the cache is put
on or after: drawn as by the model as a whole, passed-over blocks are not gathered, and what they had put on stays.
"""

import pytest
import torch
from sharded_ranks import start

pytestmark = [
    pytest.mark.line("Sharded"),
    pytest.mark.on("small nets", "2 gloo processes on the CPU"),
    pytest.mark.slow,
]

ORDERS = ("shard, attach", "attach, shard")
MASKED = [6, 8, 2, 6, 2, 2, 6, 2, 6, 2]  # blocks that the mask runs; 8: 6, and 2 of the first residual's test


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two has written."""
    return start("sharded_weights.py", tmp_path_factory.mktemp("weights"))


@pytest.fixture
def both(ranks):
    """What each has written of one check."""

    def of(check):
        for rank in ranks:
            assert "traceback" not in rank[check], rank[check]["traceback"]
        return [rank[check] for rank in ranks]

    return of


@pytest.mark.parametrize("order", ORDERS)
def test_fsdp(both, order):
    """Blocks and root sharded: the very picture of the whole model with the same mask, here and in a second run."""
    for told in both("fsdp_static"):
        mine, cached = told[order], told["cached"]
        assert mine["first"]["picture"] == mine["again"]["picture"] == cached["picture"] != told["plain"]["picture"]
        assert mine["first"]["runs"] == cached["runs"] == MASKED
        assert mine["reused"] == 10
        assert mine["held"] > 0


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_passed_over_is_not_gathered(both, order):
    """One all-gather for each block that runs (and one for the root, which stays), and none for those passed over."""
    for told in both("fsdp_static"):
        assert told[order]["first"]["gathers"] == [MASKED[0] + 1, *MASKED[1:]]
        assert told[order]["again"]["gathers"] == [6, 6, *MASKED[2:]]
        assert told[order]["plain"]["gathers"][1:] == [6] * 9


@pytest.mark.parametrize("order", ORDERS)
def test_fsdp_remains_as_it_was(both, order):
    """Its methods, state dict and hooks, while the cache is on and when it is off; without it all is computed."""
    for told in both("fsdp_static"):
        mine = told[order]
        assert all(mine[name] for name in ("keys", "weights", "api", "hooks", "blocks"))
        assert mine["root"] == [False] * 6
        assert mine["plain"]["picture"] == told["plain"]["picture"]
        assert mine["plain"]["runs"] == [6] * 10


@pytest.mark.parametrize("when", ["before", "attached"])
def test_forward_prefetch(both, when):
    """Blocks that ask for the weights of the next two, passed over or not: the very picture, and with other weights."""
    for told in both("fsdp_prefetch"):
        assert told[when]["picture"] == told["cached"]["picture"]
        assert told[when]["runs"][-1] == 2
        assert told[f"{when}, changed"]["picture"] == told["cached, changed"]["picture"] != told["plain"]["picture"]
        assert told[f"{when}, plain"]["picture"] == told["plain"]["picture"]
        assert told[when]["reused"] == 5
        assert told[when]["gathers"][2] == 4  # of the two blocks that run, and of two that were asked for in vain


def test_fsdp_in_bfloat16(both):
    """Weights gathered in bfloat16: the first residual passes its test, and a reused step gives the step's output."""
    for told in both("fsdp_mixed"):
        assert (told["reused"], told["dtype"]) == (2, "torch.bfloat16")
        assert told["error"] < 0.01


def test_fsdp_and_a_threshold_together(both):
    """Inputs by which each rank would decide otherwise, with `process_group`: one decision, the very picture."""
    first, second = both("fsdp_together")
    assert [each[2] for each in first["apart"]] != [each[2] for each in second["apart"]]
    assert first["sharded"]["decisions"] == second["sharded"]["decisions"]
    for told in (first, second):
        assert told["sharded"]["decisions"] == told["whole"]["decisions"]
        assert told["sharded"]["picture"] == told["whole"]["picture"]
        assert told["sharded"]["reused"] == 4
        assert told["said"] == []


def test_fsdp_and_a_threshold_apart(both):
    """The same without a group: a rank waits without end, or is given wrong weights; a warning says so beforehand."""
    told = both("fsdp_apart")
    assert [each[2] for each in told[0]["would"]] != [each[2] for each in told[1]["would"]]
    for each in told:
        assert each["error"] is not None or each["picture"] != each["right"]
        (said,) = each["said"]
        assert "its weights are sharded over ranks (FSDP)" in said
        assert "process_group" in said


@pytest.mark.parametrize("how", ["matrices", "tokens"])
@pytest.mark.parametrize("policy", ["mask", "threshold"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel(both, how, policy, order):
    """Columns and rows split, activations whole or as DTensors of some tokens: as one process; less is communicated."""
    first, second = both("tensors")
    for told in (first, second):
        mine, one = told[how][f"{policy}, {order}"], told["None"][f"{policy}, {order}"]
        whole, picture = (torch.tensor(each["picture"]) for each in (one, mine))
        torch.testing.assert_close(picture, whole, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(whole, torch.tensor(told["None"]["plain"]["picture"]), atol=1e-2)
        assert mine["runs"] == one["runs"]
        assert mine["reused"] == one["reused"] > 0
        assert [each[2] for each in mine["decisions"]] == [each[2] for each in one["decisions"]]
        for value, right in zip(mine["decisions"], one["decisions"], strict=True):
            assert value[3] == (None if right[3] is None else pytest.approx(right[3], rel=1e-3))
        plain, asked = told[how]["plain"]["gathers"][-1], sum(each[3] is not None for each in mine["decisions"])
        fewer = [gathers for gathers, runs in zip(mine["gathers"], mine["runs"], strict=True) if runs < 6]
        assert len(fewer) == mine["reused"]
        assert max(fewer) < plain / 2
        assert asked == (8 if policy == "threshold" else 0)
    assert first[how][f"{policy}, {order}"]["decisions"] == second[how][f"{policy}, {order}"]["decisions"]
