"""What a notebook shows of each object is short, or a table; what stands in it is right."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from toys import Net

import dithooks
from dithooks import DitCacheConfig, Linear, PlanTiers, Threshold, dit_cache, profile, search
from dithooks.config.transformer_plan import TransformerPlan
from dithooks.demo import load_plan
from dithooks.markup import Raw, diagram, step_squares, table

GIVEN = torch.linspace(-1, 1, 24).reshape(1, 6, 4)


@torch.no_grad()
def run(net):
    return [net(GIVEN * (1 + t), timestep=torch.tensor([t])) for t in (1.0, 0.8, 0.6, 0.4, 0.2)]


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


@pytest.fixture
def found(net):
    return search(net, run, 1.6, cost="blocks", max_evals=2, local_moves=0, verbose=False)


def tree(html):
    """It is well-formed: what is not would spoil the rest of a page."""
    return ElementTree.fromstring(f"<div>{html}</div>")


def titles(html):
    return [each.text for each in tree(html).iter("title")]


def test_each_is_a_line(net, found):
    """Of what holds numbers by the thousand, its kind, and what it is about."""
    with dit_cache(net, found.plan) as cache:
        run(net)
    measured = profile(net, lambda: run(net))
    config = DitCacheConfig(cache_block_start=1, policy=Threshold(0.1), predictor=Linear())
    for each in (found, found.plan, found.plans, found.recording, found.evaluations[0], cache, cache.stats, measured):
        assert repr(each).startswith(f"<{type(each).__name__} ")
        assert len(repr(each)) < 200
        assert "\n" not in repr(each)
    assert repr(found.recording) == "<Recording of Net, 5 blocks, 5 steps, 1 sample>"
    assert str(cache.stats).startswith(f"{cache.stats.reused_calls} of 5 calls reused; {cache.stats.blocks_run} of 25 ")
    assert eval(repr(config), vars(dithooks)) == config


def test_the_steps_of_a_plan():
    plan = load_plan("2x")
    bits = plan.pieces[0].steps
    states = [f"step {step}: {'computed' if bit else 'reused'}" for step, bit in enumerate(bits)]
    assert titles(plan._repr_html_()) == states
    assert f"{bits.count(0)} of {len(bits)}" in plan._repr_html_()
    tiers = PlanTiers({"good": load_plan("1.5x"), "fast": plan})
    assert titles(tiers._repr_html_())[len(bits) :] == states


def test_the_steps_of_a_plan_of_two_ranges():
    """Steps 1 … 3 compute nothing, the last blocks and the first ones."""
    behind = TransformerPlan("", 2, 1, 3, (1, 0, 1, 0), (None, (1.0,), None, (1.0,)), None)
    piece = TransformerPlan("", 0, 2, 3, (1, 0, 0, 1), (None, (1.0,), (1.0,), None), None, more_ranges=(behind,))
    plan = load_plan("2x")
    plan = replace(plan, made=replace(plan.made, steps=4), pieces=(piece,))
    states = ["computed", "reused", "only the last blocks computed", "other blocks computed"]
    assert titles(plan._repr_html_()) == [f"step {step}: {state}" for step, state in enumerate(states)]


def test_the_steps_of_the_latest_run(net):
    with dit_cache(net, DitCacheConfig(2, 2)) as cache:
        assert "0 of 0 calls reused" in "".join(tree(cache._repr_html_()).itertext())
        run(net), run(net)
        assert [title.split(": ")[1] for title in titles(cache._repr_html_())] == [
            "reused" if each.reuse else "computed" for each in cache.decisions if each.run == 1
        ]


def test_the_plans_of_a_search(found):
    """A point for each that was run, and a row, with its steps."""
    page = tree(found._repr_html_())
    points = list(page.iter("circle"))
    assert len(points) == len(found.evaluations) == len(list(page.iter("tr"))) - 1
    assert sum(each.get("fill") != "white" for each in points) == 1
    assert len(titles(found._repr_html_())) == len(points) + 5 * len(found.evaluations)


def test_the_tables_of_a_profile(net):
    measured = profile(net, run)
    cells = [each.text for each in tree(measured._repr_html_()).iter("td")]
    for line in str(measured).splitlines()[1:2]:
        assert set(line.split()) <= set(" ".join(filter(None, cells)).split())


def test_markup():
    assert table(["<a>"], [["&", Raw("<b>x</b>")]]).count("&lt;a&gt;") == 1
    assert tree(table(["a"], [["<"], [Raw("<i>y</i>")]])).find(".//i").text == "y"
    assert titles(step_squares("●○, ·")) == ["step 0: computed", "step 1: reused", "step 4: not called"]
    assert titles(step_squares("◐◑")) == ["step 0: both", "step 1: only the last blocks computed"]
    assert diagram({}, ("x", "y")) == ""
    dots = tree(diagram({"a": (1, 1), "b": (3, 9)}, ("x", "<y>"))).iter("circle")
    places = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in dots]
    assert places == [(44.0, 156.0), (348.0, 12.0)]  # lower left, and upper right
