"""Train the comparison's video pipeline on clips of moving emoji: ``python -m bench.video.train --help``.

Rectified flow on pixels: from (1 − σ) x + σ ε the model predicts x, and is judged by the velocity ε − x that follows.
To predict the velocity itself it would have to carry the noise of a patch, 96 numbers, through a width of 96, and would
learn little else. σ is logit-normal, shifted towards noise as the sampler's steps are, for it is there that place and
motion are decided. The learning rate is constant after a warm-up and falls to zero at the end, so that a run can be
resumed towards another length.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import WanTransformer3DModel

from dithooks.demo.emoji import ARCHIVE, load_emoji
from dithooks.demo.text import CaptionEncoder
from dithooks.demo.train import run

from .clips import Clips
from .model import SHIFT, build_scheduler, build_text, build_transformer, to_latents

log = logging.getLogger("bench.video.train")

LEAST = 0.1  # σ that an error of x is divided by


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of; stored in every checkpoint."""

    steps: int = 4500
    batch: int = 12
    lr: float = 1e-3
    warmup: int = 100
    decay: float = 0.35
    drop_caption: float = 0.1
    spread: float = 1.2
    ema: float = 0.999
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, then linear to zero over the last ``decay`` of the run."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """Model, average, optimiser and random state of one run; ``state_dict`` holds all that a resume needs.

    Args:
        config: the run.
        clips: what is drawn.
        models: transformer and text encoder to train, when not the full-size ones.
    """

    def __init__(
        self, config: TrainConfig, clips: Clips, models: tuple[WanTransformer3DModel, CaptionEncoder] | None = None
    ) -> None:
        self.config, self.clips = config, clips
        torch.manual_seed(config.seed)
        self.transformer, self.text = models or (build_transformer(), build_text())
        self.parameters = [*self.transformer.parameters(), *self.text.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        # The blocks' matrices learn with Muon, whose updates are scaled to AdamW's size.
        matrices = [p for p in self.transformer.blocks.parameters() if p.ndim == 2]
        others = [p for p in self.parameters if all(p is not matrix for matrix in matrices)]
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, lr=2 * config.lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0),
        ]
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Clips, caption tokens, σ and noise of one step, all drawn from the run's own generator."""
        size, draw = self.config.batch, self.generator
        drawn, captions = self.clips.sample(size, draw)
        tokens = self.text.tokenize(captions)
        tokens[torch.rand(size, generator=draw) < self.config.drop_caption] = 0
        odds = SHIFT * (self.config.spread * torch.randn(size, generator=draw)).exp()
        clean = to_latents(drawn)
        return clean, tokens, odds / (1 + odds), torch.randn(clean.shape, generator=draw)

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        for optimizer, times in zip(self.optimizers, (2, 1), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = times * self.config.lr_at(self.step)
        clean, tokens, sigma, noise = self.batch()
        level = sigma.view(-1, 1, 1, 1, 1)
        predicted = self.transformer(
            hidden_states=torch.lerp(clean, noise, level),
            timestep=1000 * sigma,
            encoder_hidden_states=self.text(tokens)[0],
            return_dict=False,
        )[0]
        loss = ((predicted - clean) / level.clamp(min=LEAST)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - keep)
        value: float = loss.item()
        return value

    def state_dict(self) -> dict[str, object]:
        return {
            "config": asdict(self.config),
            "step": self.step,
            "parameters": [p.detach() for p in self.parameters],
            "average": self.average,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` stopped; the new run may have another length."""
        mine, theirs = self.parameters + self.average, state["parameters"] + state["average"]
        with torch.no_grad():
            for target, value in zip(mine, theirs, strict=True):
                target.copy_(value)
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision as a pipeline folder for ``from_pretrained``."""
        from .pipeline import ClipPipeline

        raw = [p.detach().clone() for p in self.parameters]
        self._assign(self.average)
        try:
            transformer = WanTransformer3DModel.from_config(self.transformer.config)
            transformer.load_state_dict(self.transformer.state_dict())
            text = CaptionEncoder.from_config(self.text.config)
            text.load_state_dict(self.text.state_dict())
            ClipPipeline(
                transformer=transformer.half(), text_encoder=text.half(), scheduler=build_scheduler()
            ).save_pretrained(folder)
        finally:
            self._assign(raw)

    def _assign(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.video.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=ARCHIVE, help="npm tarball or its unpacked folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("video-run"), help="checkpoints, log and, at the end, pipeline/"
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
    trainer = Trainer(config, Clips(load_emoji(options.data)))
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        log.info("resumed at step %d", trainer.step)
    log.info("%d pictures, %d steps of %d", len(trainer.clips.names), config.steps, config.batch)
    if not options.export_only:
        run(trainer, options.out)
    trainer.export(options.out / "pipeline")
    log.info("pipeline written to %s", options.out / "pipeline")


if __name__ == "__main__":
    main()
