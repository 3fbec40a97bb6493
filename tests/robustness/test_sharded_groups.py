"""Two processes that each have a whole model: without `process_group` they never ask each other anything; with it,
decisions by looking cost one collective each and are the same on both ranks, as one process with all tokens, samples or
branches would decide. A rank that stops, is elsewhere, or has nothing to reuse: an error in time, or both compute.
"""

import pytest
import torch
from sharded_ranks import start

from dithooks import DitCacheConfig, Threshold, dit_cache

pytestmark = [
    pytest.mark.line("Sharded"),
    pytest.mark.on("small nets", "2 gloo processes on the CPU"),
    pytest.mark.slow,
]

POLICIES = ("threshold", "largest", "budget", "rate", "rate, largest", "masked", "at once")
SETTLED = ("warm-up", "mask", "cap", "budget", "end")  # without looking


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two has written."""
    return start("sharded_groups.py", tmp_path_factory.mktemp("groups"))


@pytest.fixture
def both(ranks):
    """What each has written of one check."""

    def of(check):
        for rank in ranks:
            assert "traceback" not in rank[check], rank[check]["traceback"]
        return [rank[check] for rank in ranks]

    return of


def close(mine, whole):
    """Decisions alike, and by the same differences."""
    assert [each[:3] for each in mine] == [each[:3] for each in whole]
    for one, other in zip(mine, whole, strict=True):
        assert one[3] == (None if other[3] is None else pytest.approx(other[3], rel=1e-4)), (one, other)


def reasons(run):
    return [each[2] for each in run["decisions"]]


def same_on_both(first, second):
    assert first["together"]["decisions"] == second["together"]["decisions"]
    for run in (first["together"], second["together"]):
        asked = sum(reason not in SETTLED for reason in reasons(run))
        assert run["collectives"] == {"allgather_": asked}
        assert 0 < run["reused"] < len(reasons(run))
        assert run["blocks"] == run["blocks counted"] < 6 * len(reasons(run))
    assert first["apart"]["collectives"] == second["apart"]["collectives"] == {}


@pytest.mark.parametrize("policy", POLICIES)
def test_tokens_split_unevenly(both, policy):
    """5 and 2 tokens of each sample: decided and drawn as in one process with all 7; by `max`, more cautiously."""
    first, second = (told[policy] for told in both("tokens_split"))
    same_on_both(first, second)
    whole = torch.tensor(first["whole"]["picture"]).view(3, 7, 4)
    mine = [torch.tensor(each["together"]["picture"]).view(3, -1, 4) for each in (first, second)]
    if "largest" in policy:  # of the shares of the sample that changed most
        pairs = list(zip(first["together"]["decisions"], first["whole"]["decisions"], strict=True))
        same = next((n for n, (one, other) in enumerate(pairs) if one[2] != other[2]), len(pairs) - 1)
        measured = [(one[3], other[3]) for one, other in pairs[: same + 1] if one[3] is not None]
        assert measured
        assert all(one > other for one, other in measured)
    else:
        close(first["together"]["decisions"], first["whole"]["decisions"])
        torch.testing.assert_close(torch.cat(mine, 1), whole, rtol=1e-4, atol=1e-5)
    if policy != "budget":
        assert reasons(first["apart"]) != reasons(second["apart"])  # by itself each would do otherwise


@pytest.mark.parametrize("policy", POLICIES)
def test_samples_split_unevenly(both, policy):
    """2 and 1 samples: decided as in one process with all 3, by their mean or by the one that changed most."""
    first, second = (told[policy] for told in both("samples_split"))
    same_on_both(first, second)
    close(first["together"]["decisions"], first["whole"]["decisions"])
    drawn = torch.tensor(first["together"]["picture"] + second["together"]["picture"])
    torch.testing.assert_close(drawn, torch.tensor(first["whole"]["picture"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("policy", ["threshold", "rate"])
def test_a_branch_each(both, policy):
    """Conditional here and unconditional there: decided as where one call has both."""
    first, second = (told[policy] for told in both("branches_split"))
    assert first["together"]["decisions"] == second["together"]["decisions"]
    close(first["together"]["decisions"], first["whole"]["decisions"])
    assert first["together"]["reused"] > 0


def test_a_branch_each_by_its_number(both):
    """The same where each rank gives the number of its branch: the numbers differ, the decisions do not."""
    first, second = (told["numbered"] for told in both("branches_split"))
    assert {each[1] for each in first} == {0}
    assert {each[1] for each in second} == {1}
    assert [each[2:] for each in first] == [each[2:] for each in second]
    assert "reuse" in {each[2] for each in first}


@pytest.mark.parametrize("separate", [True, False])
def test_several_ranges_and_branches(both, separate):
    """Two ranges and two calls a step, a decision each or one for both: the same on both ranks."""
    first, second = (told[f"separate {separate}"] for told in both("several_ranges_and_branches"))
    assert first["decisions"] == second["decisions"]
    assert {"reuse", "threshold"} <= {each[2] for each in first["decisions"]}
    asked = [each for each in first["decisions"] if each[2] == "reuse" or each[3] is not None]
    assert first["collectives"] == second["collectives"] == {"allgather_": len(asked)}


def test_one_has_nothing_to_reuse(both):
    """Other shapes on one rank at steps 5 and 7: both compute there, and reuse together before, between and after."""
    first, second = ([each[2] for each in told["decisions"]] for told in both("one_cannot"))
    assert [n for n, reason in enumerate(first) if reason == "another rank"] == [5, 7]
    assert [n for n, reason in enumerate(second) if reason == "shape"] == [5, 7]
    assert [reason == "reuse" for reason in first] == [reason == "reuse" for reason in second]
    assert first.count("reuse") == 8


def test_one_does_not_reach_the_range(both):
    """One rank's model passes over its blocks at a step: the other is not left waiting, and both go on together."""
    first, second = ([each[2] for each in told["decisions"]] for told in both("not_reached"))
    assert (first[5], second[5]) == ("another rank", "not reached")
    assert (first[6], second[6]) == ("another rank", "no anchor")
    assert first[7:] == second[7:] == ["reuse"] * 5


def test_interrupted_on_one_rank(both):
    """A call broken off on one rank and made again: an error on both, or none reuses; the next run is as any."""
    first, second = both("interrupted")
    for told in (first, second):
        with_warmup, without = told["warm-up 2"], told["warm-up 0"]
        assert "rank 0 at step 5 of 12, call 0, rank 1 at step 7 of 12, call 0" in with_warmup["error"]
        assert without["error"] is None
        assert [each[2] for each in without["first"][-7:]] == ["ranks differ"] * 7
        assert sum("by other ways" in said for said in told["said"]) == 1
        for run in (with_warmup, without):
            assert [each[2] for each in run["second"]].count("reuse") >= 10
    assert first["warm-up 0"]["second"] == second["warm-up 0"]["second"]


@pytest.mark.parametrize("policy", ["interval", "mask"])
def test_static_plans_need_no_communication(both, policy):
    """Policies that do not look, with a group given: no collective, and steps are reused."""
    for told in both("static"):
        assert told[policy]["collectives"] == 0
        assert told[policy]["reused"] > 0


def test_ranks_by_themselves_are_never_coupled(both):
    """No group given, 12 steps here and 5 there, `torch.distributed` initialised: no collective, no wait, no word."""
    first, second = both("independent")
    assert (len(first["decisions"]), len(second["decisions"])) == (12, 5)
    for told in (first, second):
        assert told["collectives"] == {}
        assert told["reused"] > 0
        assert told["said"] == []


def test_schedules_of_other_lengths(both):
    """12 steps here and 5 there, known beforehand: an error on both ranks at once, with their steps."""
    for told in both("other_step_counts"):
        assert told["type"] == "RankMismatch"
        assert "rank 0 at step 2 of 12, call 0, rank 1 at step 2 of 5, call 0" in told["error"]


def test_one_rank_stops(both):
    """12 steps here and 5 there, unknown beforehand: an error on the one that goes on, when the group's time is up."""
    goes_on, stops = both("one_stops")
    assert stops["error"] is None
    assert len(goes_on["decisions"]) == len(stops["decisions"]) == 5
    assert goes_on["type"] == "RankMismatch"
    assert 5 < goes_on["after"] < 20
    for part in ("Net, step 5: after ", "ranks [0, 1]", "new_group(timeout=...)"):
        assert part in goes_on["error"]


def test_ranks_at_other_steps(both):
    """One rank is a step ahead: an error on both, with their steps."""
    for told in both("other_steps"):
        assert told["type"] == "RankMismatch"
        assert "rank 0 at step 2, call 0, rank 1 at step 3, call 0" in told["error"]


def test_other_policies(both):
    """Another threshold on each rank: an error on both."""
    for told in both("other_policies"):
        assert told["type"] == "RankMismatch"
        assert "different policies" in told["error"]


def test_wrong_groups(both):
    """No group, one without this rank, a mesh of two dimensions: refused, and the model is not touched."""
    for rank, told in enumerate(both("wrong_groups")):
        assert told["number"]["type"] == told["name"]["type"] == "WrongType"
        assert told["others"]["type"] == told["mesh"]["type"] == "InvalidSetting"
        assert "not a member" in told["others"]["error"], rank
        assert "('dp', 'tp')" in told["mesh"]["error"]
        assert told["untouched"]


def test_meshes_and_updates(both):
    """A mesh of one dimension is taken as its group, `update()` keeps it, and a group of one rank asks nobody."""
    first, second = both("meshes_and_updates")
    assert first["runs"] == second["runs"]
    assert all(collectives > 0 for _, collectives in first["runs"])
    assert first["alone"]["collectives"] == second["alone"]["collectives"] == {}
    assert first["alone"]["decisions"] != second["alone"]["decisions"]


@pytest.mark.parametrize("how", ["blocks", "whole"])
@pytest.mark.on("torch.compile, backend eager")
def test_compiled(both, how):
    """Blocks compiled, or the whole model: the same decisions as without, on both ranks."""
    first, second = both("compiled")
    assert first[how] == second[how] == first["eager"]
    assert "reuse" in {each[2] for each in first[how]}


@pytest.mark.on("one process")
def test_without_torch_distributed():
    """A group given where `torch.distributed` was never initialised: refused."""
    model = torch.nn.Sequential()
    assert not torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="not initialized"):
        dit_cache(model, DitCacheConfig(cache_block_start=1, policy=Threshold(0.1)), process_group=object())
