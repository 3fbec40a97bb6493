"""Train the demo's text-to-emoji pipeline: ``python -m dithooks.demo.train --help``.

Rectified flow on pixels: σ is drawn logit-normal, the model predicts ε − x from (1 − σ) x + σ ε. The learning rate is
constant after a warm-up and falls to zero over the last quarter, so that a run can be resumed towards another length.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from ..storage.replacement import replacing
from .emoji import ARCHIVE, SIZE, Emoji, load_emoji
from .model import WIDTH, build_transformer, patchify, position_ids
from .text import CaptionEncoder

log = logging.getLogger("dithooks.demo.train")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a training run."""

    steps: int = 8000
    batch: int = 64
    lr: float = 1e-3
    warmup: int = 200
    decay: float = 0.25
    drop_caption: float = 0.1
    ema: float = 0.999
    seed: int = 0

    def lr_at(self, step: int) -> float:
        """Warm-up, plateau, then linear to zero over the last ``decay`` of the run."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.lr * min(1.0, (step + 1) / self.warmup, left)


class Trainer:
    """The model, its average, the optimiser and the random state of one run, all of which ``state_dict`` holds."""

    def __init__(self, config: TrainConfig, data: list[Emoji], device: str = "cpu") -> None:
        self.config, self.device = config, torch.device(device)
        torch.manual_seed(config.seed)
        words = sorted({word for emoji in data for caption in emoji.captions for word in caption.split()})
        self.text = CaptionEncoder(vocabulary=words, dim=WIDTH).to(self.device)
        self.transformer = build_transformer().to(self.device)
        self.parameters = [*self.transformer.parameters(), *self.text.parameters()]
        self.average = [p.detach().clone() for p in self.parameters]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=config.lr, betas=(0.9, 0.99), weight_decay=0.0)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.step = 0

        pixels = torch.stack([torch.from_numpy(emoji.pixels.copy()) for emoji in data])
        self.tokens = patchify(pixels.permute(0, 3, 1, 2).float() / 127.5 - 1).to(self.device)
        # Half of the time the full name, else any of the names: prompts of both kinds must work.
        self.captions = [self.text.tokenize([emoji.captions[0], *emoji.captions]) for emoji in data]
        self.ids = [ids.to(self.device) for ids in position_ids(SIZE, SIZE, self.text.config.max_length)]

    def batch(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Pictures, caption tokens, σ and noise of one step, all drawn from the run's own generator."""
        size, draw = self.config.batch, self.generator
        chosen = torch.randint(len(self.captions), (size,), generator=draw)
        which = torch.rand(size, 2, generator=draw)
        captions = torch.stack([self._caption(int(n), *w) for n, w in zip(chosen, which.tolist(), strict=True)])
        captions[torch.rand(size, generator=draw) < self.config.drop_caption] = 0
        sigma = torch.randn(size, generator=draw).sigmoid()
        noise = torch.randn((size, *self.tokens.shape[1:]), generator=draw)
        return self.tokens[chosen], captions.to(self.device), sigma.to(self.device), noise.to(self.device)

    def _caption(self, picture: int, full: float, other: float) -> torch.Tensor:
        names = self.captions[picture]
        chosen: torch.Tensor = names[0 if full < 0.5 else 1 + int(other * (len(names) - 1))]
        return chosen

    def train_step(self) -> float:
        """One optimiser step; returns the loss."""
        lr = self.config.lr_at(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        clean, captions, sigma, noise = self.batch()
        mix = sigma.view(-1, 1, 1)
        prompt, pooled = self.text(captions)
        predicted = self.transformer(
            hidden_states=(1 - mix) * clean + mix * noise,
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=sigma,
            img_ids=self.ids[0],
            txt_ids=self.ids[1],
            return_dict=False,
        )[0]
        loss = torch.nn.functional.mse_loss(predicted, noise - clean)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        keep = min(self.config.ema, (1 + self.step) / (10 + self.step))
        for average, parameter in zip(self.average, self.parameters, strict=True):
            average.lerp_(parameter.detach(), 1 - keep)
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
            for mine, theirs in zip(
                self.parameters + self.average, state["parameters"] + state["average"], strict=True
            ):
                mine.copy_(theirs)
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        self.step = state["step"]

    def export(self, folder: Path) -> None:
        """Write the averaged weights in half precision as a pipeline folder for ``from_pretrained``."""
        from .pipeline import EmojiPipeline

        raw = [p.detach().clone() for p in self.parameters]
        self._assign(self.average)
        try:
            transformer = FluxTransformer2DModel.from_config(self.transformer.config)
            transformer.load_state_dict(self.transformer.state_dict())
            text = CaptionEncoder.from_config(self.text.config)
            text.load_state_dict(self.text.state_dict())
            scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
            EmojiPipeline(
                transformer=transformer.half(), text_encoder=text.half(), scheduler=scheduler
            ).save_pretrained(folder)
        finally:
            self._assign(raw)

    def _assign(self, values: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, value in zip(self.parameters, values, strict=True):
                parameter.copy_(value)


class TrainingRun(Protocol):
    """A run of training, which has made ``step`` of the ``config.steps`` steps."""

    config: Any
    step: int

    def train_step(self) -> float: ...

    def state_dict(self) -> dict[str, object]: ...


def run(trainer: TrainingRun, folder: Path, *, save_every: int = 250, log_every: int = 20) -> None:
    """Train to the end, logging loss and ETA to ``log.jsonl`` and saving ``checkpoint.pt`` as it goes."""
    folder.mkdir(parents=True, exist_ok=True)
    total, losses, mark = trainer.config.steps, [], time.monotonic()
    with (folder / "log.jsonl").open("a") as lines:
        while trainer.step < total:
            losses.append(trainer.train_step())
            if trainer.step % log_every == 0 or trainer.step == total:
                pace = (time.monotonic() - mark) / len(losses)
                row = {
                    "step": trainer.step,
                    "loss": round(sum(losses) / len(losses), 5),
                    "seconds_per_step": round(pace, 3),
                    "eta_minutes": round(pace * (total - trainer.step) / 60, 1),
                }
                print(json.dumps(row), file=lines, flush=True)
                log.info("%(step)d  loss %(loss).4f  %(seconds_per_step).2f s/step  ETA %(eta_minutes).0f min", row)
                losses, mark = [], time.monotonic()
            if trainer.step % save_every == 0 or trainer.step == total:
                with replacing(folder / "checkpoint.pt") as draft:
                    torch.save(trainer.state_dict(), draft)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m dithooks.demo.train", description=__doc__.split("\n")[0])
    parser.add_argument("--data", default=ARCHIVE, help="npm tarball or its unpacked folder (default: %(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("emoji-run"), help="checkpoints, log and, at the end, pipeline/"
    )
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--lr", type=float, default=TrainConfig.lr)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, npu, ...")
    parser.add_argument("--fresh", action="store_true", help="start over even if --out holds a checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write pipeline/ from the checkpoint and stop")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")

    config = TrainConfig(steps=options.steps, batch=options.batch, lr=options.lr, seed=options.seed)
    data = load_emoji(options.data)
    trainer = Trainer(config, data, options.device)
    checkpoint = options.out / "checkpoint.pt"
    if checkpoint.exists() and not options.fresh:
        trainer.load_state_dict(torch.load(checkpoint, map_location=options.device, weights_only=True))
        log.info("resumed at step %d", trainer.step)
    log.info("%d pictures, %d steps of %d", len(data), config.steps, config.batch)
    if not options.export_only:
        run(trainer, options.out)
    trainer.export(options.out / "pipeline")
    log.info("pipeline written to %s", options.out / "pipeline")


if __name__ == "__main__":
    main()
