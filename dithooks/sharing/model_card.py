"""The model card of shared plans: what they promise, how to use them, and where they come from."""

from __future__ import annotations

import math
import re

from ..config.cache_plan import CachePlan
from ..config.plan_tiers import PlanTiers, speed_of

MARK = "<!-- written by dithooks.push_to_hub, which overwrites it -->"
ACTIVE = r"([\\`*_{}\[\]()<>#+!|~$&])"  # characters that mean something in Markdown
LONGEST = 120  # characters of a text of a plan


def model_card(
    plans: CachePlan | PlanTiers, repo: str, filename: str, picture: str, base_model: str | None, licence: str | None
) -> str:
    """Return the card as Markdown. Texts of plans are shown as they are: none of them is read as markup.

    Args:
        plans: a plan, or tiers.
        repo: the repository's id, or the folder's path.
        filename: the plans' file in it.
        picture: the picture's file in it.
        base_model: the id of the model that the plans are for; ``None``: it is left out.
        licence: the licence of the plans, by the Hub's name; ``None``: it is left out.
    """
    every = plans.plans if isinstance(plans, PlanTiers) else {"": plans}
    one = next(iter(every.values()))
    made, found, kind = one.made, one.provenance, type(plans).__name__
    head = ["---", "library_name: dithooks", "tags:", "- dithooks", "- diffusion", "- caching"]
    head += [f"base_model: {base_model}"] if base_model else []
    head += [f"license: {licence}"] if licence else []
    steps = f"{made.steps} steps" + (f" of {_plain(made.scheduler)}" if made.scheduler else "")
    size = f", latents {'×'.join(map(str, made.size))}" if made.size else ""
    lines = [
        *head,
        "---",
        MARK,
        "",
        f"# Cache plans for {_plain(base_model or made.model)}",
        "",
        f"Which blocks of {_plain(made.model)} ({made.blocks} blocks, {_plain(made.dtype)}) are computed at which of "
        f"{steps}{size}, and what takes their place at the others. The model's weights are as they were.",
        "",
        "| tier | speed-up | PSNR, mean | worst | SSIM | LPIPS | computed steps |",
        "|---|---|---|---|---|---|---|",
        *(_row(name or "plan", plan) for name, plan in every.items()),
        "",
        f"![PSNR over speed-up]({picture})",
        "",
        "PSNR, SSIM and LPIPS are of pictures without the cache, from the same noise; ± is the standard error of the "
        "mean, by which a promise is below it.",
        "",
        "```python",
        f"from dithooks import {kind}, dit_cache",
        "",
        f'plans = {kind}.from_pretrained("{repo}", "{filename}")' if isinstance(plans, PlanTiers) else
        f'plan = {kind}.from_pretrained("{repo}", "{filename}")',
        f'with dit_cache(pipe, plans, tier="{list(every)[-1]}"):' if isinstance(plans, PlanTiers) else
        "with dit_cache(pipe, plan):",
        "    pipe(prompt)",
        "```",
        "",
        f"Found {_plain(found.method)} from {found.samples} sample{'s' * (found.samples != 1)} on "
        f"{_plain(found.machine)}, {_plain(found.date)}, with "
        f"{_plain(', '.join(f'{name} {version}' for name, version in sorted(found.versions.items())))}. The plans fit "
        f"the model of fingerprint `{_code(made.fingerprint)}` only; any other is refused.",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _row(name: str, plan: CachePlan) -> str:
    found = plan.provenance
    steps = "<br>".join(piece.picture for piece in plan.pieces)
    figures = [
        f"{speed_of(plan):.2f}×",
        _decibels(found.psnr, found.psnr_error),
        _decibels(found.worst),
        "–" if found.ssim is None else f"{found.ssim:.4f}",
        "–" if found.lpips is None else f"{found.lpips:.4f}",
    ]
    return f"| {' | '.join([_plain(name), *figures, steps])} |"


def _decibels(value: float | None, error: float | None = None) -> str:
    if value is None:
        return "–"
    return "identical" if value == math.inf else f"{value:.1f}{'' if error is None else f' ± {error:.1f}'} dB"


def _plain(text: str) -> str:
    """Return a text that Markdown shows as it is, in one line."""
    line = " ".join("".join(each if each.isprintable() else " " for each in text).split())
    return re.sub(ACTIVE, r"\\\1", line[:LONGEST]).replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def _code(text: str) -> str:
    """Return a text for a span of code."""
    return re.sub(r"[^\w.:-]", "", text)[:LONGEST]
