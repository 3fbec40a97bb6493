"""What caches cost: the walker counts bytes as they are, figures are differences within a turn, graphs are counted."""

import copy

import pytest
import torch

from bench.compiled import PLAIN, Counting, measure, table
from bench.costs_peers import DOUBLE, METHODS, SINGLE, Loop, Method, Missing, Steps, call, flux, module, quiet
from bench.memory import Geometry, held, since, size
from bench.overhead import BLOCKS, Series, Spread, blocks_run, cut, lowest, plain_name, row
from bench.overhead import measure as one_round
from dithooks import DitCacheConfig, Fitted, Interval, Linear, Mask, dit_cache

PICTURE, TEXT = 16 * 32 * 4, 5 * 32 * 4  # bytes of the two streams of the small FLUX, in float32
BY_NAME = {method.name: method for method in METHODS}


@pytest.fixture(autouse=True)
def _sampling():
    with torch.no_grad(), quiet():
        yield


def given(device="cpu"):
    loop = Loop(4)
    arguments = {"hidden_states": loop.noise, **loop.given}
    del arguments["return_dict"]
    return {name: value.to(device) for name, value in arguments.items()}


def tiny(device="cpu", branches=1):
    made = [given(device) for _ in range(branches)]
    for each in made[1:]:
        each["hidden_states"] = made[0]["hidden_states"]
    model = flux(2, 3).to(device)
    return Geometry("tiny", lambda: copy.deepcopy(model), lambda branch: made[branch], branches, torch.float32)


# -- memory -------------------------------------------------------------------------------------------------------


def test_storages_that_are_new_count_once():
    before = torch.ones(100)
    with since() as new:
        assert new() == {}
        there = torch.ones(30)
        view, old = there[3:], before[5:]
        assert list(new().values()) == [120]
        other, number = torch.ones(9, dtype=torch.float64), torch.ones(16)
        assert sorted(new().values()) == [72, 120]  # a few numbers are not looked at
        del there, number
        assert sorted(new().values()) == [72, 120]  # the view still holds it
        del view, other
        assert new() == {}
        assert old.numel() == 95


@pytest.mark.parametrize(("device", "branches"), [("cpu", 2), ("meta", 1)])
@pytest.mark.parametrize(
    ("config", "residuals"),
    [
        (DitCacheConfig(policy=Interval(0, 2)), 1),
        (DitCacheConfig(policy=Interval(0, 2), predictor=Linear()), 2),
        (
            DitCacheConfig(
                policy=Mask([1, 0] * 4 + [1]),
                predictor=Fitted([None, (1.0,), None, (1.5, -0.5), *[None, (1.2, -0.4, 0.2)] * 2, None]),
            ),
            3,
        ),
    ],
    ids=["reuse", "line", "three residuals"],
)
def test_the_cache_counts_what_the_walker_finds(config, residuals, branches, device):
    """Residuals of both streams for each branch, and not a byte more, whoever counts."""
    geometry, handles = tiny(device, branches), []

    def attach(model, mode, loop):
        handles.append(dit_cache(model, config, scheduler=loop.scheduler))
        return None

    found = held(Method("ours", "dithooks", attach, every=2), geometry.make(), geometry)
    told = handles[0].stats.bytes_held
    handles[0].remove()
    assert found.kept == told == branches * residuals * (PICTURE + TEXT)
    assert found.storages == branches * residuals * 2


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # What the first block did and gave, and what the others did.
        ("diffusers, FirstBlockCache", PICTURE + 2 * (PICTURE + TEXT)),
        ("diffusers, MagCache", 2 * PICTURE),  # what entered, and the residual
        # The outputs of two attentions of two streams, and of three that have both in one.
        ("diffusers, PyramidAttentionBroadcast", 5 * (PICTURE + TEXT)),
        ("diffusers, TaylorSeer on attention", 2 * 5 * (PICTURE + TEXT)),  # each with its difference
    ],
)
def test_what_hooks_keep(name, kept):
    """By hand, from what their code keeps."""
    geometry = tiny()
    assert held(BY_NAME[name], geometry.make(), geometry).kept == kept


def test_sizes_in_words():
    assert size(3 * 2**20) == "3.0 MiB"
    assert size(2.5 * 2**30) == "2.50 GiB"


# -- time ---------------------------------------------------------------------------------------------------------


def test_differences_are_within_a_turn():
    turns = [
        {"a": {"cpu": 5e-6}, "plain": {"cpu": 2e-6}},
        {"plain": {"cpu": 1e-6}},  # a's step did not count
        {"a": {"cpu": 9e-6}, "plain": {"cpu": 8e-6}},
    ]
    assert Series(turns).differences("a", "plain", "cpu") == pytest.approx([3.0, 1.0])
    assert Series(turns).times("a", "cpu") == pytest.approx([5.0, 9.0])


def test_quartiles():
    assert vars(Spread.of([4.0, 1.0, 3.0, 2.0, 5.0, 7.0, 6.0])) == {"median": 4.0, "low": 2.0, "high": 6.0}
    assert vars(Spread.of([4.0])) == {"median": 4.0, "low": 4.0, "high": 4.0}


def test_a_row():
    """Per block of the trunk; and of a reused step, less what is beside the blocks, then less the blocks that ran."""
    method = Method("m", "peer", lambda *_: None)

    def turn(**times):
        return {name: {"cpu": each * 1e-6, "wall": 2e-6 * each} for name, each in times.items()}

    computed = [{**turn(m=1000 + 57 * 2), **{plain_name(method): turn(p=1000)["p"]}}] * 3
    references = {plain_name(method, 0, 0): turn(p=300)["p"], plain_name(method, 1, 0): turn(p=700)["p"]}
    series = {"computed": Series(computed), "reused": Series([{**turn(m=900), **references}] * 3)}
    found = row(method, series, {"reused": {"m": (1, 0)}})
    assert BLOCKS == 57
    assert found["per_block_cpu"]["median"] == pytest.approx(2)
    assert found["per_block_wall"]["median"] == pytest.approx(4)
    assert found["reused_cpu"]["median"] == pytest.approx(600)
    assert found["passing_cpu"]["median"] == pytest.approx(200)
    ours = {"library": "dithooks", "passing_cpu": {"median": 100.0}}
    assert lowest([found, ours], "passing_cpu") == {"ours": ours, "theirs": found}


def test_a_cut_model_is_a_copy():
    base = flux(2, 3)
    small = cut(base, 1, 0)
    assert [len(small.transformer_blocks), len(small.single_transformer_blocks)] == [1, 0]
    assert [len(base.transformer_blocks), len(base.single_transformer_blocks)] == [2, 3]
    assert {id(each) for each in small.parameters()}.isdisjoint(map(id, base.parameters()))
    assert call(small, Loop(2).arguments()).shape == (1, 16, 4)


@pytest.mark.parametrize(
    ("name", "computed", "reused"),
    [
        ("dithooks, Interval", [(2, 3), (0, 0)], (0, 0)),
        ("dithooks, Threshold from block 1", [(2, 3), (2, 3)], (1, 0)),
        ("diffusers, FirstBlockCache", [(2, 3), (2, 3)], (1, 0)),
        ("diffusers, MagCache", [(2, 3), (2, 3)], (0, 0)),
        ("diffusers, PyramidAttentionBroadcast", [(2, 3), (2, 3)], (2, 3)),
        ("diffusers, TaylorSeer lite", [(2, 3), (2, 3)], (0, 0)),
    ],
)
def test_which_blocks_run(name, computed, reused):
    base, method = flux(2, 3), BY_NAME[name]
    seen = blocks_run(method, "computed", base)
    assert [seen[4], seen[5]] == computed
    seen = blocks_run(method, "reused", base)
    assert {seen[step] for step in seen if method.timed("reused", step, len(seen))} == {reused}
    seen = blocks_run(method, "turns", base)
    assert [seen[4], seen[5]] == [(2, 3), reused]


def test_a_round():
    """Every turn has the plain copy, and the cache where its step counts."""
    method = BY_NAME["dithooks, Interval"]
    series = one_round([method], "computed", flux(), {}, 7, 1)
    name = plain_name(method)
    assert name == f"plain {DOUBLE}+{SINGLE}"
    assert [set(turn) for turn in series.turns] == [
        {name},
        {name},
        {name, method.name},
        {name},
        {name, method.name},
        {name},
        {name},
    ]
    assert all(times["cpu"] > 0 for turn in series.turns for times in turn.values())


def test_a_library_that_is_missing_is_said():
    with pytest.raises(Missing, match="not installed"):
        module("no_such_library_at_all")


def test_steps_are_the_schedulers():
    loop = Steps(5)
    loop.moved(torch.zeros(1))
    assert (loop.step, loop.scheduler.step_index, loop.timestep) == (1, 1, 800)


# -- compiled -----------------------------------------------------------------------------------------------------


def test_graphs_are_counted():
    base = flux(1, 1)
    found = measure(BY_NAME["dithooks, Interval"], "whole, fullgraph", base)
    assert [found[key] for key in ("graphs", "later", "breaks", "entries", "apart")] == [2, 0, 0, 1.0, 0.0]
    failed = measure(BY_NAME["diffusers, FirstBlockCache"], "blocks, fullgraph", base)
    assert failed["error"].startswith("Unsupported")
    shown = table({"about": "here", "rows": [found, failed]})
    assert "| dithooks, Interval | 2 | 0 | 0 | 1 | yes |" in shown
    assert "| diffusers, FirstBlockCache | fails: Unsupported" in shown


def test_breaks_are_counted():
    backend = Counting()

    def broken(x):
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    torch.compile(broken, backend=backend)(torch.ones(2))
    assert (backend.graphs, backend.entries) == (2, 2)
    torch._dynamo.reset()
    assert PLAIN.attach(None, "turns", None) is None
