"""Next to cache-dit and msmodelslim: with equal settings the same blocks run, and the same picture comes out.

``pytest bench/test_parity.py -s``; what it needs beside this package is cache-dit 1.5.3 and msmodelslim 26.1.0
(``pip install --no-deps msmodelslim==26.1.0``, and ``pip install opencv-python-headless "imageio[ffmpeg]"``); the cases
of one that is missing are skipped.

The shipped demo pipeline draws with the other library, as its user would write it, and with this one, each on a fresh
copy of the pipeline and with the same noise. Which blocks run is seen from outside, by hooks on their attention. Equal
means: at every step, for each of guidance's calls, the same blocks ran, and latents and pictures differ by 1e-5 at
most; and what a library itself calls reused has to be what was seen. Counts are of steps, by list and call of guidance.

cache-dit has no interval, but takes a mask. The adaptor of msmodelslim keeps one residual for all calls of a step, so
it is given one call a step. Of what a block is called with by position it takes the first tensors for the streams, and
subtracts them from the block's outputs in that order; FLUX calls its blocks by keyword, and they return the text first.
So for both libraries the single-stream blocks are put into a loop that calls them as ``x = block(x, …)``, text and
picture in one tensor, or as ``x, text = block(x, text, …)``.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache, partial
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dithooks
from dithooks import CacheHandle, DitCacheConfig, Mask, Reuse, Taylor, Threshold, dit_cache
from dithooks.demo import load_pipeline
from dithooks.demo.emoji import SIZE
from dithooks.demo.model import unpatchify
from dithooks.demo.pipeline import EmojiPipeline
from dithooks.environment.machine import machine, versions
from dithooks.policies.policy import Policy

STEPS, GUIDANCE, PROMPTS = 28, 3.0, ("penguin", "slice of pizza")
LISTS = ("transformer_blocks", "single_transformer_blocks")
LOOPED = "looped_blocks"  # in place of the latter
WITHIN = 1e-5

Call = tuple[int, int]  # step, and which of its calls


@dataclass
class Outcome:
    """What came out of a run, and the blocks that ran in it.

    Args:
        told: calls in which the library says that it reused the last list, if it says.
        ran: (step, call, list, number of the block).
    """

    pipe: EmojiPipeline
    guidance: float = GUIDANCE
    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    told: set[Call] | None = None
    ran: set[tuple[int, int, str, int]] = field(default_factory=set)

    def draw(self, **kwargs: Any) -> None:
        """Run the pipeline, and watch."""
        self.pipe.set_progress_bar_config(disable=True)
        self.ran, prompts, branch = set(), list[Tensor](), 0

        def called(_: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
            nonlocal branch
            prompt = given["pooled_projections"]
            if not any(prompt is each for each in prompts):
                prompts.append(prompt)
            branch = next(number for number, each in enumerate(prompts) if each is prompt)

        def ran(name: str, number: int) -> Callable[..., None]:
            return lambda *_: self.ran.add((self.pipe.scheduler.step_index or 0, branch, name, number))

        transformer = self.pipe.transformer
        with ExitStack() as hooks:
            hooks.enter_context(transformer.register_forward_pre_hook(called, with_kwargs=True))
            for name in (*LISTS, LOOPED):
                for number, attention in enumerate(attentions(transformer, name)):
                    hooks.enter_context(attention.register_forward_pre_hook(ran(name, number)))
            made: Any = self.pipe(
                PROMPTS,
                num_inference_steps=STEPS,
                guidance_scale=self.guidance,
                generator=[torch.Generator().manual_seed(number) for number in range(len(PROMPTS))],
                output_type="latent",
                **kwargs,
            )
        self.latents = made.images

    @property
    def pictures(self) -> Tensor:
        """(batch, 3, height, width) in 0…1, as the pipeline makes them of its latents."""
        made: Tensor = self.pipe.image_processor.postprocess(unpatchify(self.latents, SIZE, SIZE), output_type="pt")
        return made

    @property
    def reused(self) -> list[set[Call]]:
        """Of each list, the calls in which some block of it did not run."""
        calls = {block[:2] for block in self.ran}
        counts = [(name, len(attentions(self.pipe.transformer, name))) for name in (*LISTS, LOOPED)]
        return [
            {call for call in calls if any((*call, name, number) not in self.ran for number in range(count))}
            for name, count in counts
            if count
        ]


def attentions(transformer: nn.Module, name: str) -> list[nn.Module]:
    """Of each block of a list, in order."""
    named = transformer.named_modules()
    return [each for path, each in named if path.startswith(f"{name}.") and path.endswith(".attn")]


def compare(case: str, theirs: Outcome, ours: Outcome) -> None:
    """Print how much was reused and how far the outputs are apart, and refuse a difference."""
    counts = [sum(map(len, each.reused)) for each in (theirs, ours)]
    calls = len({block[:2] for block in theirs.ran}) * len(theirs.reused)
    apart = [float((a - b).abs().max()) for a, b in ((theirs.latents, ours.latents), (theirs.pictures, ours.pictures))]
    print(f"\n{case}: {counts[0]} / {counts[1]} of {calls}, {apart[0]:.2g}, {apart[1]:.2g}")
    differing = sorted(theirs.ran ^ ours.ran)
    assert not differing, f"ran in one only, first of {len(differing)}: {differing[0]}"
    assert counts[0], "nothing was reused: the case shows nothing"
    assert max(apart) <= WITHIN
    for each in (theirs, ours):
        assert each.told is None or each.told == each.reused[-1]


@pytest.fixture(scope="module", autouse=True)
def _about() -> Iterator[None]:
    """What the figures are of; and no log lines between them."""
    logging.disable(logging.WARNING)
    found = versions("cache-dit", "msmodelslim", "diffusers")
    print(f"\n{machine()}, {', '.join(f'{name} {number}' for name, number in found.items())}")
    print("case: steps reused by the other / by this library, largest difference of latents, of pictures")
    yield
    logging.disable(logging.NOTSET)


def module(name: str) -> ModuleType:
    """The other library, or what stands for it here; without it, the case is skipped."""
    if name.startswith("dithooks"):
        return importlib.import_module(name)
    found: ModuleType = pytest.importorskip(name, exc_type=ImportError)
    return found


# -- cache-dit ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Case:
    """Settings in the names of ``DBCacheConfig``, which are this package's, too, but for the blocks and the mask."""

    name: str
    settings: dict[str, Any]
    guidance: float = GUIDANCE
    taylor: int | None = None
    runs: int = 1

    def __str__(self) -> str:
        return self.name


def f1b0(threshold: float, **others: Any) -> dict[str, Any]:
    """The first block decides, the others are the range."""
    first = {"Fn_compute_blocks": 1, "Bn_compute_blocks": 0, "max_warmup_steps": 4}
    return {**first, "residual_diff_threshold": threshold, **others}


def masked(interval: int, policy: str) -> dict[str, Any]:
    """Every so many steps are computed, or every so many at least."""
    mask = [int(step % interval == 0) for step in range(STEPS)]
    return {"steps_computation_mask": mask, "steps_computation_policy": policy}


FAST = [int(bit) for bit in "1111110100010000100000100001"]  # steps_mask(total_steps=28, mask_policy="fast")
CASES = (
    *(Case(f"F1B0, {threshold}", f1b0(threshold)) for threshold in (0.05, 0.1, 0.2, 0.3)),
    Case("F1B0, 0.2, two in a row", f1b0(0.2, max_continuous_cached_steps=2)),
    Case("F1B0, 0.2, six in all", f1b0(0.2, max_cached_steps=6)),
    Case("F1B0, 0.2, every second step of the warm-up", f1b0(0.2, max_warmup_steps=8, warmup_interval=2)),
    Case("F1B0, 0.2, one decision a step", f1b0(0.2, cfg_diff_compute_separate=False)),
    Case("F1B0, 0.1, without guidance", f1b0(0.1), guidance=1.0),
    Case("F1B0, 0.2, second run", f1b0(0.2), runs=2),
    Case("F1B0, 0.2, Taylor of order 1", f1b0(0.2), taylor=1),
    Case("F2B1, 0.1", f1b0(0.1, Fn_compute_blocks=2, Bn_compute_blocks=1)),
    Case("F2B1, 0.2", f1b0(0.2, Fn_compute_blocks=2, Bn_compute_blocks=1)),
    Case("F1B0, every second step", f1b0(0.2, **masked(2, "static"))),
    Case("F1B0, every third step", f1b0(0.2, **masked(3, "static"))),
    Case("F1B2, every third step, without guidance", f1b0(0.2, Bn_compute_blocks=2, **masked(3, "static")), 1.0),
    Case("F1B0, its mask 'fast'", f1b0(0.2, steps_computation_mask=FAST, steps_computation_policy="static")),
    Case("F1B0, every sixth step and 0.2", f1b0(0.2, **masked(6, "dynamic"))),
)


def user_of_cache_dit(cache_dit: ModuleType, case: Case) -> Outcome:
    """What a user of cache-dit writes."""
    pipe = load_pipeline()
    outcome = Outcome(pipe, case.guidance)
    adapter = cache_dit.BlockAdapter(
        pipe=pipe,
        transformer=pipe.transformer,
        blocks=[pipe.transformer.transformer_blocks, pipe.transformer.single_transformer_blocks],
        forward_pattern=[cache_dit.ForwardPattern.Pattern_1, cache_dit.ForwardPattern.Pattern_1],
        has_separate_cfg=case.guidance > 1,
    )
    taylor = None
    if case.taylor is not None:
        taylor = cache_dit.TaylorSeerCalibratorConfig(enable_encoder_calibrator=True, taylorseer_order=case.taylor)
    config = cache_dit.DBCacheConfig(**case.settings)
    adapter = cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=taylor)
    for _ in range(case.runs):
        outcome.draw()
    stats = cache_dit.summary(adapter, logging=False)[-1]
    cache_dit.disable_cache(adapter)
    outcome.told = {(step, 0) for step in stats.cached_steps} | {(step, 1) for step in stats.cfg_cached_steps}
    return outcome


@cache
def by_cache_dit(case: Case) -> Outcome:
    """With cache-dit itself."""
    return user_of_cache_dit(module("cache_dit"), case)


def by_dit_cache(case: Case) -> Outcome:
    """The same settings for ``dit_cache``: each list is a range of its own."""
    pipe = load_pipeline()
    outcome = Outcome(pipe, case.guidance)
    config = DitCacheConfig(
        cache_block_start=case.settings["Fn_compute_blocks"],
        compute_last=case.settings["Bn_compute_blocks"],
        policy=policy(case.settings),
        predictor=Reuse() if case.taylor is None else Taylor(case.taylor, axis="step"),
    )
    lists = [f"transformer.{name}" for name in LISTS]
    with dit_cache(dithooks.BlockAdapter(pipe, blocks=lists, params=[config, config]), config) as handle:
        for _ in range(case.runs):
            outcome.draw()
    outcome.told = told(handle, lists[-1])
    return outcome


def policy(settings: dict[str, Any]) -> Policy:
    """When to reuse. Under a mask, its first steps are the warm-up."""
    mask = settings.get("steps_computation_mask")
    if mask is not None and settings["steps_computation_policy"] == "static":
        return Mask(mask)
    names = {"residual_diff_threshold", "max_warmup_steps", "warmup_interval"}
    names |= {"max_cached_steps", "max_continuous_cached_steps"}
    given = {name: settings[name] for name in names & settings.keys()}
    if mask is not None:
        return Mask(mask, dynamic=Threshold(**{**given, "max_warmup_steps": 0}))
    return Threshold(**given, separate_branches=settings.get("cfg_diff_compute_separate", True))


def told(handle: CacheHandle, name: str) -> set[Call]:
    """Calls of the last run in which a range was reused."""
    here = [each for each in handle.decisions if each.range == name]
    return {(each.step, each.branch) for each in here if each.reuse and each.run == here[-1].run}


def by_compat_cache_dit(case: Case) -> Outcome:
    """The user's code with nothing changed but the import."""
    return user_of_cache_dit(module("dithooks.compat.cache_dit"), case)


@pytest.mark.parametrize("ours", [by_dit_cache, by_compat_cache_dit], ids=["dit_cache", "compat"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_cache_dit(case: Case, ours: Callable[[Case], Outcome]) -> None:
    which = "dit_cache" if ours is by_dit_cache else "compat"
    compare(f"cache-dit and {which}, {case}", by_cache_dit(case), ours(case))


# -- msmodelslim --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Static:
    """Settings of a static interval; tensors that a block takes, and whether the user tells each step or the first."""

    cache_step_start: int
    cache_step_interval: int
    cache_block_start: int
    cache_num_blocks: int
    streams: int = 1
    each_step: bool = True
    runs: int = 1

    @property
    def numbers(self) -> dict[str, Any]:
        """As both take them."""
        return {name: number for name, number in vars(self).items() if name.startswith("cache_")}

    def __str__(self) -> str:
        first, last = self.cache_block_start, self.cache_block_start + self.cache_num_blocks - 1
        shown = f"every {self.cache_step_interval} from step {self.cache_step_start}, blocks {first}–{last}"
        shown += f", {self.streams} tensor{'s' * (self.streams > 1)}, {'each' if self.each_step else 'first'} step told"
        return shown + ", second run" * (self.runs > 1)


STATIC = (
    Static(0, 2, 0, 8),
    Static(0, 2, 0, 8, streams=2),
    Static(4, 3, 0, 8),
    Static(4, 3, 0, 8, streams=2),
    Static(3, 2, 2, 4),
    Static(3, 4, 1, 6, streams=2),
    Static(5, 5, 6, 2, streams=2),
    Static(4, 3, 1, 7, each_step=False),
    Static(4, 3, 1, 7, streams=2, each_step=False, runs=2),
)


class One(nn.Module):
    """A single-stream block that takes and returns text and picture in one tensor."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, length: int, temb: Tensor, rotary: Any) -> Tensor:
        return torch.cat(self.block(x[:, length:], x[:, :length], temb, rotary), dim=1)


class Two(nn.Module):
    """A single-stream block that takes and returns the picture and the text."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        text, x = self.block(x, text, temb, rotary)
        return x, text


def of_one(
    blocks: nn.ModuleList, hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any
) -> tuple[Tensor, Tensor]:
    """All blocks, one after another; called as FLUX calls a block of its own."""
    x, length = torch.cat([encoder_hidden_states, hidden_states], dim=1), encoder_hidden_states.shape[1]
    for block in blocks:
        x = block(x, length, others["temb"], others["image_rotary_emb"])
    return x[:, :length], x[:, length:]


def of_two(
    blocks: nn.ModuleList, hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any
) -> tuple[Tensor, Tensor]:
    """All blocks, one after another; called as FLUX calls a block of its own."""
    x, text = hidden_states, encoder_hidden_states
    for block in blocks:
        x, text = block(x, text, others["temb"], others["image_rotary_emb"])
    return text, x


def looped(streams: int) -> EmojiPipeline:
    """The demo with its single-stream blocks in a loop."""
    pipe = load_pipeline()
    loop, kind = (of_one, One) if streams == 1 else (of_two, Two)
    blocks = nn.ModuleList(kind(block) for block in pipe.transformer.single_transformer_blocks)
    setattr(pipe.transformer, LOOPED, blocks)
    del pipe.transformer.single_transformer_blocks
    pipe.transformer.single_transformer_blocks = [partial(loop, blocks)]
    return pipe


def user_of_msmodelslim(dit_cache: ModuleType, case: Static) -> Outcome:
    """What a user of msmodelslim writes."""
    pipe = looped(case.streams)
    outcome = Outcome(pipe, guidance=1.0)
    config = dit_cache.DitCacheSearchConfig(num_sampling_steps=STEPS, num_hidden_states=case.streams)
    adaptor = dit_cache.DitCacheAdaptor(pipe, config, dit_block_path=f"transformer.{LOOPED}")
    adaptor.update_cache_config(**case.numbers)

    def next_step(_: object, step: int, *__: object) -> dict[str, Any]:
        if step + 1 < STEPS:
            dit_cache.DitCacheAdaptor.set_timestep_idx(step + 1)
        return {}

    for _ in range(case.runs):
        dit_cache.DitCacheAdaptor.set_timestep_idx(0)
        outcome.draw(callback_on_step_end=next_step if case.each_step else None)
    return outcome


@cache
def by_msmodelslim(case: Static) -> Outcome:
    """With msmodelslim itself."""
    return user_of_msmodelslim(module("msmodelslim.pytorch.multi_modal.dit_cache"), case)


def by_four_numbers(case: Static) -> Outcome:
    """The same numbers for ``dit_cache``."""
    pipe = looped(case.streams)
    outcome = Outcome(pipe, guidance=1.0)
    with dit_cache(pipe, DitCacheConfig(**case.numbers), blocks=f"transformer.{LOOPED}") as handle:
        for _ in range(case.runs):
            outcome.draw()
    outcome.told = told(handle, handle.decisions[0].range)
    return outcome


def by_compat_msmodelslim(case: Static) -> Outcome:
    """The user's code with nothing changed but the import."""
    return user_of_msmodelslim(module("dithooks.compat.msmodelslim"), case)


@pytest.mark.parametrize("ours", [by_four_numbers, by_compat_msmodelslim], ids=["dit_cache", "compat"])
@pytest.mark.parametrize("case", STATIC, ids=str)
def test_msmodelslim(case: Static, ours: Callable[[Static], Outcome]) -> None:
    which = "dit_cache" if ours is by_four_numbers else "compat"
    compare(f"msmodelslim and {which}, {case}", by_msmodelslim(case), ours(case))
