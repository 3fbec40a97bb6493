"""The nodes, each with what it takes, what it hands on, and what it does; ComfyUI's classes are made of these."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ...config.cache_config import DitCacheConfig
from ...errors import DitHooksError
from ...policies.budget import Budget
from ...predictors.polynomial import Linear, Reuse
from .cached_run import CachedRun
from .model_cache import report_of
from .plan_folder import fingerprint_of, load_plan_file, new_plan_file, plan_file, plan_names
from .recorded_run import RecordedRun

ValueKind = Literal["MODEL", "LATENT", "STRING", "FLOAT", "INT", "BOOLEAN", "COMBO"]
PREDICTORS = {"line through the last two": Linear(), "the last one": Reuse()}
SPEEDUP = {"default": 2.0, "min": 1.05, "max": 10.0, "step": 0.05}


@dataclass(frozen=True)
class NodeInput:
    """An input of a node.

    Args:
        name: of the argument that the node's function is given.
        kind: ComfyUI's type.
        tooltip: what it is, in a sentence.
        settings: default and bounds, as ComfyUI names them.
        choices: of a list to choose from.
    """

    name: str
    kind: ValueKind
    tooltip: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    choices: Callable[[], list[str]] | None = None


@dataclass(frozen=True)
class NodeDeclaration:
    """A node.

    Args:
        id: by which workflows name it, for good.
        title: that is shown.
        description: what it does, in a sentence or two.
        inputs: what it takes.
        outputs: type and name of what it hands on.
        run: returns the outputs for inputs given by name.
        fingerprint: what changes where the outputs would with the same inputs, as a file is another one.
        shows: number of the output that is shown on the node, a text.
    """

    id: str
    title: str
    description: str
    inputs: tuple[NodeInput, ...]
    outputs: tuple[tuple[ValueKind, str], ...]
    run: Callable[..., tuple[Any, ...]]
    fingerprint: Callable[..., str] | None = None
    shows: int | None = None


def apply_plan(model: Any, plan: str, tier: str = "") -> tuple[Any]:
    """Return a model that is cached by a plan."""
    found = load_plan_file(plan_file(plan), tier)
    return (CachedRun(found, f"{plan} {tier}".strip()).put_on(model),)


def record_and_plan(model: Any, target_speedup: float, name: str = "") -> tuple[Any]:
    """Return a model whose first run is recorded, and that is cached by the plan made of it from then on."""
    if name:
        new_plan_file(name)
    return (RecordedRun(target_speedup, name).put_on(model),)


def budget(model: Any, target_speedup: float, first_blocks: int, forecast: str, keep_on_host: bool) -> tuple[Any]:
    """Return a model that is cached so that a run lands on a speed-up."""
    config = DitCacheConfig(
        cache_block_start=first_blocks,
        policy=Budget(target_speedup),
        predictor=PREDICTORS[forecast],
        cache_device="cpu" if keep_on_host else None,
    )
    return (CachedRun(config, f"budget ×{target_speedup:g}").put_on(model),)


def report(model: Any, after: Any) -> tuple[Any, str]:
    """Return the latents as they are, and what was reused in the runs that led to them."""
    return after, str(report_of(model))


def _plan_state(plan: str = "", **_: Any) -> str:
    try:
        return fingerprint_of(plan_file(plan))
    except DitHooksError:
        return ""


def all_nodes() -> tuple[NodeDeclaration, ...]:
    """Return the nodes."""
    model = NodeInput("model", "MODEL", "The model, after LoRAs and other patches")
    return (
        NodeDeclaration(
            "DithooksApplyPlan",
            "dithooks: Apply plan",
            "Cache a model by a plan of models/dithooks while a sampler draws with it.",
            (
                model,
                NodeInput("plan", "COMBO", "A file in models/dithooks", choices=plan_names),
                NodeInput("tier", "STRING", "Which of several plans in one file; else empty", {"default": ""}),
            ),
            (("MODEL", "model"),),
            apply_plan,
            _plan_state,
        ),
        NodeDeclaration(
            "DithooksRecordAndPlan",
            "dithooks: Record and plan",
            "Draw once without a cache, plan by that run, keep the plan in models/dithooks, and draw by it afterwards",
            (
                model,
                NodeInput("target_speedup", "FLOAT", "How many times fewer blocks are to run", SPEEDUP),
                NodeInput("name", "STRING", "Of the plan's file; empty: made of the model's", {"default": ""}),
            ),
            (("MODEL", "model"),),
            record_and_plan,
        ),
        NodeDeclaration(
            "DithooksBudget",
            "dithooks: Budget ×N",
            "Cache a model so that N times fewer blocks run, at the steps that change least. It needs no plan.",
            (
                model,
                NodeInput("target_speedup", "FLOAT", "N", SPEEDUP),
                NodeInput(
                    "first_blocks",
                    "INT",
                    "Blocks that always run: what changes is measured behind them",
                    {"default": 1, "min": 0, "max": 100},
                ),
                NodeInput("forecast", "COMBO", "What a reused step adds", choices=lambda: list(PREDICTORS)),
                NodeInput("keep_on_host", "BOOLEAN", "Keep residuals in the host's memory", {"default": False}),
            ),
            (("MODEL", "model"),),
            budget,
        ),
        NodeDeclaration(
            "DithooksReport",
            "dithooks: Report",
            "Show how many steps were reused in the latest runs of a model.",
            (model, NodeInput("after", "LATENT", "What the sampler has drawn, so that the report comes after it")),
            (("LATENT", "latent"), ("STRING", "report")),
            report,
            shows=1,
        ),
    )
