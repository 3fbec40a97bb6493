"""diffusers' context parallel (Ulysses) over two processes, enabled before the cache is put on or after: decided and
drawn as in one process, with no collective of ours but one for each decision by looking.
"""

from itertools import product

import pytest
import torch
from sharded_ranks import start

pytestmark = [
    pytest.mark.line("Sharded"),
    pytest.mark.on("tiny FLUX, Wan and Qwen-Image", "2 gloo processes on the CPU"),
    pytest.mark.slow,
]

NAMES = ("flux", "wan", "qwen")
ORDERS = ("after", "before")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of the two has written."""
    return start("sharded_context.py", tmp_path_factory.mktemp("context"))


@pytest.fixture
def both(ranks):
    """What each has written of one check."""

    def of(check):
        for rank in ranks:
            assert "traceback" not in rank[check], rank[check]["traceback"]
        return [rank[check] for rank in ranks]

    return of


def outputs(run):
    return torch.tensor(run["outputs"])


def alike(mine, whole):
    """As in one process: outputs, decisions and differences."""
    torch.testing.assert_close(outputs(mine), outputs(whole), rtol=1e-4, atol=1e-4)
    assert [each[:3] for each in mine["decisions"]] == [each[:3] for each in whole["decisions"]]
    for one, other in zip(mine["decisions"], whole["decisions"], strict=True):
        assert one[3] == (None if other[3] is None else pytest.approx(other[3], rel=1e-3))
    assert mine["reused"] == whole["reused"] > 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_static(both, name, order):
    """A mask: as in one process; as many collectives as the plain model where it computes, fewer where it reuses."""
    for told in both("static"):
        run, plain = told[name][order], told[name]["plain"]
        alike(run, told[name]["one process"])
        assert (outputs(run) - outputs(plain)).abs().max() > 0.1
        full = plain["collectives"][0]
        computed = [n for n, step in enumerate(run["decisions"]) if step[2] == "mask" and n != 1]  # 1: and its test
        assert [run["collectives"][n] for n in computed] == [full] * len(computed)
        assert all(run["collectives"][n] < full / 2 for n in range(8) if run["decisions"][n][2] == "reuse")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("order", ORDERS)
def test_threshold(both, name, order):
    """A threshold with `process_group`: each rank sees half of the tokens; decided by all, as in one process."""
    first, second = both("together")
    assert first[name][order]["decisions"] == second[name][order]["decisions"]
    for told in (first, second):
        run, plain = told[name][order], told[name]["plain"]
        alike(run, told[name]["one process"])
        assert {"reuse", "threshold"} <= {each[2] for each in run["decisions"]}
        for n in range(2, 8):
            if run["decisions"][n][2] == "threshold":
                assert run["collectives"][n] == plain["collectives"][n] + 1


@pytest.mark.parametrize("policy", ["mask", "threshold"])
@pytest.mark.parametrize("name", ["wan", "qwen"])
@pytest.mark.parametrize("order", ORDERS)
def test_range_that_begins_at_the_split(both, name, policy, order):
    """Tokens are split on the way into block 0, with which the range begins: as in one process."""
    for told in both("at_the_split"):
        alike(told[f"{name}, {policy}"][order], told[f"{name}, {policy}"]["one process"])


def test_threshold_without_a_group(both):
    """Each rank would decide by its own tokens: one warning, when the cache is put on or at the next call."""
    for told, order in product(both("apart"), ORDERS):
        (said,) = told[order]
        assert "its tokens are split over ranks (context parallel)" in said
        assert "process_group" in said


@pytest.mark.parametrize("how", ["ring", "uneven"])
def test_other_ways_to_split(both, how):
    """Ring attention, and numbers of tokens that cannot be halved: where the model by itself can do so here."""
    errors = [told[how]["error"] for told in both("alone")]
    if all(errors):
        pytest.skip(f"not here: the model by itself, without a cache, says: {errors[0]}")
    raise AssertionError("it can be done here now: test it")
