"""What the teacher does: its latents on the way from noise to picture, at the times of all grids of few steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dithooks.demo.pipeline import EmojiPipeline
from dithooks.storage.replacement import replacing

TICKS = 24  # of the way from σ = 1 to σ = 0: every grid of 8, 6, 4, 3 or 2 steps has its points among them
GUIDANCE, STEPS = 3.0, 28  # of the teacher
SEED = 500_000  # of the first noise; no measurement draws any of it
BATCH = 64


class Trajectories(NamedTuple):
    """Captions as token ids (n, length), and latents (n, ticks + 1, 64, 48) in float16, from noise to picture."""

    tokens: Tensor
    latents: Tensor


def cached(
    folder: Path, teacher: Callable[[], EmojiPipeline], captions: Sequence[str], said: Callable[[str], None] = print
) -> Trajectories:
    """One trajectory for every caption, each from noise of its own; batches that are in ``folder`` are not drawn again.

    Args:
        folder: of one file a batch.
        teacher: loads the teacher, if a batch is missing.
        captions: what is drawn; those of a batch that is there have to be the same.
        said: is told of every batch that was drawn.

    Raises:
        ValueError: a batch in the folder is of other captions.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pipe, found = None, []
    for first in range(0, len(captions), BATCH):
        path, batch = folder / f"{first:06}.pt", list(captions[first : first + BATCH])
        if not path.exists():
            pipe = pipe or teacher()
            made = {"captions": batch, "tokens": pipe.text_encoder.tokenize(batch), "latents": draw(pipe, batch, first)}
            with replacing(path) as draft:
                torch.save(made, draft)
            said(f"{first + len(batch)} of {len(captions)} trajectories")
        kept = torch.load(path, weights_only=True)
        if kept["captions"] != batch:
            raise ValueError(f"{path} is of other captions: give another folder, or delete it")
        found.append(kept)
    return Trajectories(torch.cat([each["tokens"] for each in found]), torch.cat([each["latents"] for each in found]))


def draw(pipe: EmojiPipeline, captions: Sequence[str], first: int = 0, steps: int = STEPS) -> Tensor:
    """The teacher's trajectories of one batch, (captions, ticks + 1, 64, 48) in float16.

    Args:
        pipe: the teacher.
        captions: one for each trajectory.
        first: number of the first, by which its noise is chosen.
        steps: of the teacher.
    """
    seeds = [torch.Generator().manual_seed(SEED + first + number) for number in range(len(captions))]
    noise = torch.stack([torch.randn(64, 48, generator=seed) for seed in seeds])
    states = [noise]
    pipe(
        list(captions),
        num_inference_steps=steps,
        guidance_scale=GUIDANCE,
        latents=noise,
        output_type="latent",
        callback_on_step_end=lambda pipe, step, timestep, given: states.append(given["latents"].clone()),
    )
    return at_ticks(torch.stack(states, dim=1), pipe.scheduler.sigmas).half()


def at_ticks(states: Tensor, sigmas: Tensor, ticks: int = TICKS) -> Tensor:
    """States (n, sigmas, …) of an Euler sampler at σ = 1 − k/ticks instead: between two of its own it goes straight.

    Args:
        states: at each of ``sigmas``.
        sigmas: falling from 1 to 0.
        ticks: how many steps to go.
    """
    wanted = 1 - torch.arange(ticks + 1, dtype=torch.float64) / ticks
    known = sigmas.double()
    after = torch.searchsorted(-known, -wanted).clamp(1, len(known) - 1)
    share = (known[after - 1] - wanted) / (known[after - 1] - known[after])
    share = share.to(states.dtype).view(-1, *[1] * (states.ndim - 2))
    return torch.lerp(states[:, after - 1], states[:, after], share)
