"""Train the class-conditional DiT on Fashion-MNIST: ``python -m bench.fashion.train --help``.

v-prediction at timesteps drawn evenly; a tenth of the labels are dropped, for guidance. The learning rate is constant
after a warm-up and falls to zero over the last quarter, so that a run can be resumed towards another length. Pictures
are not flipped: shoes have a direction.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from dithooks.demo.train import run

from .data import Split, load_fashion, to_unit
from .model import NO_CLASS, build_scheduler, build_transformer

log = logging.getLogger("bench.fashion.train")


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of; stored in every checkpoint."""

    steps: int = 4_800
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 300
    decay: float = 0.25
    drop_label: float = 0.1
    ema: float = 0.999
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, then linear to zero over the last ``decay`` of the run."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """Model, average, optimiser and random state of one run; ``state_dict`` holds all that a resume needs."""

    def __init__(self, config: TrainConfig, data: Split, transformer: DiTTransformer2DModel | None = None) -> None:
        self.config, self.data = config, data
        torch.manual_seed(config.seed)
        self.transformer = transformer or build_transformer()
        self.scheduler = build_scheduler()
        self.parameters = list(self.transformer.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0

    def batch(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pictures, labels, timesteps and noise of one step, all drawn from the run's own generator."""
        size, draw = self.config.batch, self.generator
        chosen = torch.randint(len(self.data), (size,), generator=draw)
        labels = self.data.labels[chosen].long()
        labels[torch.rand(size, generator=draw) < self.config.drop_label] = NO_CLASS
        clean = to_unit(self.data.pictures[chosen]) * 2 - 1
        timestep = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=draw)
        return clean, labels, timestep, torch.randn(clean.shape, generator=draw)

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        lr = self.config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clean, labels, timestep, noise = self.batch()
        noisy = self.scheduler.add_noise(clean, noise, timestep)
        predicted = self.transformer(noisy, timestep=timestep, class_labels=labels, return_dict=False)[0]
        velocity = self.scheduler.get_velocity(clean, noise, timestep)
        loss = nn.functional.mse_loss(predicted, velocity)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        return loss.item()

    def state_dict(self) -> dict[str, object]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` stopped; the new run may have another length."""
        with torch.no_grad():
            theirs = state["parameters"] + state["average"]
            for mine, value in zip(self.parameters + self.average, theirs, strict=True):
                mine.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision as a pipeline folder for ``from_pretrained``."""
        from .pipeline import FashionPipeline

        averaged = DiTTransformer2DModel.from_config(self.transformer.config)
        averaged.load_state_dict(self.transformer.state_dict())
        with torch.no_grad():
            for parameter, value in zip(averaged.parameters(), self.average, strict=True):
                parameter.copy_(value)
        FashionPipeline(transformer=averaged.half(), scheduler=self.scheduler).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.fashion.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", type=Path, help="folder of the four idx files (default: where Debian puts them)")
    parser.add_argument(
        "--out", type=Path, default=Path("fashion-run"), help="checkpoints, log and, at the end, pipeline/"
    )
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--fresh", action="store_true", help="start over even if --out holds a checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write pipeline/ from the checkpoint and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    config = TrainConfig(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    trainer = Trainer(config, load_fashion("train", options.data))
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        log.info("resumed at step %d", trainer.step)
    log.info("%d pictures, %d steps of %d", len(trainer.data), config.steps, config.batch)
    if not options.export_only:
        run(trainer, options.out)
    trainer.export(options.out / "pipeline")
    log.info("pipeline written to %s", options.out / "pipeline")


if __name__ == "__main__":
    main()
