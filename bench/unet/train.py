"""Train the comparison's UNet on a few emoji: ``python -m bench.unet.train --help``.

Diffusion on pixels, as SDXL's, with the noise levels of its scheduler up to pure noise: from what is left of x and the
noise ε the model predicts v = √ᾱ ε − √(1 − ᾱ) x. Pictures are crops of slightly larger ones, mirrored half of the time,
and the model is told the crop's corner, as SDXL is. The learning rate is constant after a warm-up and falls to zero at
the end. A run goes on from its checkpoint, if there is one.
"""

from __future__ import annotations

import argparse
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from dithooks.demo.emoji import ARCHIVE, load_emoji
from dithooks.demo.text import CaptionEncoder
from dithooks.demo.train import run

from .data import Pictures
from .model import build_scheduler, build_text, build_unet, places

log = logging.getLogger("bench.unet.train")


@dataclass(frozen=True)
class TrainConfig:
    """What a training run is made of; stored in every checkpoint."""

    steps: int = 1500
    batch: int = 16
    lr: float = 1e-3
    warmup: int = 50
    decay: float = 0.4
    drop_caption: float = 0.1
    ema: float = 0.995
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, then linear to zero over the last ``decay`` of the run."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """Model, average, optimiser and random state of one run; ``state_dict`` holds all that a resume needs.

    Args:
        config: the run.
        pictures: what is drawn.
        models: UNet and text encoder to train, when not the full-size ones.
    """

    def __init__(
        self,
        config: TrainConfig,
        pictures: Pictures,
        models: tuple[UNet2DConditionModel, CaptionEncoder] | None = None,
    ) -> None:
        self.config, self.pictures = config, pictures
        torch.manual_seed(config.seed)
        self.unet, self.text = models or (build_unet(), build_text(pictures.words))
        self.unet.train()
        self.parameters = [*self.unet.parameters(), *self.text.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.left = build_scheduler().alphas_cumprod  # ᾱ by timestep
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr_at(self.step)
        size, draw = self.config.batch, self.generator
        clean, captions, corners = self.pictures.sample(size, draw)
        words = self.text.tokenize(captions)
        words[torch.rand(size, generator=draw) < self.config.drop_caption] = 0
        timestep = torch.randint(len(self.left), (size,), generator=draw)
        noise = torch.randn(clean.shape, generator=draw)
        signal = self.left[timestep].sqrt().view(-1, 1, 1, 1)
        rest = (1 - self.left[timestep]).sqrt().view(-1, 1, 1, 1)
        tokens, pooled = self.text(words)
        predicted = self.unet(
            signal * clean + rest * noise,
            timestep,
            encoder_hidden_states=tokens,
            added_cond_kwargs={"text_embeds": pooled, "time_ids": places(corners.float())},
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(predicted, signal * noise - rest * clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` stopped; the new run may have another length."""
        mine, theirs = self.parameters + self.average, state["parameters"] + state["average"]
        with torch.no_grad():
            for target, value in zip(mine, theirs, strict=True):
                target.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision as a pipeline folder for ``from_pretrained``."""
        from .pipeline import UNetPipeline

        made = UNet2DConditionModel.from_config(self.unet.config), CaptionEncoder.from_config(self.text.config)
        copies = [parameter for model in made for parameter in model.parameters()]
        with torch.no_grad():
            for parameter, value in zip(copies, self.average, strict=True):
                parameter.copy_(value)
        UNetPipeline(unet=made[0].half(), text_encoder=made[1].half(), scheduler=build_scheduler()).save_pretrained(
            folder
        )


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m bench.unet.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default=ARCHIVE, help="npm tarball or its unpacked folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("unet-run"), help="checkpoints, log and, at the end, pipeline/"
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
    trainer = Trainer(config, Pictures(load_emoji(options.data)))
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        trainer.load_state_dict(torch.load(checkpoint, weights_only=True))
        log.info("resumed at step %d", trainer.step)
    log.info("%d pictures, %d steps of %d", len(trainer.pictures.names), config.steps, config.batch)
    if not options.export_only:
        run(trainer, options.out, save_every=80)
    trainer.export(options.out / "pipeline")
    log.info("pipeline written to %s", options.out / "pipeline")


if __name__ == "__main__":
    main()
