"""The caches that are compared by what they cost, each as its user would write it; and the FLUX they are put on.

A :class:`Method` attaches itself to a transformer for a kind of run: one in which its cost on *computed* steps is seen,
with all that it keeps for later; one in which every step but the first few is *reused*; or one in which they take
*turns*. What a library's thresholds are set to for that is the library's own way to say always or never.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dithooks import DitCacheConfig, Fitted, Interval, Linear, Mask, Threshold, dit_cache

Mode = Literal["computed", "reused", "turns"]
Remove = Callable[[], object]
DOUBLE, SINGLE = 19, 38  # blocks of FLUX.1
BLOCKS = DOUBLE + SINGLE
NEVER = 10**6


class Missing(Exception):
    """The library is not installed, or cannot do what is asked; the text says which."""


class Steps:
    """The steps of a sampling loop, as its scheduler tells them.

    Args:
        steps: of a run.
        branches: calls of the transformer at each.
        dtype: of the model.
    """

    latents = noise = torch.zeros(1)

    def __init__(self, steps: int, branches: int = 1, dtype: torch.dtype = torch.float32) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.steps, self.branches, self.dtype = steps, branches, dtype
        self.scheduler = FlowMatchEulerDiscreteScheduler()
        self.begin()

    def begin(self) -> None:
        """The first step of a run is next."""
        self.step, self.latents = 0, self.noise
        self.scheduler.set_timesteps(self.steps)

    def moved(self, velocity: Tensor) -> bool:
        """Make the step; returns whether that was the run's last."""
        time = self.scheduler.timesteps[self.step]
        self.latents = self.scheduler.step(velocity, time, self.latents, return_dict=False)[0]
        self.step += 1
        return self.step == self.steps

    @property
    def timestep(self) -> float:
        """In 0…1000, which some caches ask for."""
        return 1000 * (1 - self.step / self.steps)


class Loop(Steps):
    """A loop that calls :func:`flux`: the latents move with what the model gives."""

    def __init__(self, steps: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(1, 16, 4, generator=generator)
        self.given = {
            "encoder_hidden_states": torch.randn(1, 5, 32, generator=generator),
            "pooled_projections": torch.randn(1, 32, generator=generator),
            "img_ids": torch.zeros(16, 3),
            "txt_ids": torch.zeros(5, 3),
            "return_dict": False,
        }
        super().__init__(steps)

    def arguments(self) -> dict[str, Any]:
        """What the transformer is given at this step."""
        time = self.scheduler.timesteps[self.step].reshape(1) / 1000
        return {"hidden_states": self.latents, "timestep": time, **self.given}


def flux(double: int = DOUBLE, single: int = SINGLE, seed: int = 0) -> nn.Module:
    """A FLUX transformer of 32 channels, every parameter drawn, so that no gate is closed."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(seed)
    model = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
    ).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.requires_grad_(False)


def call(model: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """One call of the transformer, as diffusers' pipelines make it."""
    with model.cache_context("cond"):
        return model(**arguments)[0]


@dataclass(frozen=True)
class Method:
    """A cache, and the way it is attached.

    Args:
        name: how it is shown.
        library: whose it is, as it is installed; ``"dithooks"``: this package.
        attach: puts it on a transformer, for a mode and a loop, and returns what takes it off, or ``None``: nothing.
        every: in a run of computed steps, one of so many is computed, and the others are not of interest.
        prepare: what is done to the model first, and to the plain one beside it.
        note: what has to be known of it.
    """

    name: str
    library: str
    attach: Callable[[nn.Module, Mode, Steps], Remove | None]
    every: int = 1
    modes: tuple[Mode, ...] = ("computed", "reused")
    prepare: Callable[[nn.Module], None] | None = None
    note: str = ""

    def timed(self, mode: Mode, step: int, steps: int) -> bool:
        """Whether a step is one of those that are measured: neither of the first, nor the last."""
        first = 6 if mode == "reused" else 2
        return first <= step < steps - 1 and (mode == "reused" or step % self.every == 0)


def module(name: str) -> ModuleType:
    """A library of the others.

    Raises:
        Missing: it is not installed.
    """
    try:
        with quiet():
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed: {error}") from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without log lines and warnings of the libraries that are measured."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# -- dithooks -----------------------------------------------------------------------------------------------------


def pattern(mode: Mode, steps: int, first: int = 3) -> tuple[int, ...]:
    """Every second step computed, or the first few only."""
    return tuple(int(step < first if mode == "reused" else step % 2 == 0) for step in range(steps))


def by_interval(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
    config = DitCacheConfig(policy=Interval(0, NEVER if mode == "reused" else 2))
    return dit_cache(model, config, scheduler=loop.scheduler).remove


def by_warm_up(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
    return dit_cache(model, DitCacheConfig(policy=Interval(NEVER, 2)), scheduler=loop.scheduler).remove


def by_plan(residuals: int) -> Callable[[nn.Module, Mode, Steps], Remove]:
    """Steps and weights as a plan has them."""
    found = {1: (1.0,), 2: (1.5, -0.5), 3: (1.25, -0.5, 0.25)}

    def attach(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
        steps = pattern(mode, loop.steps)
        weights = tuple(None if bit else found[min(residuals, sum(steps[:at]))] for at, bit in enumerate(steps))
        config = DitCacheConfig(policy=Mask(steps), predictor=Fitted(weights))
        return dit_cache(model, config, scheduler=loop.scheduler).remove

    return attach


def by_line(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
    config = DitCacheConfig(policy=Mask(pattern(mode, loop.steps)), predictor=Linear())
    return dit_cache(model, config, scheduler=loop.scheduler).remove


def by_threshold(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
    most = {"max_continuous_cached_steps": 1} if mode == "turns" else {}
    policy = Threshold(1e-30 if mode == "computed" else 1e9, max_warmup_steps=1, **most)
    config = DitCacheConfig(cache_block_start=1, policy=policy)
    return dit_cache(model, config, scheduler=loop.scheduler).remove


# -- cache-dit ----------------------------------------------------------------------------------------------------


LISTS = ("transformer_blocks", "single_transformer_blocks", "blocks")
PATTERNS = {"Flux": "Pattern_1", "HunyuanVideo": "Pattern_0", "Wan": "Pattern_2"}  # as it has them registered


def by_cache_dit(
    taylor: int | None = None, mask: bool = False, front: int = 1
) -> Callable[[nn.Module, Mode, Steps], Remove]:
    """DBCache on both lists; the default for FLUX."""

    def attach(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
        cache_dit = module("cache_dit")
        settings: dict[str, Any] = {"residual_diff_threshold": -1.0 if mode == "computed" else 1e9}
        if mode == "turns":
            settings["max_continuous_cached_steps"] = 1
        if mask:
            steps = list(pattern(mode, loop.steps))
            settings |= {"steps_computation_mask": steps, "steps_computation_policy": "static"}
        calibrator = None
        if taylor is not None:
            calibrator = cache_dit.TaylorSeerCalibratorConfig(taylorseer_order=taylor)
        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=front,
            Bn_compute_blocks=0,
            max_warmup_steps=1,
            num_inference_steps=loop.steps,
            enable_separate_cfg=loop.branches > 1,
            **settings,
        )
        lists = [getattr(model, name) for name in LISTS if hasattr(model, name)]
        kind = next(kind for kind in PATTERNS if type(model).__name__.startswith(kind))
        patterns = [getattr(cache_dit.ForwardPattern, PATTERNS[kind])] * len(lists)
        with quiet():
            adapter = cache_dit.BlockAdapter(transformer=model, blocks=lists, forward_pattern=patterns)
            cache_dit.enable_cache(adapter, cache_config=config, calibrator_config=calibrator)
        return partial(_off, cache_dit, adapter)

    return attach


def _off(cache_dit: ModuleType, adapter: Any) -> None:
    with quiet():
        cache_dit.disable_cache(adapter)


# -- diffusers ----------------------------------------------------------------------------------------------------


def by_hooks(make: Callable[[ModuleType, Mode, Steps], Any]) -> Callable[[nn.Module, Mode, Steps], Remove]:
    """What ``enable_cache`` is given."""

    def attach(model: nn.Module, mode: Mode, loop: Steps) -> Remove:
        hooks = module("diffusers.hooks")
        with quiet():
            model.enable_cache(make(hooks, mode, loop))
        return model.disable_cache

    return attach


class ByTurns(float):
    """A threshold that every second step is above: it has no other way to say when."""

    loop: Steps

    def __lt__(self, value: float) -> bool:
        return self.loop.step % 2 == 0

    def __gt__(self, value: float) -> bool:
        return not self < value


def _first_block(hooks: ModuleType, mode: Mode, loop: Steps) -> Any:
    threshold = -1.0 if mode == "computed" else float("inf")
    if mode == "turns":
        threshold = ByTurns()
        threshold.loop = loop
    return hooks.FirstBlockCacheConfig(threshold=threshold)


def _magnitude(hooks: ModuleType, mode: Mode, loop: Steps) -> Any:
    retained = 1.0 if mode == "computed" else 1 / loop.steps
    return hooks.MagCacheConfig(
        threshold=1e9,
        max_skip_steps=1 if mode == "turns" else NEVER,
        retention_ratio=retained,
        num_inference_steps=loop.steps,
        mag_ratios=[1.0] * loop.steps,
    )


def _taylor(lite: bool) -> Callable[[ModuleType, Mode, Steps], Any]:
    def make(hooks: ModuleType, mode: Mode, loop: Steps) -> Any:
        first = {"computed": NEVER, "reused": 3, "turns": 1}[mode]
        return hooks.TaylorSeerCacheConfig(
            cache_interval=2 if mode == "turns" else NEVER,
            disable_cache_before_step=first,
            max_order=1,
            taylor_factors_dtype=loop.dtype,
            use_lite_mode=lite,
        )

    return make


def _pyramid(hooks: ModuleType, mode: Mode, loop: Steps) -> Any:
    return hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range={"computed": 1, "reused": NEVER, "turns": 2}[mode],
        spatial_attention_timestep_skip_range=(-1, 1001),
        current_timestep_callback=lambda: loop.timestep,
    )


def _faster(hooks: ModuleType, mode: Mode, loop: Steps) -> Any:
    return hooks.FasterCacheConfig(
        spatial_attention_block_skip_range={"computed": 1, "reused": NEVER, "turns": 2}[mode],
        spatial_attention_timestep_skip_range=(-1, 999),
        spatial_attention_block_identifiers=("transformer_blocks.*attn", "blocks.*attn1"),
        is_guidance_distilled=True,
        tensor_format="BCHW",
        attention_weight_callback=lambda _: 0.5,
        current_timestep_callback=lambda: loop.timestep,
    )


# -- msmodelslim --------------------------------------------------------------------------------------------------

LOOPED = "looped_blocks"


class Two(nn.Module):
    """A block that takes and returns the picture and the text, in this order and by position."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor, text: Tensor, temb: Tensor, rotary: Any) -> tuple[Tensor, Tensor]:
        text, x = self.block(x, text, temb, rotary)
        return x, text


def looped(model: nn.Module) -> None:
    """Put all blocks into one list, in a loop that calls them as that library has to have it."""
    blocks = nn.ModuleList(Two(block) for block in [*model.transformer_blocks, *model.single_transformer_blocks])
    del model.transformer_blocks, model.single_transformer_blocks
    setattr(model, LOOPED, blocks)
    model.transformer_blocks, model.single_transformer_blocks = [], [partial(_loop, blocks)]


def _loop(
    blocks: nn.ModuleList, hidden_states: Tensor, encoder_hidden_states: Tensor, **others: Any
) -> tuple[Tensor, Tensor]:
    x, text = hidden_states, encoder_hidden_states
    for block in blocks:
        x, text = block(x, text, others["temb"], others["image_rotary_emb"])
    return text, x


def by_adaptor(model: nn.Module, mode: Mode, loop: Steps) -> None:
    """The adaptor keeps step and block in its class, and cannot be taken off."""
    found = module("msmodelslim.pytorch.multi_modal.dit_cache")
    name = next(name for name in (LOOPED, "blocks", "single_transformer_blocks") if hasattr(model, name))
    config = found.DitCacheSearchConfig(num_sampling_steps=loop.steps, num_hidden_states=1 if name == "blocks" else 2)
    with quiet():
        adaptor = found.DitCacheAdaptor(SimpleNamespace(transformer=model), config, f"transformer.{name}")
    adaptor.update_cache_config(
        cache_block_start=0,
        cache_num_blocks=len(getattr(model, name)),
        cache_step_start=0,
        cache_step_interval=NEVER if mode == "reused" else 2,
    )
    found.DitCacheAdaptor.set_timestep_idx(0)


# -- all of them --------------------------------------------------------------------------------------------------

OURS = (
    Method("dithooks, Interval", "dithooks", by_interval, every=2),
    Method("dithooks, Interval in its warm-up", "dithooks", by_warm_up, modes=("computed",), note="keeps nothing"),
    Method("dithooks, Linear", "dithooks", by_line, every=2),
    Method("dithooks, plan, 2 residuals", "dithooks", by_plan(2), every=2),
    Method("dithooks, plan, 3 residuals", "dithooks", by_plan(3), every=2),
    Method("dithooks, Threshold from block 1", "dithooks", by_threshold, note="looks at block 0"),
)
THEIRS = (
    Method("cache-dit, F1B0, threshold", "cache-dit", by_cache_dit(), note="the first block of each list runs"),
    Method(
        "cache-dit, F1B0, static mask",
        "cache-dit",
        by_cache_dit(mask=True),
        every=2,
        note="the first block of each list runs",
    ),
    Method(
        "cache-dit, F1B0, static mask, Taylor 1",
        "cache-dit",
        by_cache_dit(taylor=1, mask=True),
        every=2,
        note="the first block of each list runs",
    ),
    Method("diffusers, FirstBlockCache", "diffusers", by_hooks(_first_block), note="the first block runs"),
    Method("diffusers, MagCache", "diffusers", by_hooks(_magnitude), note="the text stream gets no residual"),
    Method(
        "diffusers, TaylorSeer on attention",
        "diffusers",
        by_hooks(_taylor(False)),
        note="all else of every block runs",
    ),
    Method("diffusers, TaylorSeer lite", "diffusers", by_hooks(_taylor(True)), note="blocks give zeros"),
    Method("diffusers, PyramidAttentionBroadcast", "diffusers", by_hooks(_pyramid), note="all but attention runs"),
    Method("diffusers, FasterCache", "diffusers", by_hooks(_faster), note="all but attention runs"),
    Method(
        "msmodelslim, DitCacheAdaptor",
        "msmodelslim",
        by_adaptor,
        every=2,
        prepare=looped,
        note="blocks put into one list that calls them by position; cannot be taken off",
    ),
)
METHODS = (*OURS, *THEIRS)
