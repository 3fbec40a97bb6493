"""The nodes, as ComfyUI loads and runs them, by both of its interfaces."""

import asyncio
import json
import runpy
import sys
from pathlib import Path

import comfy_stand_in as comfy
import pytest
import torch

from dithooks import CachePlan, DitCacheConfig, DitHooksWarning, PlanTiers, dit_cache
from dithooks.errors import InvalidSetting, MissingFile
from dithooks.integrations.comfyui import exports
from dithooks.integrations.comfyui.__main__ import main
from dithooks.integrations.comfyui.plan_folder import NONE

PAGE = Path(__file__).parents[3] / "docs" / "howto" / "comfyui.md"
IDS = ["DithooksApplyPlan", "DithooksRecordAndPlan", "DithooksBudget", "DithooksReport"]
SIGMAS = torch.cat([torch.linspace(1.0, 0.05, 20), torch.zeros(1)])
PROMPTS = [torch.full((1, 3, 6), 0.3), torch.full((1, 3, 6), -0.7)]
LINE = "line through the last two"


@pytest.fixture
def patcher():
    torch.manual_seed(1)
    return comfy.Patcher(comfy.BaseModel(comfy.Flux()))


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    """Instances of the classic classes."""
    comfy.install(monkeypatch, tmp_path)
    return {name: cls() for name, cls in exports()["NODE_CLASS_MAPPINGS"].items()}


def draw(patcher, sigmas=SIGMAS, seed=2):
    noise = torch.randn(1, 5, 6, generator=torch.Generator().manual_seed(seed))
    return comfy.Guider(patcher, PROMPTS).sample(noise, sigmas, comfy.euler)


def run(node, **given):
    return getattr(node, node.FUNCTION)(**given)


def test_nothing_of_comfyui_is_needed_to_import_it():
    assert "folder_paths" not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        exports()


def test_the_entry_is_written_and_hands_on_the_nodes(monkeypatch, tmp_path, capsys):
    assert main([str(tmp_path)]) == 0
    assert "restart ComfyUI" in capsys.readouterr().out
    (entry,) = tmp_path.glob("*.py")
    comfy.install(monkeypatch, tmp_path)
    assert [*runpy.run_path(str(entry))["NODE_CLASS_MAPPINGS"]] == IDS
    assert main([str(tmp_path / "none")]) == 2
    assert "ComfyUI/custom_nodes" in capsys.readouterr().err


def test_the_classic_interface(nodes):
    assert [*nodes] == IDS
    assert exports()["NODE_DISPLAY_NAME_MAPPINGS"]["DithooksBudget"] == "dithooks: Budget ×N"
    budget = nodes["DithooksBudget"].INPUT_TYPES()["required"]
    assert budget["model"][0] == "MODEL"
    assert budget["target_speedup"][0] == "FLOAT"
    assert budget["target_speedup"][1]["default"] == 2.0
    assert budget["forecast"][0] == [LINE, "the last one"]
    assert nodes["DithooksApplyPlan"].INPUT_TYPES()["required"]["plan"][0] == [NONE]
    assert [node.RETURN_TYPES for node in nodes.values()] == [("MODEL",)] * 3 + [("LATENT", "STRING")]
    assert [node.OUTPUT_NODE for node in nodes.values()] == [False, False, False, True]
    assert {node.CATEGORY for node in nodes.values()} == {"dithooks"}
    assert all(node.DESCRIPTION for node in nodes.values())


def test_the_v3_interface(monkeypatch, tmp_path, patcher):
    comfy.install(monkeypatch, tmp_path, with_v3=True)
    found = exports()
    assert [*found] == ["comfy_entrypoint"]
    classes = asyncio.run(asyncio.run(found["comfy_entrypoint"]()).get_node_list())
    schemas = [cls.define_schema() for cls in classes]
    assert [schema.node_id for schema in schemas] == IDS
    assert [(each.kind, each.name) for each in schemas[2].inputs] == [
        ("Model", "model"),
        ("Float", "target_speedup"),
        ("Int", "first_blocks"),
        ("Combo", "forecast"),
        ("Boolean", "keep_on_host"),
    ]
    assert schemas[2].inputs[3].options == [LINE, "the last one"]
    assert [schema.is_output_node for schema in schemas] == [False, False, False, True]
    assert hasattr(classes[0], "fingerprint_inputs")
    assert not hasattr(classes[2], "fingerprint_inputs")  # else ComfyUI would ask it
    given = {"target_speedup": 2.0, "first_blocks": 0, "forecast": LINE, "keep_on_host": False}
    (model,) = classes[2].execute(model=patcher, **given).args
    drawn = draw(model)
    report = classes[3].execute(model=model, after=drawn)
    assert report.args[0] is drawn
    assert report.args[1] == "10 of 20 steps reused, 2.0× fewer blocks (Flux, budget ×2)"
    assert report.ui == {"text": (report.args[1],)}


@pytest.mark.parametrize(("target", "steps"), [(1.25, 4), (2.0, 10), (4.0, 15)])
def test_a_budget_lands_on_its_speed_up(nodes, patcher, target, steps):
    given = {"target_speedup": target, "first_blocks": 0, "forecast": "the last one", "keep_on_host": True}
    (model,) = run(nodes["DithooksBudget"], model=patcher, **given)
    draw(model)
    told = run(nodes["DithooksReport"], model=model, after=None)["result"][1]
    assert told == f"{steps} of 20 steps reused, {target:.1f}× fewer blocks (Flux, budget ×{target:g})"


def test_the_first_run_is_recorded_and_those_that_follow_are_cached(nodes, patcher, tmp_path):
    plain = draw(patcher)
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0)
    assert torch.equal(draw(model), plain)
    (file,) = (tmp_path / "dithooks").iterdir()
    plan = CachePlan.load(file)
    assert (plan.made.model, plan.made.steps) == ("Flux", 20)
    assert plan.pieces[0].sigmas == pytest.approx(SIGMAS[:20].tolist())
    assert plan.speedup == pytest.approx(2.0, abs=0.15)
    planned = draw(model)
    assert 0 < (planned - plain).norm() / plain.norm() < 0.1
    recorded, cached = run(nodes["DithooksReport"], model=model, after=None)["result"][1].splitlines()
    assert file.name in recorded
    assert "recorded 20 steps without a cache" in recorded
    assert f"({type(patcher.model.diffusion_model).__name__}, {file.name})" in cached
    (applied,) = run(nodes["DithooksApplyPlan"], model=patcher, plan=file.name, tier="")
    assert torch.equal(draw(applied), planned)


def test_a_plan_is_used_at_another_number_of_steps(nodes, patcher):
    """Resampled by σ: the share of steps stays, and it says so in numbers."""
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0, name="mine")
    draw(model)
    (applied,) = run(nodes["DithooksApplyPlan"], model=patcher, plan="mine.json")
    with pytest.warns(UserWarning, match="this run has 30"):
        draw(applied, torch.cat([torch.linspace(1.0, 0.05, 30), torch.zeros(1)]))
    told = run(nodes["DithooksReport"], model=applied, after=None)["result"][1]
    assert told.startswith("15 of 30 steps reused, 2.0× fewer blocks")


def test_where_there_can_be_no_plan_what_was_drawn_is_kept(nodes, patcher, tmp_path):
    short = SIGMAS[-2:]
    plain = draw(patcher, short)
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0)
    assert torch.equal(draw(model, short), plain)
    told = run(nodes["DithooksReport"], model=model, after=None)["result"][1]
    assert told.startswith("there is NO plan, though the run was recorded: nothing of this run can be reused")
    assert not [*(tmp_path / "dithooks").glob("*")]


def test_an_exception_in_the_recorded_run_is_passed_on(nodes, patcher, tmp_path):
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0)

    def broken(step):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        comfy.Guider(model, PROMPTS).sample(torch.randn(1, 5, 6), SIGMAS, comfy.euler, broken)
    assert not any(each._forward_hooks or each._forward_pre_hooks for each in patcher.model.modules())
    assert not [*(tmp_path / "dithooks").glob("*")]


def test_what_keeps_a_run_from_being_recorded_is_an_error(nodes, patcher):
    """Raised before a step is made, as nothing is drawn yet that could be lost."""
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0)
    cache = dit_cache(patcher.model.diffusion_model, DitCacheConfig(2, 2, 0, 3))
    with pytest.raises(InvalidSetting, match="cached"):
        draw(model)
    assert cache.stats.calls == 0
    with pytest.warns(DitHooksWarning, match="no call"):
        cache.remove()


def test_a_plan_of_another_model_is_refused_before_a_step(nodes, patcher):
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0, name="mine")
    draw(model)
    other = comfy.Patcher(comfy.BaseModel(comfy.Wan()))
    (applied,) = run(nodes["DithooksApplyPlan"], model=other, plan="mine.json")
    with pytest.raises(InvalidSetting, match="another model"):
        draw(applied)


def test_a_tier_is_chosen(nodes, patcher, tmp_path):
    for target, name in ((1.5, "slow"), (2.5, "fast")):
        (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=target, name=name)
        draw(model)
    folder = tmp_path / "dithooks"
    plans = {name: CachePlan.load(folder / f"{name}.json") for name in ("slow", "fast")}
    PlanTiers(plans).save(folder / "tiers.json")
    apply = nodes["DithooksApplyPlan"]
    (tiered,) = run(apply, model=patcher, plan="tiers.json", tier="fast")
    (alone,) = run(apply, model=patcher, plan="fast.json")
    assert torch.equal(draw(tiered), draw(alone))
    with pytest.raises(InvalidSetting, match="'slow', 'fast'"):
        run(apply, model=patcher, plan="tiers.json")


def test_a_plan_that_is_not_there_is_named(nodes, patcher):
    with pytest.raises(MissingFile, match="Record and plan"):
        run(nodes["DithooksApplyPlan"], model=patcher, plan=NONE)


@pytest.mark.parametrize("name", ["../up", "a/b", "a\\b", ".hidden", "x" * 200])
def test_a_plan_is_kept_nowhere_else(nodes, patcher, name):
    with pytest.raises(InvalidSetting, match="not that of a file"):
        run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0, name=name)


def test_another_file_under_the_same_name_is_loaded_anew(nodes, patcher, tmp_path):
    """ComfyUI keeps a node's outputs while what it is given, and what this returns, stays the same."""
    state = type(nodes["DithooksApplyPlan"]).IS_CHANGED
    before = state(model=None, plan="mine.json")
    (model,) = run(nodes["DithooksRecordAndPlan"], model=patcher, target_speedup=2.0, name="mine")
    draw(model)
    there = state(model=None, plan="mine.json")
    assert before != there == state(model=None, plan="mine.json")
    (tmp_path / "dithooks" / "mine.json").write_text("{}")
    assert state(model=None, plan="mine.json") != there


def test_the_workflow_of_the_page_gives_each_node_what_it_takes(nodes):
    flow = json.loads(PAGE.read_text(encoding="utf-8").partition("```json\n")[2].partition("```")[0])
    own = {each["class_type"]: each["inputs"] for each in flow.values() if each["class_type"] in nodes}
    assert [*own] == ["DithooksBudget", "DithooksReport"]
    for name, given in own.items():
        taken = nodes[name].INPUT_TYPES()["required"]
        assert given.keys() == taken.keys()
        links = {key for key, value in given.items() if isinstance(value, list)}
        assert links == {key for key, (kind, _) in taken.items() if kind in ("MODEL", "LATENT")}
        choices = {key: kind for key, (kind, _) in taken.items() if isinstance(kind, list)}
        assert all(given[key] in kind for key, kind in choices.items())
