"""Distil the emoji pipeline to few steps: ``python -m bench.few_steps.train --help``.

The teacher is the pipeline that ships, with 28 steps and guidance 3.0 by two calls. It draws every emoji, and its
latents on the way are kept ({folder}, 150 KB each). The student starts from its weights. It is told the length
of a step, and predicts the velocity that leads from where it is to where the teacher was at that step's end. Where it
is, it got to by itself: a batch is of pictures that are under way, each on the grid of 8, 6 or 4 steps, and each
training step takes one step of all of them; those that have arrived make room for new ones. So the student learns to
correct its own errors, and no call is made that is not learned from.

The learning rate rises, stays, and falls to zero over the last half. A run goes on from its checkpoint, if there is
one. On one core of a CPU {time}.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from dithooks.demo import load_pipeline
from dithooks.demo.emoji import ARCHIVE, SIZE, Emoji, load_emoji
from dithooks.demo.model import position_ids
from dithooks.demo.text import CaptionEncoder
from dithooks.demo.train import run

from . import STEPS
from .model import build_student
from .trajectories import TICKS, Trajectories, cached

log = logging.getLogger("bench.few_steps.train")

COUNT = 768  # trajectories: every emoji, and some of them twice
FOLDER = "trajectories"
TIME = "the trajectories take 5 minutes, the training 22"


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of; stored in every checkpoint."""

    steps: int = 2000
    batch: int = 32
    lr: float = 1e-4
    warmup: int = 50
    decay: float = 0.5
    ema: float = 0.998
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, then linear to zero over the last ``decay`` of the run."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """The student, its average, its optimiser, and the pictures that are under way; ``state_dict`` holds all of it.

    Args:
        config: the run.
        trajectories: the teacher's.
        teacher: whose weights the student starts from.
        text: captions to embeddings; it is not trained.
    """

    def __init__(
        self,
        config: TrainConfig,
        trajectories: Trajectories,
        teacher: FluxTransformer2DModel,
        text: CaptionEncoder,
    ) -> None:
        self.config, self.trajectories, self.text = config, trajectories, text
        torch.manual_seed(config.seed)
        self.transformer = build_student(teacher).train()
        self.parameters = list(self.transformer.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0
        with torch.no_grad():
            self.prompts, self.pooled = text(trajectories.tokens)
        self.ids = position_ids(SIZE, SIZE, text.config.max_length)
        count = config.batch
        self.which, self.stride, self.tick = (torch.zeros(count, dtype=torch.int64) for _ in range(3))
        self.latents = torch.zeros(count, *trajectories.latents.shape[2:])
        self._renew(torch.ones(count, dtype=torch.bool), begun=True)

    def _renew(self, places: torch.Tensor, begun: bool = False) -> None:
        """Put new pictures in some places of the batch; ``begun``: somewhere on the teacher's way, else noise."""
        count, draw = int(places.sum()), self.generator
        which = torch.randint(len(self.trajectories.tokens), (count,), generator=draw)
        steps = torch.tensor(STEPS)[torch.randint(len(STEPS), (count,), generator=draw)]
        tick = torch.zeros(count, dtype=torch.int64)
        if begun:
            tick = (torch.rand(count, generator=draw) * steps).long() * (TICKS // steps)
        self.which[places], self.stride[places], self.tick[places] = which, TICKS // steps, tick
        self.latents[places] = self.trajectories.latents[which, tick].float()

    def train_step(self) -> float:
        """One optimiser step, and one step of every picture that is under way; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        length = self.stride / TICKS
        velocity = self.transformer(
            hidden_states=self.latents,
            encoder_hidden_states=self.prompts[self.which],
            pooled_projections=self.pooled[self.which],
            timestep=1 - self.tick / TICKS,
            guidance=length,
            img_ids=self.ids[0],
            txt_ids=self.ids[1],
            return_dict=False,
        )[0]
        far = length.view(-1, 1, 1)
        there = self.trajectories.latents[self.which, self.tick + self.stride].float()
        loss = torch.nn.functional.mse_loss(velocity, (self.latents - there) / far)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        self.latents = self.latents - far * velocity.detach()
        self.tick += self.stride
        self._renew(self.tick == TICKS)
        value: float = loss.item()
        return value

    def state_dict(self) -> dict[str, object]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "under_way": [self.which, self.stride, self.tick, self.latents],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` stopped; the new run may have another length."""
        mine, theirs = self.parameters + self.average, state["parameters"] + state["average"]
        with torch.no_grad():
            for target, value in zip(mine, theirs, strict=True):
                target.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.which, self.stride, self.tick, self.latents = state["under_way"]
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision as a pipeline folder for ``from_pretrained``."""
        from .pipeline import FewStepPipeline

        transformer = FluxTransformer2DModel.from_config(self.transformer.config)
        names = [name for name, _ in self.transformer.named_parameters()]
        transformer.load_state_dict(dict(zip(names, self.average, strict=True)))
        text = CaptionEncoder.from_config(self.text.config)
        text.load_state_dict(self.text.state_dict())
        scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
        FewStepPipeline(transformer=transformer.half(), text_encoder=text.half(), scheduler=scheduler).save_pretrained(
            folder
        )


def to_draw(data: Sequence[Emoji], count: int = COUNT) -> list[str]:
    """So many captions: all emoji by their full names, then all by their next, and so on."""
    rounds = (divmod(number, len(data)) for number in range(count))
    return [data[place].captions[turn % len(data[place].captions)] for turn, place in rounds]


def main(arguments: list[str] | None = None) -> None:
    text = (__doc__ or "").format(folder=f"--cache/{FOLDER}", time=TIME)
    parser = argparse.ArgumentParser(
        prog="python -m bench.few_steps.train", description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=ARCHIVE, help="npm tarball or its unpacked folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("few-steps-run"), help="checkpoints, log and, at the end, pipeline/"
    )
    parser.add_argument("--cache", type=Path, help=f"where {FOLDER}/ is kept (default: that of --out)")
    parser.add_argument("--trajectories", type=int, default=COUNT, help="of the teacher (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--fresh", action="store_true", help="start over even if --out holds a checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write pipeline/ from the checkpoint and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    config = TrainConfig(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    (teacher := load_pipeline()).set_progress_bar_config(disable=True)
    captions = to_draw(load_emoji(options.data), options.trajectories)
    trajectories = cached((options.cache or options.out) / FOLDER, lambda: teacher, captions, log.info)
    trainer = Trainer(config, trajectories, teacher.transformer, teacher.text_encoder)
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        log.info("resumed at step %d", trainer.step)
    log.info("%d trajectories, %d steps of %d", len(captions), config.steps, config.batch)
    if not options.export_only:
        run(trainer, options.out, save_every=50)
    trainer.export(options.out / "pipeline")
    log.info("pipeline written to %s", options.out / "pipeline")


if __name__ == "__main__":
    main()
